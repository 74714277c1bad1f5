"""nanoGPT: the text that ``train.py`` prints.

Read are ``step N: train loss X, val loss Y`` and ``iter N: loss X, ...`` lines, ``tokens per iteration``, the
parameters that the optimizer lists (the line ``number of parameters`` leaves learned positions out), and settings
that were overridden. The learning rate is not printed.
"""

import re
from pathlib import Path

from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import number, whole_number
from megamm_laws.runs.readers.parts import holds

_MARK = re.compile(rb"step \d+: train loss |iter \d+: loss .*time .*ms")
_STEP = re.compile(r"step (\d+): train loss ([\d.]+|nan|inf), val loss ([\d.]+|nan|inf)")
_ITERATION = re.compile(r"iter (\d+): loss ([\d.]+|nan|inf), time")
_TOKENS = re.compile(r"tokens per iteration will be: (\d[\d,]*)")
_SIZE = re.compile(r"number of parameters: ([\d.]+)M")
_TENSORS = re.compile(r"num (decayed|non-decayed) parameter tensors: \d+, with (\d[\d,]*) parameters")
_SETTING = re.compile(r"^(?:Overriding: )?(max_iters|learning_rate|min_lr|n_layer|n_head|n_embd|dataset|seed) = (\S+)")


def read_nanogpt(path: Path) -> list[Curve] | None:
    """The runs in a file of nanoGPT's output; None if the file has no step line of that form.

    What is printed before the first step begins a new part where it comes after steps.
    """
    if not holds(path, _MARK):
        return None
    curves = [Curve(name=run_name(path), origin=str(path))]
    tensors: list[dict[str, float]] = [{}]
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            curve = curves[-1]
            if match := _STEP.search(line):
                values = {"loss": number(match[3])}
                curve.add(int(match[1]), {key: value for key, value in values.items() if value is not None})
            elif match := _ITERATION.search(line):
                if (value := number(match[2])) is not None:
                    curve.add(int(match[1]), {"train_loss": value})
            else:
                _read_head(line, curves, tensors)
    for curve, counts in zip(curves, tensors):
        curve.headed = bool(curve.facts or curve.settings)
        if len(counts) == 2:
            curve.facts["params"] = sum(counts.values())
        curve.total_steps = whole_number(number(curve.settings.get("max_iters"))) or None
    return curves


def _read_head(line: str, curves: list[Curve], tensors: list[dict[str, float]]) -> None:
    """What holds for a whole run; ``tensors`` are the counts that the optimizer lists."""
    found = next((m for m in (p.search(line) for p in (_TOKENS, _SIZE, _TENSORS, _SETTING)) if m), None)
    if found is None:
        return
    if curves[-1].points:
        curves.append(Curve(name=curves[-1].name, origin=curves[-1].origin))
        tensors.append({})
    curve = curves[-1]
    if found.re is _TOKENS:
        curve.facts["tokens_per_step"] = number(found[1])
    elif found.re is _SIZE:
        curve.facts["params"] = 1e6 * float(found[1])
    elif found.re is _TENSORS:
        tensors[-1][found[1]] = number(found[2]) or 0.0
    else:
        curve.settings[found[1]] = found[2]
