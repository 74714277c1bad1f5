"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4), alone or after the addition to a residual stream."""

import torch

from megamm_kernels import dispatch

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.rms_norm import add_rms_norm_gpu, rms_norm_gpu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Statistics are float32 at least, whatever the dtype of ``x``.

    Args:
        x: [..., W].
        weight: [W], of any floating dtype.
        eps: added to the mean square.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: ``weight`` does not have the width of ``x``.
    """
    _check(x, weight)
    if dispatch.use_triton(x):
        return rms_norm_gpu(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise the sum.

    Args:
        x, residual: [..., W], of one shape and dtype.
        weight: [W], of any floating dtype.
        eps: added to the mean square.

    Returns:
        normed: ``rms_norm(x + residual)``.
        new_residual: ``x + residual``. Both of the shape and dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x is {list(x.shape)} {x.dtype}, residual {list(residual.shape)} {residual.dtype}")
    if dispatch.use_triton(x):
        return add_rms_norm_gpu(x, residual, weight, eps)[:2]
    new_residual = residual + x
    return _RMSNorm.apply(new_residual, weight, eps), new_residual


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in the dtype of ``x``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in the dtype of ``x``."""
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}, but x is {list(x.shape)}: want [{x.shape[-1]}]")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself, or in float32 where its dtype is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalised and scaled ``x`` [..., W], and the reciprocal norms [..., 1]."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale).mul_(weight.to(x.dtype)), scale


def normalise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`normalise` with respect to ``x`` and (not yet summed over rows) ``weight``."""
    unit = x * scale
    grad_unit = grad * weight.to(x.dtype)
    # The derivative of x * scale is (1 - unit unit^T / W) * scale, with eps as without it, since eps does not depend on
    # x.
    dot = (grad_unit * unit).mean(-1, keepdim=True)
    # In this order: the first of the two reads ``unit``, the second writes over it.
    return grad_unit.addcmul_(unit, dot, value=-1).mul_(scale), unit.mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """The CPU path: keeps the input and one reciprocal norm per row, and recomputes the rest in the backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = normalise(at_least_float32(x), weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = normalise_backward(at_least_float32(grad), at_least_float32(x), weight, scale)
        return grad_x.to(x.dtype), grad_weight.flatten(0, -2).sum(0).to(weight.dtype), None
