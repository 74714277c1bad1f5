"""Input embedding of a multimodal sequence: text rows from the table, images written over their positions.

An image enters as given features (late fusion), or as raw uint8 patches, normalised and projected in the same op
(early fusion, as in arXiv 2504.07951).
"""

import torch
import torch.nn.functional as F

from megamm_kernels import dispatch

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.multimodal_embedding import multimodal_embedding_gpu, multimodal_patch_embedding_gpu


def multimodal_embedding(
    tokens: torch.Tensor,
    table: torch.Tensor,
    features: torch.Tensor | None,
    feature_index: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Embed tokens and place one feature vector at each image position.

    On CUDA the table's gradient is summed in a fixed order, without atomic additions.

    Args:
        tokens: integers [B, S] in [0, V), also where a feature goes.
        table: [V, W] embedding table.
        features: [P, W] image features, or None (positions keep the placeholder token's embedding).
        feature_index: int64 [P], where each feature goes in the flattened [B * S] positions; no two alike.
        dtype: of the result; the table's by default. A float32 table need not be cast before.

    Returns:
        [B, S, W] in ``dtype``.

    Raises:
        ValueError: shapes do not fit.
    """
    dtype = dtype or table.dtype
    if features is not None and features.shape != (len(feature_index), table.shape[1]):
        raise ValueError(f"features are {list(features.shape)}: want [{len(feature_index)}, {table.shape[1]}]")
    if dispatch.use_triton(table):
        return multimodal_embedding_gpu(tokens, table, features, feature_index, dtype)[0]
    # Looked up first, then cast: the rows of a batch are fewer than those of the table.
    x_bsw = F.embedding(tokens, table).to(dtype)
    return x_bsw if features is None else _place_features(x_bsw, features.to(dtype), feature_index)


def multimodal_patch_embedding(
    tokens: torch.Tensor,
    table: torch.Tensor,
    patches: torch.Tensor,
    projection: torch.Tensor,
    patch_index: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Embed tokens, and normalise, project and place raw patches.

    Args:
        tokens: integers [B, S] in [0, V), also where a patch goes.
        table: [V, W] embedding table.
        patches: uint8 [P, C], pixels of each patch; P may be 0.
        projection: [W, C], applied to pixels in [-1, 1].
        patch_index: int64 [P], where each patch goes in the flattened [B * S] positions; no two alike.
        dtype: of the result and of the product; the table's by default.

    Returns:
        [B, S, W] in ``dtype``.

    Raises:
        ValueError: shapes do not fit, or patches are not uint8.
    """
    dtype = dtype or table.dtype
    if patches.dtype != torch.uint8 or len(patches) != len(patch_index):
        raise ValueError(f"patches are {list(patches.shape)} {patches.dtype}: want [{len(patch_index)}, C] uint8")
    if projection.shape != (table.shape[1], patches.shape[1]):
        raise ValueError(f"projection is {list(projection.shape)}: want [{table.shape[1]}, {patches.shape[1]}]")
    # Not every version of Triton compiles a float64 product with uint8 operands for every GPU.
    if dispatch.use_triton(table) and not (table.is_cuda and dtype == torch.float64):
        return multimodal_patch_embedding_gpu(tokens, table, patches, projection, patch_index, dtype)[0]
    return multimodal_embedding(tokens, table, project_patches(patches, projection, dtype), patch_index, dtype)


def multimodal_embedding_reference(
    tokens: torch.Tensor,
    table: torch.Tensor,
    features: torch.Tensor | None,
    feature_index: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The definition."""
    x_bsw = F.embedding(tokens, table).to(dtype or table.dtype)
    if features is None:
        return x_bsw
    return x_bsw.flatten(0, 1).index_copy(0, feature_index, features.to(x_bsw.dtype)).view_as(x_bsw)


def multimodal_patch_embedding_reference(
    tokens: torch.Tensor,
    table: torch.Tensor,
    patches: torch.Tensor,
    projection: torch.Tensor,
    patch_index: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The definition."""
    features = project_patches(patches, projection, dtype or table.dtype)
    return multimodal_embedding_reference(tokens, table, features, patch_index, dtype)


def project_patches(patches: torch.Tensor, projection: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 pixels [P, C] to [-1, 1], then the linear map [W, C]: [P, W] in ``dtype``, in plain torch."""
    return F.linear(patches.to(dtype) / 127.5 - 1, projection.to(dtype))


# An op of its own, because DTensors have no rule for index_copy and cannot flatten positions sharded unevenly.
@torch.library.custom_op("megamm::place_features", mutates_args=())
def _place_features(x: torch.Tensor, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The CPU path: ``x`` [B, S, W] with ``features`` [P, W] over the positions ``index``."""
    # A copy, since an op that mutates nothing must not return its input either.
    out = x.clone(memory_format=torch.contiguous_format)
    out.flatten(0, 1).index_copy_(0, index, features)
    return out


@_place_features.register_fake
def _(x, features, index):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    # By row and position: a DTensor that is sharded unevenly cannot be flattened.
    grad_features = grad[index // grad.shape[1], index % grad.shape[1]]
    # What lay under a feature reached no output, so its gradient is zero.
    return _place_features(grad, torch.zeros_like(grad_features), index), grad_features, None


_place_features.register_autograd(_backward, setup_context=_setup_context)
