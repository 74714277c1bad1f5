"""Triton kernels of interval attention: forward, gradient of queries, gradients of keys and values.

A tile of one side (queries, or in the last kernel keys) meets the other side in one contiguous range, which the
tile's own intervals give. Inside it lies the range that every member of the tile sees: its tiles go through a loop
without any mask. The tiles cut by an edge of some interval, before and after it, share one loop with a mask.

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
def _load_rows(
    base_ptr, start, stride, end, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start..start+BLOCK of one head as [BLOCK, BLOCK_D] in the dtype of products; zeros outside.

    The start is applied in 64 bits: position times stride may pass 2^31. Without MASKED all rows are inside.
    """
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    ptrs = base_ptr + start.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        inside = (start + rows < end)[:, None]
        if HEAD_DIM != BLOCK_D:
            inside = inside & (columns < HEAD_DIM)[None, :]
        x = tl.load(ptrs, mask=inside, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        x = tl.load(ptrs, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x.to(DOT)


@triton.jit
def _store_rows(x, base_ptr, start, stride, end, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK, BLOCK_D] to rows start..end of one head."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    ptrs = base_ptr + start.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (start + rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_step(
    acc_md, max_m, sum_m, q_md, lo, hi, k_base, v_base, start_n, end_n, k_stride, v_stride, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over one more tile of keys."""
    k_nd = _load_rows(k_base, start_n, k_stride, end_n, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, MASKED)
    s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision=PRECISION)
    if MASKED:
        n = start_n + tl.arange(0, BLOCK_N)[None, :]
        s_mn = tl.where((n >= lo[:, None]) & (n <= hi[:, None]), s_mn, float("-inf"))
    new_max_m = tl.maximum(max_m, tl.max(s_mn, 1) * (SCALE * LOG2E))
    shift_m = new_max_m
    if MASKED:  # a query that has seen nothing yet keeps exp2(-inf - 0) = 0 instead of NaN
        shift_m = tl.where(new_max_m == float("-inf"), 0.0, new_max_m)
    p_mn = tl.math.exp2(s_mn * (SCALE * LOG2E) - shift_m[:, None])
    decay_m = tl.math.exp2(max_m - shift_m)
    v_nd = _load_rows(v_base, start_n, v_stride, end_n, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, MASKED)
    acc_md = tl.dot(p_mn.to(DOT), v_nd, acc_md * decay_m[:, None], input_precision=PRECISION, out_dtype=acc_md.dtype)
    return acc_md, new_max_m, sum_m * decay_m + tl.sum(p_mn, 1)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, num_queries, num_keys,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h,
    GROUP: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
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
    q_md = _load_rows(q_base, start_m, q_stride_s, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D, DOT, True)
    acc_md = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    max_m = tl.full([BLOCK_M], float("-inf"), ACC)
    sum_m = tl.zeros([BLOCK_M], ACC)
    for i in range(full):
        acc_md, max_m, sum_m = _forward_step(
            acc_md, max_m, sum_m, q_md, lo, hi, k_base, v_base, inner + i * BLOCK_N, end, k_stride_s, v_stride_s,
            SCALE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, False,
        )  # fmt: skip
    for i in range(edges):
        start_n = _edge_start(i, first, before, outer, BLOCK_N)
        acc_md, max_m, sum_m = _forward_step(
            acc_md, max_m, sum_m, q_md, lo, hi, k_base, v_base, start_n, end, k_stride_s, v_stride_s,
            SCALE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, True,
        )  # fmt: skip
    some = lo <= hi
    sum_m = tl.where(some, sum_m, 1.0)
    out_md = tl.where(some[:, None], acc_md / sum_m[:, None], 0.0)
    lse_m = tl.where(some, (max_m + tl.math.log2(sum_m)) * LN2, float("-inf"))
    out_base = out_ptr + row * out_stride_b + head * out_stride_h
    _store_rows(out_md, out_base, start_m, out_stride_s, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (row * tl.num_programs(1) + head) * num_queries + m, lse_m, mask=m < num_queries)


@triton.jit
def _query_step(
    dq_md, q_md, do_md, lse_m, delta_m, lo, hi, k_base, v_base, start_n, end_n, k_stride, v_stride,
    SCALE: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries."""
    k_nd = _load_rows(k_base, start_n, k_stride, end_n, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, MASKED)
    v_nd = _load_rows(v_base, start_n, v_stride, end_n, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, MASKED)
    s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision=PRECISION)
    dp_mn = tl.dot(do_md, tl.trans(v_nd), input_precision=PRECISION)
    p_mn = tl.math.exp2(s_mn * (SCALE * LOG2E) - lse_m[:, None])
    if MASKED:
        n = start_n + tl.arange(0, BLOCK_N)[None, :]
        p_mn = tl.where((n >= lo[:, None]) & (n <= hi[:, None]), p_mn, 0.0)
    ds_mn = p_mn * (dp_mn - delta_m[:, None])
    return tl.dot(ds_mn.to(DOT), k_nd, dq_md, input_precision=PRECISION, out_dtype=dq_md.dtype)


@triton.jit
def query_gradient_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, dq_ptr, delta_ptr, num_queries, num_keys,
    do_stride_b, do_stride_s, do_stride_h, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, out_stride_b, out_stride_s, out_stride_h,
    GROUP: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
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
    q_md = _load_rows(q_base, start_m, q_stride_s, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D, DOT, True)
    do_md = _load_rows(do_base, start_m, do_stride_s, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D, DOT, True)
    out_md = _load_rows(out_base, start_m, out_stride_s, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D, DOT, True)
    some = lo <= hi
    delta_m = tl.where(some, tl.sum(do_md.to(ACC) * out_md.to(ACC), 1), 0.0)
    stats = (row * tl.num_programs(1) + head) * num_queries + m
    if HAS_DLSE:
        delta_m -= tl.load(dlse_ptr + stats, mask=some, other=0.0)
    tl.store(delta_ptr + stats, delta_m, mask=m < num_queries)
    # An infinite log-sum-exp makes all weights of an empty query zero.
    lse_m = tl.load(lse_ptr + stats, mask=some, other=float("inf")) * LOG2E
    dq_md = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for i in range(full):
        dq_md = _query_step(
            dq_md, q_md, do_md, lse_m, delta_m, lo, hi, k_base, v_base, inner + i * BLOCK_N, end,
            k_stride_s, v_stride_s, SCALE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, False,
        )  # fmt: skip
    for i in range(edges):
        start_n = _edge_start(i, first, before, outer, BLOCK_N)
        dq_md = _query_step(
            dq_md, q_md, do_md, lse_m, delta_m, lo, hi, k_base, v_base, start_n, end,
            k_stride_s, v_stride_s, SCALE, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, PRECISION, True,
        )  # fmt: skip
    dq_base = dq_ptr + row * out_stride_b + head * out_stride_h
    dq_md = tl.where(some[:, None], dq_md * SCALE, 0.0)
    _store_rows(dq_md, dq_base, start_m, out_stride_s, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_step(
    dk_nd, dv_nd, k_nd, v_nd, lo, hi, q_base, do_base, lse_base, delta_base, start_m, end_m, q_stride, do_stride,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys; ``lo``, ``hi`` are the queries that see each key."""
    q_md = _load_rows(q_base, start_m, q_stride, end_m, BLOCK_M, HEAD_DIM, BLOCK_D, DOT, MASKED)
    do_md = _load_rows(do_base, start_m, do_stride, end_m, BLOCK_M, HEAD_DIM, BLOCK_D, DOT, MASKED)
    m = start_m + tl.arange(0, BLOCK_M)
    if MASKED:
        lse_m = tl.load(lse_base + m, mask=m < end_m, other=0.0)
        delta_m = tl.load(delta_base + m, mask=m < end_m, other=0.0)
    else:
        lse_m = tl.load(lse_base + m)
        delta_m = tl.load(delta_base + m)
    s_nm = tl.dot(k_nd, tl.trans(q_md), input_precision=PRECISION)
    p_nm = tl.math.exp2(s_nm * (SCALE * LOG2E) - (lse_m * LOG2E)[None, :])
    if MASKED:
        p_nm = tl.where((m[None, :] >= lo[:, None]) & (m[None, :] <= hi[:, None]), p_nm, 0.0)
    dv_nd = tl.dot(p_nm.to(DOT), do_md, dv_nd, input_precision=PRECISION, out_dtype=dv_nd.dtype)
    dp_nm = tl.dot(v_nd, tl.trans(do_md), input_precision=PRECISION)
    ds_nm = p_nm * (dp_nm - delta_m[None, :])
    dk_nd = tl.dot(ds_nm.to(DOT), q_md, dk_nd, input_precision=PRECISION, out_dtype=dk_nd.dtype)
    return dk_nd, dv_nd


@triton.jit
def key_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, dk_ptr, dv_ptr, num_queries, num_keys,
    do_stride_b, do_stride_s, do_stride_h, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, dk_stride_b, dk_stride_s, dk_stride_h,
    GROUP: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
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
    k_nd = _load_rows(k_base, start_n, k_stride_s, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, True)
    v_nd = _load_rows(v_base, start_n, v_stride_s, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D, DOT, True)
    dk_nd = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv_nd = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for g in range(GROUP):
        q_head = head * GROUP + g
        q_base = q_ptr + row * q_stride_b + q_head * q_stride_h
        do_base = do_ptr + row * do_stride_b + q_head * do_stride_h
        stats = (row * tl.num_programs(1) * GROUP + q_head) * num_queries
        for i in range(full):
            dk_nd, dv_nd = _key_step(
                dk_nd, dv_nd, k_nd, v_nd, lo, hi, q_base, do_base, lse_ptr + stats, delta_ptr + stats,
                inner + i * BLOCK_M, end, q_stride_s, do_stride_s, SCALE, BLOCK_M, HEAD_DIM, BLOCK_D, DOT,
                PRECISION, False,
            )  # fmt: skip
        for i in range(edges):
            dk_nd, dv_nd = _key_step(
                dk_nd, dv_nd, k_nd, v_nd, lo, hi, q_base, do_base, lse_ptr + stats, delta_ptr + stats,
                _edge_start(i, first, before, outer, BLOCK_M), end, q_stride_s, do_stride_s, SCALE, BLOCK_M,
                HEAD_DIM, BLOCK_D, DOT, PRECISION, True,
            )  # fmt: skip
    some = (lo <= hi)[:, None]
    dk_base = dk_ptr + row * dk_stride_b + head * dk_stride_h
    dv_base = dv_ptr + row * dk_stride_b + head * dk_stride_h
    dk_nd, dv_nd = tl.where(some, dk_nd * SCALE, 0.0), tl.where(some, dv_nd, 0.0)
    _store_rows(dk_nd, dk_base, start_n, dk_stride_s, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(dv_nd, dv_base, start_n, dk_stride_s, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
