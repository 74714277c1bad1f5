"""Muon: a step along the nearest semi-orthogonal matrix of the momentum, for the matrices of the blocks.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), at the step size that Liu et al. 2025 (arXiv 2502.16982,
section 2.2) give it, which makes its learning rate and decay mean what they mean to AdamW. All else - tables, router,
norms, biases, projections, head - is AdamW's.

A matrix that is spread over ranks is gathered for its step, so that the result does not depend on how it lies; every
rank that holds a part of it does the same products.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamm.model.experts import Experts
from megamm.model.layers import Attention, FeedForward
from megamm.parallel.data import gather_whole, share_of

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5
"""Of the quintic that is iterated: it drives every singular value to about 1 (Jordan et al.)."""


@dataclass(frozen=True)
class Parts:
    """The matrices that lie in one parameter [..., rows, columns].

    Its rows are repetitions of sum(sizes) * block rows; part i is the ``sizes[i] * block`` ones of each repetition.
    """

    sizes: tuple[int, ...] = (1,)
    block: int = 1


def muon_parts(model: nn.Module) -> dict[nn.Parameter, Parts]:
    """The parameters that Muon steps, and which matrices lie in each: queries, keys and values; gate and up.

    Args:
        model: the whole or some of its blocks, under their names in the whole.
    """
    found = {
        parameter: Parts()
        for name, parameter in model.named_parameters()
        # By name, too: scales of heads are [2, head_dim] and would pass for matrices.
        if "blocks." in name and parameter.ndim >= 2 and "norm" not in name and "router" not in name
    }
    # Queries, keys and values do not work together, nor do gate and up: as one matrix they would share singular
    # vectors.
    joint: dict[nn.Parameter, Parts] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            heads, head_dim = module.group
            joint[module.qkv.weight] = Parts((heads - 2, 1, 1), head_dim)
        elif isinstance(module, FeedForward):
            joint[module.gate_up.weight] = Parts((1, 1))
        elif isinstance(module, Experts):
            joint[module.gate_up] = Parts((1, 1))
    return {parameter: joint.get(parameter, parts) for parameter, parts in found.items()}


class Muon(torch.optim.AdamW):
    """AdamW, but for parameter groups that have ``parts``.

    Args:
        groups: parameter groups; those of Muon with ``parts`` (:class:`Parts`).
        momentum: share of the momentum that a step keeps.
        dtype: of the matrix products.
        options: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **options: Any):
        super().__init__(groups, **options)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("parts") is None:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:  # frozen for now
                    self._move(parameter, group)
                    parameter.grad = None  # AdamW passes over it
        super().step()

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # which AdamW wants of every parameter on loading
            # Sharded as the gradient is: each rank keeps its share, and checkpoints see a DTensor like AdamW's.
            state["momentum"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["momentum"].mul_(self.momentum).add_(gradient)
        # Nesterov's form: the gradient counts once more.
        direction = gradient.add(state["momentum"], alpha=self.momentum)
        # A collective: all ranks of the parameter's mesh have it in the same place of the same group.
        step = orthogonal_step(gather_whole(direction), group["parts"], self.dtype)
        local, where = share_of(parameter)
        # Before the step, as AdamW does it.
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.sub_(step[where], alpha=group["lr"])


def orthogonal_step(direction: torch.Tensor, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """The step of each of the matrices in ``direction`` [..., rows, columns], of the root mean square .2 of AdamW's."""
    # [..., repetitions, parts, block, columns]: a part takes its rows out of every repetition.
    rows = direction.unflatten(-2, (-1, sum(parts.sizes), parts.block))
    found = torch.empty_like(rows)
    for part, out in zip(rows.split(parts.sizes, -3), found.split(parts.sizes, -3), strict=True):
        matrix = part.flatten(-4, -2)
        # An orthogonal m x n matrix has root mean square 1 / sqrt(max(m, n)).
        scale = 0.2 * math.sqrt(max(matrix.shape[-2:]))
        out.copy_((orthogonalise(matrix, dtype) * scale).view(part.shape))
    return found.flatten(-4, -2)


def orthogonalise(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Matrices [..., m, n] with the same singular vectors and all singular values about 1 (from .7 to 1.2)."""
    a, b, c = COEFFICIENTS
    # The Gram matrix is of the smaller side: fewer operations, the same result.
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).float()
    # The iteration needs singular values of at most 1, which this norm, the root of the sum of their squares, grants.
    # In float32, as bfloat16 is too coarse to sum up in; a matrix of zeros stays zero.
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
