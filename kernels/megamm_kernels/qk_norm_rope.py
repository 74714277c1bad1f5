"""RMS norm of queries and keys, then rotary position embedding (Su et al. 2021, arXiv 2104.09864), in one pass.

QK-norm keeps attention scores bounded (Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv
2302.05442). The norm is taken within a head, so that a slice of the heads is an attention of its own.
"""

from collections.abc import Callable

import torch

from megamm_kernels import dispatch
from megamm_kernels.rms_norm import at_least_float32, normalise, normalise_backward

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.qk_norm_rope import qk_norm_rope_backward_gpu, qk_norm_rope_gpu


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
    # Each axis has the whole series of wavelengths on its share of the pairs.
    dim = head_dim // axes
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    # [B, L, 1, 1], or [B, L, 1, 2, 1] for rows and columns; the last dimension becomes the pairs of an axis.
    angles = positions.unflatten(-1, (-1, 1, 1)) if axes == 1 else positions[:, :, None, :, None]
    angles = angles.float() * theta**-exponent
    if axes > 1:
        angles = angles.flatten(-2)
    return angles.cos(), angles.sin()


def qk_norm_rope(
    qkv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise queries and keys to unit RMS, scale by ``weight`` and rotate by position; pass the values through.

    The first half of a head's entries pairs with the second half (the "rotate half" layout of GPT-NeoX
    and Llama checkpoints). Statistics are float32 at least. The gradient is one tensor of the shape of ``qkv``.

    Args:
        qkv: [B, L, G, R + 2, D], of each of the G groups R heads of queries, one of keys and one of values (R = 1:
            multi-head attention); read where it lies, whatever its strides.
        weight: [2, D], one scale for queries and one for keys, of any floating dtype.
        cos, sin: [B or 1, L, 1, D / 2] from :func:`rope_table`.
        eps: added to the mean square of a head.

    Returns:
        q [B, L, G * R, D], whose head h belongs to group h // R; k [B, L, G, D]; v [B, L, G, D], a view of ``qkv``.
        All in the dtype of ``qkv``.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(qkv, weight, cos, sin)
    return _QKNormRope.apply(qkv, weight, cos, sin, eps)


def qk_norm_rope_reference(
    qkv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, in the dtype of ``qkv``."""
    cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)

    def norm_rope(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale.to(x.dtype)
        first, second = normed.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    queries, keys, values = qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
    return norm_rope(queries.flatten(2, 3), weight[0]), norm_rope(keys.squeeze(3), weight[1]), values.squeeze(3)


def _check(qkv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if qkv.ndim != 5 or qkv.shape[3] < 3 or qkv.shape[4] % 2:
        raise ValueError(f"qkv is {list(qkv.shape)}: want [B, L, groups, query heads of a group + 2, even head width]")
    batch, length, _, _, dim = qkv.shape
    if weight.shape != (2, dim):
        raise ValueError(f"weight is {list(weight.shape)}: want [2, {dim}], a scale of queries and one of keys")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((batch, length, 1, dim // 2), (1, length, 1, dim // 2)):
            raise ValueError(f"{name} is {list(table.shape)}: want [{batch} or 1, {length}, 1, {dim // 2}]")


class _QKNormRope(torch.autograd.Function):
    """Keeps the input and the reciprocal norms, and recomputes the rest in the backward.

    Values pass through, so that the gradients of all three parts are written into one tensor, once.
    """

    @staticmethod
    def forward(ctx, qkv, weight, cos, sin, eps):
        ctx.set_materialize_grads(False)  # autograd's zeros are no DTensors
        forward = qk_norm_rope_gpu if dispatch.use_triton(qkv) else _forward
        q, k, scale = forward(qkv, weight, cos, sin, eps)
        ctx.save_for_backward(qkv, weight, cos, sin, scale)
        return q, k, qkv.select(3, -1)

    @staticmethod
    def backward(ctx, *grads):
        qkv, *others = ctx.saved_tensors
        parts = _parts(qkv)
        given = [torch.zeros_like(part.flatten(2, 3)) if g is None else g for g, part in zip(grads, parts, strict=True)]
        backward: Callable = qk_norm_rope_backward_gpu if dispatch.use_triton(qkv) else _backward
        return *backward(*given, qkv, *others), None, None, None


def _parts(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, L, G, R, D], keys and values [B, L, G, 1, D]."""
    return qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (first half, second half); with -sin the inverse, which is also the transpose."""
    first, second = x.chunk(2, dim=-1)  # only read: a slice of a DTensor need not be a view
    return torch.cat(((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)), dim=-1)


def _angles(cos: torch.Tensor, sin: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of :func:`rope_table` for tensors [B, L, G, heads, D]."""
    return cos.to(like.dtype).unsqueeze(2), sin.to(like.dtype).unsqueeze(2)


def _forward(qkv, weight, cos, sin, eps):
    """The CPU path: q, k and the reciprocal norms [B, L, G, R + 1, 1]."""
    rotated, scales = [], []
    for part, part_weight in zip(_parts(qkv)[:2], weight, strict=True):  # one pass over both would be slower
        x = at_least_float32(part)
        normed, scale = normalise(x, part_weight, eps)
        rotated.append(_rotate(normed, *_angles(cos, sin, x)).to(qkv.dtype).flatten(2, 3))
        scales.append(scale)
    return *rotated, torch.cat(scales, dim=3)


def _backward(grad_q, grad_k, grad_v, qkv, weight, cos, sin, scale):
    """The CPU path: gradients of qkv and weight."""
    scales = scale.split((qkv.shape[3] - 2, 1), dim=3)
    grads, grad_weights = [], []
    for part, part_weight, part_scale, grad in zip(_parts(qkv)[:2], weight, scales, (grad_q, grad_k), strict=True):
        x, grad = at_least_float32(part), at_least_float32(grad).unflatten(2, part.shape[2:4])
        cosines, sines = _angles(cos, sin, x)
        grad_x, grad_weight = normalise_backward(_rotate(grad, cosines, -sines), x, part_weight, part_scale)
        grads.append(grad_x.to(qkv.dtype))
        grad_weights.append(grad_weight.sum((0, 1, 2, 3)))
    return torch.cat((*grads, grad_v.unsqueeze(3)), dim=3), torch.stack(grad_weights).to(weight.dtype)
