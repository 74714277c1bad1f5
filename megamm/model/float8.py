"""Matrix products of the blocks in 8-bit floats, by torchao: operands and gradients get one scale per tensor.

Weights, activations between the products, and all else keep their types (Micikevicius et al. 2022, arXiv 2209.05433:
e4m3 for operands, e5m2 for gradients). The head, the embedding and the experts' grouped products are left as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megamm.model.layers import FeedForward, Linear

ALIGNMENT = 16
"""Rows and columns of 8-bit operands come in multiples of this on tensor cores."""


def use_float8(block: nn.Module, device: torch.device) -> None:
    """Have a block's products run in 8-bit floats, in place; on a CPU their rounding is emulated.

    Products whose widths are not multiples of 16 stay as they are. torchao has to be installed.
    """
    product = _product(emulate=device.type != "cuda")
    for module in block.modules():
        if isinstance(module, FeedForward):
            module.fused = False  # the fused form has its own product
        if isinstance(module, Linear) and not any(size % ALIGNMENT for size in module.weight.shape):
            module.product = product


def _product(emulate: bool) -> Callable[..., torch.Tensor]:
    """``F.linear`` in 8-bit floats."""
    # Only whoever asks for it pays for the import.
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = Float8LinearConfig(emulate=emulate)

    def how(gemm: Any) -> ScaledMMConfig:
        return ScaledMMConfig(emulate, gemm.use_fast_accum, False, config.pad_inner_dim)

    # Sums of the forward may be fast; those of gradients are exact, as torchao's own layers have it.
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    return partial(_float8_linear, config=config, gemms=LinearMMConfig(*map(how, gemms)))


def _float8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, config: Any, gemms: Any
) -> torch.Tensor:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    rows = x.flatten(0, -2)
    # The gradient of the weight sums over rows, which are of any number. Rows of zeros change no scale and no sum.
    padding = -rows.shape[0] % ALIGNMENT
    found = matmul_with_hp_or_float8_args.apply(F.pad(rows, (0, 0, 0, padding)), weight.t(), gemms, config)
    found = found[: rows.shape[0]].unflatten(0, x.shape[:-1])
    return found if bias is None else found + bias
