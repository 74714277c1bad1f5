"""A run's directory: one process group at a time, one config and one set of data for ever.

A run may be lengthened: more steps are the same run as long as its rate is constant. Where the ranks meet in it, and
what was begun there, is decided here; nothing here trains.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import megamm
from megamm.config import Config, ScheduleConfig, load
from megamm.errors import InputError, RunError
from megamm.files import write_json, write_text
from megamm.model.counts import ParameterCounts
from megamm.parallel.mesh import World
from megamm.settings import marked, to_dict, to_yaml
from megamm.training.schedule import cooldown_start

LOCK = ".lock"

TRAINING_DATA = ("tokenizer", "preprocessing", "train")
"""Fingerprints that decide what a model is trained on."""

DATA_PARTS = {
    "tokenizer": "tokenizer",
    "preprocessing": "preparation of images",
    "train": "training split",
    "val": "validation split",
}
"""How errors call what a fingerprint is of."""


@contextmanager
def lock(run_dir: Path, patience: float = 10.0) -> Iterator[str]:
    """Keep other processes out of ``run_dir`` within the block; waits some seconds for a killed one to go.

    Gives a token, new each time, that lies in the folder: who can read it sees the same folder.

    Raises:
        RunError: another process still trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # Opened without emptying it: until the lock is ours, the token in it is another run's.
    with (run_dir / LOCK).open("a+") as handle:
        deadline = time.monotonic() + patience
        while True:
            try:
                # The system lets go of it when its holder dies, however it dies: no lock is ever left behind.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RunError(f"{run_dir}: another process is training here; stop it first") from None
                time.sleep(0.2)
        # New each time: on a disk of its own a node may have an old file of the same name.
        token = uuid.uuid4().hex
        handle.truncate(0)
        handle.write(token)
        handle.flush()
        os.fsync(handle.fileno())  # other nodes look for it
        yield token


@contextmanager
def occupy(run_dir: Path, world: World) -> Iterator[None]:
    """Keep other runs out of a run directory that all ranks see; called by all ranks.

    Raises:
        RunError: another process trains there.
        InputError: a rank does not see what rank 0 writes there.
    """
    with ExitStack() as stack:
        # Only rank 0 holds the lock: ranks of one run would shut each other out.
        token = world.decide(lambda: stack.enter_context(lock(run_dir)))
        with world.agree():
            # Ranks on folders of their own would each write a part of every checkpoint.
            _find_token(run_dir, token, world.rank)
        yield


def _find_token(run_dir: Path, token: str, rank: int, patience: float = 10.0) -> None:
    """Read rank 0's token; network file systems show a new file to others only after some seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if (run_dir / LOCK).read_text() == token:
                return
        except OSError:
            pass  # not there yet
        if time.monotonic() > deadline:
            raise InputError(
                f"train.run_dir: {run_dir.absolute()} of rank {rank} on {socket.gethostname()} is not the folder that "
                "rank 0 writes to; give an absolute path on a disk that all nodes share"
            )
        time.sleep(0.2)


# ---- what was begun here ---------------------------------------------------------------------------------


def is_begun(run_dir: Path) -> bool:
    """Whether something was trained here; a start that failed before its first step leaves nothing to keep."""
    metrics = run_dir / "metrics.jsonl"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    # Checkpoints that were set aside count, half-written ones do not: their names do not end in a digit.
    return logged or (run_dir / "result.json").is_file() or any((run_dir / "checkpoints").glob("*step-*[0-9]"))


def finished(run_dir: Path, config: Config) -> dict | None:
    """The result.json of a run that has reached its last step; None for one that is not finished, or is to go on."""
    path = run_dir / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["steps"] >= config.train.steps else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not the result of a run ({error}); delete it, and the run ends again from its last checkpoint"
        ) from error


def check_settings(run_dir: Path, config: Config) -> None:
    """Check that a run directory, where something was trained, is of this (resolved) config.

    Raises:
        InputError: it holds a run of other settings.
    """
    changed = changed_settings(run_dir, config)
    if changed:
        raise InputError(
            f"{run_dir / 'config.yaml'}: made with other settings ({'; '.join(changed)}); "
            "restore them, or set train.run_dir to a new folder"
        )


def changed_settings(run_dir: Path, config: Config) -> list[str]:
    """What tells a (resolved) config from that of a begun run, as ``section.key: old -> new``.

    More steps are no change: the run is lengthened (see :func:`constant_until`).
    """
    if not is_begun(run_dir):
        return []
    old, new = _settings(run_dir), to_dict(config)
    free = set(marked(Config, "free"))
    if old["train"]["steps"] < new["train"]["steps"]:
        free.add("train.steps")
    return _differences(old, new, free)


def constant_until(run_dir: Path, config: Config) -> int | None:
    """Last step that a begun run shares with a longer one of the same settings: where its cool-down began.

    None where the run is not begun, or is not to be lengthened.
    """
    if not is_begun(run_dir):
        return None
    steps = _settings(run_dir)["train"]["steps"]
    return cooldown_start(config.schedule, steps) if steps < config.train.steps else None


def check_branch(trunk: Path, config: Config, data: dict) -> None:
    """Check that a branch does what its trunk would: they may differ in cool-down, length, evaluation and place.

    Args:
        data: see :func:`megamm.data.shards.fingerprints`, of each source.

    Raises:
        InputError: they differ, each difference named; or the trunk cools down before the branch leaves it.
    """
    if not (trunk / "config.yaml").exists():
        raise InputError(f"train.branch_from: {trunk} holds no run (no config.yaml)")
    old = _settings(trunk)
    free = set(marked(Config, "free"))
    free |= {"train.steps", "train.branch_from", "schedule.cooldown", "schedule.cooldown_fraction"}
    new = to_dict(config)
    # Validation changes no weights.
    free |= {key for key in {**_flat(old), **_flat(new)} if key.startswith("eval.")}
    found = _differences(old, new, free)
    found += _changed_data(recorded_data(trunk), data, TRAINING_DATA)
    start = cooldown_start(config.schedule, config.train.steps)
    end = cooldown_start(ScheduleConfig(**old["schedule"]), old["train"]["steps"])
    # Where the rates part, the trunk's steps are no longer those that the branch would have made.
    if end < start:
        found.append(f"it cools down from step {end}, before the branch leaves it at step {start}")
    if found:
        raise InputError(
            f"train.branch_from: {trunk} is not the trunk of this run ({'; '.join(found)}); "
            "make them agree, or leave train.branch_from out to train from the start"
        )


def check_data(run_dir: Path, data: dict) -> None:
    """Check that the data are still those that a begun run was trained on.

    Args:
        data: see :func:`megamm.data.shards.fingerprints`, of each source.

    Raises:
        InputError: they are others.
    """
    changed = _changed_data(recorded_data(run_dir), data) if is_begun(run_dir) else []
    if changed:
        raise InputError(
            f"{run_dir / 'run.json'}: the run was begun on other data ({'; '.join(changed)}); "
            "put them back, or set train.run_dir to a new folder"
        )


def claim(run_dir: Path, config: Config, about: dict) -> None:
    """Write ``run.json`` and ``config.yaml`` of a run that begins or is lengthened; checked before.

    A lengthened run's result and log so far are kept as ``result-STEPS.json`` and ``metrics-STEPS.jsonl``.

    Args:
        about: see :func:`run_facts`.
    """
    if not is_begun(run_dir):
        write_json(run_dir / "run.json", about)
    else:
        steps = _settings(run_dir)["train"]["steps"]
        if steps < config.train.steps:
            if (run_dir / "metrics.jsonl").exists():
                # A copy: the log itself goes on, and opening it drops the lines of the cool-down.
                shutil.copyfile(run_dir / "metrics.jsonl", run_dir / f"metrics-{steps:08d}.jsonl")
            if (run_dir / "result.json").exists():
                os.replace(run_dir / "result.json", run_dir / f"result-{steps:08d}.json")
    write_text(run_dir / "config.yaml", to_yaml(config))


def _settings(run_dir: Path) -> dict:
    """The settings that a run was begun with; ones that have been added since have their defaults."""
    path = run_dir / "config.yaml"
    if not path.exists():
        raise InputError(f"{path}: missing, though a run was begun here; put it back, or use a new train.run_dir")
    return to_dict(load(path))


def recorded_data(run_dir: Path) -> dict:
    """The fingerprints of each source that ``run.json`` holds (see :func:`megamm.data.shards.fingerprints`).

    Raises:
        InputError: it is missing or does not hold them.
    """
    path = run_dir / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["fingerprints"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: does not say which data the run was begun on ({type(error).__name__}: {error}); put it back"
        ) from error


def run_facts(counts: ParameterCounts, world: World, data: dict) -> dict:
    """What run.json says: versions, device, parameter counts, and the fingerprints of the data of each source."""
    return {
        "megamm": megamm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine(),
        "world_size": world.size,
        "params": counts.total,
        "params_active": counts.active,
        "params_decoder": counts.decoder,
        "params_vision": counts.vision,
        "flops_per_token": 6 * counts.active_decoder,
        "flops_per_patch_vision": 6 * counts.vision,
        "fingerprints": data,
    }


def _differences(old: dict, new: dict, free: set[str]) -> list[str]:
    """Settings that differ, except those in ``free``, as ``section.key: old -> new``."""
    old, new = _flat(old), _flat(new)
    # Where the data lie is free: their fingerprints tell what they are.
    # Keys of both: a setting that only one of them has is a difference.
    keys = [key for key in {**old, **new} if key not in free and not re.fullmatch(r"data\.sources\..*\.path", key)]
    found = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    return found


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as ``section.key: value``; the sources of data also by their order, which the seed depends on."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            if prefix == "data." and key == "sources":
                # The data order draws by the number of a source, so the same sources in another order are other data.
                flat["data.sources"] = ", ".join(value)
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _changed_data(old: dict, new: dict, parts: tuple[str, ...] | None = None) -> list[str]:
    """Fingerprints that differ, as ``data.sources.name: the ... is another one``; all of them, or only ``parts``."""
    return [
        f"data.sources.{name}: another {DATA_PARTS.get(part, part)} ({str(before)[:12]} -> {str(after)[:12]})"
        for name in new
        for part in (parts or new[name])
        if (before := old.get(name, {}).get(part)) != (after := new[name].get(part))
    ]


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
