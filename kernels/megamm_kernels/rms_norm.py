"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; same shape and dtype as ``x``."""
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in the dtype of ``x``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalised and scaled ``x``, and the reciprocal norm [..., 1] that the backward needs."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale).mul_(weight.to(x.dtype)), scale


def normalise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`normalise` with respect to ``x`` and (not yet summed over rows) ``weight``."""
    unit = x * scale
    grad_unit = grad * weight.to(x.dtype)
    dot = (grad_unit * unit).mean(-1, keepdim=True)
    return grad_unit.addcmul_(unit, dot, value=-1).mul_(scale), unit.mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one reciprocal norm per row, and recomputes the rest in the backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = normalise_backward(grad, x, weight, scale)
        return grad_x, grad_weight.flatten(0, -2).sum(0).to(weight.dtype), None
