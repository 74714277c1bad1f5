"""Triton kernels of interval attention: forward, gradient of queries, gradients of keys and values.

A tile of one side (queries, or in the last kernel keys) meets the other side in one contiguous range, which the
tile's own intervals give. Inside it lies the range that every member of the tile sees: its tiles go through a loop
without any mask. The tiles cut by an edge of some interval, before and after it, share one loop with a mask.

A head is held in one part or in two, each a power of 2 wide (80 = 64 + 16), as a tuple of [tile, MAIN] and
[tile, REST]: padding 80 to 128 would waste a third of all products.

Letters: m queries, n keys, d head width. Scores are kept in units of log2, since exp2 is what the hardware has.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_intervals(lo_ptr, hi_ptr, positions, length):
    """Intervals of a tile's positions; empty ones past the end."""
    inside = positions < length
    return tl.load(lo_ptr + positions, mask=inside, other=1), tl.load(hi_ptr + positions, mask=inside, other=0)


@triton.jit
def _split(lo, hi, length, BLOCK: tl.constexpr):
    """Cut the range that a tile's intervals cover into tiles of the other side.

    Empty intervals do not count. Returns (first, before, inner, full, outer, edges, end): ``full`` tiles from
    ``inner`` on are seen whole by all; the ``edges`` others need the mask, ``before`` of them from ``first`` on,
    the rest from ``outer`` on; ``end`` is the end of the range.
    """
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
def _edge_start(i, first, before, outer, BLOCK: tl.constexpr):
    """Where the i-th of the tiles with a mask starts."""
    return tl.where(i < before, first + i * BLOCK, outer + (i - before) * BLOCK)


@triton.jit
def _load_part(
    ptr, stride, rows_left, BLOCK: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr, DOT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """[BLOCK, WIDTH] in the dtype of products, of which USED columns exist; zeros outside."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    ptrs = ptr + (rows * stride + columns)
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
def _load_head(
    base, start, stride, end, BLOCK: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start..start+BLOCK of one head. Without MASKED all of them are below ``end``.

    The start is applied in 64 bits: position times stride may pass 2^31.
    """
    ptr = base + start.to(tl.int64) * stride
    if REST == 0:
        return (_load_part(ptr, stride, end - start, BLOCK, MAIN, D, DOT, MASKED),)
    else:
        return (
            _load_part(ptr, stride, end - start, BLOCK, MAIN, MAIN, DOT, MASKED),
            _load_part(ptr + MAIN, stride, end - start, BLOCK, REST, D - MAIN, DOT, MASKED),
        )


@triton.jit
def _store_part(x, factor, some, ptr, stride, rows_left, BLOCK: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    x = tl.where(some[:, None], x * factor[:, None], 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr + (rows * stride + columns), x, mask=(rows < rows_left) & (columns < USED))


@triton.jit
def _store_head(
    x, factor, some, base, start, stride, end, BLOCK: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Write ``x`` times ``factor``, zero where not ``some``, to rows start..end of one head."""
    ptr = base + start.to(tl.int64) * stride
    if REST == 0:
        _store_part(x[0], factor, some, ptr, stride, end - start, BLOCK, MAIN, D)
    else:
        _store_part(x[0], factor, some, ptr, stride, end - start, BLOCK, MAIN, MAIN)
        _store_part(x[1], factor, some, ptr + MAIN, stride, end - start, BLOCK, REST, D - MAIN)


@triton.jit
def _zeros(BLOCK: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ACC: tl.constexpr):
    """An accumulator as wide as a head."""
    if REST == 0:
        return (tl.zeros([BLOCK, MAIN], ACC),)
    else:
        return (tl.zeros([BLOCK, MAIN], ACC), tl.zeros([BLOCK, REST], ACC))


@triton.jit
def _scaled(x, factor, REST: tl.constexpr):
    """Rows of a head times ``factor``."""
    if REST == 0:
        return (x[0] * factor[:, None],)
    else:
        return (x[0] * factor[:, None], x[1] * factor[:, None])


@triton.jit
def _row_sums(x, y, REST: tl.constexpr, ACC: tl.constexpr):
    """Sum over d of x * y."""
    sums = tl.sum(x[0].to(ACC) * y[0].to(ACC), 1)
    if REST > 0:
        sums += tl.sum(x[1].to(ACC) * y[1].to(ACC), 1)
    return sums


@triton.jit
def _product(x, y, REST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """[tile, d] times [tile, d] transposed."""
    xy = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION, out_dtype=ACC)
    if REST > 0:
        xy = tl.dot(x[1], tl.trans(y[1]), xy, input_precision=PRECISION, out_dtype=ACC)
    return xy


@triton.jit
def _add_product(acc, p, x, REST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """[tile, d] plus [tile, other tile] times [other tile, d]."""
    p = p.to(x[0].dtype)
    main = tl.dot(p, x[0], acc[0], input_precision=PRECISION, out_dtype=ACC)
    if REST == 0:
        return (main,)
    else:
        return (main, tl.dot(p, x[1], acc[1], input_precision=PRECISION, out_dtype=ACC))


@triton.jit
def _forward_step(
    acc, max_m, sum_m, q, lo, hi, k_base, v_base, start_n, end_n, k_stride, v_stride, SCALE: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over one more tile of keys."""
    k = _load_head(k_base, start_n, k_stride, end_n, BLOCK_N, D, MAIN, REST, DOT, MASKED)
    s_mn = _product(q, k, REST, ACC, PRECISION)
    if MASKED:
        n = start_n + tl.arange(0, BLOCK_N)[None, :]
        s_mn = tl.where((n >= lo[:, None]) & (n <= hi[:, None]), s_mn, float("-inf"))
    new_max_m = tl.maximum(max_m, tl.max(s_mn, 1) * (SCALE * LOG2E))
    shift_m = new_max_m
    if MASKED:  # a query that has seen nothing yet keeps exp2(-inf - 0) = 0 instead of NaN
        shift_m = tl.where(new_max_m == float("-inf"), 0.0, new_max_m)
    p_mn = tl.math.exp2(s_mn * (SCALE * LOG2E) - shift_m[:, None])
    decay_m = tl.math.exp2(max_m - shift_m)
    v = _load_head(v_base, start_n, v_stride, end_n, BLOCK_N, D, MAIN, REST, DOT, MASKED)
    acc = _add_product(_scaled(acc, decay_m, REST), p_mn, v, REST, ACC, PRECISION)
    return acc, new_max_m, sum_m * decay_m + tl.sum(p_mn, 1)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, num_queries, num_keys,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h,
    GROUP: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one head. The last tiles, in causal rows the longest, start first."""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_base = q_ptr + row * q_stride_b + head * q_stride_h
    k_base = k_ptr + row * k_stride_b + (head // GROUP) * k_stride_h
    v_base = v_ptr + row * v_stride_b + (head // GROUP) * v_stride_h
    m = start_m + tl.arange(0, BLOCK_M)
    lo, hi = _load_intervals(lo_ptr + row * num_queries, hi_ptr + row * num_queries, m, num_queries)
    first, before, inner, full, outer, edges, end = _split(lo, hi, num_keys, BLOCK_N)
    q = _load_head(q_base, start_m, q_stride_s, num_queries, BLOCK_M, D, MAIN, REST, DOT, True)
    acc = _zeros(BLOCK_M, MAIN, REST, ACC)
    max_m = tl.full([BLOCK_M], float("-inf"), ACC)
    sum_m = tl.zeros([BLOCK_M], ACC)
    for i in range(full):
        acc, max_m, sum_m = _forward_step(
            acc, max_m, sum_m, q, lo, hi, k_base, v_base, inner + i * BLOCK_N, end, k_stride_s, v_stride_s,
            SCALE, D, MAIN, REST, BLOCK_N, DOT, ACC, PRECISION, False,
        )  # fmt: skip
    for i in range(edges):
        start_n = _edge_start(i, first, before, outer, BLOCK_N)
        acc, max_m, sum_m = _forward_step(
            acc, max_m, sum_m, q, lo, hi, k_base, v_base, start_n, end, k_stride_s, v_stride_s,
            SCALE, D, MAIN, REST, BLOCK_N, DOT, ACC, PRECISION, True,
        )  # fmt: skip
    some = lo <= hi
    sum_m = tl.where(some, sum_m, 1.0)
    lse_m = tl.where(some, (max_m + tl.math.log2(sum_m)) * LN2, float("-inf"))
    out_base = out_ptr + row * out_stride_b + head * out_stride_h
    _store_head(acc, 1.0 / sum_m, some, out_base, start_m, out_stride_s, num_queries, BLOCK_M, D, MAIN, REST)
    tl.store(lse_ptr + (row * tl.num_programs(1) + head) * num_queries + m, lse_m, mask=m < num_queries)


@triton.jit
def _query_step(
    dq, q, do, lse_m, delta_m, lo, hi, k_base, v_base, start_n, end_n, k_stride, v_stride, SCALE: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries."""
    k = _load_head(k_base, start_n, k_stride, end_n, BLOCK_N, D, MAIN, REST, DOT, MASKED)
    v = _load_head(v_base, start_n, v_stride, end_n, BLOCK_N, D, MAIN, REST, DOT, MASKED)
    s_mn = _product(q, k, REST, ACC, PRECISION)
    dp_mn = _product(do, v, REST, ACC, PRECISION)
    p_mn = tl.math.exp2(s_mn * (SCALE * LOG2E) - lse_m[:, None])
    if MASKED:
        n = start_n + tl.arange(0, BLOCK_N)[None, :]
        p_mn = tl.where((n >= lo[:, None]) & (n <= hi[:, None]), p_mn, 0.0)
    return _add_product(dq, p_mn * (dp_mn - delta_m[:, None]), k, REST, ACC, PRECISION)


@triton.jit
def query_gradient_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, dq_ptr, delta_ptr, num_queries, num_keys,
    do_stride_b, do_stride_s, do_stride_h, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, out_stride_b, out_stride_s, out_stride_h,
    GROUP: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one head. Also writes delta = sum(do * out) - dlse, for the keys' kernel."""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = start_m + tl.arange(0, BLOCK_M)
    lo, hi = _load_intervals(lo_ptr + row * num_queries, hi_ptr + row * num_queries, m, num_queries)
    first, before, inner, full, outer, edges, end = _split(lo, hi, num_keys, BLOCK_N)
    q_base = q_ptr + row * q_stride_b + head * q_stride_h
    do_base = do_ptr + row * do_stride_b + head * do_stride_h
    out_base = out_ptr + row * out_stride_b + head * out_stride_h
    k_base = k_ptr + row * k_stride_b + (head // GROUP) * k_stride_h
    v_base = v_ptr + row * v_stride_b + (head // GROUP) * v_stride_h
    q = _load_head(q_base, start_m, q_stride_s, num_queries, BLOCK_M, D, MAIN, REST, DOT, True)
    do = _load_head(do_base, start_m, do_stride_s, num_queries, BLOCK_M, D, MAIN, REST, DOT, True)
    out = _load_head(out_base, start_m, out_stride_s, num_queries, BLOCK_M, D, MAIN, REST, DOT, True)
    some = lo <= hi
    delta_m = tl.where(some, _row_sums(do, out, REST, ACC), 0.0)
    stats = (row * tl.num_programs(1) + head) * num_queries + m
    if HAS_DLSE:
        delta_m -= tl.load(dlse_ptr + stats, mask=some, other=0.0)
    tl.store(delta_ptr + stats, delta_m, mask=m < num_queries)
    # An infinite log-sum-exp makes all weights of an empty query zero.
    lse_m = tl.load(lse_ptr + stats, mask=some, other=float("inf")) * LOG2E
    dq = _zeros(BLOCK_M, MAIN, REST, ACC)
    for i in range(full):
        dq = _query_step(
            dq, q, do, lse_m, delta_m, lo, hi, k_base, v_base, inner + i * BLOCK_N, end, k_stride_s, v_stride_s,
            SCALE, D, MAIN, REST, BLOCK_N, DOT, ACC, PRECISION, False,
        )  # fmt: skip
    for i in range(edges):
        start_n = _edge_start(i, first, before, outer, BLOCK_N)
        dq = _query_step(
            dq, q, do, lse_m, delta_m, lo, hi, k_base, v_base, start_n, end, k_stride_s, v_stride_s,
            SCALE, D, MAIN, REST, BLOCK_N, DOT, ACC, PRECISION, True,
        )  # fmt: skip
    dq_base = dq_ptr + row * out_stride_b + head * out_stride_h
    scale_m = tl.full([BLOCK_M], SCALE, ACC)
    _store_head(dq, scale_m, some, dq_base, start_m, out_stride_s, num_queries, BLOCK_M, D, MAIN, REST)


@triton.jit
def _key_step(
    dk, dv, k, v, lo, hi, q_base, do_base, lse_base, delta_base, start_m, end_m, q_stride, do_stride,
    SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys; ``lo``, ``hi`` are the queries that see each key."""
    q = _load_head(q_base, start_m, q_stride, end_m, BLOCK_M, D, MAIN, REST, DOT, MASKED)
    do = _load_head(do_base, start_m, do_stride, end_m, BLOCK_M, D, MAIN, REST, DOT, MASKED)
    m = start_m + tl.arange(0, BLOCK_M)
    if MASKED:
        lse_m = tl.load(lse_base + m, mask=m < end_m, other=0.0)
        delta_m = tl.load(delta_base + m, mask=m < end_m, other=0.0)
    else:
        lse_m = tl.load(lse_base + m)
        delta_m = tl.load(delta_base + m)
    s_nm = _product(k, q, REST, ACC, PRECISION)
    p_nm = tl.math.exp2(s_nm * (SCALE * LOG2E) - (lse_m * LOG2E)[None, :])
    if MASKED:
        p_nm = tl.where((m[None, :] >= lo[:, None]) & (m[None, :] <= hi[:, None]), p_nm, 0.0)
    dv = _add_product(dv, p_nm, do, REST, ACC, PRECISION)
    dp_nm = _product(v, do, REST, ACC, PRECISION)
    dk = _add_product(dk, p_nm * (dp_nm - delta_m[None, :]), q, REST, ACC, PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, dk_ptr, dv_ptr, num_queries, num_keys,
    do_stride_b, do_stride_s, do_stride_h, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, dk_stride_b, dk_stride_s, dk_stride_h,
    GROUP: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of keys of one key head, over the queries of all heads of its group, in order."""
    start_n = tl.program_id(0) * BLOCK_N
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = start_n + tl.arange(0, BLOCK_N)
    lo, hi = _load_intervals(lo_ptr + row * num_keys, hi_ptr + row * num_keys, n, num_keys)
    first, before, inner, full, outer, edges, end = _split(lo, hi, num_queries, BLOCK_M)
    k_base = k_ptr + row * k_stride_b + head * k_stride_h
    v_base = v_ptr + row * v_stride_b + head * v_stride_h
    k = _load_head(k_base, start_n, k_stride_s, num_keys, BLOCK_N, D, MAIN, REST, DOT, True)
    v = _load_head(v_base, start_n, v_stride_s, num_keys, BLOCK_N, D, MAIN, REST, DOT, True)
    dk = _zeros(BLOCK_N, MAIN, REST, ACC)
    dv = _zeros(BLOCK_N, MAIN, REST, ACC)
    for g in range(GROUP):
        q_head = head * GROUP + g
        q_base = q_ptr + row * q_stride_b + q_head * q_stride_h
        do_base = do_ptr + row * do_stride_b + q_head * do_stride_h
        stats = (row * tl.num_programs(1) * GROUP + q_head) * num_queries
        for i in range(full):
            dk, dv = _key_step(
                dk, dv, k, v, lo, hi, q_base, do_base, lse_ptr + stats, delta_ptr + stats, inner + i * BLOCK_M, end,
                q_stride_s, do_stride_s, SCALE, D, MAIN, REST, BLOCK_M, DOT, ACC, PRECISION, False,
            )  # fmt: skip
        for i in range(edges):
            start_m = _edge_start(i, first, before, outer, BLOCK_M)
            dk, dv = _key_step(
                dk, dv, k, v, lo, hi, q_base, do_base, lse_ptr + stats, delta_ptr + stats, start_m, end,
                q_stride_s, do_stride_s, SCALE, D, MAIN, REST, BLOCK_M, DOT, ACC, PRECISION, True,
            )  # fmt: skip
    some = lo <= hi
    dk_base = dk_ptr + row * dk_stride_b + head * dk_stride_h
    dv_base = dv_ptr + row * dk_stride_b + head * dk_stride_h
    scale_n, one_n = tl.full([BLOCK_N], SCALE, ACC), tl.full([BLOCK_N], 1.0, ACC)
    _store_head(dk, scale_n, some, dk_base, start_n, dk_stride_s, num_keys, BLOCK_N, D, MAIN, REST)
    _store_head(dv, one_n, some, dv_base, start_n, dk_stride_s, num_keys, BLOCK_N, D, MAIN, REST)
