"""RMS norm, alone and after a residual addition, at the paper's widths.

    python kernels/bench/rms_norm.py [--device cuda] [--dtype bfloat16] [--quick] [--out DIR]

Bound by memory: the work of a case is the tensors that must be read and written, forward and backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import FORWARD, Case, Provider, Work, gradients, main
from megamm_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

EPS = 1e-6
NUM_TOKENS = 32768 if torch.cuda.is_available() else 4096  # rows of 1024 or 4096, end to end


class Inputs(NamedTuple):
    """The residual only where it is added; the weight is float32, as parameters are."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    grads: list[torch.Tensor]

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.residual, self.weight) if t is not None]


def case(tokens: int, width: int, add: bool) -> Case:
    """One width; x, output and gradients count once each (with the addition: residual and its gradient too)."""

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        def tensor(requires_grad: bool = True) -> torch.Tensor:
            return torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=requires_grad)

        weight = torch.ones(width, device=device, requires_grad=True)
        return Inputs(tensor(), tensor() if add else None, weight, [tensor(False) for _ in range(1 + add)])

    forward, both = (4, 8) if add else (2, 5)
    name = f"{'add, ' if add else ''}width {width}"
    size = tokens * width
    return Case(name, Work(elements=both * size), make, Work(elements=forward * size))


def cases(quick: bool) -> list[Case]:
    widths, tokens = ((64,), 128) if quick else ((800, 1632, 3232, 5120), NUM_TOKENS)
    return [case(tokens, width, add) for add in (False, True) for width in widths]


def call(norm, add_norm, inputs: Inputs):
    """The op that the inputs ask for, as a list of outputs."""
    if inputs.residual is None:
        return [norm(inputs.x, inputs.weight, EPS)]
    return list(add_norm(inputs.x, inputs.residual, inputs.weight, EPS))


def training(norm, add_norm):
    return lambda inputs: gradients(lambda: call(norm, add_norm, inputs), inputs.leaves(), inputs.grads)


def forward(norm, add_norm):
    return lambda inputs: torch.no_grad()(lambda: call(norm, add_norm, inputs))


def torch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def torch_add_norm(x, residual, weight, eps):
    total = x + residual
    return torch_norm(total, weight, eps), total


def compiled(inputs: Inputs):
    return training(torch.compile(rms_norm_reference), torch.compile(add_rms_norm_reference))(inputs)


def liger(inputs: Inputs):
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

    def norm(x, weight, eps):
        return liger_rms_norm(x, weight, eps, in_place=False)

    def add_norm(x, residual, weight, eps):
        return liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)

    return training(norm, add_norm)(inputs)


def hugging_face(inputs: Inputs):
    """Llama's module, its weight in the dtype of the activations."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(inputs.x.shape[-1], EPS).to(inputs.x)

    def add_norm(x, residual, weight, eps):
        total = x + residual
        return module(total), total

    return training(lambda x, weight, eps: module(x), add_norm)(inputs._replace(weight=module.weight))


PROVIDERS = [
    Provider("megamm", training(rms_norm, add_rms_norm)),
    Provider("megamm", forward(rms_norm, add_rms_norm), FORWARD),
    Provider("eager", training(rms_norm_reference, add_rms_norm_reference), minor=True),
    Provider("torch F.rms_norm", training(torch_norm, torch_add_norm)),
    Provider("torch.compile", compiled, compiles=True),
    Provider("liger", liger),
    Provider("Hugging Face", hugging_face, minor=True),
]

if __name__ == "__main__":
    main("rms_norm", cases, PROVIDERS)
