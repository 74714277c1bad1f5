"""Data parallelism: parameters, gradients and optimizer state sharded over ranks (FSDP2, ZeRO-3)."""

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from megamm.model.multimodal import MultimodalModel
from megamm.parallel.experts import dim_of_shares, expert_layers, shard_spread_experts
from megamm.parallel.mesh import World


def shard_over_data(model: MultimodalModel, world: World, dtype: torch.dtype, reshard_after_forward: bool) -> None:
    """Shard ``model`` in place: a unit per block, one each for tower, embedding and head; of one process, nothing.

    Units are gathered in ``dtype``, routers in float32; gradients are averaged over the ranks of dp_replicate,
    dp_shard and context in float32.
    """
    # From the inside out: each call of FSDP takes the parameters that no unit has yet.
    shard_spread_experts(model, world, dtype, reshard_after_forward)
    for layer in expert_layers(model):
        # A unit is gathered in one dtype, and routers must not be rounded.
        shard_unit(layer.router, world, torch.float32, reshard_after_forward)
    # A table that is also the head's matrix is needed at both ends: it stays in the unit of the whole model.
    ends = [] if model.config.tied_embeddings else [model.embedding, model.head]
    # The model itself comes last: it takes what is left, and is the root through which FSDP steers all units.
    for unit in [*model.all_blocks(), model.vision, *ends, model]:
        if unit is not None:
            shard_unit(unit, world, dtype, reshard_after_forward)


def shard_unit(module: nn.Module, world: World, dtype: torch.dtype, reshard_after_forward: bool) -> None:
    """Make a module one FSDP unit of those of its parameters that are in no unit yet; of one process, nothing."""
    if world.mesh is None:
        return
    # FSDP replicates over the first of two dims and shards over the second (HSDP).
    mesh = world.mesh[("dp_replicate", "shard") if world.layout.dp_replicate > 1 else ("shard",)]
    # FSDP's cast of inputs would reach into a block's context and round the float32 tables of rotary positions.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    cut = partial(dim_of_shares, num_ranks=world.axis("shard").size)
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        shard_placement_fn=cut,
        reshard_after_forward=reshard_after_forward,
    )


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients in the coming backward, or only accumulate them locally."""
    if isinstance(model, FSDPModule):
        # Without it a pass adds to gradients that are whole on each rank: less traffic, more memory.
        model.set_requires_gradient_sync(sync)


def share_of(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """What of a parameter lies on this rank, and where that lies in the whole (see model.initial.initialise)."""
    where = [slice(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return parameter, tuple(where)
    mesh, placements = parameter.device_mesh, parameter.placements
    # Outer axes first: each cuts what the one before it has left.
    axes = list(range(mesh.ndim))
    if any(isinstance(p, _StridedShard) for p in placements):
        axes.reverse()  # sharded over the inner axes first, then each share again (tensor, then data)
    for axis in axes:
        placement = placements[axis]
        if isinstance(placement, (Shard, _StridedShard)):
            dim, size, rank = placement.dim, mesh.size(axis), mesh.get_local_rank(axis)
            start, stop = where[dim].start, where[dim].stop
            # As torch.chunk cuts: all shares are equal but the last ones, which may be smaller or empty.
            each = -(-(stop - start) // size)
            where[dim] = slice(min(start + rank * each, stop), min(start + (rank + 1) * each, stop))
    return parameter.to_local(), tuple(where)


def gather_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over ranks, all of which must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not any(isinstance(p, _StridedShard) for p in tensor.placements):
        return tensor.full_tensor()
    # Sharded twice, the inner axes first: no chain of gathers puts that together, so each rank adds its share to zeros.
    local, where = share_of(tensor)
    whole = local.new_zeros(tensor.shape)
    whole[where] = local
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            dist.all_reduce(whole, group=tensor.device_mesh.get_group(axis))
    return whole


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float, world: World) -> torch.Tensor:
    """Scale all gradients so that the norm of the whole model's is at most ``max_norm``.

    Returns:
        The norm before, float32 scalar, the same on all ranks: each parameter counts once, however it is spread.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Wide, so that the norm hardly depends on how the squares are dealt to ranks.
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    locals_ = []
    for gradient in gradients:
        copies, local = 1, gradient
        if isinstance(gradient, DTensor):
            local = gradient.to_local()
            sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
            # All ranks are summed below, so what several of them hold would count several times.
            copies = math.prod(size for placement, size in sizes if placement.is_replicate())
        locals_.append(local)
        total += local.double().square().sum() / copies
    norm = world.all_reduce(total).sqrt().float()
    # The 1e-6 is that of torch's clip_grad_norm_. Gradients are scaled by 1 rather than left alone: to know which, the
    # host would have to wait for the device.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(locals_, scale)
    return norm
