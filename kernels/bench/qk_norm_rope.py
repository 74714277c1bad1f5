"""QK-norm and rotary embedding on a slice of a fused qkv product, at the paper's widths.

    python kernels/bench/qk_norm_rope.py [--device cuda] [--dtype bfloat16] [--quick] [--out DIR]

Bound by memory: the work of a case is queries and keys (and their gradients) read and written once. Angles and
reciprocal norms are not counted.
"""

from typing import NamedTuple

import torch
from harness import FORWARD, Case, Provider, UnavailableError, Work, gradients, main
from megamm_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, rope_table

EPS = 1e-6
NUM_TOKENS = 32768 if torch.cuda.is_available() else 4096  # rows of 1024 or 4096, end to end
# name: query heads, key heads, head width, full-width norm, 2-D positions, row length
SHAPES = {
    "width 800": (10, 10, 80, False, False, 1024),
    "width 2048": (16, 16, 128, False, False, 1024),
    "width 2048, rows of 4096": (16, 16, 128, False, False, 4096),
    "width 5120": (40, 40, 128, False, False, 1024),
    "width 5120, GQA 5:1": (40, 8, 128, False, False, 1024),
    "width 2048, full-width norm": (16, 16, 128, True, False, 1024),
    "width 1024, patches (2-D)": (16, 16, 64, False, True, 256),
}


class Inputs(NamedTuple):
    """Queries and keys as a view of qkv, which is the leaf; weight and angles are float32."""

    qkv: torch.Tensor
    weight: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    query_heads: int
    key_heads: int
    grads: list[torch.Tensor]

    def arguments(self) -> tuple:
        qk = self.qkv[:, :, : self.query_heads + self.key_heads]
        return qk, self.weight, self.cos, self.sin, EPS, self.query_heads


def case(name: str, tokens: int, query_heads: int, key_heads: int, dim: int, full: bool, plane: bool, length: int):
    """One shape."""

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        batch, heads = tokens // length, query_heads + key_heads
        # No room for values: their gradient would be zeros here, and is no part of this op.
        qkv = torch.randn(batch, length, heads, dim, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(heads if full else 2, dim, device=device, requires_grad=True)
        positions = torch.arange(length, device=device).expand(batch, length)
        if plane:
            positions = torch.stack((positions // 16, positions % 16), dim=-1)
        grads = [torch.randn(batch, length, n, dim, device=device, dtype=dtype) for n in (query_heads, key_heads)]
        return Inputs(qkv, weight, *rope_table(positions, dim, 10000.0), query_heads, key_heads, grads)

    size = tokens * (query_heads + key_heads) * dim
    return Case(name, Work(elements=5 * size), make, Work(elements=2 * size))


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case("tiny, GQA", 32, 2, 1, 16, False, False, 16), case("tiny, full", 32, 2, 2, 16, True, True, 16)]
    return [case(name, NUM_TOKENS, *shape) for name, shape in SHAPES.items()]


def training(op):
    return lambda i: gradients(lambda: op(*i.arguments()), [i.qkv, i.weight], i.grads)


def forward(op):
    return lambda inputs: torch.no_grad()(lambda: op(*inputs.arguments()))


def compiled(inputs: Inputs):
    return training(torch.compile(qk_norm_rope_reference))(inputs)


def full_angles(inputs: Inputs) -> list[torch.Tensor]:
    """Cosines and sines [B, L, D] in the dtype of the activations, each half alike."""
    if len(inputs.weight) != 2:
        raise UnavailableError("no norm over all heads")
    return [torch.cat((t, t), dim=-1).squeeze(2).to(inputs.qkv.dtype) for t in (inputs.cos, inputs.sin)]


def liger(inputs: Inputs):
    """Liger's norm of queries and of keys, then its rotation of both, in the layout [B, H, L, D] that it wants."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope

    cos, sin = full_angles(inputs)

    def op(qk, weight, cos_table, sin_table, eps, query_heads):
        q, k = qk.split((query_heads, qk.shape[2] - query_heads), dim=2)
        q, k = (liger_rms_norm(x, w, eps, in_place=False).transpose(1, 2) for x, w in zip((q, k), weight))
        return [x.transpose(1, 2) for x in liger_rope(q, k, cos, sin)]

    return training(op)(inputs)


def hugging_face(inputs: Inputs):
    """Qwen3's norms and rotation, with weights in the dtype of the activations."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    cos, sin = full_angles(inputs)
    norms = [Qwen3RMSNorm(inputs.qkv.shape[-1], EPS).to(inputs.qkv) for _ in range(2)]

    def op():
        parts = inputs.qkv.split((inputs.query_heads, inputs.key_heads), dim=2)
        q, k = (norm(x).transpose(1, 2) for norm, x in zip(norms, parts))
        return [x.transpose(1, 2) for x in apply_rotary_pos_emb(q, k, cos, sin)]

    return gradients(op, [inputs.qkv, *(norm.weight for norm in norms)], inputs.grads)


PROVIDERS = [
    Provider("megamm", training(qk_norm_rope)),
    Provider("megamm", forward(qk_norm_rope), FORWARD),
    Provider("eager", training(qk_norm_rope_reference)),
    Provider("torch.compile", compiled, compiles=True),
    Provider("liger norm and rope", liger),
    Provider("Hugging Face norm and rope", hugging_face),
]

if __name__ == "__main__":
    main("qk_norm_rope", cases, PROVIDERS)
