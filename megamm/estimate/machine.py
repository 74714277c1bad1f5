"""What this machine has: memory of the device that a run would take here."""

import os

import torch

from megamm.config import Config


def device_here(config: Config) -> str:
    """``cuda`` or ``cpu``: where the run would compute if it were started on this machine."""
    if config.train.device != "auto":
        return config.train.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_per_rank(kind: str, ranks_here: int) -> int | None:
    """Bytes that one rank can use: a GPU's memory, or its share of the host's; None if that is not known here."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
    except (ValueError, OSError):  # no such names on this system
        return None
