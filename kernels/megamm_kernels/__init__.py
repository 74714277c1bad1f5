"""Operations for packed multimodal sequences, each with a plain-torch reference beside it."""

from megamm_kernels.interval_attention import AttentionPlan, attention_plan, interval_attention
from megamm_kernels.linear_cross_entropy import linear_cross_entropy
from megamm_kernels.multimodal_embedding import multimodal_embedding
from megamm_kernels.qk_norm_rope import qk_norm_rope, rope_table
from megamm_kernels.rms_norm import add_rms_norm, rms_norm
from megamm_kernels.swiglu import swiglu

__all__ = [
    "AttentionPlan",
    "add_rms_norm",
    "attention_plan",
    "interval_attention",
    "linear_cross_entropy",
    "multimodal_embedding",
    "qk_norm_rope",
    "rms_norm",
    "rope_table",
    "swiglu",
]
