"""Checkpoints: whole or absent, checked before they are used, written while training goes on.

    checkpoints/step-00000100/            tensors, state.json, and manifest.json: size and sha256 of each file
    checkpoints/latest                    name of the one to go on from
    checkpoints/aside-step-00000100-1/    was in the way: damaged, or later than the one that the run went on from
    checkpoints/step-00000100.partial/    half-written or half-deleted; removed when the run goes on

A step is always written anew, under a temporary name, and takes its place only when it is whole: a kill at any moment
leaves the earlier checkpoints as they were.
"""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from megamm.errors import InputError, RunError, warn
from megamm.files import write_json, write_text
from megamm.parallel.mesh import World
from megamm.training.tensor_files import INDEX, error_words, innermost, load_tensors, save_tensors

MANIFEST, STATE, POINTER = "manifest.json", "state.json", "latest"
PARTIAL = ".partial"


# ---- the folder ------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint's folder; None where the name is not one."""
    # The whole name: partial and set-aside folders hold one, too, and are no checkpoints.
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, the earliest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((p for p in folders if step_of(p) is not None and p.is_dir()), key=step_of)


def pointed(run_dir: Path) -> tuple[Path | None, str]:
    """The checkpoint that ``latest`` names; or None, and why it names none."""
    pointer = run_dir / "checkpoints" / POINTER
    try:
        # People may write it by hand, to go back to an earlier step.
        path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, "it is missing"
    except UnicodeDecodeError:
        return None, "it is garbage"
    # The parent, too: what is read here must not lead out of the folder.
    if step_of(path) is None or path.parent != pointer.parent:
        return None, "it names no checkpoint"
    return (path, "") if path.is_dir() else (None, f"it names {path.name}, which is missing")


def newest_whole(run_dir: Path, world: World, up_to: int | None = None) -> Path | None:
    """The checkpoint to go on from: what ``latest`` names, or else the newest whole one, with a warning.

    Called by all ranks; rank 0 decides, all of them check the files.

    Args:
        up_to: leave out later steps.

    Returns:
        None where the run has no checkpoint up to that step.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    # One listing for all: ranks that list a network disk by themselves may see different folders.
    candidates, problem = world.decide(_candidates, run_dir, up_to)
    damaged: list[str] = []
    for path in candidates:
        # The same on all ranks, so that all of them leave this loop at the same checkpoint.
        found = find_damage(path, world)
        if not found:
            if world.rank == 0 and (problem or damaged):
                reasons = [f"latest: {problem}"] if problem else []
                warn(f"{path.parent}: {'; '.join(reasons + damaged)}; going on from {path.name}")
            return path
        damaged.append(f"{path.name}: {found}")
    # Never a silent new start: somebody's training would be overwritten.
    if damaged:
        raise InputError(
            f"{run_dir / 'checkpoints'}: no checkpoint is whole ({'; '.join(damaged)}); "
            "put back a copy of one, or remove this folder to train from the start"
        )
    return None


def _candidates(run_dir: Path, up_to: int | None) -> tuple[list[Path], str]:
    """Checkpoints in the order of preference, and what is wrong with ``latest``."""
    folders = [p for p in reversed(list_checkpoints(run_dir)) if up_to is None or step_of(p) <= up_to]
    path, problem = pointed(run_dir)
    if path in folders:
        return [path, *(p for p in folders if p != path)], ""
    return folders, problem if folders else ""


def find_damage(folder: Path, world: World) -> str:
    """Check a checkpoint against its manifest; called by all ranks, each of which reads its share of the files.

    Returns:
        What is wrong with the first bad file; empty if nothing is.
    """
    files, problem = world.decide(_read_manifest, folder)
    if problem:
        return problem
    # Every byte is read once, not once by each rank.
    mine = sorted(files)[world.rank :: world.size]
    with world.agree():
        found = [line for name in mine if (line := _differs(folder / name, files[name]))]
    return next((line for part in world.gather(found) for line in part), "")


def _read_manifest(folder: Path) -> tuple[dict[str, dict], str]:
    """Name -> {size, sha256}, and what is wrong with the manifest itself."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        # A manifest is itself checked by nothing else: what it says of files must make sense first.
        if not {INDEX, STATE} <= files.keys():
            raise ValueError("incomplete")
        # Names come from a file that users exchange: none may lead out of the folder.
        if any(Path(name).name != name or not isinstance(entry["size"], int) for name, entry in files.items()):
            raise ValueError("not one of a checkpoint")
        return files, ""
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing: half-written, or of an earlier version"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST} is damaged ({error_words(error)})"


def _differs(path: Path, entry: dict) -> str:
    try:
        size = path.stat().st_size
        if size != entry["size"]:  # quick, and catches most copies that were cut short
            return f"{path.name} has {size} bytes, not {entry['size']}"
        return "" if _sha256(path) == entry["sha256"] else f"{path.name} is damaged: its sha256 is another one"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint out of the way; returns the new place."""
    places = (folder.with_name(f"aside-{folder.name}-{n}") for n in range(1, 10**6))
    place = next(p for p in places if not p.exists())
    os.rename(folder, place)
    return place


def settle_on(path: Path) -> None:
    """Make a restored checkpoint the newest of its run: set later ones aside. Called by rank 0."""
    run_dir = path.parent.parent
    for folder in list_checkpoints(run_dir):
        if step_of(folder) > step_of(path):
            # Kept, but under another name: if it stayed, a start without `latest` would take it for the newest.
            warn(f"{folder}: later than {path.name}, from which the run goes on; kept as {set_aside(folder).name}")
    if pointed(run_dir)[0] != path:
        write_text(path.parent / POINTER, path.name + "\n")


def remove_old(run_dir: Path, keep: int, spared: set[int]) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of the steps in ``spared``. Called by rank 0."""
    latest = pointed(run_dir)[0]
    # What latest names is never deleted, though somebody may have set it to an old step.
    folders = [p for p in list_checkpoints(run_dir) if step_of(p) not in spared and p != latest]
    if latest is not None and step_of(latest) not in spared:
        keep -= 1
    for folder in folders[: max(0, len(folders) - keep)]:
        partial = folder.with_name(folder.name + PARTIAL)  # half-deleted, it is no checkpoint any more
        os.rename(folder, partial)
        shutil.rmtree(partial)


# ---- what a checkpoint holds -----------------------------------------------------------------------------


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Everything that training changes, as nested dictionaries of tensors; sharded ones stay sharded.

    The optimizer's settings are left out: they come from the config.
    """
    states: Any = get_state_dict(model, optimizer)
    model_state, optimizer_state = states
    # Under names of parameters and as DTensors: any other layout can find its shares in it.
    return {"model": model_state, "optimizer": optimizer_state["state"], "rng": {"cpu": torch.get_rng_state()}}


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict:
    """Fill model and optimizer from a checkpoint, whatever the number of ranks that wrote it.

    Returns:
        The ``state`` given to :meth:`Checkpoints.save`, with ``step``.

    Raises:
        InputError: damaged, or of another model.
    """
    # An optimizer that has not stepped yet gets its state made by torch, so that there is something to fill.
    tensors = _tensors(model, optimizer)
    load_tensors(path, tensors, world)
    settings = [dict(group) for group in optimizer.param_groups]
    _, optimizer_state = get_state_dict(model, optimizer)
    optimizer_state["state"] = tensors["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=optimizer_state)
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update({key: value for key, value in wanted.items() if key != "params"})
    # Last: whatever was drawn on the way here is forgotten.
    torch.set_rng_state(tensors["rng"]["cpu"])
    return world.decide(lambda: json.loads((path / STATE).read_text(encoding="utf-8")))


class Checkpoints:
    """Writes the checkpoints of a run in a thread, so that training waits only for a copy in the host's memory.

    One is written at a time: a save that comes too early waits for the one before.

    Args:
        keep: number of the newest ones kept.
        spared: steps whose checkpoints are never deleted.
    """

    def __init__(self, run_dir: Path, world: World, keep: int, spared: list[int]):
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.keep, self.spared = keep, set(spared)
        # The thread's collectives go on beside those of training; in one group they would be matched with each other.
        self.world = world.apart()
        # One thread: saves of a rank never overtake each other, so neither do their collectives.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self._copies: dict = {}
        # Here, not at the next save: a run that was killed after its last one makes no other.
        self.world.decide(self._clear)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Begin to write one checkpoint; called by all ranks.

        Args:
            state: plain JSON values, equal on all ranks, returned by :func:`load`.

        Raises:
            RunError: the one before could not be written.
        """
        # The copies are used again, so the thread must be done with them.
        self.wait()
        tensors = _tensors(model, optimizer)
        # Kept from save to save: page-locked memory is slow to allocate.
        self._copies = _copy_to_host(tensors, self._copies)
        if any(tensor.is_cuda for part in tensors.values() for tensor in _leaves(part)):
            # The thread reads the copies without knowing of the stream that fills them.
            torch.cuda.current_stream().synchronize()
        text = json.dumps({"step": step, **state}, indent=2)  # as it is now: training goes on
        self._saving = self._thread.submit(self._write, step, self._copies, text)

    def poll(self) -> None:
        """Raise what the last save failed with, if it has ended.

        Raises:
            RunError: it could not be written (full disk); earlier checkpoints are untouched.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last save; raises as :meth:`poll`."""
        if self._saving is not None:
            # Forgotten first, so that an error is raised once and not at every step.
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Let the last save end, well or not."""
        self._thread.shutdown(wait=True)

    def _write(self, step: int, tensors: dict, state: str) -> None:
        final = self.folder / step_name(step)
        partial = final.with_name(final.name + PARTIAL)
        world = self.world
        try:
            # No rank may write before the folder is there.
            world.decide(lambda: partial.mkdir(parents=True))
            save_tensors(partial, tensors, world)
            with world.agree():
                # Reading them back shows that they can be read.
                mine = partial.glob(f"__{world.rank}_*")  # as DCP names the files of a rank
                files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in mine}
            files = {name: entry for part in world.gather(files) for name, entry in part.items()}
            world.decide(self._end, partial, final, files, state)
        # DCP's own error is not an Exception.
        except (Exception, CheckpointException) as error:
            if world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{final}: checkpoint not written ({error_words(innermost(error))}); earlier checkpoints are untouched"
            ) from error

    def _clear(self) -> None:
        """Remove what a killed run half wrote or half deleted: nobody else writes here while the run holds its lock."""
        for leftover in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(leftover)

    def _end(self, partial: Path, final: Path, files: dict[str, dict], state: str) -> None:
        write_text(partial / STATE, state)
        for name in (STATE, INDEX):
            files[name] = {"size": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
        # The manifest comes last: a folder without one counts as half-written.
        write_json(partial / MANIFEST, {"files": files})
        if final.exists():
            set_aside(final)
        # From here on it is a checkpoint. The pointer moves afterwards, so it never names what is not there yet; old
        # ones go last, when the new one can be found.
        os.rename(partial, final)
        write_text(self.folder / POINTER, final.name + "\n")
        remove_old(self.run_dir, self.keep, self.spared)


def _copy_to_host(tensors: dict, copies: dict) -> dict:
    """Copy nested dictionaries of tensors into ``copies`` of the same shape, made where there are none yet.

    Copies from a GPU go to page-locked memory, at the full speed of the bus; they have not ended on return.
    """
    result = {}
    for name, value in tensors.items():
        copy = copies.get(name)
        if isinstance(value, dict):
            result[name] = _copy_to_host(value, copy or {})  # state of the optimizer by parameter
            continue
        if copy is None:
            # A DTensor's copy is one too: DCP must know which share of the whole it is.
            copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        _local(copy).copy_(_local(value), non_blocking=True)
        result[name] = copy
    return result


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _leaves(tensors: dict) -> list[torch.Tensor]:
    return [t for value in tensors.values() for t in (_leaves(value) if isinstance(value, dict) else [value])]
