"""Schedules and the optimizer's weight decay."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from dataset_factory import make_dataset
from model_factory import model_config
from run_factory import run_until, trainer

from megamm.config import ExpertsConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from megamm.estimate.memory import rank_memory
from megamm.estimate.tokens import stats_of_sources
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


def singular_reference(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's direction by the singular values themselves, on which its matrix iteration is a scalar polynomial."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * max(matrix.shape) ** 0.5 * (u * s) @ v


def muon_reference(name: str, direction: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor | None:
    """What Muon subtracts at a rate of 1, float64; None for what AdamW steps. Keys have one head."""
    if name.endswith("qkv.weight"):
        rows = direction.unflatten(0, (-1, heads + 2, head_dim))
        pieces = [rows[:, :-2], rows[:, -2:-1], rows[:, -1:]]
        found = [singular_reference(piece.flatten(0, 2)).view(piece.shape) for piece in pieces]
        return torch.cat(found, 1).flatten(0, 2)
    if "experts." in name:
        each = "gate_up.weight" if name.endswith("gate_up") else "down.weight"
        return torch.stack([muon_reference(each, expert, heads, head_dim) for expert in direction])
    if name.endswith("gate_up.weight"):
        return torch.stack([singular_reference(direction[i::2]) for i in (0, 1)], 1).flatten(0, 1)
    return singular_reference(direction) if name.endswith(("out.weight", "down.weight")) else None


def test_muon_steps_each_matrix_of_the_blocks_and_adamw_the_rest():
    """Two steps against float64: queries, keys, values, gate and up are matrices of their own, as is each expert's."""
    config = model_config("late", width=32, key_heads=1, experts=ExpertsConfig(num=3))
    settings = OptimizerConfig(name="muon", lr=0.01, weight_decay=1e-3, momentum=0.9, vision_lr_factor=0.5)
    model, plain = MultimodalModel(config, seed=0), MultimodalModel(config, seed=0)
    optimizer, adamw = make_optimizer(model, settings), make_optimizer(plain, replace(settings, name="adamw"))
    wanted = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    momentum: dict[str, torch.Tensor] = {}
    torch.manual_seed(1)
    for _ in range(2):
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
            momentum[name] = 0.9 * momentum.get(name, 0) + parameter.grad.double()
            tower = name.startswith("vision.")
            sizes = (1, 8) if tower else (2, 16)
            step = muon_reference(name, parameter.grad.double() + 0.9 * momentum[name], *sizes)
            if step is not None:
                wanted[name] = wanted[name] * (1 - 1e-3) - (0.005 if tower else 0.01) * step
        optimizer.step()
        adamw.step()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if muon_reference(name, parameter.detach(), *((1, 8) if name.startswith("vision.") else (2, 16))) is None:
            assert torch.equal(parameter, other), name
        else:
            torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=1e-4, atol=1e-5)
            assert set(optimizer.state[parameter]) == {"step", "momentum"}


def test_a_run_with_muon_resumes_exactly_and_its_state_is_as_estimated(tmp_path):
    for kind in ("caption", "text"):
        make_dataset(tmp_path / kind, kind=kind, num_documents=60)
    settings = {"optimizer.name": "muon", "train.steps": 8}
    whole, broken = (trainer(tmp_path, tmp_path / name, **settings) for name in ("whole", "broken"))
    losses = whole.run()["losses"]
    run_until(broken, 7)  # goes on from the checkpoint at step 5
    assert trainer(tmp_path, tmp_path / "broken", **settings).run()["losses"] == losses
    assert trainer(tmp_path, tmp_path / "adamw", **{"train.steps": 8}).run()["losses"] != losses
    tensors = [t for state in whole.optimizer.state.values() for t in state.values() if t.ndim]
    held = rank_memory(whole.config, whole.world.layout, stats_of_sources(whole.config))["optimizer state"]
    assert sum(t.nbytes for t in tensors) == pytest.approx(held, rel=0.02)


def test_adamw_in_the_hosts_memory_is_adamw_bit_by_bit_and_resumes(tmp_path):
    for kind in ("caption", "text"):
        make_dataset(tmp_path / kind, kind=kind, num_documents=60)
    settings = {"model.architecture": "late", "train.steps": 8}
    away = settings | {"optimizer.offload": "true"}
    whole, broken = trainer(tmp_path, tmp_path / "whole", **settings), trainer(tmp_path, tmp_path / "broken", **away)
    losses = whole.run()["losses"]
    run_until(broken, 7)  # goes on from the checkpoint at step 5
    resumed = trainer(tmp_path, tmp_path / "broken", **away)
    assert resumed.run()["losses"] == losses
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert "optimizer state" not in rank_memory(resumed.config, resumed.world.layout, stats_of_sources(resumed.config))
    # Where the state lies is no matter of the run: it goes on without.
    assert trainer(tmp_path, tmp_path / "broken", **settings | {"train.steps": 8}).run()["losses"] == losses
