"""Schedules and the optimizer's weight decay."""

from itertools import pairwise

import pytest
import torch

from megamm.config import ModelConfig, OptimizerConfig, ScheduleConfig
from megamm.model.multimodal import MultimodalModel
from megamm.training.optimizer import freeze, make_optimizer, set_learning_rate
from megamm.training.schedule import cooldown_start, learning_rate_factor


@pytest.mark.parametrize("shape", ["inverse_sqrt", "one_minus_sqrt", "linear", "cosine"])
def test_schedule_warms_up_holds_and_falls(shape):
    config = ScheduleConfig(warmup_steps=10, cooldown=shape, cooldown_fraction=0.2)
    factors = [learning_rate_factor(config, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert all(f == 1.0 for f in factors[9:80])
    assert all(a > b > 0 for a, b in pairwise(factors[79:]))
    assert factors[-1] < 0.15


def test_a_trunk_shares_every_step_before_the_cooldown():
    branch = ScheduleConfig(warmup_steps=10, cooldown="linear")
    trunk = ScheduleConfig(warmup_steps=10, cooldown="none")
    start = cooldown_start(branch, 60)
    assert start == 48
    assert [learning_rate_factor(branch, s, 60) for s in range(start)] == [
        learning_rate_factor(trunk, s, 200) for s in range(start)
    ]


def test_weight_decay_does_not_depend_on_the_learning_rate():
    """With zero gradients a step at the peak removes exactly weight_decay of every matrix and of no norm."""
    config = ModelConfig(
        architecture="late", width=16, depth=1, vocab_size=20, image_size=16, patch_size=8, hidden_multiple=8
    )
    for lr in (1e-2, 1e-4):
        model = MultimodalModel(config, seed=0)
        optimizer = make_optimizer(model, OptimizerConfig(lr=lr, weight_decay=1e-3))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        set_learning_rate(optimizer, 1.0)
        optimizer.step()
        for name, parameter in model.named_parameters():
            kept = 1.0 if "norm" in name else 1 - 1e-3
            torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=1e-8)


def test_the_tower_has_its_own_rate_and_the_projector_not():
    config = ModelConfig(architecture="late", width=16, depth=1, vocab_size=20, image_size=16, patch_size=8)
    model = MultimodalModel(config, seed=0)
    optimizer = make_optimizer(model, OptimizerConfig(lr=1.0, vision_lr_factor=0.01))
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    slow = {name for name, value in rates.items() if value == 0.01}
    assert slow == {n for n in rates if n.startswith("vision.") and not n.startswith("vision.projector")}


def test_a_rate_of_zero_freezes_the_tower():
    """No gradient, no decay and no state; the projector still learns."""
    config = ModelConfig(architecture="late", width=16, depth=1, vocab_size=20, image_size=16, patch_size=8)
    model = MultimodalModel(config, seed=0)
    settings = OptimizerConfig(vision_lr_factor=0.0, weight_decay=0.5)
    freeze(model, settings)
    optimizer = make_optimizer(model, settings)
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {name for name, p in model.named_parameters() if id(p) not in learning}
    names = [name for name, _ in model.named_parameters()]
    assert frozen == {n for n in names if n.startswith("vision.") and ".projector." not in n} and len(frozen) > 3
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
