"""The first values of a run from other weights: each rank reads what lies on it, and nobody holds the whole.

The settings that decide what the weights compute must be those that they were made with. New parts (an image's way into
a decoder that has seen text only) and new rows of the vocabulary keep their values by seed and name.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn

from megamm.config import Config, ModelConfig
from megamm.errors import InputError
from megamm.exchange.weights import Weights, model_shapes, open_weights
from megamm.model.sizes import (
    decoder_hidden,
    num_heads,
    tower_activation,
    tower_eps,
    tower_hidden,
    tower_patch_size,
)
from megamm.parallel.data import share_of
from megamm.parallel.mesh import World

TABLES = ("embedding.weight", "head.weight")
"""Parameters with a row for each token."""
PROJECTOR = "vision.projector."
BALANCE = ".feed_forward.bias"
"""Of a router that is balanced by a bias; it begins at zero where the weights were balanced by a loss."""


@torch.no_grad()
def start_from(model: nn.Module, config: Config, world: World) -> None:
    """Fill this rank's shares from ``start.weights`` and ``start.vision_weights``; nothing to do without them.

    Args:
        model: under the names of the whole model, with its first values.
        config: resolved.
        world: this process among all; all of them call.

    Raises:
        InputError: weights of another model: the setting, or the parameter that is missing or left over, is named.
    """
    start = config.start
    if start.weights is None and start.vision_weights is None:
        return
    with world.agree():
        shapes = model_shapes(config.model)
        given: set[str] = set()
        # The tower first: what it gave is then left out of the model's weights.
        for setting, path in (("start.vision_weights", start.vision_weights), ("start.weights", start.weights)):
            if path is None:
                continue
            weights, first_row = open_weights(path), start.first_row
            is_tower = setting == "start.vision_weights"
            names = _tower_names(weights, config.model) if is_tower else list(weights.shapes)
            check = _check_tower if is_tower else _check_decoder
            check(setting, weights, config.model)
            _check_names(setting, weights, names, shapes, first_row)
            _check_whole(setting, weights, {*names, *given}, shapes, is_tower)
            if not is_tower:  # a tower that is given by itself wins over the one of the model
                names = [name for name in names if name not in given]
            _fill(model, weights, names, first_row)
            given |= set(names)


def _fill(model: nn.Module, weights: Weights, names: Iterable[str], first_row: int) -> None:
    wanted = set(names)
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):
        if name not in wanted:
            continue
        local, where = share_of(parameter)
        if not local.numel():
            continue
        if name in TABLES:
            rows = weights.shapes[name][0]
            # The rows that lie here and that the weights have; all others keep their first values.
            start, stop = max(where[0].start, first_row), min(where[0].stop, first_row + rows)
            if start >= stop:
                continue
            local = local[start - where[0].start : stop - where[0].start]
            where = (slice(start - first_row, stop - first_row), *where[1:])
        local.copy_(weights.read(name, where))


def _check_names(setting: str, weights: Weights, names: list[str], shapes: dict, first_row: int) -> None:
    """Check that the model has a place of the right shape for each name."""
    for name in names:
        if name not in shapes:
            raise InputError(f"{setting}: {weights.place} has {name}, for which the model has no place")
        found, wanted = weights.shapes[name], shapes[name]
        if name in TABLES and found[1:] == wanted[1:]:
            if first_row + found[0] > wanted[0]:
                raise InputError(
                    f"{setting}: {weights.place} has a vocabulary of {found[0]} rows, which does not fit in "
                    f"model.vocab_size {wanted[0]} from start.first_row {first_row}"
                )
        elif found != wanted:
            raise InputError(f"{setting}: {name} of {weights.place} is {list(found)}, of the model {list(wanted)}")


def _check_whole(setting: str, weights: Weights, names: set[str], shapes: dict, is_tower: bool) -> None:
    """Check that nothing of the model begins anew but what may be grafted: a tower is taken whole or not at all."""
    has_tower = any(name.startswith("vision.blocks.") for name in names)
    new = (PROJECTOR, *(() if has_tower else ("vision.",)), "embedding.projection.")
    wanted = [name for name in shapes if name.startswith("vision.") or not is_tower]
    missing = [name for name in wanted if not (name in names or name.startswith(new) or name.endswith(BALANCE))]
    if missing:
        raise InputError(
            f"{setting}: {weights.place} has no {missing[0]}; only what images need may be new: patch projection, "
            "projector, or a whole tower"
        )


def _decoder_settings(model: ModelConfig) -> dict:
    scaling = model.rope_scaling
    return {
        "width": model.width,
        "depth": model.depth,
        "heads": num_heads(model),
        "head_dim": model.head_dim,
        "key_heads": model.key_heads,
        "hidden": decoder_hidden(model),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "tied_embeddings": model.tied_embeddings,
        **{f"rope_scaling.{key}": value for key, value in vars(scaling).items() if scaling.kind != "none"},
        "rope_scaling.kind": scaling.kind,
    }


def _tower_settings(model: ModelConfig) -> dict:
    vision = model.vision
    found = {name: getattr(vision, name) for name in ("kind", "width", "head_dim")}
    return {f"vision.{name}": value for name, value in found.items()} | {
        "vision.hidden": tower_hidden(model),
        "vision.norm_eps": tower_eps(model),
        "vision.activation": None if vision.kind == "megamm" else tower_activation(model),
        "vision.patch_size": tower_patch_size(model),
        "image_size": model.image_size,
    }


def _differences(setting: str, weights: Weights, theirs: dict, ours: dict) -> None:
    wrong = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if wrong:
        flags = " ".join(f"--model.{key} {_show(theirs[key])}" for key in wrong if key in theirs)
        raise InputError(f"{setting}: {weights.place} was made with other settings of the model; set {flags}")


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_decoder(setting: str, weights: Weights, model: ModelConfig) -> None:
    if "embedding.weight" not in weights.shapes:
        raise InputError(f"{setting}: {weights.place} is a tower alone; give it as start.vision_weights")
    ours, theirs = _decoder_settings(model), _decoder_settings(weights.config)
    if any(name.startswith("vision.") for name in weights.shapes) and model.architecture == "late":
        ours |= _tower_settings(model) | {"vision.depth": model.vision.depth}
        theirs |= _tower_settings(weights.config) | {"vision.depth": weights.config.vision.depth}
    _differences(setting, weights, theirs, ours)


def _check_tower(setting: str, weights: Weights, model: ModelConfig) -> None:
    if model.architecture != "late":
        raise InputError(f"{setting}: model.architecture is {model.architecture}, which has no tower; set it to late")
    if not any(name.startswith("vision.blocks.") for name in weights.shapes):
        raise InputError(f"{setting}: {weights.place} has no vision tower")
    _differences(setting, weights, _tower_settings(weights.config), _tower_settings(model))
    depth, theirs = model.vision.depth, weights.config.vision.depth
    if depth > theirs or (depth < theirs and model.vision.final_norm):
        raise InputError(
            f"{setting}: model.vision.depth is {depth}, but {weights.place} has {theirs} blocks; take as many, or "
            "fewer with model.vision.final_norm false (features of an inner layer)"
        )


def _tower_names(weights: Weights, model: ModelConfig) -> list[str]:
    """Parameters of a tower that the model takes: of an inner layer's features nothing above it."""
    names = [name for name in weights.shapes if name.startswith("vision.") and ".projector." not in name]
    above = [f"vision.blocks.{n}." for n in range(model.vision.depth, weights.config.vision.depth)]
    above += [] if model.vision.final_norm else ["vision.norm."]
    return [name for name in names if not name.startswith(tuple(above))] if above else names
