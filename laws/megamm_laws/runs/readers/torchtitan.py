"""torchtitan: the text that training prints (torchtitan/components/metrics.py and trainer.py).

Read are ``step: N  loss: X ...`` and ``validate step: N  loss: X`` lines, the model's size, and the line ``Trainer
is initialized with ...`` for tokens per step. Colours and rank prefixes are taken off. The learning rate is not
printed; whether the run is cooled down follows from the printed configuration where there is one. Exact FLOPs per
token are the printed TFLOP/s over the printed tokens/s: matrix products and attention, without an image encoder.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megamm_laws.runs.readers.curve import COOLED, Curve, run_name
from megamm_laws.runs.readers.names import number
from megamm_laws.runs.readers.parts import holds

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


_MARK = re.compile(rb"step:\s*\d+.*loss:")
_HEAD = re.compile(r"Starting job|Running with config|total parameters|Trainer is initialized with")
_SETTING = re.compile(r"""["'](lr|seed|dataset|dataset_path|weight_decay|warmup_steps|decay_type)["']:\s*([^,}]+)""")


def read_torchtitan(path: Path) -> list[Curve] | None:
    """The runs in a file of torchtitan's output; None if the file has no step line of that form.

    What is printed before the first step - configuration, size, batch - begins a new part where it comes after steps.
    """
    if not holds(path, _MARK):
        return None
    parts = [_Part(Curve(name=run_name(path), origin=str(path)))]
    with path.open(encoding="utf-8", errors="replace") as lines:
        for raw in lines:
            part, line = parts[-1], _COLOUR.sub("", raw)
            # Other trainers may print steps and losses in these words as well: the second pattern is torchtitan's own.
            if (match := _STEP.search(line)) and _LINE.search(line):
                if (loss := number(match[3])) is None:
                    continue
                part.curve.add(int(match[2]), {"loss" if match[1] else "train_loss": loss})
                if (speed := _SPEED.search(line)) and (tokens := number(speed[1])) and (tera := number(speed[2])):
                    # TFLOP/s and tokens/s are both of one GPU: their number cancels.
                    part.per_token.append(1e12 * tera / tokens)
                continue
            if part.curve.points and _HEAD.search(line):
                part = _Part(Curve(name=part.curve.name, origin=part.curve.origin))
                parts.append(part)
            for key, value in _DECAY.findall(line):
                part.decay.setdefault(key, value)
            part.curve.settings |= {key: value.strip() for key, value in _SETTING.findall(line)}
            part.curve.facts |= _facts(line)
            if match := _TOTAL.search(line):
                part.curve.total_steps = int(match[1])
    return [_finished(part) for part in parts] if any(part.curve.points for part in parts) else None


@dataclass
class _Part:
    """What one start printed."""

    curve: Curve
    decay: dict[str, str] = field(default_factory=dict)
    per_token: list[float] = field(default_factory=list)


def _finished(part: _Part) -> Curve:
    curve = part.curve
    curve.headed = bool(curve.facts or curve.settings)
    curve.cooled = _cools_down(part.decay)
    # The printed TFLOP/s leave the encoder out, and so would the FLOPs of a run that has one.
    if part.per_token and "params_vision" not in curve.facts:
        curve.facts["flops_exact_per_token"] = median(part.per_token)
    # The active count is given without the encoder.
    if "params_active" in curve.facts:
        curve.facts["params_active"] += curve.facts.get("params_vision", 0)
    return curve


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
