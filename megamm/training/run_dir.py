"""A run's directory: one process group at a time, one config for ever."""

import fcntl
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import megamm
from megamm.config import Config, read_yaml, to_dict, to_yaml
from megamm.errors import InputError, RunError
from megamm.files import write_json, write_text
from megamm.scaling.flops import ParameterCounts

FREE_SETTINGS = {
    "train": ("run_dir", "device", "compile", "micro_rows", "log_every", "peak_flops"),
    "data": ("workers", "prefetch"),
    "checkpoint": ("every", "steps", "keep", "final"),
    "parallel": ("data",),
    "eval": ("every",),
}
"""Settings that may change when a run is resumed: they alter neither the model nor the order of the data."""


@contextmanager
def lock(run_dir: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other processes out of ``run_dir`` within the block; waits some seconds for a killed one to go.

    Raises:
        RunError: another process still trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as handle:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RunError(f"{run_dir}: another process is training here; stop it first") from None
                time.sleep(0.2)
        yield


def claim(run_dir: Path, config: Config, counts: ParameterCounts, world_size: int, device: torch.device) -> None:
    """Write ``run.json`` and ``config.yaml``, or check that those there are of the same run.

    Raises:
        InputError: the directory holds a run of other settings.
    """
    check_settings(run_dir, config)
    if not (run_dir / "config.yaml").exists():
        write_json(run_dir / "run.json", _describe(counts, world_size, device))
        write_text(run_dir / "config.yaml", to_yaml(config))


def check_settings(run_dir: Path, config: Config) -> None:
    """Check that a run directory, where it is in use, is of this (resolved) config.

    Raises:
        InputError: it holds a run of other settings.
    """
    path = run_dir / "config.yaml"
    changed = _differences(read_yaml(path), to_dict(config)) if path.exists() else []
    if changed:
        raise InputError(
            f"{path}: made with other settings ({'; '.join(changed)}); "
            "restore them, or set train.run_dir to a new folder"
        )


def _describe(counts: ParameterCounts, world_size: int, device: torch.device) -> dict:
    return {
        "megamm": megamm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "world_size": world_size,
        "params": counts.total,
        "params_active": counts.total,
        "params_decoder": counts.decoder,
        "params_vision": counts.vision,
        "flops_per_token": 6 * counts.decoder,
        "flops_per_patch_vision": 6 * counts.vision,
    }


def _differences(old: dict, new: dict) -> list[str]:
    """Settings that differ, but for those free to change, as ``section.key: old -> new``."""
    found = []
    for section in new:
        free = FREE_SETTINGS.get(section, ())
        for key, value in new[section].items():
            before = old.get(section, {}).get(key)
            if key not in free and before != value:
                found.append(f"{section}.{key}: {before} -> {value}")
    return found


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
