"""Attention in which query q sees exactly the keys lo[q]..hi[q].

Both vectors are non-decreasing along a row, so a block of queries needs one contiguous range of keys. The
plan finds these ranges once per batch, together with the additive mask inside each range; all layers share
it. Work outside the ranges is skipped: on packed rows of short documents most of the S x S square.

On the CPU, blocks of queries of all rows go through torch's fused CPU attention inside one opaque operator, so
torch.compile keeps a single graph however the ranges change from batch to batch. Other devices run the same
blocks through torch's SDPA.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 128
"""Queries per block: large enough for efficient matrix products, small enough to skip masked work."""


class AttentionPlan(NamedTuple):
    """What the intervals of a batch mean for blocks of queries.

    Attributes:
        blocks: int64 [num_blocks, 5] on the CPU: first and end query, first and end key, offset into ``bias``
            (-1: no mask needed).
        bias: float [n], the blocks' masks end to end, each [B, queries, keys]: 0 where seen, -inf where not.
        empty: bool [B, S], queries that see nothing (padding), or None where there are none.
    """

    blocks: torch.Tensor
    bias: torch.Tensor
    empty: torch.Tensor | None


def attention_plan(
    lo: torch.Tensor, hi: torch.Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK
) -> AttentionPlan:
    """Find each query block's key range and mask.

    Args:
        lo, hi: integers [B, S], the interval of keys of each query, both ends included; hi < lo is empty.
        dtype: dtype of queries and keys.
        block: queries per block.
    """
    length = lo.shape[1]
    rows, parts, offset = [], [], 0
    empty = hi < lo
    for start in range(0, length, block):
        end = min(start + block, length)
        lo_b, hi_b, empty_b = lo[:, start:end], hi[:, start:end], empty[:, start:end]
        if bool(empty_b.all()):
            continue
        first = int(lo_b.masked_fill(empty_b, length).min())
        last = int(hi_b.masked_fill(empty_b, -1).max()) + 1
        keys = torch.arange(first, last, device=lo.device, dtype=lo.dtype)
        hidden = (keys < lo_b[..., None]) | (keys > hi_b[..., None])
        # A padding query gets one visible key, lest its softmax be 0/0; its output is zeroed afterwards.
        hidden[..., 0] &= ~empty_b
        if bool(hidden.any()):
            bias = torch.zeros(hidden.shape, dtype=dtype, device=lo.device).masked_fill_(hidden, -torch.inf)
            rows.append((start, end, first, last, offset))
            parts.append(bias.flatten())
            offset += bias.numel()
        else:
            rows.append((start, end, first, last, -1))
    return AttentionPlan(
        blocks=torch.tensor(rows, dtype=torch.int64).view(-1, 5),
        bias=torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=lo.device),
        empty=empty if bool(empty.any()) else None,
    )


def interval_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Scaled dot-product attention over the plan's intervals; queries with an empty interval give zero.

    Args:
        q, k, v: [B, S, H, D].
        plan: from :func:`attention_plan`, for the same rows.

    Returns:
        [B, S, H, D], dtype of ``q``.
    """
    if q.device.type == "cpu":
        return _attention(q, k, v, plan.blocks, plan.bias, plan.empty)[0]
    return _sdpa_blocks(q, k, v, plan)


def interval_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> torch.Tensor:
    """The definition, with a dense mask."""
    keys = torch.arange(q.shape[1], device=q.device)
    seen = (keys >= lo[..., None]) & (keys <= hi[..., None])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def _block_inputs(q, k, v, bias, row):
    """The block's slices as [B, H, L, D] and its mask as [B, 1, queries, keys]."""
    start, end, first, last, offset = row
    shape = (q.shape[0], 1, end - start, last - first)
    mask = None
    if offset >= 0:
        mask = bias[offset : offset + shape[0] * shape[2] * shape[3]].view(shape)
    return (
        q[:, start:end].transpose(1, 2),
        k[:, first:last].transpose(1, 2),
        v[:, first:last].transpose(1, 2),
        mask,
    )


def _sdpa_blocks(q, k, v, plan):
    """The plan's blocks, one SDPA call each; differentiable by autograd."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for row in plan.blocks.tolist():
        q_b, k_b, v_b, mask = _block_inputs(q, k, v, plan.bias, row)
        out[:, row[0] : row[1]] = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=mask).transpose(1, 2)
    return out if plan.empty is None else out.masked_fill(plan.empty[..., None, None], 0.0)


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op("megamm::interval_attention", mutates_args=(), device_types="cpu")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor,
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output and the log-sum-exp of scores, [B, S, H]."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(q.shape[:3], dtype=_lse_dtype(q))
    for row in blocks.tolist():
        q_b, k_b, v_b, mask = _block_inputs(q, k, v, bias, row)
        out_b, lse_b = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_b, k_b, v_b, 0.0, False, attn_mask=mask
        )
        out[:, row[0] : row[1]] = out_b.transpose(1, 2)
        lse[:, row[0] : row[1]] = lse_b.transpose(1, 2)
    if empty is not None:
        out.masked_fill_(empty[..., None, None], 0.0)
    return out, lse


@_attention.register_fake
def _(q, k, v, blocks, bias, empty):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


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
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if empty is not None:
        grad = grad.masked_fill(empty[..., None, None], 0.0)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for row in blocks.tolist():
        start, end, first, last, _ = row
        q_b, k_b, v_b, mask = _block_inputs(q, k, v, bias, row)
        part = slice(start, end)
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, part].transpose(1, 2), q_b, k_b, v_b, out[:, part].transpose(1, 2),
            lse[:, part].transpose(1, 2), 0.0, False, attn_mask=mask,
        )  # fmt: skip
        grad_q[:, part] = d_q.transpose(1, 2)
        grad_k[:, first:last] += d_k.transpose(1, 2)
        grad_v[:, first:last] += d_v.transpose(1, 2)
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, blocks, bias, empty):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad_out, _):
    q, k, v, out, lse, blocks, bias, empty = ctx.saved_tensors
    return *_attention_backward(grad_out, q, k, v, out, lse, blocks, bias, empty), None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
