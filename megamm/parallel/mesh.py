"""Processes and devices: who runs where."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megamm.config import Config
from megamm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all.

    Attributes:
        rank, size: global rank and number of ranks.
        device: where this rank computes.
        mesh: one axis, ``data``; None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier()


def init_world(config: Config) -> World:
    """Join the processes that torchrun started (or be alone) and pick the device.

    Raises:
        InputError: the layout does not fit the number of ranks, or there is no CUDA device.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device: cuda, but torch sees no CUDA device; set cpu or auto")
    if config.parallel.data not in (None, size):
        raise InputError(
            f"parallel.data: {config.parallel.data}, but torchrun started {size} ranks; they must be equal"
        )
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    mesh = None
    if size > 1:
        if not dist.is_initialized():
            # gloo beside NCCL: counts known on the host are summed there, without waiting for the device.
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=60))
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("data",))
    return World(rank=rank, size=size, device=device, mesh=mesh)
