"""TensorBoard event files of any trainer whose tags have a usual name (see ``names.ALIASES``).

A folder of event files is one run, resumed ones included; scalars are float32 in them. Megatron-LM also writes its
arguments as texts, from which the tokens per step and the vocabulary tables are known.
"""

from pathlib import Path
from typing import Any

from megamm_laws.errors import InputError
from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.megatron import facts_of_arguments
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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    # 0 keeps all: by default a long series is thinned to a random sample.
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    curve = Curve(name=run_name(path.parent if path.is_file() else path), origin=str(path))
    scalars = accumulator.Tags()["scalars"]
    for tag in scalars:
        key = key_of_tag(tag, mapping)
        if key is None:
            continue
        for event in accumulator.Scalars(tag):  # in the order of writing: what a resumed run wrote comes last
            if key in _FACTS or key == "tokens_per_step":
                curve.facts[key] = event.value
            elif key == "total_steps":
                curve.total_steps = whole_number(event.value)
            else:
                curve.add(event.step, {key: event.value})
    arguments = _texts(accumulator)
    # What was logged as a number goes before what follows from the arguments.
    curve.facts = facts_of_arguments(arguments) | curve.facts
    if arguments.get("train_iters", "").isdigit():
        curve.total_steps = int(arguments["train_iters"])
    if not scalars:
        raise InputError(f"{path}: no scalar can be read from its event files: empty or damaged")
    if not curve.points:
        shown = ", ".join(scalars[:8])
        raise InputError(
            f"{path}: no tag of a usual name; has {shown}; name them with --map loss=TAG, tokens=TAG, lr=TAG"
        )
    return [curve]


def _texts(accumulator: Any) -> dict[str, str]:
    """Texts by tag, as ``SummaryWriter.add_text`` stores them."""
    from tensorboard.util.tensor_util import make_ndarray

    found = {}
    for tag in accumulator.Tags()["tensors"]:
        name, _, kind = tag.rpartition("/")
        if kind == "text_summary":
            value = make_ndarray(accumulator.Tensors(tag)[-1].tensor_proto).ravel()
            if value.size:
                found[name] = value[0].decode("utf-8", "replace") if isinstance(value[0], bytes) else str(value[0])
    return found
