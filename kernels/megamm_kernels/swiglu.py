"""SwiGLU gating (Shazeer 2020, arXiv 2002.05202)."""

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [..., 2 * hidden]; the gate half, then the up half.

    Returns:
        [..., hidden], dtype of the input.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
