"""SwiGLU: one pass over the fused gate-up rows, forward and backward; silu is recomputed in the backward."""

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.launch import accumulator, launch


@triton.jit
def _load_gate_up(gate_up_ptr, row, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Gate, up, the sigmoid of the gate, and where they stand."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    offset = row * (2 * HIDDEN) + column
    gate = tl.load(gate_up_ptr + offset, mask, other=0.0).to(DTYPE)
    up = tl.load(gate_up_ptr + offset + HIDDEN, mask, other=0.0).to(DTYPE)
    return gate, up, 1 / (1 + tl.exp(-gate)), column, mask


@triton.jit
def _forward_kernel(gate_up_ptr, out_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate, up, sigmoid, column, mask = _load_gate_up(gate_up_ptr, row, HIDDEN, BLOCK, DTYPE)
    out = gate * sigmoid * up
    tl.store(out_ptr + row * HIDDEN + column, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(grad_ptr, gate_up_ptr, out_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate, up, sigmoid, column, mask = _load_gate_up(gate_up_ptr, row, HIDDEN, BLOCK, DTYPE)
    grad = tl.load(grad_ptr + row * HIDDEN + column, mask, other=0.0).to(DTYPE)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    out = out_ptr + row * (2 * HIDDEN) + column
    tl.store(out, grad_gate.to(out_ptr.dtype.element_ty), mask)
    tl.store(out + HIDDEN, (grad * silu).to(out_ptr.dtype.element_ty), mask)


def _launch(kernel, gate_up: torch.Tensor, *tensors: torch.Tensor) -> None:
    hidden = gate_up.shape[-1] // 2
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (gate_up.numel() // (2 * hidden), triton.cdiv(hidden, block))
    launch(
        kernel, grid, *tensors, HIDDEN=hidden, BLOCK=block, DTYPE=accumulator(gate_up.dtype),
        num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip


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
    """Gradient of both halves in one tensor."""
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
