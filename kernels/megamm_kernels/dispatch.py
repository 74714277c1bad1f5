"""Which implementation runs: Triton kernels on CUDA tensors, plain torch on all others."""

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None

interpret = False
"""Tests set it, together with TRITON_INTERPRET=1, to run the Triton kernels on CPU tensors."""


def use_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take ``x``."""
    return x.is_cuda or interpret
