"""From runs, checkpoints and folders to a folder of safetensors: Hugging Face's layout, or our own names."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megamm.errors import InputError
from megamm.exchange.families import family_of, write_decoder
from megamm.exchange.names import DECODER, Row, layouts_of, rows_of
from megamm.exchange.tensors import SHARD_BYTES, TensorGroup, write_tensors
from megamm.exchange.tokenizer import TOKENIZER, shift_tokenizer
from megamm.exchange.towers import unused_norm, write_llava
from megamm.exchange.weights import MODEL, FolderSettings, HuggingFaceWeights, Weights, open_weights
from megamm.files import check_out, write_json, write_text
from megamm.sequence import IMAGE
from megamm.settings import to_yaml


def convert(
    source: Path | str,
    to: str,
    out: Path | str,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the weights of ``source`` to a new folder, whole or not at all; about one tensor is in memory.

    Args:
        source: see :func:`megamm.exchange.weights.open_weights`.
        to: ``hf`` or ``megamm``.
        family: of ``hf``, one of ``families.FAMILIES``; by default the one that fits the model.
        dtype: a key of ``tensors.DTYPES``.
        shard_bytes: a file holds no more than this.

    Returns:
        The family, or ``megamm``.

    Raises:
        InputError: the source is not whole, the model has no such layout, or ``out`` exists.
    """
    out = Path(out)
    check_out(out, folder=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists; give a new folder")
    weights = open_weights(source)
    if not any(name.startswith("blocks.") for name in weights.shapes):
        raise InputError(f"{source}: a tower alone; start.vision_weights of a run reads it as it is")
    partial_ = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial_.mkdir(parents=True)
    try:
        if to == "hf":
            family = _write_hf(weights, partial_, family, dtype, shard_bytes)
        else:
            family = _write_own(weights, partial_, family, dtype, shard_bytes)
        # It is empty, as was checked at the start.
        if out.exists():
            out.rmdir()
        os.rename(partial_, out)
    finally:
        shutil.rmtree(partial_, ignore_errors=True)
    return family


def _write_own(weights: Weights, folder: Path, family: str | None, dtype: str, shard_bytes: int) -> str:
    if family is not None:
        raise InputError(f"--family: {family} says how to write with --to hf; leave it out with --to megamm")
    groups = [TensorGroup({name: shape}, partial(_read, weights, name)) for name, shape in weights.shapes.items()]
    write_tensors(folder, groups, dtype, shard_bytes)
    tokenizer = weights.place / TOKENIZER
    if tokenizer.exists():
        if isinstance(weights, HuggingFaceWeights):
            shift_tokenizer(tokenizer, folder / TOKENIZER)
        else:
            shutil.copyfile(tokenizer, folder / TOKENIZER)
    settings = FolderSettings(model=weights.config, row_length=weights.length, special=weights.special)
    write_text(folder / MODEL, to_yaml(settings))
    return "megamm"


def _read(weights: Weights, name: str) -> tuple[torch.Tensor]:
    return (weights.read(name),)


def _write_hf(weights: Weights, folder: Path, family: str | None, dtype: str, shard_bytes: int) -> str:
    model, ids = weights.config, weights.special
    fits = "llava" if model.architecture == "late" else family_of(model)
    if family not in (None, fits):
        raise InputError(f"--family: {family} is not the layout of this model, {fits} is")
    if fits == "llava":
        config, pixels, rows = write_llava(model, weights.length, IMAGE if ids.image is None else ids.image)
        write_json(folder / "preprocessor_config.json", pixels)
        extra = unused_norm(model)
    else:
        config, rows, extra = write_decoder(model, weights.length), rows_of(DECODER, model, model.depth), {}
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    # Newer versions of transformers read ``dtype``, older ones ``torch_dtype``.
    write_json(folder / "config.json", config | special | {"dtype": dtype, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", special)
    groups = [_group(weights, row) for row in rows]
    groups += [TensorGroup({name: tuple(tensor.shape)}, partial(tuple, [tensor])) for name, tensor in extra.items()]
    write_tensors(folder, groups, dtype, shard_bytes)
    return fits


def _group(weights: Weights, row: Row) -> TensorGroup:
    layout = layouts_of(weights.config)[row.layout]
    shapes = [tuple(part.shape) for part in layout.split(torch.empty(weights.shapes[row.ours], device="meta"))]

    def make() -> Sequence[torch.Tensor]:
        return layout.split(weights.read(row.ours))

    return TensorGroup(dict(zip(row.theirs, shapes, strict=True)), make)
