"""Experts and weights per modality: routing, parity with a naive model, auxiliary losses, counts."""

import copy

import pytest
import torch
from megamm_kernels.interval_attention import interval_attention_reference
from model_factory import PATCHES, model_config, one_row, stack_rows
from naive_blocks import Naive, feed_forward
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megamm.config import Config, ExpertsConfig, ModelConfig
from megamm.errors import InputError
from megamm.model import layers, modality
from megamm.model.context import BlockContext, RoutingRecord
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token, paper_flops
from megamm.model.experts import MixtureOfExperts, attach_loss
from megamm.model.initial import initialise
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import resolve_model
from megamm.parallel.recompute import recompute_blocks
from megamm.settings import build
from megamm.training.expert_metrics import expert_record

VARIANTS = {
    "top 1": {"experts": ExpertsConfig(num=4)},
    "fine-grained, shared, normalised": {
        "experts": ExpertsConfig(num=6, top_k=2, hidden=8, shared_hidden=12, normalise=True, z_weight=0.1)
    },
    "biased": {"experts": ExpertsConfig(num=3, top_k=2, bias_rate=0.01, balance_weight=0.5)},
    "feed-forward per modality": {"per_modality": "feed_forward"},
    "mixture of transformers": {"per_modality": "block"},
    "causal images on a grid": {"image_mask": "causal", "image_positions": "grid"},
}
LEARNED = [name for name in VARIANTS if "experts" in VARIANTS[name]]


def config_of(variant: str, architecture: str = "early", **settings) -> ModelConfig:
    return model_config(architecture, **copy.deepcopy(VARIANTS[variant]), **settings)


def model_of(variant: str, architecture: str = "early", **settings) -> MultimodalModel:
    """In float64, with norms and biases that differ."""
    model = MultimodalModel(config_of(variant, architecture, **settings), seed=0).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(0.2 * torch.rand(buffer.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    found = [one_row(words, generator) for words in ([7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17, 18])]
    return found


def gradients(model: nn.Module, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(sum(losses), list(model.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def assert_equal_gradients(found: dict, expected: dict, tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- against a naive model ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_a_naive_model(variant, documents):
    """The rotary table is float32; all else is float64."""
    model, batch = model_of(variant, key_heads=1), stack_rows([*documents, None], 14)
    output = model(batch, torch.float64)
    loss, auxiliary = Naive(model).losses(batch)
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.auxiliary, auxiliary, rtol=1e-6, atol=1e-9, check_dtype=False)
    assert (output.auxiliary > 0) == (variant in LEARNED)
    found, expected = gradients(model, output.loss, output.auxiliary), gradients(model, loss, auxiliary)
    assert_equal_gradients(found, expected, 1e-6)


# ---- nothing depends on what it must not ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_split_and_no_padding_changes_losses_or_gradients(variant, documents):
    model = model_of(variant)

    def run(*batches):
        outputs = [model(batch, torch.float64) for batch in batches]
        counts = model.take_expert_counts() if variant in LEARNED else torch.zeros(())
        loss, auxiliary = sum(o.loss for o in outputs), sum(o.auxiliary for o in outputs)
        return loss, auxiliary, counts, gradients(model, loss, auxiliary)

    loss, auxiliary, counts, expected = run(stack_rows(documents, 14))
    splits = {
        "a row at a time": [stack_rows([d], 14) for d in documents],
        "two and one": [stack_rows(documents[:2], 14), stack_rows(documents[2:], 14)],
        "longer rows": [stack_rows(documents, 23)],
        "rows of padding": [stack_rows([None, documents[0], None, *documents[1:], None], 14)],
        "a batch of padding": [stack_rows(documents, 14), stack_rows([None, None], 14)],
    }
    for name, batches in splits.items():
        again = run(*batches)
        torch.testing.assert_close(again[0], loss, rtol=1e-12, atol=0, msg=name)
        torch.testing.assert_close(again[1], auxiliary, rtol=1e-12, atol=0, msg=name)
        assert torch.equal(again[2], counts), name
        assert_equal_gradients(again[3], expected, 1e-12)


@pytest.mark.parametrize("variant", LEARNED)
def test_a_stage_without_head_carries_its_auxiliary_gradient(variant, documents):
    config, batch = config_of(variant, depth=3), stack_rows(documents, 14)
    whole = MultimodalModel(config, seed=7)
    stages = [MultimodalModel(config, blocks=range(2), head=False), MultimodalModel(config, blocks=[2], inputs=False)]
    for stage in stages:
        initialise(stage, 7)
    middle = stages[0](batch, auxiliary_scale=0.3)
    output = stages[1](batch, x_bsw=middle)
    (output.loss + 0.3 * output.auxiliary).backward()
    expected = whole(batch)
    (expected.loss + 0.3 * expected.auxiliary).backward()
    assert torch.equal(output.loss, expected.loss) and output.auxiliary < expected.auxiliary
    for stage in stages:
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=1e-5, atol=1e-7)
    counts = sum(stage.take_expert_counts() for stage in stages)
    assert torch.equal(counts, whole.take_expert_counts())


def test_an_attached_loss_gets_the_gradient_of_a_sum():
    x, w = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    attach_loss(x, w**2).sum().backward()
    assert x.grad.tolist() == [1.0] * 3 and w.grad == 4.0


@pytest.mark.parametrize("mode", ["per_op", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recompute_gives_the_same_gradients_bitwise_and_counts_once(mode, variant, documents):
    batch = stack_rows(documents, 14)

    def run(mode):
        model = MultimodalModel(config_of(variant), seed=0)
        recompute_blocks(model, mode)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            output = model(batch)
        (output.loss + output.auxiliary).backward()
        counts = model.take_expert_counts() if variant in LEARNED else torch.zeros(())
        return output, counts, [p.grad for p in model.parameters()], sum(x.numel() for x in kept)

    output, counts, expected, kept = run("none")
    again = run(mode)
    assert torch.equal(output.loss, again[0].loss) and torch.equal(output.auxiliary, again[0].auxiliary)
    assert torch.equal(counts, again[1])
    assert all(torch.equal(a, b) for a, b in zip(expected, again[2], strict=True))
    assert again[3] < kept


def test_a_closed_record_keeps_nothing():
    record = RoutingRecord()
    record.add(torch.tensor(2.0), torch.ones(3, 2))
    record.add(torch.tensor(3.0), torch.ones(3, 2))
    loss, counts = record.close()
    assert loss == 5 and counts.shape == (2, 3, 2)
    record.add(torch.tensor(7.0), torch.ones(3, 2))
    assert record.close() is None


# ---- routing --------------------------------------------------------------------------------------------


def layer_of(**settings) -> MixtureOfExperts:
    layer = MixtureOfExperts(ExpertsConfig(**({"num": 5, "hidden": 12} | settings)), 16, 2)
    initialise(layer, 3)
    return layer.double()


def context_of(is_image: torch.Tensor, is_padding: torch.Tensor | None = None) -> BlockContext:
    padding = torch.zeros_like(is_image) if is_padding is None else is_padding
    return BlockContext(cos=None, sin=None, mask=None, is_image=is_image, is_padding=padding)


def draw(batch: int = 2, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, 16, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, length, generator=generator) < 0.4


@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_position_meets_exactly_k_experts(k):
    layer, (x, is_image) = layer_of(top_k=k), draw()
    padding = torch.zeros_like(is_image)
    padding[1, 6:] = True
    experts, gates = layer.choose(layer.router(x.flatten(0, 1)).softmax(-1), padding.flatten())
    assert all(len(set(row)) == k for row in experts.tolist())
    assert (gates[padding.flatten()] == 0).all() and (gates[~padding.flatten()] > 0).all()
    context = context_of(is_image, padding)
    layer(x, context)
    counts = context.routed.close()[1][0]
    assert counts.sum() == k * int((~padding).sum())
    assert counts[:, 1].sum() == k * int((is_image & ~padding).sum())


@pytest.mark.parametrize("k", [1, 3])
def test_routing_is_permutation_equivariant(k):
    layer, (x, is_image) = layer_of(top_k=k, shared_hidden=4), draw()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))
    one, other = context_of(is_image), context_of(is_image[:, order])
    torch.testing.assert_close(layer(x, one)[:, order], layer(x[:, order], other), rtol=1e-12, atol=1e-12)
    (loss, counts), (loss_again, counts_again) = one.routed.close(), other.routed.close()
    torch.testing.assert_close(loss, loss_again, rtol=1e-12, atol=0)
    assert torch.equal(counts, counts_again)


def test_no_position_is_dropped_when_all_choose_one_expert():
    layer, (x, is_image) = layer_of(bias_rate=0.001), draw(3, 50)
    layer.bias.copy_(torch.tensor([0, 0, 9.0, 0, 0]))
    context = context_of(is_image)
    out = layer(x, context)
    gates = layer.router(x).softmax(-1)[..., 2, None]
    gate_up, down = layer.experts.gate_up[2], layer.experts.down[2]
    expected = torch.stack([torch.stack([feed_forward(p, gate_up, down) for p in row]) for row in x])
    torch.testing.assert_close(out, gates * expected)
    assert context.routed.close()[1][0].sum(-1).tolist() == [0, 0, 150, 0, 0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_k": 2, "normalise": True}, {"bias_rate": 0.1}])
def test_gradients_reach_the_router_through_the_gates(settings):
    layer, (x, is_image) = layer_of(**settings, balance_weight=0.0, z_weight=0.0), draw()
    layer(x, context_of(is_image)).square().sum().backward()
    assert (layer.router.weight.grad.abs().sum(-1) > 0).all()


def test_an_even_load_has_balance_one_and_one_expert_has_the_number():
    layer = layer_of(num=4, balance_weight=1.0, z_weight=0.0)
    with torch.no_grad():
        layer.router.weight.zero_()[range(4), range(4)] = 30.0
    x = torch.eye(16, dtype=torch.float64)[:4].repeat(2, 3, 1)  # each row: four experts, three times each
    for rows, expected in ((x, 1.0), (x[:, :1].expand_as(x), 4.0)):
        context = context_of(torch.zeros(rows.shape[:2], dtype=torch.bool))
        layer(rows, context)
        assert (context.routed.close()[0] / 24).item() == pytest.approx(expected, rel=1e-6)


def test_the_bias_moves_towards_an_even_load_and_changes_the_choice_alone():
    layer, (x, _) = layer_of(top_k=2, bias_rate=0.25, num=4), draw()
    layer.move_bias(torch.tensor([[3, 0], [1, 1], [0, 7], [2, 0]]))  # loads 3, 2, 7, 2; mean 3.5
    assert layer.bias.tolist() == [0.25, 0.25, -0.25, 0.25]
    probabilities = layer.router(x.flatten(0, 1)).softmax(-1)
    experts, gates = layer.choose(probabilities, torch.zeros(22, dtype=torch.bool))
    assert torch.equal(gates, probabilities.gather(1, experts))
    assert torch.equal(experts, (probabilities + layer.bias).topk(2).indices)
    assert list(layer_of(bias_rate=0.1).state_dict()) == ["bias", *layer_of().state_dict()]
    assert "blocks.0.feed_forward.bias" in MultimodalModel(config_of("biased"), seed=0).state_dict()


def test_repeated_moves_even_out_a_skewed_router():
    layer, (x, is_image) = layer_of(bias_rate=0.02, num=4), draw(2, 200)
    with torch.no_grad():
        layer.router.weight[1] += layer.router.weight.new_tensor(0.5)
    x = x + 0.3
    violations = []
    for _ in range(60):
        context = context_of(is_image)
        layer(x, context)
        counts = context.routed.close()[1][0]
        load = counts.sum(-1).double()
        violations.append((load.max() / load.mean() - 1).item())
        layer.move_bias(counts)
    assert violations[0] > 0.4 and max(violations[-5:]) < 0.3


def test_slices_of_hidden_units_and_of_experts_are_smaller_layers():
    layer, (x, _) = layer_of(num=4, top_k=2), draw()
    whole, rows = layer.experts, x.flatten(0, 1)
    offsets = torch.tensor([4, 4, 15, 22], dtype=torch.int32)
    expected = whole(rows, offsets)
    halves = []
    for i in range(2):
        part = copy.deepcopy(whole)
        part.gate_up = nn.Parameter(whole.gate_up.chunk(2, dim=1)[i])
        part.down = nn.Parameter(whole.down.chunk(2, dim=2)[i])
        halves.append(part(rows, offsets))
    torch.testing.assert_close(sum(halves), expected)
    part = copy.deepcopy(whole)
    part.gate_up, part.down = nn.Parameter(whole.gate_up[2:]), nn.Parameter(whole.down[2:])
    torch.testing.assert_close(part(rows[4:], offsets[2:] - 4), expected[4:])


def test_experts_begin_apart():
    weights = MultimodalModel(config_of("top 1"), seed=0).blocks["0"].feed_forward.experts.gate_up
    assert len({e.flatten()[:3].detach().numpy().tobytes() for e in weights}) == 4


def test_modalities_meet_their_own_weights_alone(documents):
    batch = stack_rows(documents, 14)
    for variant, text, image in (
        ("feed-forward per modality", "feed_forward.text", "feed_forward.image"),
        ("mixture of transformers", "text", "image"),
    ):
        model = model_of(variant, depth=1)
        x = model.residual_stream(batch, torch.float64)
        is_image = batch.tokens == 3
        for part, own in ((text, ~is_image), (image, is_image)):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_parameter(f"blocks.0.{part}.{'' if '.' in part else 'feed_forward.'}down.weight").mul_(2)
            moved = (other.residual_stream(batch, torch.float64) - x).abs().sum(-1) > 1e-9
            valid = batch.lo <= batch.hi
            assert torch.equal(moved[valid], own[valid])


# ---- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["early", "late"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts(variant, architecture, documents):
    model = MultimodalModel(config_of(variant, architecture), seed=0)
    counts = count_parameters(model.config)
    assert sum(p.numel() for p in model.parameters()) == counts.total
    # The experts, or halves of a block, that one text position leaves without a gradient.
    idle = 0
    for block in model.blocks.values():
        if variant in LEARNED:
            experts, settings = block.feed_forward.experts, model.config.experts
            idle += (settings.num - settings.top_k) * sum(p[0].numel() for p in experts.parameters())
        elif model.config.per_modality != "none":
            owner = block if variant == "mixture of transformers" else block.feed_forward
            idle += sum(p.numel() for p in owner.image.parameters())
    assert counts.idle == idle and counts.active == counts.total - idle
    assert paper_flops(counts, 100, 10) == 6 * ((counts.decoder - idle) * 100 + counts.vision * 10)


@pytest.mark.parametrize(
    ("width", "millions"),
    [(800, 275), (1088, 464), (1632, 932), (2208, 1630), (2624, 2280), (3232, 3350)],
)
def test_paper_sizes_are_active_parameters(width, millions):
    experts = ExpertsConfig(num=8)
    config = ModelConfig(width=width, vocab_size=50432, image_size=224, patch_size=14, experts=experts)
    counts = count_parameters(resolve_model(config))
    assert counts.active == pytest.approx(millions * 1e6, rel=0.005)
    assert counts.total - counts.active == 24 * 7 * 3 * width * config.experts.hidden


@pytest.mark.parametrize("architecture", ["early", "late"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_flops_match_a_trace(variant, architecture, documents, monkeypatch):
    """The trace sees a dense mask, so every pair counts."""

    def dense(q, k, v, _):
        lo = torch.zeros(q.shape[:2], dtype=torch.int32)
        return interval_attention_reference(q, k, v, lo, lo + q.shape[1] - 1)

    for module in (layers, modality):
        monkeypatch.setattr(module, "interval_attention", dense)
    model, batch = MultimodalModel(config_of(variant, architecture), seed=0), documents[0]
    with FlopCounterMode(display=False) as counter:
        output = model(batch)
        (output.loss + output.auxiliary).backward()
    length = batch.tokens.shape[1]
    stats = TokenStats(patches=PATCHES / length, labels=batch.num_labels() / length, pairs=length)
    assert exact_flops_per_token(model.config, stats) * length == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_record_of_load_violation_and_specialisation():
    counts = torch.tensor([[[30, 0], [0, 10], [5, 5], [0, 0]], [[10, 10], [10, 10], [10, 10], [30, 10]]])
    record = expert_record(counts)
    assert [record[f"experts/0/load/{e}"] for e in range(4)] == [0.6, 0.2, 0.2, 0.0]
    assert record["experts/0/violation"] == pytest.approx(0.6 / 0.25 - 1)
    assert record["experts/0/specialisation"] == pytest.approx((1 + 1 + 0) / 3)  # an expert without load has no split
    entropy = -(0.75 * torch.tensor(0.75).log2() + 0.25 * torch.tensor(0.25).log2()).item()
    assert record["experts/1/specialisation"] == pytest.approx((1 - entropy) / 4)
    assert expert_record(torch.zeros(2, 4, 2, dtype=torch.int64)) == {}


# ---- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_small_batch_is_overfitted(variant, documents):
    model, batch = MultimodalModel(config_of(variant), seed=0), stack_rows(documents, 14)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(80):
        output = model(batch)
        (output.loss / batch.num_labels() + output.auxiliary / 30).backward()
        optimizer.step()
        optimizer.zero_grad()
        if variant == "biased":
            model.move_expert_bias(model.take_expert_counts())
    assert output.loss.item() / batch.num_labels() < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_activations_stay_close(variant, documents):
    model, batch = MultimodalModel(config_of(variant), seed=0), stack_rows(documents, 14)
    exact, low = model(batch), model(batch, torch.bfloat16)
    torch.testing.assert_close(low.loss, exact.loss, rtol=0.03, atol=0)
    torch.testing.assert_close(low.auxiliary, exact.auxiliary, rtol=0.03, atol=0)
    low.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_router_is_float32_whatever_the_activations():
    layer = layer_of().float()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert layer.router(x).dtype == torch.float32
    assert torch.equal(layer.router(x), x.float() @ layer.router.weight.T)


def test_validation_passes_are_not_counted(documents):
    model, batch = MultimodalModel(config_of("top 1"), seed=0), stack_rows(documents, 14)
    with torch.no_grad():
        model(batch)
    assert model.expert_counts.sum() == 0
    model(batch)
    assert model.take_expert_counts().sum() == 2 * int((batch.lo <= batch.hi).sum())
    assert model.expert_counts.sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": {"num": 4, "top_k": 5}}, "model.experts.top_k: 5 is above model.experts.num 4"),
        ({"experts": {"num": -1}}, "model.experts.num: expected a whole number from 0"),
        ({"experts": {"num": 4, "normalise": True}}, "model.experts.normalise: the one probability"),
        ({"experts": {"num": 4}, "per_modality": "block"}, "model.per_modality: block, but model.experts"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(InputError) as caught:
        build(Config, {"model": settings, "train": {"steps": 5}})
    assert caught.value.problems[0].startswith(message) and len(caught.value.problems) == 1
