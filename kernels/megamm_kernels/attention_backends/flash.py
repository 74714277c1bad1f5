"""flash-attn's varlen kernels, for the rows that they can express.

These are rows whose documents are all causal (text only) or all bidirectional (spans of an encoder). A mask that is
causal in part, as an image among text needs it, is refused.
"""

from typing import NamedTuple

import torch


class FlashMask(NamedTuple):
    """Documents of a batch, end to end over all rows.

    Attributes:
        starts: int32 [documents + 1], first position of each in the flattened rows, and the end. A padding
            position is a document of its own.
        max_length: length of the longest one.
        causal: whether documents are causal; else bidirectional.
        empty: bool [B, S], padding.
    """

    starts: torch.Tensor
    max_length: int
    causal: bool
    empty: torch.Tensor


def make_mask(lo: torch.Tensor, hi: torch.Tensor, dtype: torch.dtype, num_keys: int) -> FlashMask:
    """Find the documents. Waits for the device, since what cannot be expressed has to be refused.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: these rows or this dtype are beyond flash-attn.
    """
    # A missing package is reported here, not by the first layer.
    _varlen_function()
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention backend 'flash' takes float16 and bfloat16, not {dtype}; use 'interval' or 'sdpa'")
    batch, length = lo.shape
    if num_keys != length:
        raise ValueError(f"attention backend 'flash' needs as many keys as queries, not {num_keys} and {length}")
    position = torch.arange(length, device=lo.device, dtype=lo.dtype)
    empty = hi < lo
    is_start = empty | (lo == position)
    # The last start at or before each position: that of its document.
    start = torch.where(is_start, position, -1).cummax(1).values
    if bool((~empty & (lo != start)).any()):
        raise ValueError("attention backend 'flash' needs queries to see from the start of their document on")
    flat = is_start.clone()
    flat[:, 0] = True
    starts = flat.flatten().nonzero().flatten()
    starts = torch.cat([starts, starts.new_tensor([batch * length])])
    lengths = starts.diff()
    # Starts count over all rows, hi within its own row.
    last = (starts[1:].repeat_interleave(lengths).view(batch, length) - 1) % length
    causal = bool((empty | (hi == position)).all())
    if not causal and not bool((empty | (hi == last)).all()):
        raise ValueError(
            "attention backend 'flash' takes documents that are all causal (text only) or all bidirectional; "
            "these rows mix both, as images among text do: use 'interval', 'flex' or 'sdpa'"
        )
    return FlashMask(starts.int(), int(lengths.max()), causal, empty)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: FlashMask, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The log-sum-exp carries no gradient; the backward is flash-attn's deterministic one."""
    result = _varlen_function()(
        *(x.flatten(0, 1) for x in (q, k, v)),
        mask.starts,
        mask.starts,
        mask.max_length,
        mask.max_length,
        causal=mask.causal,
        deterministic=True,
        return_attn_probs=return_lse,
    )
    out = (result[0] if return_lse else result).view(q.shape).masked_fill(mask.empty[..., None, None], 0.0)
    if not return_lse:
        return out, None
    # flash-attn gives [H, B * S].
    lse = result[1].detach().T.unflatten(0, q.shape[:2])
    return out, lse.masked_fill(mask.empty[..., None], -torch.inf)


def _varlen_function():
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        message = "attention backend 'flash' needs the package flash-attn: pip install flash-attn"
        raise ImportError(message) from error
    return flash_attn_varlen_func
