"""Embedding rows from the table, features copied or patches projected into their positions.

Forward: one kernel copies rows; patches go through a matrix product that reads uint8 and scatters its rows.
Pixels u in 0..255 mean u / 127.5 - 1, which is ((u - 128) + 1 / 2) / 127.5. The products take u - 128, exact in
bfloat16, and the rest is a sum of weights (backward: of gradients) outside: less rounding and less work than
normalising first.
"""

import torch
import triton
import triton.language as tl

from megamm_kernels.gpu.embedding_gradient import table_gradient
from megamm_kernels.gpu.launch import accumulator, float32_precision, launch, multiprocessors, partial_dtype


@triton.jit
def _rows_kernel(
    tokens_ptr,
    table_ptr,
    features_ptr,
    slot_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One position per program: its token's row, its feature, or nothing where a patch will be projected."""
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    out = out_ptr + position * WIDTH + column
    slot = tl.load(slot_ptr + position).to(tl.int64)
    if slot < 0:
        token = tl.load(tokens_ptr + position).to(tl.int64)
        tl.store(out, tl.load(table_ptr + token * WIDTH + column, mask).to(out_ptr.dtype.element_ty), mask)
    else:
        if FEATURES:
            tl.store(out, tl.load(features_ptr + slot * WIDTH + column, mask).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _load_centred(patches_ptr, patch, channel, num_patches, CHANNELS: tl.constexpr, DOT: tl.constexpr):
    """Pixels - 128 of some patches; lanes outside hold anything finite."""
    mask = (patch < num_patches)[:, None] & (channel < CHANNELS)[None, :]
    pixel = tl.load(patches_ptr + patch.to(tl.int64)[:, None] * CHANNELS + channel[None, :], mask, other=0)
    # As uint8, pixels below 128 would wrap around.
    return (pixel.to(tl.float32) - 128).to(DOT)


@triton.jit
def _project_kernel(
    patches_ptr,
    projection_ptr,
    index_ptr,
    out_ptr,
    num_patches,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    patch = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    out = tl.zeros((BLOCK_P, BLOCK_W), DTYPE)
    weight_sum = tl.zeros((BLOCK_W,), DTYPE)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pixel = _load_centred(patches_ptr, patch, channel, num_patches, CHANNELS, DOT)
        mask = (column < WIDTH)[:, None] & (channel < CHANNELS)[None, :]
        weight = tl.load(projection_ptr + column[:, None] * CHANNELS + channel[None, :], mask, other=0.0)
        weight_sum += tl.sum(weight.to(DTYPE), 1)
        out = tl.dot(pixel, tl.trans(weight.to(DOT)), out, input_precision=PRECISION, out_dtype=DTYPE)
    out = (out + 0.5 * weight_sum[None, :]) / 127.5
    position = tl.load(index_ptr + patch, patch < num_patches, other=0)
    mask = (patch < num_patches)[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + position[:, None] * WIDTH + column[None, :], out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _projection_gradient_kernel(
    grad_ptr,
    patches_ptr,
    index_ptr,
    partial_ptr,
    num_patches,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the gradient over every n-th block of patches, n programs along the third axis."""
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = tl.zeros((BLOCK_W, BLOCK_C), DTYPE)
    grad_sum = tl.zeros((BLOCK_W,), DTYPE)
    for block in range(tl.program_id(2), tl.cdiv(num_patches, BLOCK_P), tl.num_programs(2)):
        patch = block * BLOCK_P + tl.arange(0, BLOCK_P)
        position = tl.load(index_ptr + patch, patch < num_patches, other=0)
        mask = (patch < num_patches)[:, None] & (column < WIDTH)[None, :]
        grad = tl.load(grad_ptr + position[:, None] * WIDTH + column[None, :], mask, other=0.0)
        grad_sum += tl.sum(grad.to(DTYPE), 0)
        pixel = _load_centred(patches_ptr, patch, channel, num_patches, CHANNELS, DOT)
        out = tl.dot(tl.trans(grad.to(DOT)), pixel, out, input_precision=PRECISION, out_dtype=DTYPE)
    out = (out + 0.5 * grad_sum[:, None]) / 127.5
    offset = (tl.program_id(2).to(tl.int64) * WIDTH + column)[:, None] * CHANNELS + channel[None, :]
    tl.store(partial_ptr + offset, out, (column < WIDTH)[:, None] & (channel < CHANNELS)[None, :])


def _product(x: torch.Tensor, dtype: torch.dtype) -> dict:
    """Tiles and number formats of a matrix product in ``dtype``."""
    half = dtype in (torch.float16, torch.bfloat16)
    if not x.is_cuda:
        block, warps = 16, 4
    else:
        block, warps = (128, 8) if half else (64, 8) if dtype == torch.float32 else (32, 4)
    return {
        "BLOCK_P": block,
        "BLOCK_W": block,
        "BLOCK_C": max(16, block // 2),
        "num_warps": warps,
        "num_stages": 3,
        # Triton's interpreter multiplies 16-bit operands wrongly.
        "DOT": {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
        if half and x.is_cuda
        else accumulator(dtype),
        "DTYPE": accumulator(dtype),
        "PRECISION": float32_precision(),
    }


def _slots(tokens: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """int32 [B, S]: which feature or patch a position takes, -1 for text."""
    slot = torch.full((tokens.numel(),), -1, dtype=torch.int32, device=tokens.device)
    if index is not None:
        slot.index_copy_(0, index, torch.arange(len(index), dtype=torch.int32, device=index.device))
    return slot.view(tokens.shape)


def _launch_rows(tokens, table, features, slot, out) -> None:
    width = table.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    table = table.contiguous()
    launch(
        _rows_kernel,
        (tokens.numel(), triton.cdiv(width, block)),
        tokens.contiguous(),
        table,
        table if features is None else features.contiguous(),
        slot,
        out,
        WIDTH=width,
        BLOCK=block,
        FEATURES=features is not None,
        num_warps=min(8, max(1, block // 256)),
    )


def _empty_outputs(tokens, table, dtype):
    out = torch.empty(*tokens.shape, table.shape[1], dtype=dtype, device=table.device)
    return out, torch.empty(tokens.shape, dtype=torch.int32, device=tokens.device)


@torch.library.custom_op("megamm::multimodal_embedding_gpu", mutates_args=())
def multimodal_embedding_gpu(
    tokens: torch.Tensor,
    table: torch.Tensor,
    features: torch.Tensor | None,
    feature_index: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the embedded sequence and the feature of each position (-1: none)."""
    out, _ = _empty_outputs(tokens, table, dtype)
    slot = _slots(tokens, feature_index if features is not None else None)
    _launch_rows(tokens, table, features, slot, out)
    return out, slot


@torch.library.custom_op("megamm::multimodal_patch_embedding_gpu", mutates_args=())
def multimodal_patch_embedding_gpu(
    tokens: torch.Tensor,
    table: torch.Tensor,
    patches: torch.Tensor,
    projection: torch.Tensor,
    patch_index: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the embedded sequence and the patch of each position (-1: none)."""
    out, _ = _empty_outputs(tokens, table, dtype)
    slot = _slots(tokens, patch_index)
    _launch_rows(tokens, table, None, slot, out)
    meta = _product(table, dtype)
    width, channels = projection.shape
    launch(
        _project_kernel,
        (triton.cdiv(len(patches), meta["BLOCK_P"]), triton.cdiv(width, meta["BLOCK_W"])),
        patches.contiguous(),
        projection.to(dtype).contiguous(),
        patch_index.contiguous(),
        out,
        len(patches),
        WIDTH=width,
        CHANNELS=channels,
        **meta,
    )
    return out, slot


@torch.library.custom_op("megamm::embedding_table_backward_gpu", mutates_args=())
def embedding_table_backward_gpu(
    grad: torch.Tensor, tokens: torch.Tensor, slot: torch.Tensor, vocabulary: int, dtype: torch.dtype
) -> torch.Tensor:
    """Gradient of the table: the sum of ``grad`` over the text positions of each token."""
    # Positions of images hold a placeholder token, which gets no gradient from them: key V counts nowhere.
    keys = torch.where(slot < 0, tokens, vocabulary).flatten().int()
    return table_gradient(grad.flatten(0, 1).contiguous(), keys, vocabulary, dtype)


@torch.library.custom_op("megamm::patch_projection_backward_gpu", mutates_args=())
def patch_projection_backward_gpu(
    grad: torch.Tensor, patches: torch.Tensor, projection: torch.Tensor, patch_index: torch.Tensor
) -> torch.Tensor:
    """Gradient of the projection of the patches."""
    meta = _product(grad, grad.dtype)
    width, channels = projection.shape
    tiles = triton.cdiv(width, meta["BLOCK_W"]), triton.cdiv(channels, meta["BLOCK_C"])
    blocks = triton.cdiv(len(patches), meta["BLOCK_P"])
    # Few tiles leave multiprocessors idle: then several programs share one, each over part of the patches.
    splits = min(blocks, max(1, multiprocessors(grad) // (tiles[0] * tiles[1])))
    partial = torch.empty(splits, width, channels, dtype=partial_dtype(grad.dtype), device=grad.device)
    launch(
        _projection_gradient_kernel,
        (*tiles, splits),
        grad.contiguous(),
        patches.contiguous(),
        patch_index.contiguous(),
        partial,
        len(patches),
        WIDTH=width,
        CHANNELS=channels,
        **meta,
    )
    return partial.sum(0).to(projection.dtype)


@multimodal_embedding_gpu.register_fake
def _(tokens, table, features, feature_index, dtype):
    return _empty_outputs(tokens, table, dtype)


@multimodal_patch_embedding_gpu.register_fake
def _(tokens, table, patches, projection, patch_index, dtype):
    return _empty_outputs(tokens, table, dtype)


@embedding_table_backward_gpu.register_fake
def _(grad, tokens, slot, vocabulary, dtype):
    return grad.new_empty(vocabulary, grad.shape[-1], dtype=dtype)


@patch_projection_backward_gpu.register_fake
def _(grad, patches, projection, patch_index):
    return projection.new_empty(projection.shape)


def _save_features(ctx, inputs, output):
    tokens, table, features, feature_index, _ = inputs
    ctx.save_for_backward(tokens, output[1], feature_index)
    # Not the table itself, which the backward does not read.
    ctx.table = table.shape[0], table.dtype
    ctx.features_dtype = None if features is None else features.dtype


def _features_backward(ctx, grad, _):
    tokens, slot, index = ctx.saved_tensors
    grad_table = grad_features = None
    if ctx.needs_input_grad[1]:
        grad_table = embedding_table_backward_gpu(grad, tokens, slot, *ctx.table)
    if ctx.needs_input_grad[2]:
        length = tokens.shape[1]  # indexed in place: a DTensor sharded unevenly cannot be flattened
        grad_features = grad[index // length, index % length].to(ctx.features_dtype)
    return None, grad_table, grad_features, None, None


def _save_patches(ctx, inputs, output):
    tokens, table, patches, projection, patch_index, _ = inputs
    ctx.save_for_backward(tokens, output[1], patches, projection, patch_index)
    ctx.table = table.shape[0], table.dtype


def _patches_backward(ctx, grad, _):
    tokens, slot, patches, projection, patch_index = ctx.saved_tensors
    grad_table = grad_projection = None
    if ctx.needs_input_grad[1]:
        grad_table = embedding_table_backward_gpu(grad, tokens, slot, *ctx.table)
    if ctx.needs_input_grad[3]:
        grad_projection = patch_projection_backward_gpu(grad, patches, projection, patch_index)
    return None, grad_table, None, grad_projection, None, None


multimodal_embedding_gpu.register_autograd(_features_backward, setup_context=_save_features)
multimodal_patch_embedding_gpu.register_autograd(_patches_backward, setup_context=_save_patches)
