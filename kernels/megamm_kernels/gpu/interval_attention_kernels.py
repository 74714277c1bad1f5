"""Triton kernels of interval attention: forward, gradient of queries, gradients of keys and values.

A tile of one side (queries, or in the last kernel keys) meets the other side in one contiguous range, which the
tile's own intervals give. Inside it lies the range that every member of the tile sees: its tiles go through a loop
without any mask. The tiles cut by an edge of some interval, before and after it, share one loop with a mask.

Letters: m queries, n keys, d head width. Scores are kept in units of log2, since exp2 is what the hardware has.
"""

import triton
import triton.language as tl

from megamm_kernels.gpu.interval_attention_tiles import (
    add_product,
    edge_start,
    head_of,
    load_head,
    load_intervals,
    product,
    row_sums,
    scaled,
    seen,
    split,
    store_head,
    zeros,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward_step(acc, max_m, sum_m, q, lo, hi, k_head, v_head, start_n, end_n, C: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax over one more tile of keys."""
    k = load_head(k_head, start_n, end_n, C.BLOCK_N, C, MASKED)
    s_mn = product(q, k, C)
    if MASKED:
        s_mn = tl.where(seen(start_n + tl.arange(0, C.BLOCK_N), lo, hi), s_mn, float("-inf"))
    # The scale is positive, so it may come after the maximum: once per query, and below fused with the subtraction.
    new_max_m = tl.maximum(max_m, tl.max(s_mn, 1) * (C.SCALE * LOG2E))
    shift_m = new_max_m
    if MASKED:  # a query that has seen nothing yet keeps exp2(-inf - 0) = 0 instead of NaN
        shift_m = tl.where(new_max_m == float("-inf"), 0.0, new_max_m)
    p_mn = tl.math.exp2(s_mn * (C.SCALE * LOG2E) - shift_m[:, None])
    decay_m = tl.math.exp2(max_m - shift_m)
    v = load_head(v_head, start_n, end_n, C.BLOCK_N, C, MASKED)
    acc = add_product(scaled(acc, decay_m, C), p_mn, v, C)
    return acc, new_max_m, sum_m * decay_m + tl.sum(p_mn, 1)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lo_ptr,
    hi_ptr,
    num_queries,
    num_keys,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    C: tl.constexpr,
):
    """One program: a tile of queries of one head. The last tiles, in causal rows the longest, start first."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    # In 64 bits, because offsets of rows and heads may pass 2^31.
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_head = head_of((q_ptr, q_stride_b, q_stride_s, q_stride_h), row, head)
    k_head = head_of((k_ptr, k_stride_b, k_stride_s, k_stride_h), row, head // C.GROUP)
    v_head = head_of((v_ptr, v_stride_b, v_stride_s, v_stride_h), row, head // C.GROUP)
    m = start_m + tl.arange(0, BLOCK_M)
    lo, hi = load_intervals(lo_ptr + row * num_queries, hi_ptr + row * num_queries, m, num_queries)
    first, before, inner, full, outer, edges, end = split(lo, hi, num_keys, C.BLOCK_N)
    q = load_head(q_head, start_m, num_queries, BLOCK_M, C, True)
    acc = zeros(BLOCK_M, C)
    max_m = tl.full([BLOCK_M], float("-inf"), C.ACC)
    sum_m = tl.zeros([BLOCK_M], C.ACC)
    # Queries with an empty interval take part in whole tiles, too; what they gather is dropped when it is stored.
    for i in range(full):
        start_n = inner + i * C.BLOCK_N
        acc, max_m, sum_m = _forward_step(acc, max_m, sum_m, q, lo, hi, k_head, v_head, start_n, end, C, False)
    for i in range(edges):
        start_n = edge_start(i, first, before, outer, C.BLOCK_N)
        acc, max_m, sum_m = _forward_step(acc, max_m, sum_m, q, lo, hi, k_head, v_head, start_n, end, C, True)
    some = lo <= hi
    # It is divided by: zero for an empty interval.
    sum_m = tl.where(some, sum_m, 1.0)
    # Back from units of log2 to natural ones.
    lse_m = tl.where(some, (max_m + tl.math.log2(sum_m)) * LN2, float("-inf"))
    out_head = head_of((out_ptr, out_stride_b, out_stride_s, out_stride_h), row, head)
    store_head(acc, 1.0 / sum_m, some, out_head, start_m, num_queries, BLOCK_M, C)
    tl.store(lse_ptr + (row * tl.num_programs(1) + head) * num_queries + m, lse_m, mask=m < num_queries)


@triton.jit
def _query_step(
    dq, q, do, lse_m, delta_m, lo, hi, k_head, v_head, start_n, end_n, C: tl.constexpr, MASKED: tl.constexpr
):
    """Add one tile of keys to the gradient of a tile of queries."""
    k = load_head(k_head, start_n, end_n, C.BLOCK_N, C, MASKED)
    v = load_head(v_head, start_n, end_n, C.BLOCK_N, C, MASKED)
    s_mn = product(q, k, C)
    dp_mn = product(do, v, C)
    p_mn = tl.math.exp2(s_mn * (C.SCALE * LOG2E) - lse_m[:, None])
    # Dropped, not multiplied by zero: hidden scores are in no log-sum-exp, so that exp2 of them may be infinite.
    if MASKED:
        p_mn = tl.where(seen(start_n + tl.arange(0, C.BLOCK_N), lo, hi), p_mn, 0.0)
    return add_product(dq, p_mn * (dp_mn - delta_m[:, None]), k, C)


@triton.jit
def query_gradient_kernel(
    do_ptr,
    dlse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lo_ptr,
    hi_ptr,
    dq_ptr,
    delta_ptr,
    num_queries,
    num_keys,
    do_stride_b,
    do_stride_s,
    do_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    C: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """One program: a tile of queries of one head. Also writes delta = sum(do * out) - dlse, for the keys' kernel."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = start_m + tl.arange(0, BLOCK_M)
    lo, hi = load_intervals(lo_ptr + row * num_queries, hi_ptr + row * num_queries, m, num_queries)
    first, before, inner, full, outer, edges, end = split(lo, hi, num_keys, C.BLOCK_N)
    q_head = head_of((q_ptr, q_stride_b, q_stride_s, q_stride_h), row, head)
    do_head = head_of((do_ptr, do_stride_b, do_stride_s, do_stride_h), row, head)
    out_head = head_of((out_ptr, out_stride_b, out_stride_s, out_stride_h), row, head)
    k_head = head_of((k_ptr, k_stride_b, k_stride_s, k_stride_h), row, head // C.GROUP)
    v_head = head_of((v_ptr, v_stride_b, v_stride_s, v_stride_h), row, head // C.GROUP)
    q = load_head(q_head, start_m, num_queries, BLOCK_M, C, True)
    do = load_head(do_head, start_m, num_queries, BLOCK_M, C, True)
    out = load_head(out_head, start_m, num_queries, BLOCK_M, C, True)
    some = lo <= hi
    delta_m = tl.where(some, row_sums(do, out, C), 0.0)
    stats = (row * tl.num_programs(1) + head) * num_queries + m
    if HAS_DLSE:
        # d lse / d s = p, so that ds = p * (dp - delta + dlse).
        delta_m -= tl.load(dlse_ptr + stats, mask=some, other=0.0)
    tl.store(delta_ptr + stats, delta_m, mask=m < num_queries)
    # An infinite log-sum-exp makes all weights of an empty query zero.
    lse_m = tl.load(lse_ptr + stats, mask=some, other=float("inf")) * LOG2E
    dq = zeros(BLOCK_M, C)
    for i in range(full):
        start_n = inner + i * C.BLOCK_N
        dq = _query_step(dq, q, do, lse_m, delta_m, lo, hi, k_head, v_head, start_n, end, C, False)
    for i in range(edges):
        start_n = edge_start(i, first, before, outer, C.BLOCK_N)
        dq = _query_step(dq, q, do, lse_m, delta_m, lo, hi, k_head, v_head, start_n, end, C, True)
    # dq and out are both packed tensors of one shape.
    dq_head = head_of((dq_ptr, out_stride_b, out_stride_s, out_stride_h), row, head)
    # The scale of scores, once per entry here instead of once per score in the loop.
    scale_m = tl.full([BLOCK_M], C.SCALE, C.ACC)
    store_head(dq, scale_m, some, dq_head, start_m, num_queries, BLOCK_M, C)


@triton.jit
def _key_step(
    dk, dv, k, v, lo, hi, q_head, do_head, lse_base, delta_base, start_m, end_m, C: tl.constexpr, MASKED: tl.constexpr
):
    """Add one tile of queries to the gradients of a tile of keys; ``lo``, ``hi`` are the queries that see each key."""
    q = load_head(q_head, start_m, end_m, C.BLOCK_M, C, MASKED)
    do = load_head(do_head, start_m, end_m, C.BLOCK_M, C, MASKED)
    m = start_m + tl.arange(0, C.BLOCK_M)
    if MASKED:
        lse_m = tl.load(lse_base + m, mask=m < end_m, other=0.0)
        delta_m = tl.load(delta_base + m, mask=m < end_m, other=0.0)
    else:
        lse_m = tl.load(lse_base + m)
        delta_m = tl.load(delta_base + m)
    s_nm = product(k, q, C)
    p_nm = tl.math.exp2(s_nm * (C.SCALE * LOG2E) - (lse_m * LOG2E)[None, :])
    if MASKED:
        p_nm = tl.where(seen(m, lo, hi), p_nm, 0.0)
    dv = add_product(dv, p_nm, do, C)
    dp_nm = product(v, do, C)
    dk = add_product(dk, p_nm * (dp_nm - delta_m[None, :]), q, C)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    lo_ptr,
    hi_ptr,
    dk_ptr,
    dv_ptr,
    num_queries,
    num_keys,
    do_stride_b,
    do_stride_s,
    do_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    dk_stride_b,
    dk_stride_s,
    dk_stride_h,
    C: tl.constexpr,
):
    """One program: a tile of keys of one key head, over the queries of all heads of its group, in order."""
    BLOCK_N: tl.constexpr = C.BLOCK_N
    GROUP: tl.constexpr = C.GROUP
    # From the front: in causal rows the first keys are seen by the most queries.
    start_n = tl.program_id(0) * BLOCK_N
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = start_n + tl.arange(0, BLOCK_N)
    lo, hi = load_intervals(lo_ptr + row * num_keys, hi_ptr + row * num_keys, n, num_keys)
    first, before, inner, full, outer, edges, end = split(lo, hi, num_queries, C.BLOCK_M)
    k_head = head_of((k_ptr, k_stride_b, k_stride_s, k_stride_h), row, head)
    v_head = head_of((v_ptr, v_stride_b, v_stride_s, v_stride_h), row, head)
    k = load_head(k_head, start_n, num_keys, BLOCK_N, C, True)
    v = load_head(v_head, start_n, num_keys, BLOCK_N, C, True)
    dk = zeros(BLOCK_N, C)
    dv = zeros(BLOCK_N, C)
    # The sum over a group's heads stays in registers: no other program writes these keys.
    for g in range(GROUP):
        query_head = head * GROUP + g
        q_head = head_of((q_ptr, q_stride_b, q_stride_s, q_stride_h), row, query_head)
        do_head = head_of((do_ptr, do_stride_b, do_stride_s, do_stride_h), row, query_head)
        # Programs count key heads; statistics lie by query head.
        stats = (row * tl.num_programs(1) * GROUP + query_head) * num_queries
        lse, delta = lse_ptr + stats, delta_ptr + stats
        for i in range(full):
            start_m = inner + i * C.BLOCK_M
            dk, dv = _key_step(dk, dv, k, v, lo, hi, q_head, do_head, lse, delta, start_m, end, C, False)
        for i in range(edges):
            start_m = edge_start(i, first, before, outer, C.BLOCK_M)
            dk, dv = _key_step(dk, dv, k, v, lo, hi, q_head, do_head, lse, delta, start_m, end, C, True)
    some = lo <= hi
    dk_head = head_of((dk_ptr, dk_stride_b, dk_stride_s, dk_stride_h), row, head)
    # dk and dv are both packed tensors of one shape.
    dv_head = head_of((dv_ptr, dk_stride_b, dk_stride_s, dk_stride_h), row, head)
    scale_n, one_n = tl.full([BLOCK_N], C.SCALE, C.ACC), tl.full([BLOCK_N], 1.0, C.ACC)
    store_head(dk, scale_n, some, dk_head, start_n, num_keys, BLOCK_N, C)
    store_head(dv, one_n, some, dv_head, start_n, num_keys, BLOCK_N, C)
