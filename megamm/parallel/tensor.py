"""Tensor and sequence parallelism: matrices cut by heads, hidden units and vocabulary; positions spread in between.

    residual stream   [B, S / T, W]: a rank's own positions; norms and residual adds work there
    attention, SwiGLU gather positions -> this rank's heads or hidden units -> scatter the sum over positions
    embedding         this rank's part of the vocabulary and of the patches -> scatter the sum over positions
    head              gather positions -> this rank's part of the vocabulary; ranks exchange two numbers a row

(Megatron-LM, arXiv 1909.08053, and its sequence parallelism, arXiv 2205.05198.) Parameters are DTensors, for FSDP and
checkpoints; modules see plain local tensors. A parameter that is whole on every rank meets only this rank's positions
(or heads), so its gradient is a partial sum, which FSDP completes.
"""

from functools import cache, partial
from typing import Any

import torch
from megamm_kernels import linear_cross_entropy
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megamm.model.experts import Experts
from megamm.model.modality import ModalityBlock
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.collectives import gather, gather_shared, scatter_sum
from megamm.parallel.mesh import Axis, World

CUT = {
    "attention.qkv.weight": 0,
    "attention.qkv.bias": 0,
    "attention.out.weight": 1,
    "gate_up.weight": 0,
    "down.weight": 1,
    "embedding.weight": 0,
    "head.weight": 0,
}
"""Ends of the names of the matrices that are cut, and the dim; all other parameters are whole on every rank."""


def apply_tensor(model: MultimodalModel, world: World) -> None:
    """Cut a model on the meta device over the tensor axis, in place; nothing to do where there is none."""
    axis = world.axis("tensor")
    if axis.size == 1:
        return
    for name, module in model.named_modules():
        if module._parameters and not isinstance(module, Experts):  # see parallel.experts
            _distribute(module, name, axis)
    for block in model.all_blocks():
        _cut_block(block, axis)
    # The blocks of a tower are cut as the decoder's are, so that its stream, too, has a rank's own positions.
    if model.vision is not None:
        first = next(iter(model.vision.blocks.values()))
        first.register_forward_pre_hook(partial(_own_positions, axis=axis))
    if model.head is not None:
        size = model.config.vocab_size
        # The norm works on this rank's positions, the cross entropy needs all of them. Its gradient of x is whole and
        # equal on all ranks, hence gather_shared.
        model.head.norm.register_forward_hook(lambda _, args, x: gather_shared(x, 1, axis.group))
        model.head.cross_entropy = partial(
            linear_cross_entropy,
            process_group=axis.group,
            vocab_start=axis.rank * (size // axis.size),
            vocab_size=size,
        )


def _distribute(module: nn.Module, prefix: str, axis: Axis) -> None:
    """Turn the module's own parameters into DTensors, and let it see their local parts."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    for name, parameter in own.items():
        full = f"{prefix}.{name}"
        dim = next((dim for end, dim in CUT.items() if full == end or full.endswith(f".{end}")), None)
        placement = Replicate() if dim is None else Shard(dim)
        # Equal runs of rows are whole heads, or pairs of gate and up (see model/layers.py), so a plain chunk will do.
        local = parameter.data if dim is None else parameter.data.chunk(axis.size, dim)[axis.rank].contiguous()
        shape, stride = parameter.shape, parameter.stride()
        # The check would be a collective on values, which the meta device does not have.
        whole = DTensor.from_local(local, axis.mesh, [placement], run_check=False, shape=shape, stride=stride)
        module._parameters[name] = nn.Parameter(whole)
    cls: Any = type(module)
    # A subclass, since a property has to be on the class. Modules of one class and the same parameters share it.
    module.__class__ = _with_local_parameters(cls, tuple(own))


@cache
def _with_local_parameters(cls: type, names: tuple[str, ...]) -> type:
    """A subclass whose parameters read as plain local tensors; registered ones stay DTensors."""
    return type(cls.__name__, (cls,), {name: property(partial(_local, name=name)) for name in names})


def _local(module: nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
        return parameter  # FSDP at work on its shards, outside of a forward
    # In a forward FSDP has gathered its shares, so only the tensor axis is left.
    (placement,) = parameter.placements
    return parameter.to_local(grad_placements=[Partial() if placement.is_replicate() else placement])


def _cut_block(block: Any, axis: Axis) -> None:
    if isinstance(block, ModalityBlock):
        # Its norms see all positions: which weights a position meets is known for whole rows. Their gradients are
        # partial sums all the same, since each rank goes on with its own heads or hidden units.
        block.enter = partial(gather, dim=1, group=axis.group)
        block.leave = partial(scatter_sum, dim=1, group=axis.group)
        return
    for module in (block.attention, block.feed_forward):
        # Hooks, so that model/ knows of no ranks; the first argument is the stream, further ones stay.
        module.register_forward_pre_hook(lambda _, args: (gather(args[0], 1, axis.group), *args[1:]))
        module.register_forward_hook(lambda _, args, x: scatter_sum(x, 1, axis.group))


def _own_positions(_: nn.Module, args: tuple, axis: Axis) -> tuple:
    """The first block of a vision tower takes this rank's positions of every image."""
    # No collective: every rank has embedded all patches, and its gradient of that is a part of the sum, like that of
    # any whole parameter.
    return args[0].chunk(axis.size, 1)[axis.rank].contiguous(), *args[1:]
