"""A model that can be cut: slices of weights, parts of the model, first values, recompute."""

import copy

import pytest
import torch
from model_factory import model_config, one_row
from torch import nn

from megamm.model.context import make_context
from megamm.model.initial import initialise
from megamm.model.layers import Attention, FeedForward
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.recompute import recompute_blocks


@pytest.fixture
def batch():
    return one_row([7, 8, 9, 10], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("key_heads", [4, 8])
def test_slices_of_heads_are_smaller_attentions(shards, key_heads, batch):
    config = model_config("early", width=64, head_dim=8, key_heads=key_heads)
    whole = Attention(64, 8, key_heads, 2, 1e-6)
    initialise(whole, 0)
    context = make_context(config, batch.positions, batch.lo, batch.hi, 8, torch.float32)
    x = torch.randn(1, batch.tokens.shape[1], 64, generator=torch.Generator().manual_seed(1))
    total = torch.zeros_like(x)
    for i in range(shards):
        part = copy.deepcopy(whole)
        part.qkv.weight = nn.Parameter(whole.qkv.weight.chunk(shards)[i])
        part.out.weight = nn.Parameter(whole.out.weight.chunk(shards, dim=1)[i])
        total = total + part(x, context)
    torch.testing.assert_close(total, whole(x, context), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [2, 4])
def test_slices_of_hidden_units_are_smaller_feed_forward_layers(shards):
    whole = FeedForward(32, 48, 2)
    initialise(whole, 0)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    total = torch.zeros_like(x)
    for i in range(shards):
        part = copy.deepcopy(whole)
        part.gate_up.weight = nn.Parameter(whole.gate_up.weight.chunk(shards)[i])
        part.down.weight = nn.Parameter(whole.down.weight.chunk(shards, dim=1)[i])
        total = total + part(x)
    torch.testing.assert_close(total, whole(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_stages_have_the_weights_of_the_whole_and_give_its_losses(architecture, batch):
    config = model_config(architecture, depth=3)
    whole = MultimodalModel(config, seed=7)
    stages = [
        MultimodalModel(config, blocks=[0], head=False),
        MultimodalModel(config, blocks=[1], inputs=False, head=False),
        MultimodalModel(config, blocks=[2], inputs=False),
    ]
    x, names = None, set()
    for stage in reversed(stages):  # in any order
        initialise(stage, 7)
    for stage in stages:
        x = stage(batch, torch.float32, x)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)), name
            names.add(name)
    assert names == {name for name, _ in whole.named_parameters()}
    torch.testing.assert_close(x.loss, whole(batch).loss, rtol=0, atol=0)


def test_a_model_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = MultimodalModel(model_config("late", width=4096, depth=40, head_dim=128))
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_shares_of_a_parameter_are_drawn_alone():
    """A block of rows is drawn whole or not at all, so a share has the values of the whole."""
    whole = nn.Module()
    whole.initial, whole.weight = {"weight": 0.5}, nn.Parameter(torch.empty(3000, 70))
    initialise(whole, 3)
    for where in ((slice(0, 1), slice(0, 70)), (slice(900, 2200), slice(10, 20)), (slice(2999, 3000), slice(0, 70))):
        part = nn.Module()
        part.initial, part.weight = {"weight": 0.5}, nn.Parameter(torch.empty(3000, 70))
        local = torch.empty(*(s.stop - s.start for s in where))
        initialise(part, 3, lambda _, local=local, where=where: (local, where))
        assert torch.equal(local, whole.weight[where])
    assert whole.weight.std().item() == pytest.approx(0.5, rel=0.01)
    assert abs(whole.weight.mean().item()) < 0.01


def test_first_values_depend_on_seed_and_name():
    config = model_config("early")
    one, other = MultimodalModel(config, seed=0), MultimodalModel(config, seed=1)
    seen = set()
    for name, parameter in one.named_parameters():
        if "norm" not in name:
            assert not torch.equal(parameter, other.get_parameter(name))
            seen.add(parameter.flatten()[:4].detach().numpy().tobytes())
    assert len(seen) == sum("norm" not in name for name, _ in one.named_parameters())


@pytest.mark.parametrize("mode", ["per_op", "full"])
@pytest.mark.parametrize("architecture", ["early", "late"])
def test_recompute_gives_the_same_gradients_bitwise(mode, architecture, batch):
    def run(mode):
        model = MultimodalModel(model_config(architecture), seed=0)
        recompute_blocks(model, mode)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = model(batch).loss
        loss.backward()
        return loss, [p.grad for p in model.parameters()], sum(x.numel() for x in kept)

    loss, gradients, kept = run("none")
    loss_again, gradients_again, kept_again = run(mode)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert kept_again < kept
