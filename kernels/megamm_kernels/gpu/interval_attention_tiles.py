"""What the kernels of interval attention share: tiles, the ranges that they meet, loads, stores and products.

A head is held in one part or in two, each a power of 2 wide (80 = 64 + 16), as a tuple of [tile, MAIN] and
[tile, REST]: padding 80 to 128 would waste a third of all products.

What a kernel knows of a tensor [B, S, H, D] is a tuple: pointer, strides of rows, of positions and of heads; of one of
its heads another: pointer and stride of positions.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Constants:
    """What a kernel knows when it is compiled."""

    GROUP: int  # query heads of a key head
    SCALE: float  # of scores
    D: int  # width of a head, and of its two parts
    MAIN: int
    REST: int
    BLOCK_M: int  # queries and keys of a tile
    BLOCK_N: int
    DOT: tl.dtype  # operands of products
    ACC: tl.dtype  # sums and statistics
    PRECISION: str  # of products of float32


@triton.jit
def head_of(x, row, head):
    """(pointer, stride of positions) of one head of one row."""
    return x[0] + row * x[1] + head * x[3], x[2]


@triton.jit
def load_intervals(lo_ptr, hi_ptr, positions, length):
    """Intervals of a tile's positions; empty ones past the end."""
    inside = positions < length
    return tl.load(lo_ptr + positions, mask=inside, other=1), tl.load(hi_ptr + positions, mask=inside, other=0)


@triton.jit
def split(lo, hi, length, BLOCK: tl.constexpr):
    """Cut the range that a tile's intervals cover into tiles of the other side.

    Empty intervals do not count. Returns (first, before, inner, full, outer, edges, end): ``full`` tiles from
    ``inner`` on are seen whole by all; the ``edges`` others need the mask, ``before`` of them from ``first`` on,
    the rest from ``outer`` on; ``end`` is the end of the range.
    """
    # Where an interval is empty, the neutral value of each reduction: if all are, the range is empty, too.
    some = lo <= hi
    first = tl.min(tl.where(some, lo, length), 0)
    first_common = tl.max(tl.where(some, lo, 0), 0)
    end_common = tl.min(tl.where(some, hi, length - 1), 0) + 1
    end = tl.max(tl.where(some, hi, -1), 0) + 1
    before = tl.cdiv(tl.maximum(first_common - first, 0), BLOCK)
    inner = first + before * BLOCK
    full = tl.maximum(end_common - inner, 0) // BLOCK
    outer = inner + full * BLOCK
    after = tl.cdiv(tl.maximum(end - outer, 0), BLOCK)
    return first, before, inner, full, outer, before + after, end


@triton.jit
def edge_start(i, first, before, outer, BLOCK: tl.constexpr):
    """Where the i-th of the tiles with a mask starts."""
    return tl.where(i < before, first + i * BLOCK, outer + (i - before) * BLOCK)


@triton.jit
def seen(other, lo, hi):
    """Which members [own, other] of a tile of the other side lie in the intervals of a tile."""
    return (other[None, :] >= lo[:, None]) & (other[None, :] <= hi[:, None])


@triton.jit
def _load_part(
    ptr, stride, rows_left, BLOCK: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr, DOT, MASKED: tl.constexpr
):
    """[BLOCK, WIDTH] in the dtype of products, of which USED columns exist; zeros outside."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    ptrs = ptr + (rows * stride + columns)
    # Decided when compiled, so that whole tiles of whole heads are loaded without a mask.
    if MASKED and USED < WIDTH:
        x = tl.load(ptrs, mask=(rows < rows_left) & (columns < USED), other=0.0)
    elif MASKED:
        x = tl.load(ptrs, mask=rows < rows_left, other=0.0)
    elif USED < WIDTH:
        x = tl.load(ptrs, mask=columns < USED, other=0.0)
    else:
        x = tl.load(ptrs)
    return x.to(DOT)


@triton.jit
def load_head(x, start, end, BLOCK: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """Rows start..start+BLOCK of one head. Without MASKED all of them are below ``end``.

    The start is applied in 64 bits: position times stride may pass 2^31.
    """
    ptr = x[0] + start.to(tl.int64) * x[1]
    if C.REST == 0:
        return (_load_part(ptr, x[1], end - start, BLOCK, C.MAIN, C.D, C.DOT, MASKED),)
    else:
        return (
            _load_part(ptr, x[1], end - start, BLOCK, C.MAIN, C.MAIN, C.DOT, MASKED),
            _load_part(ptr + C.MAIN, x[1], end - start, BLOCK, C.REST, C.D - C.MAIN, C.DOT, MASKED),
        )


@triton.jit
def _store_part(x, factor, some, ptr, stride, rows_left, BLOCK: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    # Not times zero: the scores of a key that no query sees are in no log-sum-exp, so that its weights may overflow.
    x = tl.where(some[:, None], x * factor[:, None], 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr + (rows * stride + columns), x, mask=(rows < rows_left) & (columns < USED))


@triton.jit
def store_head(x, factor, some, to, start, end, BLOCK: tl.constexpr, C: tl.constexpr):
    """Write ``x`` times ``factor``, zero where not ``some``, to rows start..end of one head."""
    ptr = to[0] + start.to(tl.int64) * to[1]
    if C.REST == 0:
        _store_part(x[0], factor, some, ptr, to[1], end - start, BLOCK, C.MAIN, C.D)
    else:
        _store_part(x[0], factor, some, ptr, to[1], end - start, BLOCK, C.MAIN, C.MAIN)
        _store_part(x[1], factor, some, ptr + C.MAIN, to[1], end - start, BLOCK, C.REST, C.D - C.MAIN)


@triton.jit
def zeros(BLOCK: tl.constexpr, C: tl.constexpr):
    """An accumulator as wide as a head."""
    MAIN: tl.constexpr = C.MAIN  # Triton 3.6 takes no attribute inside of a shape
    REST: tl.constexpr = C.REST
    if REST == 0:
        return (tl.zeros([BLOCK, MAIN], C.ACC),)
    else:
        return (tl.zeros([BLOCK, MAIN], C.ACC), tl.zeros([BLOCK, REST], C.ACC))


@triton.jit
def scaled(x, factor, C: tl.constexpr):
    """Rows of a head times ``factor``."""
    if C.REST == 0:
        return (x[0] * factor[:, None],)
    else:
        return (x[0] * factor[:, None], x[1] * factor[:, None])


@triton.jit
def row_sums(x, y, C: tl.constexpr):
    """Sum over d of x * y."""
    sums = tl.sum(x[0].to(C.ACC) * y[0].to(C.ACC), 1)
    if C.REST > 0:
        sums += tl.sum(x[1].to(C.ACC) * y[1].to(C.ACC), 1)
    return sums


@triton.jit
def product(x, y, C: tl.constexpr):
    """[tile, d] times [tile, d] transposed."""
    xy = tl.dot(x[0], tl.trans(y[0]), input_precision=C.PRECISION, out_dtype=C.ACC)
    if C.REST > 0:
        xy = tl.dot(x[1], tl.trans(y[1]), xy, input_precision=C.PRECISION, out_dtype=C.ACC)
    return xy


@triton.jit
def add_product(acc, p, x, C: tl.constexpr):
    """[tile, d] plus [tile, other tile] times [other tile, d]."""
    # Both operands of a product have one dtype; the sum stays wide.
    p = p.to(x[0].dtype)
    main = tl.dot(p, x[0], acc[0], input_precision=C.PRECISION, out_dtype=C.ACC)
    if C.REST == 0:
        return (main,)
    else:
        return (main, tl.dot(p, x[1], acc[1], input_precision=C.PRECISION, out_dtype=C.ACC))
