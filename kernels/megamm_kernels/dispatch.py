"""Which implementation runs: Triton kernels on CUDA tensors, plain torch on all others; and what is checked."""

import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None

interpret = False
"""Tests set it, together with TRITON_INTERPRET=1, to run the Triton kernels on CPU tensors."""

check_intervals = os.environ.get("MEGAMM_CHECK_INTERVALS", "0") != "0"
"""Whether ``attention_mask`` makes sure that intervals are non-decreasing, which waits for the device."""


def use_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take ``x``; an error where they would but triton is missing."""
    wanted = x.is_cuda or interpret
    if wanted and not HAS_TRITON:
        raise RuntimeError("megamm_kernels runs CUDA tensors with Triton, which is not installed: pip install triton")
    return wanted


def nvidia_generation(device: torch.device) -> int | None:
    """Major compute capability of a CUDA device (9: Hopper, 10: Blackwell); None for AMD's.

    ROCm's torch gives AMD GPUs capabilities, too: an MI300 (gfx942) says 9.4 and would be taken for a Hopper.
    """
    return None if torch.version.hip else torch.cuda.get_device_capability(device)[0]
