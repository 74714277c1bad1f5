"""Gradient of an embedding table without atomic additions: sort positions by token, then sum each token's run.

Runs differ wildly in length (padding, frequent words), so the sorted positions are cut into chunks of equal size,
one per program. A product with a 0-1 matrix sums the runs inside a chunk, all at once on tensor cores. Runs that
lie in one chunk are done; the pieces of the others (at most two a chunk) are kept as carries, which a second kernel
adds up in order. No count ever comes back to the host. The price: a gradient that is not finite spoils the sums of
its whole chunk, not of its token only.
"""

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.launch import accumulator, launch, partial_dtype


@triton.jit
def _chunk_kernel(
    grad_ptr,
    keys_ptr,
    order_ptr,
    table_ptr,
    first_ptr,
    last_ptr,
    num_rows,
    vocabulary,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < WIDTH)[None, :]
    key = tl.load(keys_ptr + row, row < num_rows, other=vocabulary)
    source = tl.load(order_ptr + row, row < num_rows, other=0)
    # Rows that count nowhere are not read: zero times what is not finite would spoil the others' sums.
    grad = tl.load(grad_ptr + source[:, None] * WIDTH + column[None, :], (key < vocabulary)[:, None] & inside, other=0)
    # Entry (i, j) is 1 where row j belongs to the run of row i; it is used where row i is the first of its run.
    same = (key[:, None] == key[None, :]).to(DOT)
    # "ieee", whatever torch's setting: TF32 would round float32 gradients before they are added.
    total = tl.dot(same, grad.to(DOT), input_precision="ieee", out_dtype=DTYPE)
    previous = tl.load(keys_ptr + row - 1, (row > 0) & (row < num_rows), other=-1)
    begins = ((row % CHUNK == 0) | (previous != key)) & (key < vocabulary)
    next_row = (chunk + 1) * CHUNK
    continued = (row % CHUNK == 0) & (previous == key)
    continues = key == tl.load(keys_ptr + next_row, next_row < num_rows, other=-1)
    out = table_ptr + key.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, total.to(table_ptr.dtype.element_ty), (begins & ~continued & ~continues)[:, None] & inside)
    # As tall as ``total``, to be stored with the same shape: at most one row of each mask is set.
    carry = chunk * WIDTH + column[None, :] + tl.zeros((CHUNK, 1), tl.int64)
    tl.store(first_ptr + carry, total, (begins & continued)[:, None] & inside)
    # A chunk that is all of one run counts as a first piece only.
    tl.store(last_ptr + carry, total, (begins & continues & ~continued)[:, None] & inside)


@triton.jit
def _carry_kernel(
    keys_ptr,
    table_ptr,
    first_ptr,
    last_ptr,
    num_rows,
    vocabulary,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Finish the run that begins in this chunk and goes on in the next, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    next_row = (chunk + 1) * CHUNK
    key = tl.load(keys_ptr + next_row - 1, next_row < num_rows, other=vocabulary)
    after = tl.load(keys_ptr + next_row, next_row < num_rows, other=-1)
    before = tl.load(keys_ptr + chunk * CHUNK - 1, chunk > 0, other=-1)
    # One program per run: that of the chunk where it begins, as the key before the chunk tells.
    if (key < vocabulary) & (key == after) & (key != before):
        total = tl.load(last_ptr + chunk * WIDTH + column, column < WIDTH, other=0.0)
        start = chunk + 1
        while tl.load(keys_ptr + start * CHUNK, start * CHUNK < num_rows, other=-1) == key:
            piece = start + tl.arange(0, STEP)
            mine = tl.load(keys_ptr + piece * CHUNK, piece * CHUNK < num_rows, other=-1) == key
            offset = piece[:, None] * WIDTH + column[None, :]
            total += tl.sum(tl.load(first_ptr + offset, mine[:, None] & (column < WIDTH)[None, :], other=0.0), 0)
            start += STEP
        out = table_ptr + key.to(tl.int64) * WIDTH + column
        tl.store(out, total.to(table_ptr.dtype.element_ty), column < WIDTH)


def table_gradient(grad: torch.Tensor, keys: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """[V, W] in ``dtype``: sums of the rows of ``grad`` [n, W] by ``keys`` int32 [n]; key V counts nowhere."""
    num_rows, width = grad.shape
    # Zeros: the kernels write the rows of tokens that occur, no others.
    table = torch.zeros(vocabulary, width, dtype=dtype, device=grad.device)
    # Stable, or positions of a token would be added in another order from run to run.
    keys, order = torch.sort(keys, stable=True)
    chunk, block = (32, 128) if grad.is_cuda else (16, 16)
    chunks = triton.cdiv(num_rows, chunk)
    first, last = (torch.empty(chunks, width, dtype=partial_dtype(grad.dtype), device=grad.device) for _ in range(2))
    grid = (chunks, triton.cdiv(width, block))
    # Triton's interpreter multiplies 16-bit operands wrongly.
    half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} if grad.is_cuda else {}
    launch(
        _chunk_kernel,
        grid,
        grad,
        keys,
        order,
        table,
        first,
        last,
        num_rows,
        vocabulary,
        WIDTH=width,
        CHUNK=chunk,
        BLOCK=block,
        DOT=half.get(grad.dtype, accumulator(grad.dtype)),
        DTYPE=accumulator(grad.dtype),
        num_warps=4,
    )
    launch(
        _carry_kernel,
        grid,
        keys,
        table,
        first,
        last,
        num_rows,
        vocabulary,
        WIDTH=width,
        CHUNK=chunk,
        BLOCK=block,
        STEP=16,
        num_warps=4,
    )
    return table
