"""Dropless mixture-of-experts layer with SwiGLU experts, forward and backward, router left out.

Routing is skewed, as a router's is before it is balanced: expert e is drawn with weight 1 / (1 + e).
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Case, Provider, Work, gradients, main
from megamm_kernels import grouped_experts as module_function
from megamm_kernels.grouped_experts import grouped_experts_reference


class Inputs(NamedTuple):
    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def make(tokens: int, width: int, hidden: int, num_experts: int, k: int, device, dtype) -> Inputs:
    """Random activations and matrices."""
    shares = 1 / (1 + torch.arange(num_experts, device=device, dtype=torch.float32))
    experts = torch.multinomial(shares.expand(tokens, -1), k)

    def leaf(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device, dtype=dtype) * scale).requires_grad_()

    return Inputs(
        leaf(tokens, width),
        experts,
        leaf(tokens, k, dtype=torch.float32),
        leaf(num_experts, 2 * hidden, width, scale=width**-0.5),
        leaf(num_experts, width, hidden, scale=hidden**-0.5),
    )


def cases(quick: bool) -> list[Case]:
    """The paper's eight experts, top-1, on 4 x 4096 tokens, and a finer-grained top-2 layer."""
    shapes = [(48, 32, 64, 4, 2)]
    if not quick:
        shapes = [
            (16384, 800, 2304, 8, 1),
            (16384, 2208, 5888, 8, 1),
            (4096, 2208, 5888, 8, 1),
            (16384, 1632, 1024, 64, 2),
        ]
    return [
        Case(f"{n}x{w} E{e} top-{k}", Work(flops=3 * 2 * n * k * 3 * w * h), partial(make, n, w, h, e, k))
        for n, w, h, e, k in shapes
    ]


def layer(function, inputs: Inputs):
    """Forward and backward of ``function``."""
    leaves = [inputs.x, *inputs[2:]]
    grad = torch.randn_like(inputs.x)
    return gradients(lambda: function(*inputs), leaves, grad)


def triton_only(inputs: Inputs):
    """Ours with our own products even where torch's are chosen."""
    import sys

    module = sys.modules["megamm_kernels.grouped_experts"]
    run = layer(module_function, inputs)

    def without_torch():
        chosen, module._torch_is_fast = module._torch_is_fast, lambda *_: False
        try:
            return run()
        finally:
            module._torch_is_fast = chosen

    return without_torch


def torch_grouped(x, experts, weights, gate_up, down):
    """What a model writes today: argsort, torch's grouped GEMM, atomic additions."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(gate_up.shape[0], device=x.device, dtype=torch.int32)
    offsets = counts.index_add(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    token = order // experts.shape[1]
    gate, up = F.grouped_mm(x[token], gate_up.mT, offs=offsets).unflatten(-1, (-1, 2)).unbind(-1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=offsets)
    return torch.zeros_like(x).index_add(0, token, (y * weights.flatten()[order, None]).to(x.dtype))


def compiled(inputs: Inputs):
    """The same under torch.compile."""
    return layer(torch.compile(torch_grouped), inputs)


PROVIDERS = [
    Provider("megamm", partial(layer, module_function)),
    Provider("megamm, Triton products", triton_only),
    Provider("loop over experts", partial(layer, grouped_experts_reference), minor=True),
    Provider("F.grouped_mm, eager", partial(layer, torch_grouped)),
    Provider("F.grouped_mm, compiled", compiled, compiles=True),
]

if __name__ == "__main__":
    main(op="grouped_experts", cases=cases, providers=PROVIDERS)
