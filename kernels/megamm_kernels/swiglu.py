"""SwiGLU gating (Shazeer 2020, arXiv 2002.05202) on the output of one fused gate-up product.

Gate and up of a hidden entry stand side by side, in activations [..., F, 2] and in the rows of the weight [F, 2], so
that an equal slice of either is a smaller layer.
"""

import torch
import torch.nn.functional as F

from megamm_kernels import dispatch

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.swiglu import swiglu_gpu


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    On CUDA nothing but the input is kept for the backward, whose gradient is one tensor of the shape of ``gate_up``.

    Args:
        gate_up: [..., 2 * hidden]: gate, up, gate, up and so on.

    Returns:
        [..., hidden], dtype of the input.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {list(gate_up.shape)}: its last dimension must be even (pairs of gate and up)")
    return swiglu_gpu(gate_up) if dispatch.use_triton(gate_up) else swiglu_reference(gate_up)


def linear_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """swiglu(x @ weight^T), the first half of a feed-forward layer.

    On CUDA one product and the kernel. On the CPU, in float32 and float64, two products, of every other row of the
    weight: a matrix product takes them where they lie, while element-wise operations on every other entry of the
    result would be slow.

    Args:
        x: [..., W].
        weight: [2 * hidden, W]: rows of gate, up, gate, up and so on; cast to the dtype of ``x``.

    Returns:
        [..., hidden], dtype of ``x``.

    Raises:
        ValueError: shapes do not fit.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight is {list(weight.shape)}: want [2 * hidden, {x.shape[-1]}], as x is {list(x.shape)}")
    weight = weight.to(x.dtype)
    if dispatch.use_triton(x) or x.dtype.itemsize < 4:  # the gradient of x would be the sum of two rounded products
        return swiglu(F.linear(x, weight))
    gate, up = weight.unflatten(0, (-1, 2)).unbind(1)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition, and the CPU path."""
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


def linear_swiglu_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition."""
    return swiglu_reference(x @ weight.T)
