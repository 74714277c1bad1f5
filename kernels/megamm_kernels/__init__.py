"""Operations for packed multimodal sequences, each with a plain-torch reference beside it."""

from megamm_kernels.grouped_experts import (
    Routing,
    grouped_experts,
    grouped_linear,
    grouped_linear_swiglu,
    permute_tokens,
    sort_by_expert,
    unpermute_tokens,
)
from megamm_kernels.interval_attention import AttentionMask, attention_mask, default_backend, interval_attention
from megamm_kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from megamm_kernels.multimodal_embedding import multimodal_embedding, multimodal_patch_embedding, project_patches
from megamm_kernels.qk_norm_rope import qk_norm_rope, rope_table
from megamm_kernels.rms_norm import add_rms_norm, rms_norm
from megamm_kernels.swiglu import linear_swiglu, swiglu

__all__ = [
    "AttentionMask",
    "LinearCrossEntropyOutput",
    "Routing",
    "add_rms_norm",
    "attention_mask",
    "default_backend",
    "grouped_experts",
    "grouped_linear",
    "grouped_linear_swiglu",
    "interval_attention",
    "linear_cross_entropy",
    "linear_swiglu",
    "multimodal_embedding",
    "multimodal_patch_embedding",
    "permute_tokens",
    "project_patches",
    "qk_norm_rope",
    "rms_norm",
    "rope_table",
    "sort_by_expert",
    "swiglu",
    "unpermute_tokens",
]
