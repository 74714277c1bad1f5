"""Input embedding: text rows from the table, image features written over their positions."""

import torch
import torch.nn.functional as F


def multimodal_embedding(
    tokens: torch.Tensor,
    table: torch.Tensor,
    features: torch.Tensor | None,
    feature_index: torch.Tensor | None,
) -> torch.Tensor:
    """Embed tokens and place one feature vector at each image position.

    Args:
        tokens: integers [B, S].
        table: [V, W] embedding table.
        features: [P, W] image features, or None (positions keep the placeholder token's embedding).
        feature_index: int64 [P], where each feature goes in the flattened [B * S] positions.

    Returns:
        [B, S, W], dtype of the table.
    """
    x_bsw = F.embedding(tokens, table)
    if features is None:
        return x_bsw
    flat = x_bsw.flatten(0, 1).index_copy(0, feature_index, features.to(x_bsw.dtype))
    return flat.view_as(x_bsw)
