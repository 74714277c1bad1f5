"""How one of our parameters is made of other programs' tensors, and the way back; also on the meta device, for shapes.

The rotary layout needs no change: in both, entry i of a head turns with entry i + D / 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class TensorLayout:
    """``join``: their tensors to ours; ``split``: ours to theirs. Each is exact and undoes the other."""

    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    split: Callable[[torch.Tensor], Parts]
    is_same: bool = False


SAME = TensorLayout(lambda parts: parts[0], lambda ours: (ours,), is_same=True)
"""One tensor, as it is."""

STACKED = TensorLayout(lambda parts: torch.stack(tuple(parts)), lambda ours: ours.unbind(0))
"""Vectors of the same length: the norms of queries and of keys, [2, D]."""


def _interleave(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tuple(parts), dim=1).flatten(0, 1)


SIDE_BY_SIDE = TensorLayout(_interleave, lambda ours: (ours[0::2], ours[1::2]))
"""Gate and up, [F, ...] each: row by row in turn, [F * 2, ...]."""


def heads(query_heads: int, head_dim: int) -> TensorLayout:
    """Rows of queries [G * R * D, ...], keys and values [G * D, ...]: by groups of heads, [G * (R + 2) * D, ...].

    Args:
        query_heads: R, heads of queries that share one of keys and values.
        head_dim: D.
    """
    sizes = (query_heads, 1, 1)

    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        groups = [part.unflatten(0, (-1, size, head_dim)) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(groups, dim=1).flatten(0, 2)

    def split(ours: torch.Tensor) -> Parts:
        groups = ours.unflatten(0, (-1, query_heads + 2, head_dim))
        return tuple(part.flatten(0, 2) for part in groups.split(sizes, dim=1))

    return TensorLayout(join, split)


def _pixels_last(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].permute(0, 2, 3, 1).flatten(1)


def _channels_first(ours: torch.Tensor, patch_size: int) -> Parts:
    return (ours.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2),)


def patches(patch_size: int) -> TensorLayout:
    """A convolution's weight [W, 3, P, P]: one row of pixels, channel last, for each output, [W, P * P * 3]."""
    return TensorLayout(_pixels_last, partial(_channels_first, patch_size=patch_size))
