"""Building blocks of the decoder and of the vision tower: the same block serves both.

Shape suffixes: b rows, l positions, w width of the residual stream, h heads, d head width, f SwiGLU hidden.
Parameters are float32; matrices are cast to the dtype of the activations where they are used.
"""

import math

import torch
import torch.nn.functional as F
from megamm_kernels import AttentionPlan, add_rms_norm, interval_attention, qk_norm_rope, rms_norm, swiglu
from torch import nn


class Linear(nn.Linear):
    """Matrix product without bias, in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, init_std: float):
        self.init_std = init_std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """RMS norm with a learned scale, also of a sum: the residual stream and what a layer adds to it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """The normalised ``x``; with a residual (normalised ``x + residual``, ``x + residual``)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention with per-head QK-norm and rotary positions; no biases."""

    def __init__(self, width: int, head_dim: int, depth: int, eps: float):
        super().__init__()
        self.num_heads, self.head_dim, self.eps = width // head_dim, head_dim, eps
        std = width**-0.5
        self.qkv = Linear(width, 3 * width, std)
        self.out = Linear(width, width, std / math.sqrt(2 * depth))
        self.qk_norm = nn.Parameter(torch.ones(2, head_dim))

    def forward(self, x_blw: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan):
        qkv = self.qkv(x_blw).unflatten(-1, (3, self.num_heads, self.head_dim))
        qk, v = qkv.split((2, 1), dim=2)
        q_blhd, k_blhd = qk_norm_rope(qk, self.qk_norm, cos, sin, self.eps)
        a_blhd = interval_attention(q_blhd, k_blhd, v.squeeze(2), plan)
        return self.out(a_blhd.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer; no biases."""

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, width**-0.5)
        self.down = Linear(hidden, width, hidden**-0.5 / math.sqrt(2 * depth))

    def forward(self, x_blw: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x_blw)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, head_dim: int, hidden: int, depth: int, eps: float):
        super().__init__()
        self.attention_norm = RMSNorm(width, eps)
        self.attention = Attention(width, head_dim, depth, eps)
        self.feed_forward_norm = RMSNorm(width, eps)
        self.feed_forward = FeedForward(width, hidden, depth)

    def forward(self, x_blw: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan):
        a_blw = self.attention(self.attention_norm(x_blw), cos, sin, plan)
        normed_blw, x_blw = self.feed_forward_norm(a_blw, residual=x_blw)
        return x_blw + self.feed_forward(normed_blw)
