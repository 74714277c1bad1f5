"""TensorBoard event files of any trainer whose tags have a usual name (see ``names.ALIASES``).

A folder of event files is one run, resumed ones included; scalars are float32 in them. Megatron-LM also writes its
arguments as texts, from which the tokens per step and the vocabulary tables are known.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.megatron import facts_of_arguments, settings_of
from megamm_laws.runs.readers.names import key_of_tag, whole_number

MARK = "tfevents"
_FACTS = ("params", "params_active", "params_embedding", "params_head", "params_vision", "tokens_vision")


def has_events(folder: Path) -> bool:
    """Whether event files lie in the folder itself."""
    return any(MARK in entry.name and entry.is_file() for entry in folder.iterdir())


def read_events(path: Path, mapping: dict[str, str] | None = None) -> list[Curve] | None:
    """The run whose event files lie in the folder ``path``, or are the file ``path``; None if it has none.

    Raises:
        InputError: no tag in them means anything here.
    """
    if not (MARK in path.name if path.is_file() else has_events(path)):
        return None
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if MARK in entry.name)
    curve = Curve(name=run_name(path.parent if path.is_file() else path), origin=str(path))
    curve.unit = path.parent
    tags: dict[str, str | None] = {}
    texts: dict[str, str] = {}
    for step, value in (pair for file in files for pair in _values(file)):  # in the order of writing: the last stays
        tag = value.tag
        scalar = _scalar(value)
        if scalar is None:
            if tag.endswith("/text_summary") and value.tensor.string_val:
                texts[tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode("utf-8", "replace")
            continue
        if tag not in tags:
            tags[tag] = key_of_tag(tag, mapping)
        key = tags[tag]
        if key in _FACTS or key == "tokens_per_step":
            curve.facts[key] = scalar
        elif key == "total_steps":
            curve.total_steps = whole_number(scalar)
        elif key is not None:
            curve.add(step, {key: scalar})
    # What was logged as a number goes before what follows from the arguments.
    curve.facts = facts_of_arguments(texts) | curve.facts
    curve.settings = settings_of(texts)
    if texts.get("train_iters", "").isdigit():
        curve.total_steps = int(texts["train_iters"])
    if not tags:
        raise InputError(f"{path}: no scalar can be read from its event files: empty or damaged")
    if not curve.points:
        shown = ", ".join(list(tags)[:8])
        raise InputError(
            f"{path}: no tag of a usual name; has {shown}; name them with --map loss=TAG, tokens=TAG, lr=TAG"
        )
    return [curve]


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Step and value of each entry, up to the first damaged record.

    Records are read here: the accumulator of tensorboard keeps and sorts everything, at twenty times the cost.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # slow to import, both

    data = path.read_bytes()
    place = 0
    while place + 12 <= len(data):  # length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, place)
        if place + 12 + length > len(data):  # cut short by a kill
            return
        try:
            event = Event.FromString(data[place + 12 : place + 12 + length])
        except DecodeError:
            return
        place += 16 + length
        for value in event.summary.value:
            yield event.step, value


def _scalar(value: Any) -> float | None:
    """The number of an entry, in the older or the newer form; None if it is no scalar."""
    if value.HasField("simple_value"):
        return value.simple_value
    if value.metadata.plugin_data.plugin_name != "scalars":
        return None
    tensor = value.tensor
    for numbers in (tensor.float_val, tensor.double_val):
        if numbers:
            return float(numbers[0])
    kind = {1: "<f4", 2: "<f8"}.get(tensor.dtype)  # DT_FLOAT, DT_DOUBLE
    return float(np.frombuffer(tensor.tensor_content, kind)[0]) if kind and tensor.tensor_content else None
