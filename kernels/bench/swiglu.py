"""SwiGLU on a fused gate-up product, at the hidden widths of the paper's models.

    python kernels/bench/swiglu.py [--device cuda] [--dtype bfloat16] [--quick] [--out DIR]

Bound by memory: the work of a case is the tensors that must be read and written, forward and backward.
"""

from typing import NamedTuple

import torch
from harness import FORWARD, Case, Provider, Work, gradients, main
from megamm_kernels.swiglu import swiglu, swiglu_reference

NUM_TOKENS = 16384 if torch.cuda.is_available() else 4096  # rows of 1024 or 4096, end to end
HIDDEN = {800: 2304, 1632: 4352, 3232: 8704, 5120: 13824}


class Inputs(NamedTuple):
    """Gate and up in one tensor, and the gradient of the output."""

    gate_up: torch.Tensor
    grad: torch.Tensor


def case(tokens: int, width: int, hidden: int) -> Case:
    """One model width; in units of the output, 3 are moved forward and 5 backward."""

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        gate_up = torch.randn(tokens, 2 * hidden, device=device, dtype=dtype, requires_grad=True)
        return Inputs(gate_up, torch.randn(tokens, hidden, device=device, dtype=dtype))

    size = tokens * hidden
    return Case(f"width {width}, hidden {hidden}", Work(elements=8 * size), make, Work(elements=3 * size))


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case(64, 24, 64)]
    return [case(NUM_TOKENS, width, hidden) for width, hidden in HIDDEN.items()]


def training(op):
    return lambda inputs: gradients(lambda: op(inputs.gate_up), [inputs.gate_up], inputs.grad)


def forward(op):
    return lambda inputs: torch.no_grad()(lambda: op(inputs.gate_up))


def compiled(inputs: Inputs):
    return training(torch.compile(swiglu_reference))(inputs)


def halves(gate_up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gate and up, each by itself."""
    return gate_up.unflatten(-1, (-1, 2)).unbind(-1)


def liger(inputs: Inputs):
    """Liger takes two tensors, so the two parts of a fused product are copied first."""
    from liger_kernel.transformers.functional import liger_swiglu

    return training(lambda gate_up: liger_swiglu(*halves(gate_up)))(inputs)


def apart(op, inputs: Inputs):
    """``op`` on gate and up as two products would give them."""
    gate, up = (x.detach().contiguous().requires_grad_() for x in halves(inputs.gate_up))
    return gradients(lambda: op(gate, up), [gate, up], inputs.grad)


def liger_apart(inputs: Inputs):
    """Its backward writes over gate and up."""
    from liger_kernel.transformers.functional import liger_swiglu

    return apart(liger_swiglu, inputs)


def hugging_face(inputs: Inputs):
    """What Llama's feed-forward module does between its products."""
    from transformers.activations import ACT2FN

    activation = ACT2FN["silu"]
    return apart(lambda gate, up: activation(gate) * up, inputs)


PROVIDERS = [
    Provider("megamm", training(swiglu)),
    Provider("megamm", forward(swiglu), FORWARD),
    Provider("eager", training(swiglu_reference), minor=True),
    Provider("torch.compile", compiled, compiles=True),
    Provider("liger", liger),
    Provider("liger, gate and up apart", liger_apart, minor=True),
    Provider("Hugging Face, gate and up apart", hugging_face, minor=True),
]

if __name__ == "__main__":
    main("swiglu", cases, PROVIDERS)
