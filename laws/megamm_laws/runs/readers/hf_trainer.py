"""transformers' Trainer: ``trainer_state.json`` in the folder of a run and in each of its checkpoints.

Read are the entries of ``log_history``: ``loss``, ``learning_rate``, ``eval_loss`` and ``eval_NAME_loss`` by step, and
tokens where they were counted (``include_num_input_tokens_seen``). The number of parameters is not in it, and
``total_flos`` is left alone: how it counts depends on the model.
"""

import json
import re
from pathlib import Path

from megamm_laws.errors import InputError
from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import number, whole_number

_EVAL = re.compile(r"eval_(?:(.+)_)?loss")


def read_hf_trainer(path: Path) -> list[Curve] | None:
    """The run in a ``trainer_state.json``; None for any other file.

    Raises:
        InputError: not JSON, or no ``log_history``.
    """
    if path.name != "trainer_state.json":
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        history = [entry for entry in state["log_history"] if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no log_history can be read ({error}); remove the damaged file") from error
    curve = Curve(name=run_name(path), origin=str(path))
    # Checkpoints hold the history up to them: parts of the run in the folder above.
    curve.unit = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    for entry in history:
        step = whole_number(number(entry.get("step")))
        if step is None:
            continue
        values = {"train_loss": number(entry.get("loss")), "lr": number(entry.get("learning_rate"))}
        values["tokens"] = number(entry.get("num_input_tokens_seen")) or None
        for key, value in entry.items():
            if match := _EVAL.fullmatch(key):
                values[f"loss_{match[1].lower()}" if match[1] else "loss"] = number(value)
        curve.add(step, {key: value for key, value in values.items() if value is not None})
    last, tokens = whole_number(number(state.get("global_step"))), number(state.get("num_input_tokens_seen"))
    if last and tokens and curve.points:
        curve.add(last, {"tokens": tokens})
    curve.total_steps = whole_number(number(state.get("max_steps"))) or None
    return [curve]
