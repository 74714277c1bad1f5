"""The inputs of a model whose vocabulary or whose rows are spread over ranks."""

from functools import partial

import torch
from megamm_kernels import multimodal_embedding, project_patches

from megamm.model.inputs import Embedding
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.collectives import gather, scatter_sum
from megamm.parallel.context import CutBatch
from megamm.parallel.mesh import Axis, World
from megamm.sequence import Batch


def apply_inputs(model: MultimodalModel, world: World) -> None:
    """Let the inputs of a model make this rank's positions only, in place; nothing to do where it has all."""
    if model.embedding is not None and world.axis("tensor").size * world.axis("context").size > 1:
        model.embedding.forward = partial(parallel_embedding, model.embedding, world=world)


def parallel_embedding(
    embedding: Embedding, batch: Batch, features: torch.Tensor | None, dtype: torch.dtype, world: World
) -> torch.Tensor:
    """This rank's positions of the residual stream before the first block, [B, S / ranks, W]; see tensor.py.

    Args:
        embedding: whole, or this rank's part of the vocabulary.
        batch: rows, or this rank's positions of them (context.CutBatch).
        features: of a tower, [rows, this rank's patches of each, W].
        dtype: of the result.
        world: this process among all.
    """
    tensor, context = world.axis("tensor"), world.axis("context")
    index = batch.patch_index
    if embedding.projection is not None:
        # Every T-th patch: the ranks share the work of projecting, and the sum over them puts all in place.
        share = slice(tensor.rank, None, tensor.size)
        features, index = project_patches(batch.patches[share], embedding.projection.weight, dtype), index[share]
    elif features is not None:
        features = _features_of_positions(features, batch, tensor, context)
    if tensor.size == 1:
        return multimodal_embedding(batch.tokens, embedding.weight, features, index, dtype)
    table = embedding.weight
    local = batch.tokens - tensor.rank * table.shape[0]
    # Tokens of other parts of the vocabulary look up row 0 and are set to zero, which also keeps their gradients from
    # it.
    own = (local >= 0) & (local < table.shape[0])
    if features is not None:  # at image positions only the rank that has the feature adds something
        own = own.flatten().index_fill(0, batch.patch_index, False).view_as(own)
    x_bsw = multimodal_embedding(local.where(own, 0), table, None, None, dtype) * own[..., None]
    if features is not None:
        x_bsw = x_bsw.flatten(0, 1).index_add(0, index, features).view_as(x_bsw)
    return scatter_sum(x_bsw, 1, tensor.group)


def _features_of_positions(features: torch.Tensor, batch: Batch, tensor: Axis, context: Axis) -> torch.Tensor:
    """A feature for each image position of the batch; zero where another tensor rank has it."""
    if context.size > 1:
        features = gather(features, 0, context.group)  # every rank's images, in equally many rows
    per_rank = features.shape[1]
    if isinstance(batch, CutBatch):
        rows = batch.feature_rows
    else:
        rows = torch.arange(len(batch.patch_index), device=features.device)
    # Features count over the tower's whole rows; a tensor rank has a run of each one's patches, as its blocks saw them.
    row, patch = rows // (per_rank * tensor.size), rows % (per_rank * tensor.size)
    own = patch // per_rank == tensor.rank
    # Rows of other ranks pick some feature of this one, and are zeroed: the shape must not depend on the rank.
    picked = features.flatten(0, 1)[row * per_rank + patch % per_rank]
    return picked * own[:, None]
