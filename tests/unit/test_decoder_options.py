"""Settings by which a decoder takes other families' shapes: counts, checks, first values and gradients."""

import pytest
import torch
from model_factory import model_config, one_row

from megamm.config import Config, RopeScalingConfig
from megamm.errors import InputError
from megamm.model.counts import count_parameters
from megamm.model.multimodal import MultimodalModel
from megamm.model.rotary import frequencies, rotary_table
from megamm.parallel.layout_rules import layout_problems
from megamm.planning.sizes import nearest_model
from megamm.settings import build

SHAPES = [
    {"heads": 6, "head_dim": 8, "key_heads": 2},
    {"hidden": 24},
    {"qk_norm": False},
    {"qk_norm": False, "qkv_bias": True, "key_heads": 1},
    {"tied_embeddings": True},
    {"heads": 3, "head_dim": 8, "per_modality": "block", "qkv_bias": True},
]


def name_of(shape: dict) -> str:
    return "-".join(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_parameters_are_counted_and_all_are_used(shape):
    config = model_config("early", **shape)
    model = MultimodalModel(config, seed=0).double()
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    batch = one_row([7, 8, 9, 10], torch.Generator().manual_seed(0))
    model(batch, torch.float64).loss.backward()
    if config.per_modality == "none":  # else the images' part of the last block leads to nothing
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_tied_gradient_is_that_of_both_ends():
    batch = one_row([7, 8, 9, 10], torch.Generator().manual_seed(0))
    tied = MultimodalModel(model_config("early", tied_embeddings=True), seed=0).double()
    untied = MultimodalModel(model_config("early"), seed=0).double()
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embedding.weight.detach().clone()})
    losses = [model(batch, torch.float64).loss for model in (tied, untied)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, rtol=1e-9, atol=1e-12)


def test_stretched_wavelengths():
    linear = RopeScalingConfig(kind="linear", factor=4.0)
    half = rotary_table(torch.tensor([[8]]), 8, 100.0, linear)
    plain = rotary_table(torch.tensor([[2]]), 8, 100.0, RopeScalingConfig())
    torch.testing.assert_close(half, plain)
    llama = RopeScalingConfig(kind="llama3", factor=8.0, original_length=64)
    base, scaled = (frequencies(16, 1e4, s) for s in (RopeScalingConfig(), llama))
    ratio = (base / scaled).tolist()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and ratio == sorted(ratio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 32, "heads": 5}, "model.heads: 5 heads of model.width 32"),
        ({"width": 32, "heads": 6, "head_dim": 8, "key_heads": 4}, "model.key_heads: 4 does not divide model.heads 6"),
        ({"rope_scaling": {"kind": "llama3", "high_frequency_factor": 1}}, "must be above low_frequency_factor 1"),
    ],
)
def test_shapes_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        build(Config, {"model": settings, "train": {"steps": 5}})


def test_a_plan_chooses_the_width_alone():
    with pytest.raises(InputError, match=r"model\.heads, model\.hidden: leave them out"):
        nearest_model(1e6, model_config("early", hidden=40))


def test_tied_embeddings_have_no_pipeline():
    config = Config()
    config.model = model_config("early", tied_embeddings=True)
    config.parallel.pipeline = 2
    assert any("model.tied_embeddings" in line for line in layout_problems(config, 2))
