"""Per-head RMS norm of queries and keys, then rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import torch

from megamm_kernels.rms_norm import normalise, normalise_backward


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles.

    Args:
        positions: [B, L] integers.
        head_dim: even width D of a head.
        theta: base of the geometric series of wavelengths.

    Returns:
        cos, sin: float32 [B, L, 1, 1, D / 2].
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None, None, None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def qk_norm_rope(
    qk: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise each head to unit RMS, scale by ``weight`` and rotate by position.

    The first half of a head's entries pairs with the second half (the "rotate half" layout of GPT-NeoX
    and Llama checkpoints).

    Args:
        qk: [B, L, 2, H, D], queries and keys.
        weight: [2, D], scales of queries and of keys.
        cos, sin: [B, L, 1, 1, D / 2] from :func:`rope_table`.

    Returns:
        q, k: [B, L, H, D] each, dtype of ``qk``.
    """
    return _QKNormRope.apply(qk, weight, cos.to(qk.dtype), sin.to(qk.dtype), eps).unbind(2)


def qk_norm_rope_reference(
    qk: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in the dtype of ``qk``."""
    normed = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + eps) * weight[:, None]
    first, second = normed.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).unbind(2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (first half, second half); with -sin the inverse, which is also the transpose."""
    halves = x.unflatten(-1, (2, -1))
    out = halves * cos.unsqueeze(-2)
    out[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    out[..., 1, :].addcmul_(halves[..., 0, :], sin)
    return out.flatten(-2)


class _QKNormRope(torch.autograd.Function):
    """Keeps the input and one reciprocal norm per head, and recomputes the rest in the backward."""

    @staticmethod
    def forward(ctx, qk, weight, cos, sin, eps):
        normed, scale = normalise(qk, weight[:, None], eps)
        ctx.save_for_backward(qk, weight, cos, sin, scale)
        return _rotate(normed, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        qk, weight, cos, sin, scale = ctx.saved_tensors
        grad_qk, grad_weight = normalise_backward(_rotate(grad, cos, -sin), qk, weight[:, None], scale)
        return grad_qk, grad_weight.sum((0, 1, 3)).to(weight.dtype), None, None, None
