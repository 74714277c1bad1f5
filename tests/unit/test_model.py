"""Models: sizes, FLOPs against a trace, masking, and where the loss is computed."""

import dataclasses

import pytest
import torch
from megamm_kernels.interval_attention import interval_attention_reference
from model_factory import PATCHES, model_config, one_row
from torch.utils.flop_counter import FlopCounterMode

from megamm.config import AttentionConfig, ModelConfig
from megamm.errors import InputError
from megamm.model import layers
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token, paper_flops
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import resolve_model
from megamm.sequence import Batch


@pytest.fixture
def batch() -> Batch:
    return one_row([7, 8, 9, 10], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_parameter_count(architecture):
    model = MultimodalModel(model_config(architecture), seed=0)
    counts = count_parameters(model.config)
    assert sum(p.numel() for p in model.parameters()) == counts.total
    if architecture == "late":
        tower = [p.numel() for n, p in model.vision.named_parameters() if not n.startswith("projector")]
        assert sum(tower) == counts.vision


@pytest.mark.parametrize(
    ("architecture", "width", "millions"),
    [("early", 800, 275), ("early", 1632, 932), ("early", 2624, 2280), ("late", 768, 290), ("late", 1024, 494)],
)
def test_paper_model_sizes(architecture, width, millions):
    config = ModelConfig(architecture=architecture, width=width, vocab_size=50432, image_size=224, patch_size=14)
    assert count_parameters(resolve_model(config)).total == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_exact_flops_match_a_trace(architecture, batch, monkeypatch):
    """The trace sees a dense mask, so every pair counts."""

    def dense(q, k, v, _):
        lo = torch.zeros(q.shape[:2], dtype=torch.int32)
        return interval_attention_reference(q, k, v, lo, lo + q.shape[1] - 1)

    monkeypatch.setattr(layers, "interval_attention", dense)
    model = MultimodalModel(model_config(architecture), seed=0)
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    length = batch.tokens.shape[1]
    patches = 0 if architecture == "text" else PATCHES
    stats = TokenStats(patches=patches / length, labels=batch.num_labels() / length, pairs=length)
    assert exact_flops_per_token(model.config, stats) * length == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_paper_flops_count_the_tower_at_patches_only():
    early, late = (count_parameters(model_config(a)) for a in ("early", "late"))
    assert paper_flops(early, 1000, 400) == 6 * early.total * 1000
    assert paper_flops(late, 1000, 400) == 6 * (late.decoder * 1000 + late.vision * 400)


@pytest.mark.parametrize("architecture", ["early", "late"])
def test_documents_of_a_row_do_not_see_each_other(architecture):
    """Packing two documents in a row gives the losses of the two apart."""
    generator = torch.Generator().manual_seed(1)
    first, second = one_row([7, 8, 9], generator), one_row([11, 12], generator)
    a, b = first.tokens.shape[1], second.tokens.shape[1]
    joined = {
        f.name: torch.cat([getattr(x, f.name) for x in (first, second)], dim=-1)
        for f in dataclasses.fields(Batch)
        if f.name not in ("patches", "grids")
    }
    joined |= {name: torch.cat([getattr(x, name) for x in (first, second)]) for name in ("patches", "grids")}
    for name in ("patch_index", "label_index"):
        joined[name] = torch.cat((getattr(first, name), getattr(second, name) + a))
    for name in ("lo", "hi"):
        joined[name][0, a:] += a
    model = MultimodalModel(model_config(architecture), seed=0).double()
    packed = model(Batch(**joined), torch.float64)
    apart = model(first, torch.float64).loss + model(second, torch.float64).loss
    torch.testing.assert_close(packed.loss, apart, rtol=1e-6, atol=1e-6)
    assert packed.counts.sum() == a + b - 2 * (PATCHES + 2)


def test_causal_on_text_and_bidirectional_inside_an_image(batch):
    model = MultimodalModel(model_config("early"), seed=0).double()
    before = model.residual_stream(batch, torch.float64)
    changed = dataclasses.replace(batch, patches=batch.patches.clone())
    changed.patches[-1] = 255 - changed.patches[-1]
    moved = (model.residual_stream(changed, torch.float64) - before).abs().sum(-1)[0] > 1e-9
    assert not moved[0], "<bos> comes before the image"
    assert moved[1 : 1 + PATCHES].all(), "the first patch sees the last"
    later = dataclasses.replace(batch, tokens=batch.tokens.clone())
    later.tokens[0, -1] = 20
    moved = (model.residual_stream(later, torch.float64) - before).abs().sum(-1)[0] > 1e-9
    assert moved.tolist() == [False] * (len(moved) - 1) + [True]


def test_the_blind_baseline_ignores_pixels(batch):
    model = MultimodalModel(model_config("text"), seed=0)
    other = dataclasses.replace(batch, patches=255 - batch.patches)
    assert torch.equal(model(batch).loss, model(other).loss)


def test_unlabelled_positions_never_reach_the_head(batch, monkeypatch):
    """Rows of the head's matrix product equal the number of labels."""
    seen = []
    original = torch.Tensor.__matmul__

    def spy(x, y):
        if y.shape[-1] == 50:
            seen.append(x.shape[0])
        return original(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    MultimodalModel(model_config("early"), seed=0)(batch)
    assert sum(seen) == batch.num_labels() == 5


def test_losses_split_by_source_and_modality(batch):
    model = MultimodalModel(model_config("early"), num_sources=2, seed=0)
    output = model(batch)
    assert output.counts.tolist() == [[0, 5], [0, 0]]
    torch.testing.assert_close(output.sums.sum(), output.loss.detach())


def test_bf16_activations_stay_close(batch):
    model = MultimodalModel(model_config("early"), seed=0)
    exact, low = model(batch).loss, model(batch, torch.bfloat16).loss
    torch.testing.assert_close(low, exact, rtol=0.02, atol=0)


def test_compiled_blocks_give_the_same_gradients(batch):
    def gradients(compiled):
        model = MultimodalModel(model_config("early", depth=1), seed=0)
        if compiled:
            for block in model.all_blocks():
                block.compile(fullgraph=True)
        model(batch).loss.backward()
        return [p.grad for p in model.parameters()]

    for eager, compiled in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_attention_backend_is_obeyed_or_refused(batch):
    """sdpa is the CPU's default; what cannot run there is bad input that names the setting."""
    model = MultimodalModel(model_config("early"), seed=0)
    loss = model(batch).loss
    for backend in ("sdpa", "interval", "flash"):
        model.config.attention = AttentionConfig(backend=backend)
        if backend == "sdpa":
            assert torch.equal(model(batch).loss, loss)
        else:
            with pytest.raises(InputError, match=f"model.attention.backend: attention backend '{backend}'"):
                model(batch)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_gives_the_same_loss(batch):
    model = MultimodalModel(model_config("early"), seed=0).requires_grad_(False)
    expected = model(batch).loss
    model.config.attention.backend = "flex"
    torch.testing.assert_close(model(batch).loss, expected)
