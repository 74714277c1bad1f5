"""QK-norm and rotary embedding on a fused qkv product, at the paper's widths.

    python kernels/bench/qk_norm_rope.py [--device cuda] [--dtype bfloat16] [--quick] [--out DIR]

Bound by memory: the work of a case is queries and keys (and their gradients) read and written once, and the gradient
of the values. Angles and reciprocal norms are not counted.
"""

from typing import NamedTuple

import torch
from harness import FORWARD, Case, Provider, Work, gradients, main
from megamm_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, rope_table

EPS = 1e-6
NUM_TOKENS = 32768 if torch.cuda.is_available() else 4096  # rows of 1024 or 4096, end to end
# name: groups, query heads of a group, head width, 2-D positions, row length
SHAPES = {
    "width 800": (10, 1, 80, False, 1024),
    "width 2048": (16, 1, 128, False, 1024),
    "width 2048, rows of 4096": (16, 1, 128, False, 4096),
    "width 5120": (40, 1, 128, False, 1024),
    "width 5120, GQA 5:1": (8, 5, 128, False, 1024),
    "width 1024, patches (2-D)": (16, 1, 64, True, 256),
}


class Inputs(NamedTuple):
    """The product [B, L, G, R + 2, D]; weight and angles are float32; gradients of q, k and v."""

    qkv: torch.Tensor
    weight: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    grads: list[torch.Tensor]


def case(name: str, tokens: int, groups: int, queries: int, dim: int, plane: bool, length: int):
    """One shape."""

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        batch = tokens // length
        qkv = torch.randn(batch, length, groups, queries + 2, dim, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(2, dim, device=device, requires_grad=True)
        positions = torch.arange(length, device=device).expand(batch, length)
        if plane:
            positions = torch.stack((positions // 16, positions % 16), dim=-1)
        heads = groups * queries, groups, groups
        grads = [torch.randn(batch, length, n, dim, device=device, dtype=dtype) for n in heads]
        return Inputs(qkv, weight, *rope_table(positions, dim, 10000.0), grads)

    size = tokens * groups * (queries + 1) * dim
    return Case(name, Work(elements=5 * size + 2 * tokens * groups * dim), make, Work(elements=2 * size))


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case("tiny, GQA", 32, 1, 2, 16, False, 16), case("tiny, 2-D", 32, 2, 1, 16, True, 16)]
    return [case(name, NUM_TOKENS, *shape) for name, shape in SHAPES.items()]


def training(op):
    return lambda i: gradients(lambda: op(*i[:4], EPS), [i.qkv, i.weight], i.grads)


def forward(op):
    return lambda inputs: torch.no_grad()(lambda: op(*inputs[:4], EPS))


def compiled(inputs: Inputs):
    return training(torch.compile(qk_norm_rope_reference))(inputs)


def full_angles(inputs: Inputs) -> list[torch.Tensor]:
    """Cosines and sines [B, L, D] in the dtype of the activations, each half alike."""
    return [torch.cat((t, t), dim=-1).squeeze(2).to(inputs.qkv.dtype) for t in (inputs.cos, inputs.sin)]


def split(qkv: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values, [B, L, heads, D]."""
    return [part.flatten(2, 3) for part in qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)]


def liger(inputs: Inputs):
    """Liger's norm of queries and of keys, then its rotation of both, in the layout [B, H, L, D] that it wants."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope

    cos, sin = full_angles(inputs)

    def op(qkv, weight, cos_table, sin_table, eps):
        *qk, v = split(qkv)
        q, k = (liger_rms_norm(x, w, eps, in_place=False).transpose(1, 2) for x, w in zip(qk, weight))
        return [*(x.transpose(1, 2) for x in liger_rope(q, k, cos, sin)), v]

    return training(op)(inputs)


def hugging_face(inputs: Inputs):
    """Qwen3's norms and rotation, with weights in the dtype of the activations."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    cos, sin = full_angles(inputs)
    norms = [Qwen3RMSNorm(inputs.qkv.shape[-1], EPS).to(inputs.qkv) for _ in range(2)]

    def op():
        *qk, v = split(inputs.qkv)
        q, k = (norm(x).transpose(1, 2) for norm, x in zip(norms, qk))
        return [*(x.transpose(1, 2) for x in apply_rotary_pos_emb(q, k, cos, sin)), v]

    return gradients(op, [inputs.qkv, *(norm.weight for norm in norms)], inputs.grads)


PROVIDERS = [
    Provider("megamm", training(qk_norm_rope)),
    Provider("megamm", forward(qk_norm_rope), FORWARD),
    Provider("eager", training(qk_norm_rope_reference), minor=True),
    Provider("torch.compile", compiled, compiles=True),
    Provider("liger norm and rope", liger),
    Provider("Hugging Face norm and rope", hugging_face, minor=True),
]

if __name__ == "__main__":
    main("qk_norm_rope", cases, PROVIDERS)
