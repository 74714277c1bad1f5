"""Activations computed again in the backward instead of kept."""

from functools import partial, wraps
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megamm.model.multimodal import MultimodalModel

aten = torch.ops.aten
KEPT = (
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
"""What ``per_op`` keeps: the costly operations. Norms, rotary embedding and activation functions run twice."""


def recompute_blocks(model: MultimodalModel, mode: str) -> None:
    """Have every block of the decoder and of the vision tower recompute its activations, in place.

    Gradients are bitwise those of the model that keeps them.

    Args:
        mode: ``none``; ``per_op``: keep what matrix products and attention give; ``full``: keep the block's input.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws random numbers
    if mode == "per_op":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.all_blocks():
        # The method, not a wrapper module: names of parameters stay as checkpoints know them.
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward, options):
    @wraps(forward)
    def run(*arguments):
        return checkpoint(forward, *arguments, **options)

    return run


def _policy(context, op, *arguments, **options) -> CheckpointPolicy:
    # Operators of our own, by name: which of them exist depends on the machine (Triton or not).
    ours = op.namespace == "megamm" and ("attention" in op._opname or op._opname == "grouped_linear")
    costly = op in KEPT or ours
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
