"""SwiGLU: one pass over the pairs of gate and up, forward and backward; silu is recomputed in the backward.

A program loads a run of pairs, as wide words, and splits it in registers.
"""

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.launch import accumulator, launch


@triton.jit
def _load_gate_up(gate_up_ptr, row, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Gate, up and the sigmoid of the gate."""
    entry = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(gate_up_ptr + row * (2 * HIDDEN) + entry, entry < 2 * HIDDEN, other=0.0)
    gate, up = tl.split(pairs.to(DTYPE).reshape(BLOCK, 2))
    return gate, up, 1 / (1 + tl.exp(-gate))


@triton.jit
def _forward_kernel(gate_up_ptr, out_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate, up, sigmoid = _load_gate_up(gate_up_ptr, row, HIDDEN, BLOCK, DTYPE)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = gate * sigmoid * up
    tl.store(out_ptr + row * HIDDEN + column, out.to(out_ptr.dtype.element_ty), column < HIDDEN)


@triton.jit
def _backward_kernel(grad_ptr, gate_up_ptr, out_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate, up, sigmoid = _load_gate_up(gate_up_ptr, row, HIDDEN, BLOCK, DTYPE)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + row * HIDDEN + column, column < HIDDEN, other=0.0).to(DTYPE)
    silu = gate * sigmoid
    # silu' = sigmoid + silu * (1 - sigmoid)
    pairs = tl.join(grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu).reshape(2 * BLOCK)
    entry = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + row * (2 * HIDDEN) + entry, pairs.to(out_ptr.dtype.element_ty), entry < 2 * HIDDEN)


def _launch(kernel, gate_up: torch.Tensor, *tensors: torch.Tensor) -> None:
    hidden = gate_up.shape[-1] // 2
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (gate_up.numel() // (2 * hidden), triton.cdiv(hidden, block))
    meta = {"HIDDEN": hidden, "BLOCK": block, "DTYPE": accumulator(gate_up.dtype)}
    launch(kernel, grid, *tensors, **meta, num_warps=min(8, max(1, block // 256)))


def _empty_out(gate_up: torch.Tensor) -> torch.Tensor:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)


@torch.library.custom_op("megamm::swiglu_gpu", mutates_args=())
def swiglu_gpu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2 * hidden]."""
    gate_up, out = gate_up.contiguous(), _empty_out(gate_up)
    _launch(_forward_kernel, gate_up, gate_up, out)
    return out


@torch.library.custom_op("megamm::swiglu_backward_gpu", mutates_args=())
def swiglu_backward_gpu(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient of both, in one tensor."""
    gate_up = gate_up.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    _launch(_backward_kernel, gate_up, grad.contiguous(), gate_up, grad_gate_up)
    return grad_gate_up


@swiglu_gpu.register_fake
def _(gate_up):
    return _empty_out(gate_up)


@swiglu_backward_gpu.register_fake
def _(grad, gate_up):
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return swiglu_backward_gpu(grad, *ctx.saved_tensors)


swiglu_gpu.register_autograd(_backward, setup_context=_setup_context)
