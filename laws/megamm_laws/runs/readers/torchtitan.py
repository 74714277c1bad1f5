"""torchtitan: the text that training prints (torchtitan/components/metrics.py and trainer.py).

Read are ``step: N  loss: X ...`` and ``validate step: N  loss: X`` lines, the model's size, and the line ``Trainer
is initialized with ...`` for tokens per step. Colours and rank prefixes are taken off. The learning rate is not
printed; whether the run is cooled down follows from the printed configuration where there is one. Exact FLOPs per
token are the printed TFLOP/s over the printed tokens/s: matrix products and attention, without an image encoder.
"""

import re
from pathlib import Path
from statistics import median
from typing import Any

from megamm_laws.runs.readers.curve import COOLED, Curve, run_name
from megamm_laws.runs.readers.names import number

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(r"(validate )?step:\s*(\d+)\s+loss:\s*([\d.]+(?:e[+-]?\d+)?|nan|inf)", re.I)
_LINE = re.compile(r"\[titan\]|tps: [\d,]+|root - INFO")
_SPEED = re.compile(r"tps: (\d[\d,]*)\s+tflops: (\d[\d,.]*)")
_SIZE = re.compile(r"size: (\d[\d,]*) total parameters")
_EXPERTS = re.compile(
    r"parameter count: dense (\d[\d,]*), sparse (\d[\d,]*)(?:, vision (\d[\d,]*))?, active (\d[\d,]*)"
)
_BATCH = re.compile(r"global batch size (\d+),.*sequence length (\d+)")
_STEP_TOKENS = re.compile(r"(\d+) tokens per train step")
_TOTAL = re.compile(r"total steps (\d+)")
_DECAY = re.compile(r"""["'](min_lr_factor|lr_min|decay_ratio)["']:\s*(null|None|[\d.eE+-]+)""")


def read_torchtitan(path: Path) -> list[Curve] | None:
    """The run in a file of torchtitan's output; None if the file has no step line of that form."""
    curve, steps = Curve(name=run_name(path), origin=str(path)), 0
    decay: dict[str, str] = {}
    per_token: list[float] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for raw in lines:
            line = _COLOUR.sub("", raw)
            # Other trainers may print steps and losses in these words as well: the second pattern is torchtitan's own.
            if (match := _STEP.search(line)) and _LINE.search(line):
                if (loss := number(match[3])) is None:
                    continue
                steps += 1
                curve.add(int(match[2]), {"loss" if match[1] else "train_loss": loss})
                if (speed := _SPEED.search(line)) and (tokens := number(speed[1])) and (tera := number(speed[2])):
                    # TFLOP/s and tokens/s are both of one GPU: their number cancels.
                    per_token.append(1e12 * tera / tokens)
                continue
            for key, value in _DECAY.findall(line):
                decay.setdefault(key, value)
            curve.facts |= _facts(line)
            if match := _TOTAL.search(line):
                curve.total_steps = int(match[1])
    if not steps:
        return None
    curve.cooled = _cools_down(decay)
    # The printed TFLOP/s leave the encoder out, and so would the FLOPs of a run that has one.
    if per_token and "params_vision" not in curve.facts:
        curve.facts["flops_exact_per_token"] = median(per_token)
    # The active count is given without the encoder.
    if "params_active" in curve.facts:
        curve.facts["params_active"] += curve.facts.get("params_vision", 0)
    return [curve]


def _facts(line: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if match := _SIZE.search(line):
        found["params"] = _integer(match[1])
    if match := _EXPERTS.search(line):
        found["params_active"] = _integer(match[4])
        if match[3] and _integer(match[3]):
            found["params_vision"] = _integer(match[3])
        if _integer(match[2]):
            found["architecture"] = "moe"
    if match := _STEP_TOKENS.search(line):
        found["tokens_per_step"] = int(match[1])
    elif match := _BATCH.search(line):
        found["tokens_per_step"] = int(match[1]) * int(match[2])
    return found


def _cools_down(decay: dict[str, str]) -> bool | None:
    """Whether the schedule ends low; None if it was not printed.

    The rate falls linearly to ``min_lr_factor`` after the warm-up unless ``decay_ratio`` is zero.
    """
    lowest = number(decay.get("min_lr_factor", decay.get("lr_min")))
    if lowest is None:
        return None
    return lowest <= COOLED and number(decay.get("decay_ratio")) != 0


def _integer(text: str) -> int:
    return int(text.replace(",", ""))
