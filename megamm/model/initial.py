"""First values of parameters: each a function of (seed, the parameter's name), whatever else is built or where.

So half of the blocks built alone have the whole model's weights, any rank can make its own share, and neither the
order of construction nor the layout changes a run. Values are drawn on the CPU in blocks of rows, each with a seed of
its own: a rank that holds a few rows of a large matrix draws no others.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

# Part of what decides the values: another number gives other models of the same seed.
BLOCK_VALUES = 1 << 16

Share = Callable[[torch.Tensor], tuple[torch.Tensor, tuple[slice, ...]]]
"""From a parameter to the part of it that lies here, and where that part lies in the whole."""


def whole(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """The share of one process alone."""
    return parameter, tuple(slice(0, size) for size in parameter.shape)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, share: Share = whole) -> None:
    """Fill every parameter of ``model`` in place; buffers begin at 0.

    Args:
        model: each module that holds parameters of its own says in ``initial`` how they begin: name -> standard
            deviation of a normal distribution with mean 0 (0 for zeros), or None for ones.
        seed: of the whole model.
        share: what of each parameter lies here, for a model that is spread over ranks.
    """
    # On the meta device they had no values, and to_empty gives them whatever lay there.
    for buffer in model.buffers():
        buffer.zero_()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            local, where = share(parameter)
            std = module.initial[name]
            if std is None or std == 0:
                local.fill_(1.0 if std is None else 0.0)
            elif local.numel():  # uneven shards leave some ranks nothing
                # By name and not by order: a stage, or a model with one part more, gives every other part the same
                # values.
                full_name = f"{module_name}.{name}" if module_name else name
                local.copy_(normal_values(parameter.shape, where, std, seed, full_name))


def normal_values(shape: torch.Size, where: tuple[slice, ...], std: float, seed: int, name: str) -> torch.Tensor:
    """The part ``where`` (no steps) of the float32 values of shape ``shape`` that belong to (seed, name)."""
    # Of the whole shape, never of a share: blocks lie the same however a parameter is cut.
    rows = max(1, BLOCK_VALUES // max(1, shape[1:].numel()))
    first, last = where[0].start // rows, -(-where[0].stop // rows)
    blocks = []
    for block in range(first, last):
        digest = hashlib.blake2b(f"{seed} {block} {name}".encode(), digest_size=7).digest()
        # On the CPU: devices draw other numbers from the same seed.
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        size = min(rows, shape[0] - block * rows)
        values = torch.randn((size, *shape[1:]), generator=generator)
        start, stop = max(where[0].start - block * rows, 0), min(where[0].stop - block * rows, size)
        blocks.append(values[(slice(start, stop), *where[1:])])
    return torch.cat(blocks).mul_(std)
