"""A start from other weights on several ranks: the losses of one process, in every layout, tied tables among them."""

import json
from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset
from ranks import run_ranks

from megamm.config import ModelConfig
from megamm.exchange.tensors import TensorGroup, write_tensors
from megamm.exchange.weights import MODEL, FolderSettings, open_weights
from megamm.model.multimodal import MultimodalModel
from megamm.settings import build, to_yaml

MODELS = {
    "qwen2": {"heads": 4, "head_dim": 12, "key_heads": 2, "hidden": 48, "qk_norm": False, "qkv_bias": True},
    "clip": {
        "architecture": "late",
        "key_heads": 1,
        "vision": {"kind": "clip", "width": 16, "depth": 2, "head_dim": 8, "patch_size": 4, "projector": "mlp"},
    },
    "tied": {"heads": 2, "head_dim": 16, "hidden": 48, "tied_embeddings": True},
}
MODELS |= {
    "frozen": MODELS["clip"] | {"optimizer.freeze": ["blocks.", "vision.embed."]},
    "thawing": MODELS["qwen2"] | {"optimizer.freeze": ["blocks."], "optimizer.freeze_until": 2},
}
LAYOUTS = {
    "qwen2": [{"tensor": 2}, {"pipeline": 2, "micro_batches": 2}, {"dp_shard": 2}],
    "frozen": [{"context": 2}, {"dp_shard": 2}],
    "thawing": [{"tensor": 2}, {"pipeline": 2, "micro_batches": 2}, {"dp_shard": 2}],
    "clip": [{"context": 2}, {"pipeline": 2, "micro_batches": 2}, {"dp_shard": 2}],
    "tied": [{"tensor": 2}, {"dp_shard": 2}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and for each kind of model a folder of weights whose vocabulary is smaller."""
    folder = tmp_path_factory.mktemp("start")
    make_dataset(folder / "data", kind="caption", num_documents=60, vocab_size=304)
    for name, settings in MODELS.items():
        sizes = {"architecture": "text", "width": 32, "depth": 2, "vocab_size": 200, "image_size": 16, "patch_size": 8}
        config = build(ModelConfig, sizes | {key: value for key, value in settings.items() if "." not in key})
        state = MultimodalModel(config, seed=5).state_dict()
        place = folder / name
        place.mkdir()
        groups = [TensorGroup({key: tuple(value.shape)}, lambda value=value: (value,)) for key, value in state.items()]
        write_tensors(place, groups, "float32")
        (place / MODEL).write_text(to_yaml(FolderSettings(model=config)))
    return folder


def losses(folder: Path, name: str, layout: dict, rank: int = 0, size: int = 1) -> list[float]:
    """Losses and gradient norms of three steps, whose checkpoint is left in ``run_of(...)``."""
    from megamm.config import load
    from megamm.data.loader import Loader, build_pack_plan
    from megamm.exchange.start import start_from
    from megamm.parallel.layout import resolve_layout
    from megamm.parallel.mesh import World, make_mesh
    from megamm.resolve import resolve_config
    from megamm.trainer import Trainer
    from megamm.training.checkpoint import Checkpoints

    settings = {
        "model.architecture": "early",
        "model.width": 32,
        "model.depth": 2,
        "data.row_length": 64,
        "data.window_tokens": 4000,
        "data.workers": 0,
        "data.sources": f"{{caption: {{path: {folder}/data}}}}",
        "start.weights": folder / name,
        "start.first_row": 5,
        "schedule.warmup_steps": 0,
        "train.steps": 3,
        "train.batch_rows": 8,
        "train.device": "cpu",
    }
    settings |= {key if "." in key else f"model.{key}": json.dumps(value) for key, value in MODELS[name].items()}
    settings |= {f"parallel.{key}": value for key, value in layout.items()}
    config = resolve_config(load(None, [f"--{key}={value}" for key, value in settings.items()]))
    sizes = resolve_layout(config, size)
    mesh = make_mesh("cpu", sizes) if size > 1 else {}
    trainer = Trainer(config, World(rank=rank, size=size, device=torch.device("cpu"), layout=sizes, **mesh))
    start_from(trainer.model, trainer.config, trainer.world)
    plan = build_pack_plan(trainer.datasets, [1.0], config.data)
    ranks = {"rank": trainer.world.data_rank, "num_ranks": trainer.world.data_size}
    loader = Loader(
        plan, trainer.datasets, config.data, global_batch_rows=8, micro_rows=sizes.micro_rows, end_step=3, **ranks
    )
    found = []
    for micro_batches in loader:
        norm = trainer.train_step(micro_batches)
        found += [trainer.window[0].sum().item(), norm.item()]
    run = run_of(folder, name, layout)
    saver = Checkpoints(run, trainer.world, 1, [])
    saver.save(3, trainer.model, trainer.optimizer, {})
    saver.wait()
    saver.close()
    if rank == 0:
        (run / "config.yaml").write_text(to_yaml(trainer.config))
    return found


def run_of(folder: Path, name: str, layout: dict) -> Path:
    return folder / "runs" / "-".join([name, *map(str, layout)])


def all_losses(folder: Path) -> dict:
    import torch.distributed as dist

    return {
        (name, str(layout)): losses(folder, name, layout, dist.get_rank(), 2)
        for name, layouts in LAYOUTS.items()
        for layout in layouts
    }


def test_layouts_start_and_learn_alike(folder):
    alone = {name: losses(folder, name, {}) for name in MODELS}
    assert alone["qwen2"][0] != alone["tied"][0]
    for rank in run_ranks(all_losses, 2, folder):
        for (name, layout), found in rank.items():
            assert found == pytest.approx(alone[name], rel=1e-5), (name, layout)
    for name, layouts in LAYOUTS.items():  # their checkpoints hold the same model
        first = open_weights(run_of(folder, name, {}))
        for layout in layouts:
            other = open_weights(run_of(folder, name, layout))
            for key in first.shapes:
                torch.testing.assert_close(other.read(key), first.read(key), rtol=1e-3, atol=1e-4)
