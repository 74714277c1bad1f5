"""Composer and llm-foundry: the text of the console logger and of the file logger (composer/loggers/).

Read are the metrics below a line ``[batch=N/TOTAL]:`` (``Train NAME: X``) or ``[Eval batch=N/N] Eval on ... data:``,
the lines ``[metric][batch=N]: NAME: X``, and from the printed configuration ``n_params``, ``global_train_batch_size``
and ``max_seq_len``. Cross-entropies are taken before total losses, which may hold other terms.
"""

import re
from pathlib import Path

from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import number
from megamm_laws.runs.readers.parts import holds

_MARK = re.compile(rb"(?:Train|\[metric\]\[batch=\d+\]:) (?:time/|loss/train|metrics/train)")
_BATCH = re.compile(r"\[batch=(\d+)/(\d+)\]")
_METRIC = re.compile(r"(?:\b(?:Train|Eval) |\[metric\]\[batch=(\d+)\]: )(\S+): ([\d.,eE+-]+|nan|inf)\s*$")
_EVAL = re.compile(r"metrics/eval(?:/(\S+))?/LanguageCrossEntropy")
_SETTING = re.compile(
    r"^(?:\d+:\s*|\[hyperparameter\]: )?(n_params|n_active_params|global_train_batch_size|max_seq_len|max_duration|"
    r"seed|global_seed|run_name): (\S+)\s*$"
)
_HEAD = re.compile(r"^(?:\d+:\s*)?Config:\s*$")
_DURATION = re.compile(r"(\d+)ba")


def read_composer(path: Path) -> list[Curve] | None:
    """The runs in a file of Composer's output; None if the file has no metric of that form.

    ``Config:`` begins a new part where it comes after steps.
    """
    if not holds(path, _MARK):
        return None
    curves, step = [Curve(name=run_name(path), origin=str(path))], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            curve = curves[-1]
            if match := _METRIC.search(line):
                step = int(match[1]) if match[1] else step
                if (value := number(match[3])) is not None:
                    step = _add(curve, step, match[2], value)
            elif match := _BATCH.search(line):
                step, curve.total_steps = int(match[1]), int(match[2])
            elif curve.points and _HEAD.search(line):
                curves.append(Curve(name=curve.name, origin=curve.origin))
                step = 0
            elif match := _SETTING.search(line):
                curve.settings.setdefault(match[1], match[2])
    for curve in curves:
        _finish(curve)
    return curves


def _add(curve: Curve, step: int, name: str, value: float) -> int:
    """Write a metric down, and return the step that the next ones belong to."""
    if name == "time/batch":
        # Batches done before this one; the console names the batch itself only where runs are counted in batches.
        return max(step, int(value))
    key = {"loss/train/total": "total", "metrics/train/LanguageCrossEntropy": "train_loss", "time/token": "seen"}.get(
        name
    )
    if name.startswith("lr-") and name.endswith("/group0"):
        key = "lr"
    elif match := _EVAL.fullmatch(name):
        key = f"loss_{match[1].lower()}" if match[1] and match[1] != "eval" else "loss"
    if key:
        curve.add(step, {key: value})
    return step


def _finish(curve: Curve) -> None:
    said = curve.settings
    curve.headed = bool(said)
    for ours, theirs in (("params", "n_params"), ("params_active", "n_active_params")):
        if (value := number(said.pop(theirs, None))) is not None:
            curve.facts[ours] = value
    batch, length = number(said.get("global_train_batch_size")), number(said.get("max_seq_len"))
    if batch and length:
        curve.facts["tokens_per_step"] = batch * length
    if not curve.total_steps and (match := _DURATION.fullmatch(said.get("max_duration", ""))):
        curve.total_steps = int(match[1])
    for step, values in curve.points.items():
        total, seen = values.pop("total", None), values.pop("seen", None)
        if total is not None and "train_loss" not in values:
            values["train_loss"] = total
        # Tokens before this batch: those of step - 1 batches.
        if seen and step > 1 and not curve.facts.get("tokens_per_step"):
            values["tokens"] = seen * step / (step - 1)
