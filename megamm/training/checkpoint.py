"""Checkpoints: sharded (DCP), written under a temporary name and renamed, with a ``latest`` pointer.

    checkpoints/step-00000100/       DCP files of model and optimizer, state.json
    checkpoints/latest               name of the newest complete one

A kill at any moment leaves either the old state or the new one; leftovers are removed at the next save.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from megamm.errors import InputError, RunError
from megamm.files import write_json, write_text
from megamm.parallel.mesh import World

TEMPORARY = ".writing"

# A single process saves and loads without torch.distributed on purpose.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:08d}"


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run directory, or None."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not (path / "state.json").exists():
        raise InputError(f"{pointer}: names {path.name}, which is missing or incomplete; write an older step into it")
    return path


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, world: World
) -> None:
    """Write one checkpoint; called by all ranks.

    Args:
        state: plain JSON values, equal on all ranks, returned by :func:`load`.

    Raises:
        RunError: it could not be written (full disk); earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    final, temporary = folder / step_name(step), folder / (step_name(step) + TEMPORARY)
    if (final / "state.json").exists():  # by a process killed before it could move the pointer
        if world.rank == 0:
            write_text(folder / "latest", final.name + "\n")
        world.barrier()
        return
    if world.rank == 0:
        for leftover in folder.glob(f"step-*{TEMPORARY}"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    world.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    try:
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=temporary,
            no_dist=world.mesh is None,
        )
        if world.rank == 0:
            write_json(temporary / "state.json", {"step": step, **state})
    except Exception as error:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{final}: checkpoint not written ({error}); earlier checkpoints are untouched") from error
    if world.rank == 0:
        os.replace(temporary, final)
        write_text(folder / "latest", final.name + "\n")
    world.barrier()


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict:
    """Fill model and optimizer from a checkpoint, whatever the number of ranks that wrote it.

    Returns:
        The ``state`` given to :func:`save`, with ``step``.

    Raises:
        InputError: missing, damaged, or of another model.
    """
    try:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        groups = [dict(group) for group in optimizer.param_groups]
        dcp.load(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=path,
            no_dist=world.mesh is None,
        )
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update({k: v for k, v in settings.items() if k != "params"})
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError, RuntimeError, KeyError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be loaded ({reason}); is it of this model, and complete?") from error


def remove_old(run_dir: Path, keep: int, protected: list[int]) -> None:
    """Delete all but the newest ``keep`` checkpoints, sparing ``protected`` steps. Called by rank 0."""
    names = {step_name(step) for step in protected}
    folders = sorted(p for p in (run_dir / "checkpoints").glob("step-*") if not p.name.endswith(TEMPORARY))
    for folder in [p for p in folders if p.name not in names][:-keep]:
        shutil.rmtree(folder)
