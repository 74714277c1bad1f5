"""Data parallelism: parameters, gradients and optimizer state sharded over ranks (FSDP2, ZeRO-3)."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard_over_data(model: nn.Module, mesh: DeviceMesh | None, dtype: torch.dtype) -> None:
    """Shard ``model`` in place, a unit per block and one for the rest; nothing to do without a mesh.

    Blocks are gathered in ``dtype``; gradients are averaged over ranks in float32.
    """
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*getattr(model.vision, "blocks", []), *model.blocks]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients in the coming backward, or only accumulate them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
