"""The model nearest to a wanted number of parameters that can be built and spread."""

import copy
import math
from dataclasses import dataclass

import numpy as np

from megamm.config import ModelConfig
from megamm.errors import InputError
from megamm.model.counts import ParameterCounts, count_parameters
from megamm.model.sizes import resolve_model

PEAK_LR = {800: 1.5e-3, 1088: 1.5e-3, 1632: 5e-4, 2208: 4.2e-4, 2624: 4e-4, 3232: 3.5e-4, 5120: 2.4e-4}
"""Peak learning rate by width at depth 24 (arXiv 2504.07951, table of early-fusion models)."""
MAX_WIDTH = 65536
WIDEST, DEEPER = max(PEAK_LR), 126 / 24
"""Beyond the paper's largest width depth grows as a power of the width, so that 16,384 has the 126 blocks of Llama 3
405B (arXiv 2407.21783): at depth 24 a model of 70B would be wider than any that exists."""


@dataclass(kw_only=True)
class Buildable:
    """A resolved model config and its parameter counts."""

    config: ModelConfig
    counts: ParameterCounts

    @property
    def params(self) -> int:
        return self.counts.total


def nearest_model(
    params: float, template: ModelConfig, tensor_parallel: int = 1, grow_depth: bool = False
) -> Buildable:
    """The width whose model is nearest to ``params`` in the logarithm; all else as in ``template``.

    With ``grow_depth`` models wider than those of the paper are deeper, too.

    Widths are multiples of head_dim (64 where the template leaves it open) times the tensor-parallel size, so that
    every rank holds whole heads; a vision tower keeps its share of the width (half by default) under the same rule.

    Raises:
        InputError: the sizes of the template do not go with the tensor-parallel size.
    """
    if template.heads or template.hidden:
        raise InputError("model.heads, model.hidden: leave them out of the base config; they follow from the width")
    template = copy.deepcopy(template)
    # Fixed before widths are tried: a default that follows the width would change what a multiple is.
    template.head_dim = template.head_dim or 64
    step = template.head_dim * tensor_parallel

    def build(width: int) -> Buildable:
        return _build(template, width, step, share, grow_depth)

    if template.hidden_multiple % tensor_parallel:
        raise InputError(
            f"--tensor-parallel: {tensor_parallel} does not divide model.hidden_multiple {template.hidden_multiple}"
        )
    if template.vocab_size is None or template.patch_size is None or template.image_size is None:
        raise InputError("model: set vocab_size, image_size and patch_size in the base config")
    share = template.vision.width / template.width if template.vision.width else 0.5
    # By halves: the count of parameters grows with the width, but by no formula that could be turned around.
    low, high = 1, MAX_WIDTH // step
    while low < high:  # the first multiple with at least ``params``
        middle = (low + high) // 2
        low, high = (middle + 1, high) if build(middle * step).params < params else (low, middle)
    found = [build(k * step) for k in {max(low - 1, 1), low}]
    return min(found, key=lambda model: abs(math.log(model.params / params)))


def _build(template: ModelConfig, width: int, step: int, share: float, grow_depth: bool) -> Buildable:
    # ``resolve_model`` fills in what is left open, in place.
    config = copy.deepcopy(template)
    config.width = width
    if grow_depth and width > WIDEST:
        config.depth = round(config.depth * (width / WIDEST) ** (math.log(DEEPER) / math.log(16384 / WIDEST)))
    config.vision.width = step * max(1, round(width * share / step))
    config.vision.head_dim = config.vision.head_dim or config.head_dim
    resolve_model(config)
    return Buildable(config=config, counts=count_parameters(config))


def peak_lr(width: int) -> float:
    """Peak learning rate by width: the paper's table, interpolated in logarithms, flat beyond its ends."""
    widths = np.log(list(PEAK_LR))
    return float(f"{np.exp(np.interp(np.log(width), widths, np.log(list(PEAK_LR.values())))):.3g}")
