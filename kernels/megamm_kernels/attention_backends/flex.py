"""FlexAttention with a block mask that is read off the intervals; its own kernels or, as an option, FLASH.

On CUDA it is compiled. On the CPU it is run eagerly, materialises all scores and has no backward: for small checks.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128


class FlexMask(NamedTuple):
    """Block mask of a batch.

    Attributes:
        block_mask: over [B, 1, S, num_keys].
        empty: bool [B, S], queries that see nothing.
        flash: whether FlexAttention's FLASH backend runs.
    """

    block_mask: BlockMask
    empty: torch.Tensor
    flash: bool


def make_mask(lo: torch.Tensor, hi: torch.Tensor, num_keys: int, flash: bool) -> FlexMask:
    """Build the block mask on the device, without the S x S mask that ``create_block_mask`` evaluates."""
    if flash and not _has_flash():
        raise ImportError("attention backend 'flex_flash' needs the package flash-attn-4: pip install flash-attn-4")
    empty = hi < lo
    some, whole = seen_blocks(lo, hi, num_keys, BLOCK)

    def mask_mod(b, h, q, kv):
        return (lo[b, q] <= kv) & (kv <= hi[b, q])

    block_mask = BlockMask.from_kv_blocks(
        *_ordered(some & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(lo.shape[1], num_keys),
    )
    return FlexMask(block_mask, empty, flash)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: FlexMask, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    run: Callable = flex_attention
    # In a model that is compiled itself, FlexAttention is compiled with it.
    if q.is_cuda and not torch.compiler.is_compiling():
        run = _compiled()
    out, aux = run(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask.block_mask,
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options={"BACKEND": "FLASH"} if mask.flash else None,
        return_aux=AuxRequest(lse=return_lse),
    )
    out = out.transpose(1, 2).masked_fill(mask.empty[..., None, None], 0.0)
    if not return_lse:
        return out, None
    return out, aux.lse.transpose(1, 2).masked_fill(mask.empty[..., None], -torch.inf)


def seen_blocks(lo: torch.Tensor, hi: torch.Tensor, num_keys: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of keys some query of a block sees, and which all see whole: bool [B, query blocks, key blocks]."""
    length = lo.shape[1]
    pad = (0, -length % block)
    empty = hi < lo

    def blocks(x, fill):
        return torch.nn.functional.pad(x, pad, value=fill).unflatten(1, (-1, block))

    first = blocks(lo.masked_fill(empty, num_keys), num_keys).amin(-1)[..., None]
    last = blocks(hi.masked_fill(empty, -1), -1).amax(-1)[..., None]
    # An empty query sees no block whole; past the end of the row there is no query to ask.
    first_common = blocks(lo.masked_fill(empty, num_keys), -1).amax(-1)[..., None]
    last_common = blocks(hi.masked_fill(empty, -1), num_keys).amin(-1)[..., None]
    start = torch.arange(0, num_keys, block, device=lo.device, dtype=lo.dtype)
    end = (start + block - 1).clamp(max=num_keys - 1)
    some = (start <= last) & (end >= first)
    whole = (start >= first_common) & (end <= last_common) & (start + block <= num_keys)
    return some, whole & some


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and order of the blocks that are set, as FlexAttention wants them."""
    blocks = blocks[:, None]
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def _has_flash() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False
