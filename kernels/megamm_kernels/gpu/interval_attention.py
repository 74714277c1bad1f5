"""Interval attention as operators over the Triton kernels: tile sizes, launches, autograd.

The backward is two kernels, one over tiles of queries and one over tiles of keys, so that every gradient has one
writer and no atomics are needed: results are the same bits run after run.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.interval_attention_kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel
from megamm_kernels.gpu.interval_attention_tiles import Constants
from megamm_kernels.gpu.launch import accumulator, float32_precision, launch, partial_dtype


class Tiles(NamedTuple):
    """Queries and keys of a tile, depth of the software pipeline, warps of a program."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


# By kernel, then by the widest padded head that the entry serves; first 16-bit types, then float32.
TILES = {
    "forward": (
        {64: Tiles(128, 64, 3, 4), 128: Tiles(128, 64, 3, 8), 256: Tiles(128, 32, 3, 8)},
        {64: Tiles(64, 32, 2, 8), 128: Tiles(32, 16, 2, 8), 256: Tiles(32, 16, 2, 8)},
    ),
    "query": (
        {32: Tiles(128, 64, 3, 4), 128: Tiles(128, 64, 3, 8), 256: Tiles(128, 32, 2, 8)},
        {128: Tiles(32, 32, 2, 8), 256: Tiles(16, 32, 2, 8)},
    ),
    "key": ({128: Tiles(64, 128, 3, 8), 256: Tiles(32, 64, 2, 8)}, {64: Tiles(32, 32, 2, 8), 256: Tiles(16, 16, 2, 8)}),
}
"""Tiles that keep everything in the registers of a Hopper SM, by the compiler's report for sm_90, but for a little that
the keys' kernel spills from a width of 128 on. 128 queries (or keys, in their kernel) a tile: with 64, the other side
would have to come out of the L2 cache twice as often, more than that delivers. Float32 is for checks, not for speed.
bench/tune/attention_tiles.py measures others."""
INTERPRETER_TILES = Tiles(32, 16, 1, 4)
MAX_HEAD_DIM = 256


def parts(head_dim: int) -> tuple[int, int]:
    """Powers of 2 of at least 16 whose sum is the least that holds a head; the second may be 0."""
    # Triton's tiles are powers of 2, and its products take no side below 16.
    whole = max(16, triton.next_power_of_2(head_dim))
    main = whole // 2
    rest = max(16, triton.next_power_of_2(max(1, head_dim - main)))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)


def shared_bytes(kernel: str, tiles: Tiles, width: int, itemsize: int) -> int:
    """Shared memory of a program: what stays for the whole loop, and what streams through the pipeline."""
    m, n = tiles.block_m, tiles.block_n
    # Forward: q stays, k and v stream. Queries' gradient: q and do, k and v. Keys' gradient: k and v, q and do.
    stays, streams = {"forward": (m, 2 * n), "query": (2 * m, 2 * n), "key": (2 * n, 2 * m)}[kernel]
    return (stays + tiles.num_stages * streams) * width * itemsize + 2048


def fit(kernel: str, tiles: Tiles, width: int, itemsize: int, limit: int) -> Tiles:
    """Shorten the pipeline, then shrink the tiles, until a program's shared memory is within ``limit`` bytes."""
    while shared_bytes(kernel, tiles, width, itemsize) > limit and max(tiles[:2]) > 16:
        if tiles.num_stages > 2:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        else:
            tiles = tiles._replace(block_m=max(16, tiles.block_m // 2), block_n=max(16, tiles.block_n // 2))
    return tiles


@lru_cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's type stub lacks the field
    # ROCm's torch may lack the first: its GPUs have one limit.
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def _tiles(kernel: str, q: torch.Tensor) -> Tiles:
    if not q.is_cuda:
        return INTERPRETER_TILES
    width, itemsize = sum(parts(q.shape[-1])), q.element_size()
    table = TILES[kernel][itemsize > 2]
    return fit(kernel, table[min(w for w in table if w >= width)], width, itemsize, _shared_memory(q.device))


def _constants(kernel: str, q: torch.Tensor, k: torch.Tensor) -> dict:
    """Compile-time arguments of a kernel."""
    head_dim, (main, rest), tiles = q.shape[-1], parts(q.shape[-1]), _tiles(kernel, q)
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(q.dtype, accumulator(q.dtype))
    constants = Constants(
        GROUP=q.shape[2] // k.shape[2],
        SCALE=head_dim**-0.5,
        D=head_dim,
        MAIN=main,
        REST=rest,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        DOT=dot if q.is_cuda else accumulator(q.dtype),  # the interpreter's bfloat16 products are wrong
        ACC=accumulator(q.dtype),
        PRECISION=float32_precision(),
    )
    return {"C": constants, "num_stages": tiles.num_stages, "num_warps": tiles.num_warps}


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but that of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _grid(x: torch.Tensor, block: int) -> tuple[int, int, int]:
    """Tiles, heads, rows of [B, S, H, D]."""
    # Tiles come first because CUDA limits the other two axes to 65535.
    return triton.cdiv(x.shape[1], block), x.shape[2], x.shape[0]


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    # Packed even where x is a slice of a fused product, whose strides empty_like would imitate.
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_stats(q: torch.Tensor) -> torch.Tensor:
    """A number per query and head, [B, H, S]."""
    batch, length, heads, _ = q.shape
    return torch.empty((batch, heads, length), dtype=partial_dtype(q.dtype), device=q.device)


@torch.library.custom_op("megamm::interval_attention_gpu", mutates_args=())
def interval_attention_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    query_lo: torch.Tensor,
    query_hi: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [B, S, H, D] and the log-sum-exp of scores [B, H, S]; the last two are for the backward."""
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    out, lse = _empty_like(q), _empty_stats(q)
    constants = _constants("forward", q, k)
    args = q, k, v, out, lse, lo, hi, q.shape[1], k.shape[1], *_strides(q, k, v, out)
    launch(forward_kernel, _grid(q, constants["C"].BLOCK_M), *args, **constants)
    return out, lse


@torch.library.custom_op("megamm::interval_attention_backward_gpu", mutates_args=())
def interval_attention_backward_gpu(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    query_lo: torch.Tensor,
    query_hi: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = (_rows_contiguous(x) for x in (grad, q, k, v))
    # Queries first: their kernel fills delta, which the keys' kernel reads.
    delta = _empty_stats(q)
    grad_q = query_gradient(grad, grad_lse, q, k, v, out, lse, delta, lo, hi)
    return grad_q, *key_gradient(grad, q, k, v, lse, delta, query_lo, query_hi)


def query_gradient(grad, grad_lse, q, k, v, out, lse, delta, lo, hi) -> torch.Tensor:
    """Gradient of q; also fills ``delta``."""
    # The kernel reads grad_lse as a packed [B, H, S]; callers see lse transposed, and its gradient comes back so.
    grad_q, grad_lse = _empty_like(q), None if grad_lse is None else grad_lse.contiguous()
    constants = _constants("query", q, k)
    args = (
        grad,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        lo,
        hi,
        grad_q,
        delta,
        q.shape[1],
        k.shape[1],
        *_strides(grad, q, k, v, out),
    )
    launch(query_gradient_kernel, _grid(q, constants["C"].BLOCK_M), *args, **constants, HAS_DLSE=grad_lse is not None)
    return grad_q


def key_gradient(grad, q, k, v, lse, delta, query_lo, query_hi) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of k and v, with the ``delta`` of :func:`query_gradient`."""
    grad_k, grad_v = _empty_like(k), _empty_like(v)
    constants = _constants("key", q, k)
    args = (
        grad,
        q,
        k,
        v,
        lse,
        delta,
        query_lo,
        query_hi,
        grad_k,
        grad_v,
        q.shape[1],
        k.shape[1],
        *_strides(grad, q, k, v, grad_k),
    )
    launch(key_gradient_kernel, _grid(k, constants["C"].BLOCK_N), *args, **constants)
    return grad_k, grad_v


@interval_attention_gpu.register_fake
def _(q, k, v, lo, hi, query_lo, query_hi):
    return _empty_like(q), _empty_stats(q)


@interval_attention_backward_gpu.register_fake
def _(grad, grad_lse, q, k, v, out, lse, lo, hi, query_lo, query_hi):
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _setup_context(ctx, inputs, output):
    # Without this an lse that nobody used would come back as zeros, and be read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad, grad_lse):
    q, k, v, out, lse, *intervals = ctx.saved_tensors
    # Only the log-sum-exp was used.
    grad = torch.zeros_like(out) if grad is None else grad
    grads = interval_attention_backward_gpu(grad, grad_lse, q, k, v, out, lse, *intervals)
    return *grads, None, None, None, None


interval_attention_gpu.register_autograd(_backward, setup_context=_setup_context)
