"""QK-norm and rotary embedding: one pass over packed queries and keys, forward and backward.

A tile is a set of (position, head) pairs as rows, and half a head's width as columns, so that a rotation combines
two tiles entry by entry. For the full-width norm a tile holds all heads of one position. The second grid axis
picks queries or keys. The backward recomputes everything from the input and the reciprocal norms, rotates the
gradient back and sums the weight gradient per program, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.launch import accumulator, launch, partial_dtype, persistent_programs


@triton.jit
def _locate(tile, num_positions, HEADS: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr):
    """Position (int64), head and validity of a tile's rows."""
    row = tl.arange(0, ROWS)
    if FULL:
        position = tile + row * 0
        head = row
    else:
        position = (tile * ROWS + row) // HEADS
        head = (tile * ROWS + row) % HEADS
    return position.to(tl.int64), head, (position < num_positions) & (head < HEADS)


@triton.jit
def _load_halves(ptr, offset, mask, HALF: tl.constexpr, DTYPE: tl.constexpr):
    first = tl.load(ptr + offset, mask, other=0.0).to(DTYPE)
    return first, tl.load(ptr + offset + HALF, mask, other=0.0).to(DTYPE)


@triton.jit
def _store_halves(ptr, offset, mask, first, second, HALF: tl.constexpr):
    tl.store(ptr + offset, first.to(ptr.dtype.element_ty), mask)
    tl.store(ptr + offset + HALF, second.to(ptr.dtype.element_ty), mask)


@triton.jit
def _load_weight(ptr, head, column, mask, HALF: tl.constexpr, FULL: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of a tile's rows: one row for all heads, or one per head."""
    if FULL:
        offset = head[:, None] * (2 * HALF) + column[None, :]
    else:
        offset = column[None, :]
        mask = (column < HALF)[None, :]
    return _load_halves(ptr, offset, mask, HALF, DTYPE)


@triton.jit
def _group_mean(values, HEADS: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr):
    """Mean over each head, or over all heads, [ROWS, 1]; ``values`` are already summed over the two halves."""
    total = tl.sum(values, 1)
    if FULL:
        total = tl.sum(total, 0) / HEADS + tl.zeros_like(total)
    return total[:, None] / (2 * HALF)


@triton.jit
def _forward_part(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, num_positions, table_rows, x_stride, scale_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    position, head, valid = _locate(tl.program_id(0), num_positions, HEADS, ROWS, FULL)
    mask = valid[:, None] & (column < HALF)[None, :]
    at_head = head[:, None] * (2 * HALF) + column[None, :]
    x1, x2 = _load_halves(x_ptr, position[:, None] * x_stride + at_head, mask, HALF, DTYPE)
    scale = tl.rsqrt(_group_mean(x1 * x1 + x2 * x2, HEADS, HALF, FULL) + eps)
    tl.store(scale_ptr + (position * scale_stride + head)[:, None], scale, valid[:, None])
    w1, w2 = _load_weight(weight_ptr, head, column, mask, HALF, FULL, DTYPE)
    x1, x2 = x1 * scale * w1, x2 * scale * w2
    table = (position % table_rows)[:, None] * HALF + column[None, :]
    cos = tl.load(cos_ptr + table, mask, other=0.0).to(DTYPE)
    sin = tl.load(sin_ptr + table, mask, other=0.0).to(DTYPE)
    out_offset = position[:, None] * (2 * HALF * HEADS) + at_head
    _store_halves(out_ptr, out_offset, mask, x1 * cos - x2 * sin, x2 * cos + x1 * sin, HALF)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, scale_ptr, num_positions, table_rows, x_stride, eps,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    heads: tl.constexpr = QUERY_HEADS + KEY_HEADS
    key_weight: tl.constexpr = 2 * HALF * (QUERY_HEADS if FULL else 1)
    if tl.program_id(1) == 0:
        _forward_part(
            x_ptr, weight_ptr, cos_ptr, sin_ptr, q_ptr, scale_ptr,
            num_positions, table_rows, x_stride, heads, eps, QUERY_HEADS, HALF, ROWS, BLOCK, FULL, DTYPE,
        )  # fmt: skip
    else:
        _forward_part(
            x_ptr + QUERY_HEADS * 2 * HALF, weight_ptr + key_weight, cos_ptr, sin_ptr, k_ptr, scale_ptr + QUERY_HEADS,
            num_positions, table_rows, x_stride, heads, eps, KEY_HEADS, HALF, ROWS, BLOCK, FULL, DTYPE,
        )  # fmt: skip


@triton.jit
def _backward_part(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, grad_x_ptr, partial_ptr,
    num_positions, table_rows, x_stride, ALL_HEADS: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    grad_w1, grad_w2 = tl.zeros((ROWS, BLOCK), DTYPE), tl.zeros((ROWS, BLOCK), DTYPE)
    tiles = num_positions if FULL else tl.cdiv(num_positions * HEADS, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        position, head, valid = _locate(tile, num_positions, HEADS, ROWS, FULL)
        mask = valid[:, None] & (column < HALF)[None, :]
        at_head = head[:, None] * (2 * HALF) + column[None, :]
        g1, g2 = _load_halves(grad_ptr, position[:, None] * (2 * HALF * HEADS) + at_head, mask, HALF, DTYPE)
        x1, x2 = _load_halves(x_ptr, position[:, None] * x_stride + at_head, mask, HALF, DTYPE)
        table = (position % table_rows)[:, None] * HALF + column[None, :]
        cos = tl.load(cos_ptr + table, mask, other=0.0).to(DTYPE)
        sin = tl.load(sin_ptr + table, mask, other=0.0).to(DTYPE)
        scale = tl.load(scale_ptr + (position * ALL_HEADS + head)[:, None], valid[:, None], other=0.0)
        w1, w2 = _load_weight(weight_ptr, head, column, mask, HALF, FULL, DTYPE)
        n1, n2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        u1, u2 = x1 * scale, x2 * scale
        grad_w1 += n1 * u1
        grad_w2 += n2 * u2
        n1, n2 = n1 * w1, n2 * w2
        dot = _group_mean(n1 * u1 + n2 * u2, HEADS, HALF, FULL)
        out_offset = position[:, None] * (2 * HALF * ALL_HEADS) + at_head
        _store_halves(grad_x_ptr, out_offset, mask, (n1 - u1 * dot) * scale, (n2 - u2 * dot) * scale, HALF)
    if FULL:
        row = tl.arange(0, ROWS)[:, None]
        _store_halves(
            partial_ptr, row * (2 * HALF) + column[None, :], (row < HEADS) & (column < HALF)[None, :],
            grad_w1, grad_w2, HALF,
        )  # fmt: skip
    else:
        _store_halves(partial_ptr, column, column < HALF, tl.sum(grad_w1, 0), tl.sum(grad_w2, 0), HALF)


@triton.jit
def _backward_kernel(
    grad_q_ptr, grad_k_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, grad_x_ptr, partial_ptr,
    num_positions, table_rows, x_stride,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    heads: tl.constexpr = QUERY_HEADS + KEY_HEADS
    key_weight: tl.constexpr = 2 * HALF * (QUERY_HEADS if FULL else 1)
    partial_ptr += tl.program_id(0).to(tl.int64) * (2 * HALF * (heads if FULL else 2))
    if tl.program_id(1) == 0:
        _backward_part(
            grad_q_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, grad_x_ptr, partial_ptr,
            num_positions, table_rows, x_stride, heads, QUERY_HEADS, HALF, ROWS, BLOCK, FULL, DTYPE,
        )  # fmt: skip
    else:
        _backward_part(
            grad_k_ptr, x_ptr + QUERY_HEADS * 2 * HALF, weight_ptr + key_weight, cos_ptr, sin_ptr,
            scale_ptr + QUERY_HEADS, grad_x_ptr + QUERY_HEADS * 2 * HALF, partial_ptr + key_weight,
            num_positions, table_rows, x_stride, heads, KEY_HEADS, HALF, ROWS, BLOCK, FULL, DTYPE,
        )  # fmt: skip


def _positions(x: torch.Tensor) -> torch.Tensor:
    """[B, L, H, D] as [B * L, H, D] with packed heads; a copy only where positions are not evenly spaced."""
    rows = x.flatten(0, 1)
    packed = rows.stride(2) == 1 and (rows.shape[1] == 1 or rows.stride(1) == rows.shape[2])
    return rows if packed else rows.contiguous()


def _tile(x: torch.Tensor, query_heads: int, full_width: bool, elements: int) -> tuple[dict, int]:
    """Constants of a launch, and the number of tiles of the larger part."""
    positions, heads, dim = x.shape
    most = max(query_heads, heads - query_heads)
    block = triton.next_power_of_2(dim // 2)
    if full_width:
        rows, tiles = triton.next_power_of_2(most), positions
    else:
        rows = max(1, elements // block) if x.is_cuda else 4
        tiles = triton.cdiv(positions * most, rows)
    meta = {
        "QUERY_HEADS": query_heads, "KEY_HEADS": heads - query_heads, "HALF": dim // 2, "ROWS": rows, "BLOCK": block,
        "FULL": full_width, "DTYPE": accumulator(x.dtype), "num_warps": min(16, max(4, rows * block // 512)),
    }  # fmt: skip
    return meta, tiles


def _empty_outputs(qk, query_heads):
    batch, length, heads, dim = qk.shape
    q, k = (torch.empty(batch, length, n, dim, dtype=qk.dtype, device=qk.device)
            for n in (query_heads, heads - query_heads))  # fmt: skip
    return q, k, torch.empty(batch, length, heads, dtype=partial_dtype(qk.dtype), device=qk.device)


@torch.library.custom_op("megamm::qk_norm_rope_gpu", mutates_args=())
def qk_norm_rope_gpu(
    qk: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, query_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries, keys and the reciprocal norm of each head (or of the part that it belongs to)."""
    q, k, scale = _empty_outputs(qk, query_heads)
    x = _positions(qk)
    meta, tiles = _tile(x, query_heads, len(weight) != 2, 1024)
    launch(
        _forward_kernel, (tiles, 2), x, weight.contiguous(), cos.contiguous(), sin.contiguous(), q, k, scale,
        x.shape[0], cos.shape[0] * cos.shape[1], x.stride(0), eps, **meta,
    )  # fmt: skip
    return q, k, scale


@torch.library.custom_op("megamm::qk_norm_rope_backward_gpu", mutates_args=())
def qk_norm_rope_backward_gpu(
    grad_q: torch.Tensor, grad_k: torch.Tensor, qk: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of the packed queries and keys, and of the weight."""
    grad_qk = torch.empty_like(qk, memory_format=torch.contiguous_format)
    x = _positions(qk)
    meta, tiles = _tile(x, grad_q.shape[2], len(weight) != 2, 1024)
    programs = persistent_programs(x, tiles, 2 * meta["num_warps"])  # of queries, and as many of keys
    partial = torch.empty(programs, *weight.shape, dtype=partial_dtype(x.dtype), device=x.device)
    launch(
        _backward_kernel, (programs, 2), grad_q.contiguous(), grad_k.contiguous(), x, weight.contiguous(),
        cos.contiguous(), sin.contiguous(), scale, grad_qk, partial,
        x.shape[0], cos.shape[0] * cos.shape[1], x.stride(0), **meta,
    )  # fmt: skip
    return grad_qk, partial.sum(0).to(weight.dtype)


@qk_norm_rope_gpu.register_fake
def _(qk, weight, cos, sin, eps, query_heads):
    return _empty_outputs(qk, query_heads)


@qk_norm_rope_backward_gpu.register_fake
def _(grad_q, grad_k, qk, weight, cos, sin, scale):
    return torch.empty_like(qk, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # autograd's zeros are no DTensors
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.query_heads = inputs[5]


def _backward(ctx, grad_q, grad_k, _):
    qk = ctx.saved_tensors[0]
    grad_q = torch.zeros_like(qk[:, :, : ctx.query_heads]) if grad_q is None else grad_q
    grad_k = torch.zeros_like(qk[:, :, ctx.query_heads :]) if grad_k is None else grad_k
    return *qk_norm_rope_backward_gpu(grad_q, grad_k, *ctx.saved_tensors), None, None, None, None


qk_norm_rope_gpu.register_autograd(_backward, setup_context=_setup_context)
