"""The sequence: what the data and the model must agree on. Arrays only: no files, no torch.distributed.

A document is ``<bos> span span ... <eos>``. An image span is its patches, each at a position that holds ``<image>``,
followed by ``<image_end>``: the text token from which the first word after the image is predicted, since image
positions themselves have no label. A packed row is whole documents, end to end, then padding.

The mask is two integers per position: the query at q sees the keys lo[q]..hi[q], both included. lo is the start of
q's document; hi is the last position of q's image, or q itself where q is text. Padding sees nothing: hi = lo - 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # preparing data takes no torch
    import torch

# Fixed for all tokenizers, so that no code has to ask for them.
PAD, BOS, EOS, IMAGE, IMAGE_END = range(5)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<image_end>")

IGNORE = -100
"""Target at positions without a label."""

LABEL_KINDS = ("text", "text_after_image")
"""Kinds of label: no image before it in its document, or at least one."""


@dataclass(kw_only=True)
class Batch:
    """Packed rows: B rows of S positions, with P image patches in all.

    Attributes:
        tokens: int32 [B, S]; <image> at image positions, <pad> at padding.
        positions: int32 [B, S]; restart at 0 with each document.
        targets: int32 [B, S]; the next token where it is text, else -100 (IGNORE).
        source: uint8 [B, S]; index of the label's source in the data config's order.
        label_kind: uint8 [B, S]; index in LABEL_KINDS of the label at this position.
        lo, hi: int32 [B, S]; the interval of keys that each query sees. Both are non-decreasing along a row.
        patches: uint8 [P, patch_size * patch_size * 3]; row, column, channel within a patch; the patches of
            an image in raster order, images in row order.
        patch_index: int64 [P]; position of each patch in the flattened [B * S] rows.
        grids: int32 [num_images, 2]; rows and columns of the patches of each image.
        label_index: int64 [num_labels]; positions with a label in the flattened rows, increasing. The loader knows
            them; finding them on a GPU would wait for the device.
    """

    tokens: "torch.Tensor"
    positions: "torch.Tensor"
    targets: "torch.Tensor"
    source: "torch.Tensor"
    label_kind: "torch.Tensor"
    lo: "torch.Tensor"
    hi: "torch.Tensor"
    patches: "torch.Tensor"
    patch_index: "torch.Tensor"
    grids: "torch.Tensor"
    label_index: "torch.Tensor"

    def to(self, device: "torch.device | str") -> "Batch":
        """Copy to a device (asynchronously from pinned memory)."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory (called by the PyTorch DataLoader)."""
        return type(self)(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def num_labels(self) -> int:
        """Number of labelled positions."""
        return self.label_index.shape[0]


def patches_per_image(image_size: int, patch_size: int) -> int:
    """Patches of a square image, the most that any image has; sizes in pixels."""
    return (image_size // patch_size) ** 2


# ---- the interval rule -----------------------------------------------------------------------------------


class RowPositions(NamedTuple):
    """What a row's spans say of each of its positions, padding included.

    Attributes:
        start: int64 [S]; first position of the document; of padding itself.
        is_image: bool [S].
        lo, hi: int32 [S].
    """

    start: np.ndarray
    is_image: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def row_positions(layouts: Sequence[np.ndarray], row_length: int) -> RowPositions:
    """The interval rule: from the spans of a row's documents to ``lo`` and ``hi``.

    Args:
        layouts: of each document its spans; ``n > 0`` text tokens, ``-n`` patches of one image.
        row_length: S, at least as many as the documents have positions.
    """
    # Every position begins as padding, which is its own document and sees nothing: lo = q, hi = q - 1. Both stay
    # non-decreasing to the row's end.
    q = np.arange(row_length)
    start, is_image, hi = q.copy(), np.zeros(row_length, bool), q - 1
    if layouts:
        spans = np.concatenate(layouts)
        sizes = np.abs(spans)
        document_sizes = np.array([np.abs(layout).sum() for layout in layouts])
        end = int(document_sizes.sum())
        # Spans to positions: what holds for a span is repeated over its positions.
        is_image[:end] = np.repeat(spans < 0, sizes)
        start[:end] = np.repeat(np.cumsum(document_sizes) - document_sizes, document_sizes)
        # An image sees up to its last patch, text up to itself.
        hi[:end] = np.where(is_image[:end], np.repeat(np.cumsum(sizes), sizes) - 1, q[:end])
    return RowPositions(start, is_image, start.astype(np.int32), hi.astype(np.int32))


class Span(NamedTuple):
    """Positions ``start`` to ``stop`` (excluded) of a row that are one image, or text."""

    start: int
    stop: int
    is_image: bool


def row_spans(tokens: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> list[list[Span]]:
    """The inverse of the interval rule: the documents of a row, each a list of its spans; padding left out.

    Args:
        tokens, lo, hi: integers [S]. The tokens tell an image of one patch from a text token.
    """
    length = int((lo <= hi).sum())  # padding is at the end and sees nothing
    starts = [i for i in range(length) if i == 0 or lo[i] != lo[i - 1]]  # lo is a document's start
    documents = []
    for start, stop in pairwise([*starts, length]):
        is_image = tokens[start:stop] == IMAGE
        # Two images never touch: <image_end> stands between.
        edges = [start, *(start + 1 + np.flatnonzero(is_image[1:] != is_image[:-1])), stop]
        documents.append([Span(int(a), int(b), bool(tokens[a] == IMAGE)) for a, b in pairwise(edges)])
    return documents


def keys_seen(lo: Any, hi: Any) -> Any:
    """How many keys each query sees; an array or tensor of the shape of ``lo``."""
    return (hi - lo + 1).clip(min=0)


def causal_ends(lo: Any, hi: Any, positions: Any) -> Any:
    """``hi`` of rows whose images see only what came before, like text; all arguments as in :class:`Batch`."""
    # A document's start and the position in it give the position in the row; padding keeps its empty interval.
    return hi.clip(max=lo + positions)


def patch_order(grids: Any, num_patches: int) -> tuple[Any, Any]:
    """Of each patch its number in its image, and the columns of that image's grid; int64 [P] each, tensors.

    Args:
        grids: as in :class:`Batch`.
        num_patches: P, the patches of all of them. The host knows it; without it a device would be waited for.
    """
    sizes, columns = grids.long().prod(1), grids[:, 1].long()
    first, columns = (
        one.repeat_interleave(sizes, 0, output_size=num_patches) for one in (sizes.cumsum(0) - sizes, columns)
    )
    return first.new_ones(num_patches).cumsum(0) - 1 - first, columns


def grid_positions(positions: Any, patch_index: Any, grids: Any) -> tuple[Any, Any]:
    """Rows and columns, two of the shape of ``positions``, for rotary positions on a grid.

    A patch has its place in the image, counted from the position of the first patch; text has its own position as both.
    Arguments as in :class:`Batch`.
    """
    order, columns = patch_order(grids, patch_index.shape[0])
    flat = positions.flatten()
    first = flat[patch_index] - order
    places = (first + order // columns, first + order % columns)
    return tuple(flat.index_copy(0, patch_index, one.to(flat.dtype)).view_as(positions) for one in places)


def pairs_of_documents(size: Any, patches: Any, image_pairs: Any, is_causal: bool = False) -> Any:
    """Sum of :func:`keys_seen` over documents: the causal triangle, and in each image the other half of the square.

    Args:
        size: positions of each document.
        patches: image patches in each.
        image_pairs: pairs of patches of one image in each: n^2 for an image of n.
        is_causal: images see only what came before, so that the triangle is all.
    """
    if is_causal:
        return size * (size + 1) / 2
    return size * (size + 1) / 2 + (image_pairs - patches) / 2


def labels_of_documents(text: Any, images: Any) -> Any:
    """Labelled positions of documents: text after text, so all but the first of each run, of which images cut one off.

    Args:
        text: text tokens of each document, int array.
        images: images in each.
    """
    return (text - images - 1).clip(min=0)  # clip: a document may be a single token


def image_intervals(grids: Any, num_patches: int) -> tuple[Any, Any]:
    """lo and hi int32 [P] of images end to end, each of which sees all of itself; arguments of :func:`patch_order`."""
    sizes = grids.long().prod(1)
    ends = sizes.cumsum(0)
    starts, ends = (one.repeat_interleave(sizes, 0, output_size=num_patches).int() for one in (ends - sizes, ends))
    return starts, ends - 1
