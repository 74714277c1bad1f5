"""Copies of tokens to and from expert order, and products of every expert's rows with its own matrix.

A program of the row product finds its expert from the offsets alone: the number of row tiles is bounded by
m / BLOCK_M + E, whatever the routing, so the grid is known without waiting for the device and the few programs beyond
the last tile leave at once.
"""

import torch
import triton
import triton.language as tl

from megamm_kernels import dispatch
from megamm_kernels.gpu.launch import accumulator, float32_precision, launch

# ---- copies of tokens -----------------------------------------------------------------------------------


def gather_copies(x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """x[order // k]: [n, W] -> [m, W]."""
    x = x.contiguous()
    out = torch.empty(order.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    # Without weights the kernel reads none of the three tensors after ``order``: any pointer will do.
    _launch_rows(_gather_copies, order.shape[0], x, out, order, x, x, out, k, WEIGHTED=False)
    return out


def sum_copies_backward(
    grad: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`sum_copies` to ``y`` [m, W] and ``weights`` [n, k], in one pass over both."""
    grad, y, weights = grad.contiguous(), y.contiguous(), weights.contiguous()
    grad_y, grad_weights = torch.empty_like(y), torch.empty_like(weights)
    _launch_rows(
        _gather_copies, y.shape[0], grad, grad_y, order, weights, y, grad_weights, weights.shape[1], WEIGHTED=True
    )
    return grad_y, grad_weights


def sum_copies(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """out[t] = sum over j of weights[t, j] * y[places[t, j]]; no weights: ones."""
    y, places = y.contiguous(), places.contiguous()
    num_tokens, k = places.shape
    out = torch.empty(num_tokens, y.shape[1], dtype=y.dtype, device=y.device)
    given = weights is not None
    # Never read if there are none: any pointer will do.
    weights = weights.contiguous() if given else y
    _launch_rows(_sum_copies, num_tokens, y, out, places, weights, K=k, WEIGHTED=given)
    return out


def _launch_rows(kernel, num_rows, source, *args, **meta):
    """One program per row of the output."""
    width = source.shape[1]
    block = 32 if dispatch.interpret else min(4096, triton.next_power_of_2(width))
    meta |= {"BLOCK": block, "ACC": accumulator(source.dtype), "num_warps": max(1, min(8, block // 256))}
    launch(kernel, (num_rows,), source, *args, width, **meta)


@triton.jit
def _gather_copies(
    x_ptr,
    out_ptr,
    order_ptr,
    weights_ptr,
    y_ptr,
    dots_ptr,
    k,
    width,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Row s of the output is x[order[s] // k]; weighted: times the copy's weight, and its dot product with y[s]."""
    place = tl.program_id(0).to(tl.int64)
    copy = tl.load(order_ptr + place)
    x_ptr += copy // k * width
    out_ptr += place * width
    y_ptr += place * width
    if WEIGHTED:
        weight = tl.load(weights_ptr + copy).to(ACC)
        dots = tl.zeros([BLOCK], ACC)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < width, other=0.0)
        if WEIGHTED:
            x = x.to(ACC)
            dots += x * tl.load(y_ptr + cols, mask=cols < width, other=0.0).to(ACC)
            x = (x * weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + cols, x, mask=cols < width)
    if WEIGHTED:
        tl.store(dots_ptr + copy, tl.sum(dots, 0).to(dots_ptr.dtype.element_ty))


@triton.jit
def _sum_copies(
    y_ptr,
    out_ptr,
    places_ptr,
    weights_ptr,
    width,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], ACC)
        for j in tl.static_range(K):
            place = tl.load(places_ptr + token * K + j)
            y = tl.load(y_ptr + place * width + cols, mask=cols < width, other=0.0).to(ACC)
            if WEIGHTED:
                y *= tl.load(weights_ptr + token * K + j).to(ACC)
            total += y
        tl.store(out_ptr + token * width + cols, total.to(out_ptr.dtype.element_ty), mask=cols < width)


# ---- grouped products -----------------------------------------------------------------------------------


def rows_product(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a[rows of e] @ b[e]: [m, K] x [E, K, N] of any strides -> [m, N]."""
    (m, inner), (num_experts, _, width) = a.shape, b.shape
    out = torch.empty(m, width, dtype=a.dtype, device=a.device)
    meta = _tiles(a)
    row_tiles = triton.cdiv(m, meta["BLOCK_M"]) + num_experts
    grid = (row_tiles * triton.cdiv(width, meta["BLOCK_N"]),)
    launch(
        _rows_product,
        grid,
        a,
        b,
        out,
        offsets,
        row_tiles,
        num_experts,
        inner,
        width,
        *a.stride(),
        *b.stride(),
        # tl.arange counts to powers of 2 only.
        EXPERTS=triton.next_power_of_2(num_experts),
        **meta,
    )
    return out


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """grad[rows of e]^T @ x[rows of e]: [m, N], [m, K] -> [E, N, K]; zeros where an expert has no rows."""
    num_experts, height, width = offsets.shape[0], grad.shape[1], x.shape[1]
    out = torch.empty(num_experts, height, width, dtype=x.dtype, device=x.device)
    meta = _tiles(x)
    grid = (triton.cdiv(height, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]), num_experts)
    launch(_weight_gradient, grid, grad, x, out, offsets, height, width, *grad.stride(), *x.stride(), **meta)
    return out


def _tiles(x):
    """Tile sizes: two bytes per number fill the tensor cores of a multiprocessor; float32 is four times as slow."""
    interpret = dispatch.interpret
    if interpret:
        sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    elif x.dtype == torch.float32:
        sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    else:
        sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return sizes | {"ACC": accumulator(x.dtype), "PRECISION": float32_precision(), "UPCAST": interpret}


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b; the interpreter multiplies bfloat16 wrongly, so there operands are widened."""
    if UPCAST:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _rows_product(
    a_ptr,
    b_ptr,
    out_ptr,
    offsets_ptr,
    row_tiles,
    num_experts,
    inner,
    width,
    a_row,
    a_col,
    b_expert,
    b_row,
    b_col,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Eight row tiles at a time walk over the columns together: their rows and the expert's matrix stay in L2.
    col_tiles = tl.cdiv(width, BLOCK_N)
    band = tl.program_id(0) // (8 * col_tiles)
    band_rows = tl.minimum(row_tiles - band * 8, 8)
    within = tl.program_id(0) % (8 * col_tiles)
    row_tile = band * 8 + within % band_rows
    n = within // band_rows * BLOCK_N + tl.arange(0, BLOCK_N)

    # Expert e has cdiv(its rows, BLOCK_M) tiles; ours is the first one whose last tile lies beyond row_tile.
    ids = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + ids, mask=ids < num_experts, other=0)
    starts = tl.load(offsets_ptr + ids - 1, mask=(ids > 0) & (ids < num_experts), other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    # Entries past num_experts have no tiles, so that a program beyond the last tile counts all EXPERTS and leaves.
    expert = tl.sum((tile_ends <= row_tile).to(tl.int32), 0)
    if expert < num_experts:
        # Sums pick the one entry: a vector in registers cannot be indexed.
        ours = ids == expert
        first_tile = tl.sum(tl.where(ours, tile_ends - tiles, 0), 0)
        start = tl.sum(tl.where(ours, starts, 0), 0)
        end = tl.sum(tl.where(ours, ends, 0), 0)
        m = start + (row_tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + m[:, None].to(tl.int64) * a_row + k[None, :] * a_col
        b_ptrs = b_ptr + expert.to(tl.int64) * b_expert + k[:, None] * b_row + n[None, :] * b_col
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for done in range(0, inner, BLOCK_K):
            left = k < inner - done
            a = tl.load(a_ptrs, mask=(m < end)[:, None] & left[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=left[:, None] & (n < width)[None, :], other=0.0)
            acc = _product(a, b, acc, PRECISION, UPCAST)
            a_ptrs += BLOCK_K * a_col
            b_ptrs += BLOCK_K * b_row
        out_ptrs = out_ptr + m[:, None].to(tl.int64) * width + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < width)[None, :])


@triton.jit
def _weight_gradient(
    grad_ptr,
    x_ptr,
    out_ptr,
    offsets_ptr,
    height,
    width,
    grad_row,
    grad_col,
    x_row,
    x_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    col_tiles = tl.cdiv(width, BLOCK_N)
    m = tl.program_id(0) // col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(1)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    r = start.to(tl.int64) + tl.arange(0, BLOCK_K)
    grad_ptrs = grad_ptr + r[None, :] * grad_row + m[:, None] * grad_col
    x_ptrs = x_ptr + r[:, None] * x_row + n[None, :] * x_col
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    # An expert without rows goes round no loop and stores its zeros.
    for done in range(0, end - start, BLOCK_K):
        left = tl.arange(0, BLOCK_K) < end - start - done
        grad = tl.load(grad_ptrs, mask=(m < height)[:, None] & left[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=left[:, None] & (n < width)[None, :], other=0.0)
        acc = _product(grad, x, acc, PRECISION, UPCAST)
        grad_ptrs += BLOCK_K * grad_row
        x_ptrs += BLOCK_K * x_row
    out_ptrs = out_ptr + (expert.to(tl.int64) * height + m[:, None]) * width + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])
