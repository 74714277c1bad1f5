"""Processes and devices: who runs where, which ranks share an axis, and how all of them come to one mind.

Whatever is read from files is decided by rank 0 (:meth:`World.decide`), and what may fail on one rank alone is run
under :meth:`World.agree`: a failure anywhere is then raised everywhere, at once.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megamm.config import Config
from megamm.errors import InputError, RunError, error_text
from megamm.parallel.layout import AXES, Layout, resolve_layout
from megamm.parallel.store import meet

JOIN_TIMEOUT = timedelta(minutes=2)
"""How long a rank waits at its start for the others."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """This rank's place on one axis of the layout.

    Attributes:
        rank, size: place among the ranks that differ in this axis alone, and their number.
        group: these ranks; None where there is only one.
        mesh: the same as a one-dimensional mesh.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all.

    Attributes:
        rank, size: global rank and number of ranks.
        device: where this rank computes.
        layout: sizes of all axes.
        mesh: all ranks, dims ``pipeline, dp_replicate, shard, tensor``, where shard is dp_shard x context; None for a
            single process.
        axes: by name, those of the layout and ``shard``.
        group: the ranks that take part in the collectives below; None for the default group.
        expert_mesh: all ranks, dims ``pipeline, dp_replicate, expert_shard, expert, tensor``, where expert_shard x
            expert is shard; None without an expert axis.
    """

    rank: int
    size: int
    device: torch.device
    layout: Layout = field(default_factory=Layout)
    mesh: DeviceMesh | None = None
    axes: dict[str, Axis] = field(default_factory=dict)
    group: dist.ProcessGroup | None = None
    expert_mesh: DeviceMesh | None = None

    def axis(self, name: str) -> Axis:
        """This rank's place on an axis; on one that is not used, alone."""
        # A single process has no axes at all, nor has a World that is not laid out yet.
        return self.axes.get(name, Axis())

    @property
    def data_rank(self) -> int:
        """Which rows of a batch this rank works on; ranks that differ in other axes work on the same."""
        return self.axis("dp_replicate").rank * self.layout.dp_shard + self.axis("dp_shard").rank

    @property
    def data_size(self) -> int:
        """Into how many parts the rows of a batch are dealt."""
        return self.layout.data_ranks

    @property
    def is_first_of_rows(self) -> bool:
        """Whether this rank speaks for its rows where all that share them would say the same."""
        return all(self.axis(name).rank == 0 for name in ("pipeline", "context", "tensor"))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def barrier(self) -> None:
        """Wait for all ranks."""
        # On the CPU, hence over gloo: a barrier of NCCL would wait for the device as well.
        self.all_reduce(torch.zeros((), dtype=torch.int64))

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list:
        """What each rank gives, in the order of ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size  # filled in place
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Run a block without collectives; if it fails on any rank, the first one's error is raised on all.

        It also waits for all ranks.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        # In the usual case one number is summed; the messages, which are slow to gather, travel only after a failure.
        failed = self.all_reduce(torch.tensor(int(error is not None)))
        if not failed:
            return
        report = (isinstance(error, InputError), _describe(error)) if error else None
        reports = self.gather(report)
        # The same on all ranks: they end with one message and one exit code, and its own rank keeps the traceback.
        first = next(rank for rank, said in enumerate(reports) if said)
        if error is not None and first == self.rank and not isinstance(error, OSError):
            raise error
        is_input, message = reports[first]
        raise (InputError if is_input else RunError)(message) from error

    def decide(self, function: Callable, *arguments: Any) -> Any:
        """What ``function`` returns on rank 0, on all ranks; what it raises there, too."""
        value = None
        with self.agree():
            if self.rank == 0:
                value = function(*arguments)
        # Only reached if rank 0 has a value: otherwise agree() has raised everywhere.
        return self.broadcast(value)

    def apart(self) -> "World":
        """The same ranks in a group of their own, on the host: its collectives never meet those of training."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.size > 1 else self


def lost_contact(error: BaseException) -> bool:
    """Whether an error comes from a collective that another rank no longer takes part in."""
    texts = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _describe(error: BaseException) -> str:
    if isinstance(error, InputError | RunError | OSError):
        return error_text(error)
    return f"{socket.gethostname()}: {type(error).__name__}: {error}"


def join() -> World:
    """Join the processes that torchrun started, if any; once. Nothing is known yet of devices and axes.

    Raises:
        InputError: torchrun's variables are incomplete.
        RunError: some rank did not come within two minutes.
    """
    if dist.is_initialized():
        return World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(rank=0, size=1, device=torch.device("cpu"))
    # gloo beside NCCL: counts known on the host are summed there, without waiting for the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = meet(JOIN_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=JOIN_TIMEOUT)
        dist.all_reduce(torch.zeros(()))  # the first one connects the ranks
    except ValueError as error:
        raise InputError(f"WORLD_SIZE is {size}, but {error}; start with torchrun") from error
    except RuntimeError as error:  # DistError among them
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"rank {rank} of {size}: not all ranks met at {address} within {JOIN_TIMEOUT.seconds} s ({reason}); "
            "is one missing, or is that port closed between the nodes?"
        ) from error
    return World(rank=rank, size=size, device=torch.device("cpu"))


def init_world(config: Config) -> World:
    """Join the processes that torchrun started (or be alone) and pick the device.

    Args:
        config: resolved (megamm.resolve).

    Raises:
        InputError: the layout does not fit the model or the number of ranks, or there is no CUDA device.
        RunError: some rank did not come.
    """
    world = join()
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    # Torchrun numbers the ranks of a node from 0; each takes the device of its number.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    with world.agree():
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError("train.device: cuda, but torch sees no CUDA device; set cpu or auto")
        layout = resolve_layout(config, world.size)
        if kind == "cuda":
            # Before the mesh is made: it and NCCL go by the current device.
            torch.cuda.set_device(device)
        set_deterministic(config.train.deterministic)
    world = replace(world, device=device, layout=layout)
    if world.size == 1:
        return world
    # A step may take longer than joining: compilation, a slow disk, a long plan of rows.
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=config.train.timeout_minutes))
    return replace(world, **make_mesh(kind, layout))


def set_deterministic(wanted: bool) -> None:
    """Let torch refuse operations that may give other results on the same device, or no longer."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads at its first product
    # Also where it is not wanted: a run of the same process before this one may have asked for it.
    torch.use_deterministic_algorithms(wanted)


def make_mesh(kind: str, layout: Layout) -> dict:
    """``mesh``, ``axes`` and ``expert_mesh`` of a :class:`World`."""
    # Two views of the same ranks: parameters are sharded over dp_shard x context, rows and positions over each alone.
    sizes = layout.pipeline, layout.dp_replicate, layout.shard_ranks, layout.tensor
    # Every rank makes every group, in the same order, also those that it is not in: making one is a collective.
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=("pipeline", "dp_replicate", "shard", "tensor"))
    fine = init_device_mesh(kind, tuple(getattr(layout, name) for name in AXES), mesh_dim_names=AXES)
    axes = {"shard": _axis(mesh, "shard")} | {name: _axis(fine, name) for name in ("dp_shard", "context")}
    axes |= {name: _axis(mesh, name) for name in ("pipeline", "dp_replicate", "tensor")}
    expert_mesh = None
    if layout.expert > 1:
        cut = sizes[0], sizes[1], layout.shard_ranks // layout.expert, layout.expert, layout.tensor
        names = "pipeline", "dp_replicate", "expert_shard", "expert", "tensor"
        expert_mesh = init_device_mesh(kind, cut, mesh_dim_names=names)
        axes["expert"] = _axis(expert_mesh, "expert")
    return {"mesh": mesh, "axes": axes, "expert_mesh": expert_mesh}


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    part = mesh[name]
    # Code that has no group takes part in no collective: an axis of one rank costs nothing.
    group = part.get_group() if part.size() > 1 else None
    return Axis(rank=part.get_local_rank(), size=part.size(), group=group, mesh=part)
