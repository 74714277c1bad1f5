"""Which of our parameters is which tensor of a Hugging Face model: tables, a row for each kind of parameter.

``{n}`` stands for the number of a block. The layouts' names are explained by :func:`layouts_of`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megamm.config import ModelConfig
from megamm.exchange import layouts
from megamm.exchange.layouts import SAME, SIDE_BY_SIDE, STACKED, TensorLayout
from megamm.model.sizes import num_heads, tower_patch_size


@dataclass(frozen=True)
class Row:
    """One parameter of ours and the tensors of theirs that it is made of.

    Attributes:
        layout: a key of :func:`layouts_of`.
        where: which models have it; all by default.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: str = "same"
    where: Callable[[ModelConfig], bool] = lambda config: True


def names_of(start: str, names: str, end: str) -> tuple[str, ...]:
    return tuple(f"{start}{name}{end}" for name in names.split())


_LAYER = "model.layers.{n}."
DECODER = (
    Row("embedding.weight", ("model.embed_tokens.weight",)),
    Row("blocks.{n}.attention_norm.weight", (f"{_LAYER}input_layernorm.weight",)),
    Row("blocks.{n}.attention.qkv.weight", names_of(f"{_LAYER}self_attn.", "q_proj k_proj v_proj", ".weight"), "heads"),
    Row(
        "blocks.{n}.attention.qkv.bias",
        names_of(f"{_LAYER}self_attn.", "q_proj k_proj v_proj", ".bias"),
        "heads",
        lambda config: config.qkv_bias,
    ),
    Row(
        "blocks.{n}.attention.qk_norm",
        names_of(f"{_LAYER}self_attn.", "q_norm k_norm", ".weight"),
        "stacked",
        lambda config: config.qk_norm,
    ),
    Row("blocks.{n}.attention.out.weight", (f"{_LAYER}self_attn.o_proj.weight",)),
    Row("blocks.{n}.feed_forward_norm.weight", (f"{_LAYER}post_attention_layernorm.weight",)),
    Row("blocks.{n}.feed_forward.gate_up.weight", names_of(f"{_LAYER}mlp.", "gate_proj up_proj", ".weight"), "gate_up"),
    Row("blocks.{n}.feed_forward.down.weight", (f"{_LAYER}mlp.down_proj.weight",)),
    Row("head.norm.weight", ("model.norm.weight",)),
    Row("head.weight", ("lm_head.weight",), where=lambda config: not config.tied_embeddings),
)
"""Llama, Qwen2 and Qwen3: they differ in what ``where`` asks for."""


def layouts_of(config: ModelConfig) -> dict[str, TensorLayout]:
    """The layouts of a (resolved) model by the names that the tables use."""
    found = {
        "same": SAME,
        "stacked": STACKED,
        "gate_up": SIDE_BY_SIDE,
        "heads": layouts.heads(num_heads(config) // config.key_heads, config.head_dim),
    }
    if config.architecture == "late":
        found["tower_heads"] = layouts.heads(1, config.vision.head_dim)
        found["patches"] = layouts.patches(tower_patch_size(config))
    return found


def rows_of(table: tuple[Row, ...], config: ModelConfig, depth: int, prefix: str = "") -> list[Row]:
    """The rows of a table that a model has, each block's by itself, in the order of the blocks.

    Args:
        depth: number of blocks.
        prefix: of their names.
    """
    found = [row for row in table if row.where(config)]
    # The rows of blocks stand together in a table.
    first = next(i for i, row in enumerate(found) if "{n}" in row.ours)
    last = max(i for i, row in enumerate(found) if "{n}" in row.ours) + 1
    numbered = [(row, str(n)) for n in range(depth) for row in found[first:last]]
    every = [*((row, "") for row in found[:first]), *numbered, *((row, "") for row in found[last:])]
    return [
        replace(
            row, ours=row.ours.replace("{n}", n), theirs=tuple(prefix + name.replace("{n}", n) for name in row.theirs)
        )
        for row, n in every
    ]
