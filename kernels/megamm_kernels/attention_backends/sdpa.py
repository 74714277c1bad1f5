"""Torch's own attention over blocks of queries: exact, on every device, in every dtype.

A block of queries needs one contiguous range of keys. The mask finds these ranges, and the additive mask inside
each; work outside the ranges, on packed rows of short documents most of the S x S square, is skipped.

On the CPU all blocks go through torch's fused CPU attention inside one opaque operator, so torch.compile keeps a
single graph however the ranges change from batch to batch. Other devices run one SDPA call a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 128
"""Queries per block: large enough for efficient matrix products, small enough to skip masked work."""
MAX_STORED = 2**24
"""Most mask elements that a mask holds; masks of longer rows are made anew, block by block, where they are used."""
UNMASKED, UNSTORED = -1, -2


class SdpaMask(NamedTuple):
    """What the intervals of a batch mean for blocks of queries.

    Attributes:
        blocks: int64 [num_blocks, 5] on the CPU: first and end query, first and end key, offset into ``bias``
            (-1: no mask needed; -2: make the mask from the intervals).
        bias: float [n], the blocks' masks end to end, each [B, queries, keys]: 0 where seen, -inf where not.
        lo, hi: the intervals [B, S].
        empty: bool [B, S], queries that see nothing (padding), or None where there are none.
    """

    blocks: torch.Tensor
    bias: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    empty: torch.Tensor | None


def make_mask(
    lo: torch.Tensor, hi: torch.Tensor, dtype: torch.dtype, block: int = BLOCK, max_stored: int = MAX_STORED
) -> SdpaMask:
    """Find each query block's key range and mask. Waits for the device."""
    batch, length = lo.shape
    empty = hi < lo
    ranges = []
    for start in range(0, length, block):
        end = min(start + block, length)
        lo_b, hi_b, empty_b = lo[:, start:end], hi[:, start:end], empty[:, start:end]
        # Blocks of nothing but padding are left out: the output starts as zeros.
        if not bool(empty_b.all()):
            last = int(hi_b.masked_fill(empty_b, -1).max())
            # One range for all rows of the batch, which go through one call together.
            first = int(lo_b.masked_fill(empty_b, last).min())
            ranges.append((start, end, first, last + 1))
    stored = batch * sum((end - start) * (stop - first) for start, end, first, stop in ranges) <= max_stored
    rows, parts, offset = [], [], 0
    for row in ranges:
        hidden = _hidden(lo, hi, row)
        if not bool(hidden.any()):
            rows.append((*row, UNMASKED))
        elif stored:
            rows.append((*row, offset))
            parts.append(_bias(hidden, dtype).flatten())
            offset += hidden.numel()
        else:
            rows.append((*row, UNSTORED))
    return SdpaMask(
        blocks=torch.tensor(rows, dtype=torch.int64).view(-1, 5),
        bias=torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=lo.device),
        lo=lo,
        hi=hi,
        empty=empty if bool(empty.any()) else None,
    )


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SdpaMask, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    group = q.shape[2] // k.shape[2]
    if group > 1:
        # Before the operator, so that autograd adds up the gradients of the heads of a group.
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    if q.device.type == "cpu":
        return _attention(q, k, v, *mask)
    return attend_in_blocks(q, k, v, mask, return_lse)


def attend_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SdpaMask, return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One SDPA call a block, differentiated by autograd; as many heads of keys as of queries."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_lse_dtype(q)) if return_lse else None
    for row in mask.blocks.tolist():
        q_b, k_b, v_b, bias_b = _block_inputs(q, k, v, mask, row)
        out[:, row[0] : row[1]] = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=bias_b).transpose(1, 2)
        if return_lse:
            # SDPA keeps its own to itself.
            scores = (q_b @ k_b.transpose(-1, -2)).to(lse.dtype) * q.shape[-1] ** -0.5
            scores = scores if bias_b is None else scores + bias_b
            lse[:, row[0] : row[1]] = scores.logsumexp(-1).transpose(1, 2)
    if mask.empty is not None:
        out = out.masked_fill(mask.empty[..., None, None], 0.0)
        lse = lse.masked_fill(mask.empty[..., None], -torch.inf) if return_lse else None
    return out, lse


def _hidden(lo, hi, row):
    """Which keys [B, queries, keys] of a block are not seen."""
    start, end, first, stop = row[:4]
    keys = torch.arange(first, stop, device=lo.device, dtype=lo.dtype)
    lo_b, hi_b = lo[:, start:end, None], hi[:, start:end, None]
    hidden = (keys < lo_b) | (keys > hi_b)
    # A padding query gets one visible key, lest its softmax be 0/0; its output is zeroed afterwards.
    hidden[..., 0] &= (lo_b <= hi_b).squeeze(-1)
    return hidden


def _bias(hidden, dtype):
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _block_inputs(q, k, v, mask, row):
    """The block's slices as [B, H, L, D] and its mask as [B, 1, queries, keys]."""
    start, end, first, stop, offset = row
    bias_b = None
    if offset == UNSTORED:
        bias_b = _bias(_hidden(mask.lo, mask.hi, row), mask.bias.dtype)[:, None]
    elif offset != UNMASKED:
        shape = (q.shape[0], 1, end - start, stop - first)
        bias_b = mask.bias[offset : offset + shape[0] * shape[2] * shape[3]].view(shape)
    return (q[:, start:end].transpose(1, 2), k[:, first:stop].transpose(1, 2), v[:, first:stop].transpose(1, 2), bias_b)


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op("megamm::interval_attention", mutates_args=(), device_types="cpu")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output and the log-sum-exp of scores, [B, S, H]."""
    mask = SdpaMask(blocks, bias, lo, hi, empty)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=_lse_dtype(q))
    for row in blocks.tolist():
        q_b, k_b, v_b, bias_b = _block_inputs(q, k, v, mask, row)
        # The public function does not return the log-sum-exp, which the backward needs.
        out_b, lse_b = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_b, k_b, v_b, 0.0, False, attn_mask=bias_b
        )
        out[:, row[0] : row[1]] = out_b.transpose(1, 2)
        lse[:, row[0] : row[1]] = lse_b.transpose(1, 2)
    if empty is not None:
        out.masked_fill_(empty[..., None, None], 0.0)
        lse.masked_fill_(empty[..., None], -torch.inf)
    return out, lse


@torch.library.custom_op("megamm::interval_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = SdpaMask(blocks, bias, lo, hi, empty)
    if empty is not None:
        grad = grad.masked_fill(empty[..., None, None], 0.0)
        # exp(score + inf) times a gradient of zero would be NaN.
        lse = lse.masked_fill(empty[..., None], 0.0)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for row in blocks.tolist():
        start, end, first, stop, _ = row
        q_b, k_b, v_b, bias_b = _block_inputs(q, k, v, mask, row)
        part = slice(start, end)
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, part].transpose(1, 2),
            q_b,
            k_b,
            v_b,
            out[:, part].transpose(1, 2),
            lse[:, part].transpose(1, 2),
            0.0,
            False,
            attn_mask=bias_b,
        )
        grad_q[:, part] = d_q.transpose(1, 2)
        # Ranges of keys overlap from block to block; blocks of queries do not.
        grad_k[:, first:stop] += d_k.transpose(1, 2)
        grad_v[:, first:stop] += d_v.transpose(1, 2)
    return grad_q, grad_k, grad_v


@_attention.register_fake
def _(q, k, v, blocks, bias, lo, hi, empty):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, blocks, bias, lo, hi, empty):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad, grad_lse):
    q, k, v, out, lse, *mask = ctx.saved_tensors
    grads = [None, None, None]
    if grad is not None:
        grads = _attention_backward(grad, q, k, v, out, lse, *mask)
    if grad_lse is not None:
        # d lse / d scores is the softmax, so this is the gradient of an attention over values (1, 0, ..., 0)
        # whose output takes part in nothing.
        unit = torch.zeros_like(v)
        unit[..., 0] = 1
        grad_unit = torch.zeros_like(out)
        grad_unit[..., 0] = grad_lse
        d_q, d_k, _ = _attention_backward(grad_unit, q, k, unit, torch.zeros_like(out), lse, *mask)
        grads = [d_q, d_k, None] if grad is None else [grads[0] + d_q, grads[1] + d_k, grads[2]]
    return *grads, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
