"""Building blocks of the decoder and of the vision tower: the same block serves both.

Shape suffixes: b rows, l positions, w width of the residual stream, g groups of heads, h heads, d head width,
f SwiGLU hidden.

Parameters are float32; matrices are cast to the dtype of the activations where they are used. Rows of a matrix are
laid out so that an equal slice of them is a valid smaller layer: qkv by groups of heads, [G, R + 2, D] with R query
heads that share one head of keys and one of values; gate and up side by side, [F, 2].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megamm_kernels import add_rms_norm, interval_attention, linear_swiglu, qk_norm_rope, rms_norm, swiglu
from torch import nn

from megamm.model.context import BlockContext
from megamm.model.rotary import rotate


class Linear(nn.Module):
    """Matrix product, by default without bias, in the dtype of its input."""

    product = staticmethod(F.linear)
    """How; replaced in modules whose product runs in 8-bit floats."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = False):
        super().__init__()
        self.initial = {"weight": std, "bias": 0.0}  # see initial.py
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Under FSDP the weight has this dtype already, and the cast is none.
        return self.product(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """RMS norm with a learned scale, also of a sum: the residual stream and what a layer adds to it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.initial = eps, {"weight": None}
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """The normalised ``x``; with a residual (normalised ``x + residual``, ``x + residual``)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions.

    Args:
        heads: of queries; by default as many as have the stream's width together.
        qk_norm: whether queries and keys are normalised, within a head.
        qkv_bias: whether they and the values have biases.
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        key_heads: int,
        depth: int,
        eps: float,
        *,
        heads: int | None = None,
        qk_norm: bool = True,
        qkv_bias: bool = False,
    ):
        super().__init__()
        heads = heads or width // head_dim
        self.group = (heads // key_heads + 2, head_dim)
        self.eps, self.initial = eps, {"qk_norm": None}
        # One product for all three. Variances: a normalised input keeps its size.
        self.qkv = Linear(width, key_heads * math.prod(self.group), width**-0.5, qkv_bias)
        # Each block adds two outputs to the stream: divided by sqrt(2 * depth), all of them together have a variance of
        # about 1.
        self.out = Linear(heads * head_dim, width, (heads * head_dim) ** -0.5 / math.sqrt(2 * depth))
        self.qk_norm = nn.Parameter(torch.empty(2, head_dim)) if qk_norm else None
        # An attribute, so that ranks that share rows, or a cache, can put their own in its place.
        self.attend = interval_attention

    def heads(self, x_blw: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [B, L, H, D], keys and values [B, L, G, D]: normalised and rotated, the values as they are."""
        qkv = self.qkv(x_blw).unflatten(-1, (-1, *self.group))
        if self.qk_norm is None:
            # [B, L, G, R + 2, D]: queries of a group, then its head of keys and its head of values.
            q, k, v = qkv.split((self.group[0] - 2, 1, 1), dim=3)
            return rotate(q.flatten(2, 3), cos, sin), rotate(k.squeeze(3), cos, sin), v.squeeze(3)
        # Split, norm and rotation in one operator, which reads qkv once.
        return qk_norm_rope(qkv, self.qk_norm, cos, sin, self.eps)

    def forward(self, x_blw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        q_blhd, k_blgd, v_blgd = self.heads(x_blw, context.cos, context.sin)
        return self.out(self.attend(q_blhd, k_blgd, v_blgd, context.mask).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer; no biases."""

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, width**-0.5)
        self.down = Linear(hidden, width, hidden**-0.5 / math.sqrt(2 * depth))
        self.fused = True  # product and gating in one operator, which has a product of its own

    def forward(self, x_blw: torch.Tensor, context: BlockContext | None = None) -> torch.Tensor:
        """[..., W] -> [..., W]; the context does not matter: all positions meet the same weights."""
        if self.fused:
            return self.down(linear_swiglu(x_blw, self.gate_up.weight))
        return self.down(swiglu(self.gate_up(x_blw)))


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        feed_forward: called with the normalised stream [B, L, W] and the context; gives [B, L, W].
        attention: further options of :class:`Attention`.
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        key_heads: int,
        depth: int,
        eps: float,
        feed_forward: nn.Module,
        **attention: Any,
    ):
        super().__init__()
        self.attention_norm = RMSNorm(width, eps)
        self.attention = Attention(width, head_dim, key_heads, depth, eps, **attention)
        self.feed_forward_norm = RMSNorm(width, eps)
        self.feed_forward = feed_forward

    def forward(self, x_blw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        a_blw = self.attention(self.attention_norm(x_blw), context)
        # Addition and norm in one operator, which also gives back the sum.
        normed_blw, x_blw = self.feed_forward_norm(a_blw, residual=x_blw)
        return x_blw + self.feed_forward(normed_blw, context)
