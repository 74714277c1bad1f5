"""What the launchers of row-wise kernels share."""

from functools import lru_cache

import torch
import triton
import triton.language as tl


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Run ``kernel`` on the device of its first argument, a tensor; an empty grid launches nothing."""
    if all(grid):
        # Triton launches on the current device, wherever the tensors lie.
        with torch.cuda.device_of(args[0]):
            # The default up to Triton 3.9; 3.10 would round each product before it is added.
            kernel[grid](*args, **meta, enable_fp_fusion=True)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What a kernel computes in: float32, or float64 for float64 tensors."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """The torch dtype of :func:`accumulator`, for statistics and partial sums in memory."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_precision() -> str:
    """How Triton multiplies float32 operands: as torch's matrix products do.

    Read through torch's newer setting, which also knows what the older setters did; the older getters raise once
    the newer one was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


WARPS = 16
"""Warps per multiprocessor for programs that stay: as many as fit with 128 registers a thread."""


def persistent_programs(x: torch.Tensor, tiles: int, num_warps: int, min_tiles: int = 4) -> int:
    """Programs of ``num_warps`` that share ``tiles`` evenly, run all at once and keep their partial sums few.

    The count depends on the device and the shape only, so sums are taken in the same order every time.
    """
    if not x.is_cuda:
        return min(tiles, multiprocessors(x))
    return min(multiprocessors(x) * max(1, WARPS // num_warps), triton.cdiv(tiles, min_tiles))


def multiprocessors(x: torch.Tensor) -> int:
    """How many programs run at once where ``x`` lies; few under the interpreter, so that tests see loops."""
    return _multiprocessors(x.device) if x.is_cuda else 3


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
