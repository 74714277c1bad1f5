"""RMS norm of queries and keys, then rotary position embedding (Su et al. 2021, arXiv 2104.09864), in one pass.

QK-norm keeps attention scores bounded (Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv
2302.05442). The norm is taken per head, or over the full width of all heads (as in OLMo 2).
"""

import torch

from megamm_kernels import dispatch
from megamm_kernels.rms_norm import at_least_float32, normalise, normalise_backward

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.qk_norm_rope import qk_norm_rope_gpu


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles.

    Args:
        positions: integers [B, L], or [B, L, 2]: row and column of a patch. In the latter case the first half of
            the pairs turns by the row and the second half by the column.
        head_dim: width D of a head, a multiple of 2 (of 4 for two-dimensional positions).
        theta: base of the geometric series of wavelengths.

    Returns:
        cos, sin: float32 [B, L, 1, D / 2].

    Raises:
        ValueError: ``head_dim`` cannot be divided into pairs.
    """
    axes = 1 if positions.ndim == 2 else positions.shape[2]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim is {head_dim}: {axes}-dimensional positions need a multiple of {2 * axes}")
    dim = head_dim // axes
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions.unflatten(-1, (-1, 1, 1)) if axes == 1 else positions[:, :, None, :, None]
    angles = angles.float() * theta**-exponent
    if axes > 1:
        angles = angles.flatten(-2)
    return angles.cos(), angles.sin()


def qk_norm_rope(
    qk: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    query_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise queries and keys to unit RMS, scale by ``weight`` and rotate by position.

    The first half of a head's entries pairs with the second half (the "rotate half" layout of GPT-NeoX
    and Llama checkpoints). Statistics are float32 at least.

    Args:
        qk: [B, L, Hq + Hk, D], query heads first; or [B, L, 2, H, D]. A slice of a wider qkv tensor is read
            where it lies.
        weight: [2, D], one scale for queries and one for keys: the norm is taken per head; or [Hq + Hk, D]: the
            norm is taken over all heads of the queries, and over all of the keys.
        cos, sin: [B or 1, L, 1, D / 2] from :func:`rope_table`.
        eps: added to the mean square.
        query_heads: Hq; half of the heads by default.

    Returns:
        q [B, L, Hq, D], k [B, L, Hk, D], dtype of ``qk``.

    Raises:
        ValueError: shapes do not fit.
    """
    qk = qk.flatten(2, 3) if qk.ndim == 5 else qk
    query_heads = qk.shape[2] // 2 if query_heads is None else query_heads
    _check(qk, weight, cos, sin, query_heads)
    if dispatch.use_triton(qk):
        return qk_norm_rope_gpu(qk, weight, cos, sin, eps, query_heads)[:2]
    heads = (query_heads, qk.shape[2] - query_heads)
    full_width = len(weight) != 2
    if not full_width:
        weight = torch.cat([w.expand(n, -1) for w, n in zip(weight, heads, strict=True)])
    return _QKNormRope.apply(qk, weight, cos, sin, eps, heads, full_width)


def qk_norm_rope_reference(
    qk: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    query_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in the dtype of ``qk``."""
    qk = qk.flatten(2, 3) if qk.ndim == 5 else qk
    query_heads = qk.shape[2] // 2 if query_heads is None else query_heads
    heads = (query_heads, qk.shape[2] - query_heads)
    dims = -1 if len(weight) == 2 else (-2, -1)
    cos, sin = cos.to(qk.dtype), sin.to(qk.dtype)

    def norm_rope(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps) * scale.to(x.dtype)
        first, second = normed.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    q, k = qk.split(heads, dim=2)
    q_scale, k_scale = weight.split((1, 1) if len(weight) == 2 else heads)
    return norm_rope(q, q_scale), norm_rope(k, k_scale)


def _check(qk: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query_heads: int) -> None:
    batch, length, heads, dim = qk.shape
    if weight.shape not in ((2, dim), (heads, dim)):
        raise ValueError(f"weight is {list(weight.shape)}: want [2, {dim}] (per head) or [{heads}, {dim}] (full width)")
    if not 0 < query_heads < heads:
        raise ValueError(f"query_heads is {query_heads} of {heads} heads: both queries and keys need one")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((batch, length, 1, dim // 2), (1, length, 1, dim // 2)):
            raise ValueError(f"{name} is {list(table.shape)}: want [{batch} or 1, {length}, 1, {dim // 2}]")


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (first half, second half); with -sin the inverse, which is also the transpose."""
    first, second = x.chunk(2, dim=-1)  # only read: a slice of a DTensor need not be a view
    return torch.cat(((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)), dim=-1)


def _mean_over(groups: tuple[int, int] | None):
    """The mean of [B, L, H, D] over each head, or over each group of heads; it broadcasts against its input."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        per_head = x.mean(-1, keepdim=True)
        if groups is None:
            return per_head
        return torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in per_head.split(groups, dim=2)], dim=2)

    return mean


class _QKNormRope(torch.autograd.Function):
    """The CPU path: keeps the input and the reciprocal norms, and recomputes the rest in the backward."""

    @staticmethod
    def forward(ctx, qk, weight, cos, sin, eps, heads, full_width):
        x = at_least_float32(qk)
        ctx.heads, ctx.mean = heads, _mean_over(heads if full_width else None)
        normed, scale = normalise(x, weight, eps, ctx.mean)
        ctx.set_materialize_grads(False)  # autograd's zeros are no DTensors
        ctx.save_for_backward(qk, weight, cos, sin, scale)
        return _rotate(normed, cos.to(x.dtype), sin.to(x.dtype)).to(qk.dtype).split(heads, dim=2)

    @staticmethod
    def backward(ctx, *grads):
        qk, weight, cos, sin, scale = ctx.saved_tensors
        parts = zip(grads, qk.split(ctx.heads, dim=2), strict=True)
        grad = torch.cat([torch.zeros_like(part) if grad is None else grad for grad, part in parts], dim=2)
        x, grad = at_least_float32(qk), at_least_float32(grad)
        grad = _rotate(grad, cos.to(x.dtype), -sin.to(x.dtype))
        grad_qk, grad_weight = normalise_backward(grad, x, weight, scale, ctx.mean)
        return grad_qk.to(qk.dtype), grad_weight.sum((0, 1)).to(weight.dtype), *[None] * 5
