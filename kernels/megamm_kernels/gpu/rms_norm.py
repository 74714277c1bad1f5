"""RMS norm, with or without a residual addition before it: one pass over the rows, forward and backward.

The backward reads the normalised input and one reciprocal norm per row. A fixed set of programs walks over the
rows; each keeps its part of the weight gradient in registers, and a sum over programs in torch ends it, so the
result does not depend on the order in which programs finish.
"""

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.launch import accumulator, launch, partial_dtype, persistent_programs


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    scale_ptr,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x = tl.load(x_ptr + offset, mask, other=0.0).to(DTYPE)
    if ADD:
        x += tl.load(residual_ptr + offset, mask, other=0.0).to(DTYPE)
        # Normalise what later layers and the backward will read, the rounded sum.
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, total, mask)
        x = total.to(DTYPE)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(scale_ptr + row, scale, row < num_rows)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0).to(DTYPE)
    out = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_total_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0).to(DTYPE)
    # Of every row of a tile a sum of its own: the rows are reduced once, after the loop.
    grad_weight = tl.zeros((ROWS, BLOCK), DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        grad = tl.load(grad_ptr + offset, mask, other=0.0).to(DTYPE)
        scale = tl.load(scale_ptr + row, row < num_rows, other=0.0)[:, None]
        unit = tl.load(x_ptr + offset, mask, other=0.0).to(DTYPE) * scale
        grad_weight += grad * unit
        grad_unit = grad * weight[None, :]
        dot = tl.sum(grad_unit * unit, 1)[:, None] / WIDTH
        grad_x = (grad_unit - unit * dot) * scale
        # The sum also went on along the residual stream; its gradient from there joins here, without another pass.
        if ADD:
            grad_x += tl.load(grad_total_ptr + offset, mask, other=0.0).to(DTYPE)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    partial_offset = tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(partial_ptr + partial_offset, tl.sum(grad_weight, 0), column < WIDTH)


def _tile(x: torch.Tensor, elements: int) -> dict:
    """Rows per tile and warps: about 16 elements a thread, more only where one row is wider."""
    block = triton.next_power_of_2(x.shape[-1])
    rows = max(1, elements // block) if x.is_cuda else 4
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch_forward(x, residual, weight, eps):
    x = x.contiguous()
    width, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    # Without an addition the kernel neither reads ``residual`` nor writes ``total``: any pointer will do.
    out, total = _empty(x), x if residual is None else _empty(x)
    scale = torch.empty(x.shape[:-1], dtype=partial_dtype(x.dtype), device=x.device)
    tile = _tile(x, 2048)
    launch(
        _forward_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]),),
        x,
        x if residual is None else residual.contiguous(),
        weight.contiguous(),
        out,
        total,
        scale,
        num_rows,
        eps,
        WIDTH=width,
        ADD=residual is not None,
        DTYPE=accumulator(x.dtype),
        **tile,
    )
    return out, total, scale


@torch.library.custom_op("megamm::rms_norm_gpu", mutates_args=())
def rms_norm_gpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalised ``x`` and the reciprocal norm of each row."""
    # The third is x itself, which an op must not return.
    out, _, scale = _launch_forward(x, None, weight, eps)
    return out, scale


@torch.library.custom_op("megamm::add_rms_norm_gpu", mutates_args=())
def add_rms_norm_gpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the normalised sum, the sum and the reciprocal norm of each row."""
    return _launch_forward(x, residual, weight, eps)


@torch.library.custom_op("megamm::rms_norm_backward_gpu", mutates_args=())
def rms_norm_backward_gpu(
    grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what was normalised and of the weight; ``grad_total`` is added to the former."""
    x, grad = x.contiguous(), grad.contiguous()
    width, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    grad_x = _empty(x)
    tile = _tile(x, 1024)
    # Fetch the next rows while these are summed, as far as shared memory goes.
    stages = 2 if tile["BLOCK"] * x.element_size() <= 2**15 else 1
    programs = persistent_programs(x, triton.cdiv(num_rows, tile["ROWS"]), tile["num_warps"])
    partial = torch.empty(programs, width, dtype=partial_dtype(x.dtype), device=x.device)
    launch(
        _backward_kernel,
        (programs,),
        grad,
        x,
        weight.contiguous(),
        scale,
        grad if grad_total is None else grad_total.contiguous(),
        grad_x,
        partial,
        num_rows,
        WIDTH=width,
        ADD=grad_total is not None,
        DTYPE=accumulator(x.dtype),
        STAGES=stages,
        **tile,
    )
    return grad_x, partial.sum(0).to(weight.dtype)


@rms_norm_gpu.register_fake
def _(x, weight, eps):
    return _empty(x), x.new_empty(x.shape[:-1], dtype=partial_dtype(x.dtype))


@add_rms_norm_gpu.register_fake
def _(x, residual, weight, eps):
    return _empty(x), _empty(x), x.new_empty(x.shape[:-1], dtype=partial_dtype(x.dtype))


@rms_norm_backward_gpu.register_fake
def _(grad, grad_total, x, weight, scale):
    return _empty(x), weight.new_empty(weight.shape)


def _save_norm(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _save_add_norm(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _norm_backward(ctx, grad, _):
    return *rms_norm_backward_gpu(grad, None, *ctx.saved_tensors), None


def _add_norm_backward(ctx, grad, grad_total, _):
    grad_x, grad_weight = rms_norm_backward_gpu(grad, grad_total, *ctx.saved_tensors)
    # x and residual enter as a sum, so that both have the same gradient.
    return grad_x, grad_x, grad_weight, None


rms_norm_gpu.register_autograd(_norm_backward, setup_context=_save_norm)
add_rms_norm_gpu.register_autograd(_add_norm_backward, setup_context=_save_add_norm)
