"""Every layout gives the losses, the sums of each source and the gradient norms of one process, over 20 steps.

The ranks of a test train one layout after another: starting processes costs more than a tiny model's steps.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset
from ranks import run_ranks

STEPS, ROWS = 20, 8
RELATIVE = 1e-5
KINDS = ("caption", "interleaved", "text")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for seed, kind in enumerate(KINDS):  # texts have no image: micro-batches without any
        make_dataset(folder / kind, kind=kind, num_documents=120, seed=seed, vocab_size=304)
        make_dataset(folder / "native" / kind, kind=kind, num_documents=120, seed=seed, vocab_size=304, fit="native")
    return folder


def depth_of(layout: dict) -> int:
    """Blocks of the model: two, or as many as there are stages."""
    stages = layout.get("pipeline", 1) * (1 if layout.get("pipeline_schedule", "1f1b") == "1f1b" else 2)
    return layout.get("model.depth", max(2, stages))


def train(data: Path, architecture: str, layout: dict, rank: int = 0, size: int = 1) -> list[tuple[float, list, float]]:
    """Loss, sums by source and label kind, and gradient norm of every step, and then those of a validation."""
    from megamm.config import load
    from megamm.data.loader import Loader, build_pack_plan
    from megamm.parallel.layout import resolve_layout
    from megamm.parallel.mesh import World, make_mesh
    from megamm.resolve import resolve_config
    from megamm.trainer import Trainer

    data = data / "native" if architecture == "native" else data  # images of unlike shape
    sources = ", ".join(f"{kind}: {{path: {data}/{kind}}}" for kind in KINDS)
    settings = {
        "model.architecture": architecture,
        "model.width": 32,
        "model.depth": depth_of(layout),
        "model.vision.depth": 2,
        "model.head_dim": 8,
        "model.hidden_multiple": 16,
        "data.row_length": 128,
        "data.window_tokens": 4000,
        "data.workers": 0,
        "data.sources": f"{{{sources}}}",
        "optimizer.lr": 0.003,
        "optimizer.vision_lr_factor": 0.5,
        "schedule.warmup_steps": 5,
        "train.steps": STEPS,
        "train.batch_rows": ROWS,
        "train.device": "cpu",
    }
    if architecture == "grid":
        settings |= {"model.architecture": "early", "model.image_mask": "causal", "model.image_positions": "grid"}
    if architecture == "native":
        settings |= {"model.architecture": "late", "model.image_positions": "grid"}
    if architecture == "muon":
        settings |= {"model.architecture": "early", "optimizer.name": "muon"}
    if architecture == "mixture":  # a mixture of transformers
        settings |= {"model.architecture": "early", "model.per_modality": "block"}
    if architecture in ("moe", "muon"):
        settings |= {"model.architecture": "early", "model.experts.num": 4, "model.experts.top_k": 2}
        settings |= {"model.experts.hidden": 16, "model.experts.bias_rate": 0.001}
    settings |= {name if "." in name else f"parallel.{name}": value for name, value in layout.items()}
    config = resolve_config(load(None, [f"--{key}={value}" for key, value in settings.items()]))
    sizes = resolve_layout(config, size)
    mesh = make_mesh("cpu", sizes) if size > 1 else {}
    trainer = Trainer(config, World(rank=rank, size=size, device=torch.device("cpu"), layout=sizes, **mesh))
    plan = build_pack_plan(trainer.datasets, [1.0] * len(KINDS), config.data)
    loader = Loader(
        plan,
        trainer.datasets,
        config.data,
        global_batch_rows=ROWS,
        rank=trainer.world.data_rank,
        num_ranks=trainer.world.data_size,
        micro_rows=sizes.micro_rows,
        end_step=STEPS,
    )
    found = []
    for micro_batches in loader:
        norm = trainer.train_step(micro_batches)
        sums, counts = trainer.window.clone()
        trainer.window.zero_()
        found.append(((sums.sum() / counts.sum()).item(), sums.tolist(), norm.item()))
    split = trainer.world.all_reduce(trainer.engine.evaluate(micro_batches))
    return [*found, (0.0, split[0].tolist(), 0.0)]


def train_on_ranks(data: Path, runs: list[tuple[str, dict]]) -> list:
    import torch.distributed as dist

    return [train(data, *run, dist.get_rank(), dist.get_world_size()) for run in runs]


@pytest.fixture(scope="module")
def alone(data) -> Callable[[str, int], list]:
    """What one process gives, by architecture and depth."""

    @cache
    def found(architecture: str, depth: int) -> list:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return train(data, architecture, {"model.depth": depth})
        finally:
            torch.set_num_threads(threads)

    return found


def check(data: Path, alone: Callable, num_ranks: int, runs: list[tuple[str, dict]], timeout: float) -> None:
    ranks = run_ranks(train_on_ranks, num_ranks, data, runs, timeout=timeout)
    for rank, results in enumerate(ranks):
        for (architecture, layout), steps in zip(runs, results, strict=True):
            wanted = alone(architecture, depth_of(layout))
            for step, (got, want) in enumerate(zip(steps, wanted, strict=True)):
                where = f"rank {rank}, {architecture} {layout}, step {step}"
                assert got[0] == pytest.approx(want[0], rel=RELATIVE), where
                assert torch.tensor(got[1]).allclose(torch.tensor(want[1]), rtol=RELATIVE, atol=1e-4), where
                assert got[2] == pytest.approx(want[2], rel=RELATIVE), where


SINGLE = [
    {"dp_replicate": 2},
    {"dp_shard": 2},
    {"tensor": 2},
    {"context": 2},
    {"context": 2, "context_method": "ring"},
    {"pipeline": 2},
    {"pipeline": 2, "pipeline_schedule": "interleaved"},
    {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["early", "late"])
def test_single_axes(architecture, data, alone):
    check(data, alone, 2, [(architecture, layout) for layout in SINGLE], timeout=900)


PRODUCTS_OF_FOUR = [
    ("moe", {"expert": 2, "dp_shard": 2, "tensor": 2}),
    ("moe", {"pipeline": 2, "dp_shard": 2, "expert": 2}),
    ("early", {"tensor": 2, "context": 2}),
    ("mixture", {"tensor": 2, "dp_shard": 2}),
    ("mixture", {"tensor": 2, "pipeline": 2}),
    ("late", {"tensor": 2, "context": 2}),
    ("late", {"tensor": 2, "pipeline": 2}),
    ("early", {"dp_replicate": 2, "dp_shard": 2, "train.micro_rows": 1}),
    ("text", {"tensor": 4}),
    ("muon", {"pipeline": 2, "dp_shard": 2, "expert": 2}),
    ("muon", {"expert": 2, "dp_shard": 2, "tensor": 2}),
    ("early", {"context": 4, "train.recompute": "full"}),
    ("late", {"pipeline": 4}),
    ("grid", {"context": 2, "tensor": 2}),
    ("grid", {"context": 2, "pipeline": 2, "context_method": "ring"}),
    ("late", {"tensor": 2, "dp_shard": 2, "optimizer.offload": "true"}),
    ("native", {"context": 2, "tensor": 2}),
    ("native", {"pipeline": 2, "dp_shard": 2}),
    ("early", {"pipeline": 2, "dp_shard": 2, "pipeline_schedule": "interleaved", "micro_batches": 4}),
    ("late", {"context": 2, "dp_shard": 2, "context_method": "ring", "train.recompute": "per_op"}),
]

PRODUCTS_OF_EIGHT = [
    ("early", {"tensor": 2, "pipeline": 2, "dp_shard": 2}),
    ("late", {"tensor": 2, "pipeline": 2, "context": 2, "pipeline_schedule": "interleaved"}),
    ("moe", {"expert": 2, "dp_shard": 2, "context": 2, "tensor": 2}),
    ("moe", {"dp_shard": 8}),  # fewer experts than ranks
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "runs"), [(4, PRODUCTS_OF_FOUR), (8, PRODUCTS_OF_EIGHT)])
def test_products_of_axes(num_ranks, runs, data, alone):
    check(data, alone, num_ranks, runs, timeout=1200)
