"""QK-norm and rotary embedding: one pass over a fused qkv product, forward and backward.

A tile is a set of (position, head) pairs as rows, and half a head's width as columns, so that a rotation combines
two tiles entry by entry. The second grid axis picks queries, keys or (in the backward, which copies them) values. The
backward recomputes everything from the input and the reciprocal norms, rotates the gradient back and sums the weight
gradient per program, in a fixed order.

What kernels know of a qkv is one tuple: pointer, strides of positions, of groups and of heads. The angles are another:
pointers to cosines and to sines, rows of either.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.launch import accumulator, launch, partial_dtype, persistent_programs


@dataclass(frozen=True)
class Tile:
    """What a kernel knows when it is compiled: groups, query heads of a group, half a head's width; rows and columns of
    a tile; the dtype of the arithmetic."""

    GROUPS: int
    QUERIES: int
    HALF: int
    ROWS: int
    BLOCK: int
    DTYPE: tl.dtype


@triton.jit
def _locate(tile, num_positions, HEADS: tl.constexpr, T: tl.constexpr):
    """Position (int64), group, head within the group and validity of a tile's rows, of HEADS heads a group."""
    row = tile * T.ROWS + tl.arange(0, T.ROWS)
    head = row % (T.GROUPS * HEADS)
    position = (row // (T.GROUPS * HEADS)).to(tl.int64)
    return position, head // HEADS, head % HEADS, position < num_positions


@triton.jit
def _offsets(x, position, group, head):
    """Where the rows of a tile start in a qkv."""
    return position * x[1] + group * x[2] + head * x[3]


@triton.jit
def _load_halves(ptr, rows, valid, T: tl.constexpr):
    column = tl.arange(0, T.BLOCK)[None, :]
    mask = valid[:, None] & (column < T.HALF)
    ptrs = ptr + rows[:, None] + column
    first, second = tl.load(ptrs, mask, other=0.0), tl.load(ptrs + T.HALF, mask, other=0.0)
    return first.to(T.DTYPE), second.to(T.DTYPE)


@triton.jit
def _store_halves(ptr, rows, valid, first, second, T: tl.constexpr):
    column = tl.arange(0, T.BLOCK)[None, :]
    mask = valid[:, None] & (column < T.HALF)
    ptrs = ptr + rows[:, None] + column
    tl.store(ptrs, first.to(ptr.dtype.element_ty), mask)
    tl.store(ptrs + T.HALF, second.to(ptr.dtype.element_ty), mask)


@triton.jit
def _load_weight(ptr, T: tl.constexpr):
    """The scale of one part, [1, BLOCK] twice."""
    column = tl.arange(0, T.BLOCK)[None, :]
    mask = column < T.HALF
    first, second = tl.load(ptr + column, mask, other=0.0), tl.load(ptr + T.HALF + column, mask, other=0.0)
    return first.to(T.DTYPE), second.to(T.DTYPE)


@triton.jit
def _load_angles(table, position, valid, T: tl.constexpr):
    """Cosines and sines of a tile's positions."""
    column = tl.arange(0, T.BLOCK)[None, :]
    mask = valid[:, None] & (column < T.HALF)
    # Positions count over the whole batch; a table of one row serves all its rows.
    offset = (position % table[2])[:, None] * T.HALF + column
    cos, sin = tl.load(table[0] + offset, mask, other=0.0), tl.load(table[1] + offset, mask, other=0.0)
    return cos.to(T.DTYPE), sin.to(T.DTYPE)


@triton.jit
def _forward_part(
    x,
    weight_ptr,
    table,
    out_ptr,
    scale_ptr,
    num_positions,
    eps,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
):
    """Heads FIRST..FIRST + HEADS of every group."""
    position, group, head, valid = _locate(tl.program_id(0), num_positions, HEADS, T)
    x1, x2 = _load_halves(x[0], _offsets(x, position, group, FIRST + head), valid, T)
    scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * T.HALF) + eps)
    tl.store(scale_ptr + (position * T.GROUPS + group) * (T.QUERIES + 1) + FIRST + head, scale, valid)
    w1, w2 = _load_weight(weight_ptr, T)
    x1, x2 = x1 * scale[:, None] * w1, x2 * scale[:, None] * w2
    cos, sin = _load_angles(table, position, valid, T)
    rows = ((position * T.GROUPS + group) * HEADS + head) * (2 * T.HALF)
    _store_halves(out_ptr, rows, valid, x1 * cos - x2 * sin, x2 * cos + x1 * sin, T)


@triton.jit
def _forward_kernel(
    x_ptr,
    x_position,
    x_group,
    x_head,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    table_rows,
    q_ptr,
    k_ptr,
    scale_ptr,
    num_positions,
    eps,
    T: tl.constexpr,
):
    x, table = (x_ptr, x_position, x_group, x_head), (cos_ptr, sin_ptr, table_rows)
    if tl.program_id(1) == 0:
        _forward_part(x, weight_ptr, table, q_ptr, scale_ptr, num_positions, eps, 0, T.QUERIES, T)
    else:
        _forward_part(x, weight_ptr + 2 * T.HALF, table, k_ptr, scale_ptr, num_positions, eps, T.QUERIES, 1, T)


@triton.jit
def _backward_part(
    x,
    weight_ptr,
    table,
    grad_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    num_positions,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
):
    ROWS: tl.constexpr = T.ROWS  # Triton 3.6 takes no attribute inside of a shape
    BLOCK: tl.constexpr = T.BLOCK
    # Of every row of a tile a sum of its own: the rows are reduced once, after the loop.
    grad_w1, grad_w2 = tl.zeros((ROWS, BLOCK), T.DTYPE), tl.zeros((ROWS, BLOCK), T.DTYPE)
    w1, w2 = _load_weight(weight_ptr, T)
    for tile in range(tl.program_id(0), tl.cdiv(num_positions * T.GROUPS * HEADS, T.ROWS), tl.num_programs(0)):
        position, group, head, valid = _locate(tile, num_positions, HEADS, T)
        at_group = position * T.GROUPS + group
        g1, g2 = _load_halves(grad_ptr, (at_group * HEADS + head) * (2 * T.HALF), valid, T)
        x1, x2 = _load_halves(x[0], _offsets(x, position, group, FIRST + head), valid, T)
        cos, sin = _load_angles(table, position, valid, T)
        scale = tl.load(scale_ptr + at_group * (T.QUERIES + 1) + FIRST + head, valid, other=0.0)[:, None]
        # Rotated back: the transpose of a rotation is its inverse.
        n1, n2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        u1, u2 = x1 * scale, x2 * scale
        grad_w1 += n1 * u1
        grad_w2 += n2 * u2
        n1, n2 = n1 * w1, n2 * w2
        dot = (tl.sum(n1 * u1 + n2 * u2, 1) / (2 * T.HALF))[:, None]
        rows = (at_group * (T.QUERIES + 2) + FIRST + head) * (2 * T.HALF)
        _store_halves(grad_x_ptr, rows, valid, (n1 - u1 * dot) * scale, (n2 - u2 * dot) * scale, T)
    none = tl.zeros((1,), tl.int32)
    _store_halves(partial_ptr, none, none == 0, tl.sum(grad_w1, 0)[None, :], tl.sum(grad_w2, 0)[None, :], T)


@triton.jit
def _copy_values(grad_ptr, grad_x_ptr, num_positions, T: tl.constexpr):
    for tile in range(tl.program_id(0), tl.cdiv(num_positions * T.GROUPS, T.ROWS), tl.num_programs(0)):
        position, group, _, valid = _locate(tile, num_positions, 1, T)
        at_group = position * T.GROUPS + group
        g1, g2 = _load_halves(grad_ptr, at_group * (2 * T.HALF), valid, T)
        rows = (at_group * (T.QUERIES + 2) + T.QUERIES + 1) * (2 * T.HALF)
        _store_halves(grad_x_ptr, rows, valid, g1, g2, T)


@triton.jit
def _backward_kernel(
    x_ptr,
    x_position,
    x_group,
    x_head,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    table_rows,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    num_positions,
    T: tl.constexpr,
):
    x, table = (x_ptr, x_position, x_group, x_head), (cos_ptr, sin_ptr, table_rows)
    # [2, D] of each program, for queries and keys.
    partial_ptr += tl.program_id(0) * (4 * T.HALF)
    key_weight, key_partial = weight_ptr + 2 * T.HALF, partial_ptr + 2 * T.HALF
    if tl.program_id(1) == 0:
        _backward_part(
            x, weight_ptr, table, grad_q_ptr, scale_ptr, grad_x_ptr, partial_ptr, num_positions, 0, T.QUERIES, T
        )
    elif tl.program_id(1) == 1:
        _backward_part(
            x, key_weight, table, grad_k_ptr, scale_ptr, grad_x_ptr, key_partial, num_positions, T.QUERIES, 1, T
        )
    else:
        _copy_values(grad_v_ptr, grad_x_ptr, num_positions, T)


def _strided(qkv: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """``qkv``, copied only where its positions are not evenly spaced or heads not packed; and its strides."""
    batch, length = qkv.shape[:2]
    # Kernels count positions over the whole batch, so one stride has to serve them all.
    even = batch == 1 or length == 1 or qkv.stride(0) == length * qkv.stride(1)
    qkv = qkv if even and qkv.stride(4) == 1 else qkv.contiguous()
    return qkv, (qkv.stride(0) if length == 1 else qkv.stride(1), qkv.stride(2), qkv.stride(3))


def _tile(qkv: torch.Tensor) -> tuple[Tile, int, int]:
    """Constants of a launch, warps of a program, and the number of tiles of the queries."""
    batch, length, groups, heads, dim = qkv.shape
    block = triton.next_power_of_2(dim // 2)
    rows = max(1, 1024 // block) if qkv.is_cuda else 4
    tile = Tile(groups, heads - 2, dim // 2, rows, block, accumulator(qkv.dtype))
    tiles = triton.cdiv(batch * length * groups * (heads - 2), rows)
    return tile, min(16, max(4, rows * block // 512)), tiles


def _empty_outputs(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, groups, heads, dim = qkv.shape
    q, k = (
        torch.empty(batch, length, n, dim, dtype=qkv.dtype, device=qkv.device) for n in (groups * (heads - 2), groups)
    )
    return q, k, torch.empty(batch, length, groups, heads - 1, dtype=partial_dtype(qkv.dtype), device=qkv.device)


@torch.library.custom_op("megamm::qk_norm_rope_gpu", mutates_args=())
def qk_norm_rope_gpu(
    qkv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries, keys and the reciprocal norms of both, [B, L, G, R + 1]."""
    q, k, scale = _empty_outputs(qkv)
    x, strides = _strided(qkv)
    tile, num_warps, tiles = _tile(x)
    table = cos.contiguous(), sin.contiguous(), cos.shape[0] * cos.shape[1]
    num_positions = x.shape[0] * x.shape[1]
    args = x, *strides, weight.contiguous(), *table, q, k, scale, num_positions, eps
    # Keys have no more tiles than queries; programs past their end store nothing.
    launch(_forward_kernel, (tiles, 2), *args, T=tile, num_warps=num_warps)
    return q, k, scale


@torch.library.custom_op("megamm::qk_norm_rope_backward_gpu", mutates_args=())
def qk_norm_rope_backward_gpu(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    qkv: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of the weight."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    x, strides = _strided(qkv)
    tile, num_warps, tiles = _tile(x)
    programs = persistent_programs(x, tiles, 2 * num_warps)  # of queries, as many of keys, and a few that only copy
    partial = torch.empty(programs, *weight.shape, dtype=partial_dtype(x.dtype), device=x.device)
    table = cos.contiguous(), sin.contiguous(), cos.shape[0] * cos.shape[1]
    grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
    num_positions = x.shape[0] * x.shape[1]
    args = x, *strides, weight.contiguous(), *table, *grads, scale, grad_qkv, partial, num_positions
    launch(_backward_kernel, (programs, 3), *args, T=tile, num_warps=num_warps)
    return grad_qkv, partial.sum(0).to(weight.dtype)


@qk_norm_rope_gpu.register_fake
def _(qkv, weight, cos, sin, eps):
    return _empty_outputs(qkv)


@qk_norm_rope_backward_gpu.register_fake
def _(grad_q, grad_k, grad_v, qkv, weight, cos, sin, scale):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)
