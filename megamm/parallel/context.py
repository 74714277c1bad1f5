"""Context parallelism: the positions of each row dealt to the ranks of an axis, by the attention work they make.

A rank holds its positions in their order, so that ``lo`` and ``hi`` stay non-decreasing; they name keys of the whole
row. The model sees a batch with fewer positions; only attention looks further: keys and values of all ranks are
gathered and put in the row's order, or passed around a ring whose partial results are merged by log-sum-exp.

Shapes: B rows, S positions, C ranks of the axis, s = S / C.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from megamm_kernels import AttentionMask, interval_attention

from megamm.config import ModelConfig
from megamm.model.context import ends_seen, make_context, position_kinds
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.collectives import gather, shift
from megamm.parallel.mesh import Axis, World
from megamm.sequence import Batch, grid_positions, keys_seen, patches_per_image

CHUNKS = 16
"""Pieces of a row that each rank gets: enough to even out the work, few enough to keep neighbours together."""
# Log-sum-exp that stands for no key seen: exp(it - any real one) is 0, and it is finite, also in float32.
NO_KEY = -1e30


@dataclass(kw_only=True)
class CutBatch(Batch):
    """A rank's positions of packed rows; ``lo`` and ``hi`` are positions of the whole row.

    Attributes:
        key_index: int64 [B, S], where each position of a row lies among the ranks' positions, end to end.
        own_positions: int64 [C, B, s], the positions of every rank.
        grid_places: int32 [2, B, s], rows and columns from :func:`megamm.sequence.grid_positions`, which needs whole
            rows; empty where rotary positions are those in the sequence.
        feature_rows: int64 [P], the row of each image position's feature among those that the ranks' vision towers
            make, end to end; empty without a tower.

    ``patches`` are those of this rank's positions, and ``grids`` those of all images; with a vision tower both are of
    the images that this rank's tower sees.
    """

    key_index: torch.Tensor
    own_positions: torch.Tensor
    grid_places: torch.Tensor
    feature_rows: torch.Tensor


def deal_positions(work: np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal the positions of a row in pieces, costly ones first, each to the rank with the least work that has room.

    Args:
        work: [S], of each position; S is a multiple of ``num_ranks``.

    Returns:
        int64 [C, S / C], increasing along each row.
    """
    size = len(work) // num_ranks
    # All pieces are equally long, and each rank gets equally many: what is gathered has one shape on all ranks.
    pieces = next(n for n in range(min(CHUNKS, size), 0, -1) if size % n == 0)
    length = size // pieces
    costs = work.reshape(-1, length).sum(1)
    load = np.zeros(num_ranks)
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    # Stable, and ties go to the lowest rank: every rank makes the same deal by itself, without a word to the others.
    for piece in np.argsort(-costs, kind="stable").tolist():
        rank = min((r for r in range(num_ranks) if len(held[r]) < pieces), key=lambda r: (load[r], r))
        held[rank].append(piece)
        load[rank] += costs[piece]
    # Back in the row's order: the kernels need lo and hi that never decrease.
    starts = np.sort(np.array(held), axis=1) * length
    return (starts[:, :, None] + np.arange(length)).reshape(num_ranks, size)


def cut_batch(batch: Batch, axis: Axis, image_patches: int | None, on_grid: bool = False) -> CutBatch:
    """This rank's positions of a batch on the CPU.

    Args:
        image_patches: patches of a full image, for a model with a vision tower: images are dealt to the ranks, each to
            one. None: a rank keeps the patches at its own positions.
        on_grid: whether the rotary positions of patches are rows and columns.
    """
    work = keys_seen(batch.lo, batch.hi).numpy() + 1
    # [C, B, s]: each row is dealt by itself, as its documents say.
    own_positions = torch.from_numpy(np.stack([deal_positions(row, axis.size) for row in work], axis=1))
    own = own_positions[axis.rank]
    num_rows, length = batch.tokens.shape
    key_index = torch.empty(num_rows, length, dtype=torch.int64)
    # The inverse of the deal: own_positions, end to end, say which position lies at each slot of the gathered keys.
    key_index.scatter_(1, own_positions.transpose(0, 1).flatten(1), torch.arange(length).expand(num_rows, -1))
    # Where a position of the whole rows lies in this rank's flattened ones; -1: on another rank.
    place = torch.full((num_rows, length), -1, dtype=torch.int64)
    place.scatter_(1, own, torch.arange(own.numel()).view_as(own))
    place = place.flatten()
    at = place[batch.patch_index]
    arrays = {}
    for field in fields(Batch):
        value = getattr(batch, field.name)
        # The fields with a value per position, told by their shape; the others are lists of positions.
        if value.shape == batch.tokens.shape:
            arrays[field.name] = value.gather(1, own)
    # Labels elsewhere are those ranks' to count; together they are the batch's.
    labels = place[batch.label_index]
    if image_patches is None:
        patches, grids, feature_rows = batch.patches[at >= 0], batch.grids, at.new_zeros(0)
    else:
        patches, grids, feature_rows = _deal_images(batch, image_patches, axis)
        feature_rows = feature_rows[at >= 0]
    grid_places = batch.positions.new_zeros(2, 0)
    if on_grid:
        places = grid_positions(batch.positions, batch.patch_index, batch.grids)
        grid_places = torch.stack([one.gather(1, own) for one in places])
    return CutBatch(
        **arrays,
        patches=patches,
        patch_index=at[at >= 0],
        grids=grids,
        label_index=labels[labels >= 0].sort().values,
        key_index=key_index,
        own_positions=own_positions,
        grid_places=grid_places,
        feature_rows=feature_rows,
    )


def _deal_images(batch: Batch, full: int, axis: Axis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's images, as many patches as every other rank has (black ones at the end), and the row of each patch.

    Returns:
        uint8 [n, C]; int32 [images, 2], their grids; and int64 [P]: the row of each of the batch's patches among all
        ranks' features.
    """
    sizes = batch.grids.long().prod(1)
    rank = torch.arange(len(sizes)) % axis.size
    loads = [int(sizes[rank == r].sum()) for r in range(axis.size)]
    # Equally many patches on every rank, since features are gathered, and of whole images, so that the tower adds none;
    # at least one image, so that no rank is missing in the tower's collectives.
    each = max(1, -(-max(loads) // full)) * full
    missing = each - loads[axis.rank]
    if (sizes == full).all():
        black = batch.grids.new_full((missing // full, 2), math.isqrt(full))
    else:
        # By images of one patch no rank's are all full ones: every rank's tower then lays its images end to end.
        each += full * (each in loads)
        missing = each - loads[axis.rank]
        black = batch.grids.new_ones(missing, 2)
    number = rank.repeat_interleave(sizes)
    rows = torch.empty(len(number), dtype=torch.int64)
    for r, load in enumerate(loads):
        # Ranks' features lie end to end.
        rows[number == r] = r * each + torch.arange(load)
    own = batch.patches[number == axis.rank]
    patches = torch.cat((own, own.new_zeros(missing, own.shape[1])))
    return patches, torch.cat((batch.grids[rank == axis.rank], black)), rows


def apply_context(model: MultimodalModel, world: World, method: str) -> None:
    """Let the decoder's attention see the keys of all ranks of the context axis, in place.

    Args:
        method: ``gather`` or ``ring``.
    """
    axis = world.axis("context")
    if axis.size == 1:
        return
    methods: dict[str, Callable] = {"gather": _attend_gathered, "ring": _attend_in_ring}
    for block in model.blocks.values():
        # Only the decoder: an image of the tower is whole on one rank.
        layer: Any = getattr(block, "attention", block)  # per modality the block itself attends
        layer.attend = partial(methods[method], group=axis.group)
    model.context = partial(_cut_context, model, method=method, axis=axis)


@dataclass(frozen=True)
class _Gathered:
    """Mask over all keys of the rows, and the order that brings the ranks' keys into the row's."""

    mask: AttentionMask
    key_index: torch.Tensor


@dataclass(frozen=True)
class _Ring:
    """Mask over the keys of each rank, beginning with this one's and going backwards."""

    masks: list[AttentionMask]


def _cut_context(model: MultimodalModel, batch: CutBatch, dtype: torch.dtype, *, method: str, axis: Axis):
    """The context of a rank's positions; see model.context.make_context."""
    config = model.config
    kinds, ends = position_kinds(config, batch), ends_seen(config, batch)
    positions = (
        batch.positions if config.image_positions == "sequence" else (batch.grid_places[0], batch.grid_places[1])
    )
    make = partial(make_context, config, positions, head_dim=config.head_dim, dtype=dtype, **kinds)
    if method == "gather":
        # lo and hi still name positions of the whole row, which are the gathered keys once these are in its order.
        context = make(lo=batch.lo, hi=ends, num_keys=batch.key_index.shape[1])
        return context.with_mask(_Gathered(context.mask, batch.key_index))
    contexts = []
    for step in range(axis.size):
        # Keys move on by one rank a step, so those that are here after `step` steps began so many ranks before.
        keys = batch.own_positions[(axis.rank - step) % axis.size]
        # That rank's positions increase, so an interval of the row is an interval of them, which may be empty.
        # searchsorted wants both sides of one dtype.
        lo = torch.searchsorted(keys, batch.lo.long(), out_int32=True)
        hi = torch.searchsorted(keys, ends.long(), right=True, out_int32=True) - 1
        # The rotary table, which is for the queries, is the same in all of them: the first one's is used.
        contexts.append(make(lo=lo, hi=hi, num_keys=keys.shape[1]))
    return contexts[0].with_mask(_Ring([context.mask for context in contexts]))


def _attend_gathered(q, k, v, mask: _Gathered, *, group):
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    # One collective for both keys and values, [B, S, G, 2 D]. Keys are rotated already, by their own rank's table.
    kv = gather(torch.cat((k, v), dim=-1), 1, group)[rows, mask.key_index]
    k, v = kv.chunk(2, dim=-1)
    return interval_attention(q, k.contiguous(), v.contiguous(), mask.mask)


def _attend_in_ring(q, k, v, mask: _Ring, *, group):
    """Partial softmaxes over one rank's keys at a time; each weighs exp(its log-sum-exp) in the whole."""
    # Together, so that a step of the ring is one transfer.
    kv, total, total_lse = torch.cat((k, v), dim=-1), None, None
    for step, part in enumerate(mask.masks):
        # The first keys are this rank's own, which every query but padding sees: the sums begin with a real value.
        kv = shift(kv, group) if step else kv
        k, v = (x.contiguous() for x in kv.chunk(2, dim=-1))
        out, lse = interval_attention(q, k, v, part, return_lse=True)
        # A finite stand-in for no key at all: -inf would give NaN gradients. Its output is zero.
        out, lse = out.to(lse.dtype), lse.masked_fill(lse == -torch.inf, NO_KEY)
        if total is None:
            total, total_lse = out, lse
            continue
        # The maximum stays inside: exp(lse) by itself would overflow.
        merged = torch.logaddexp(total_lse, lse)
        total = total * (total_lse - merged).exp()[..., None] + out * (lse - merged).exp()[..., None]
        total_lse = merged
    return total.to(q.dtype)


def tower_patches(config: ModelConfig) -> int | None:
    """``image_patches`` of :func:`cut_batch`."""
    return patches_per_image(config.image_size, config.patch_size) if config.architecture == "late" else None
