"""SwiGLU gating (Shazeer 2020, arXiv 2002.05202) on the output of one fused gate-up product."""

import torch
import torch.nn.functional as F

from megamm_kernels import dispatch

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.swiglu import swiglu_gpu


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    On CUDA nothing but the input is kept for the backward, whose gradient is one tensor of the shape of ``gate_up``.

    Args:
        gate_up: [..., 2 * hidden]; the gate half, then the up half.

    Returns:
        [..., hidden], dtype of the input.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {list(gate_up.shape)}: its last dimension must be even (gate, then up)")
    return swiglu_gpu(gate_up) if dispatch.use_triton(gate_up) else swiglu_reference(gate_up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition, and the CPU path."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
