"""OLMo-core: the text that training prints (olmo_core/train/callbacks/console_logger.py and evaluator_callback.py).

Read are the metrics below a line ``[step=N/TOTAL,epoch=E]``: ``train/CE loss``, ``optim/LR``, ``throughput/total
tokens``; validation losses below ``Finished NAME evals``; the number of parameters. Numbers have four digits.
"""

import re
from pathlib import Path

from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import number
from megamm_laws.runs.readers.parts import holds

_MARK = re.compile(rb"\[step=[\d,]+/.*epoch=")
_STEP = re.compile(r"\[step=([\d,]+)/([\d,]+|\?\?\?),epoch=")
_METRIC = re.compile(
    r"(?:^|\s{2,})(train/CE loss|optim/LR(?: \(group 0\))?|throughput/total tokens)=([\d.,eE+-]+|nan|inf)"
)
_SCALED = re.compile(r"throughput/total tokens=([\d.,]+)([KMBT])\s*$")
_EVALS = re.compile(r"Finished (\S+) evals in ")
_LOSS = re.compile(r"^\s+(\S+)/CE loss=([\d.,eE+-]+|nan|inf)")
_SIZE = re.compile(r"(?:[Tt]otal (?:model )?param(?:eter)?s|[Nn]umber of (?:total )?param(?:eter)?s): (\d[\d,]*)")
_EMBEDDING = re.compile(r"non-embedding param(?:eter)?s: (\d[\d,]*)")
_KEYS = {"train/CE loss": "train_loss", "throughput/total tokens": "tokens"}
_SCALE = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def read_olmo_core(path: Path) -> list[Curve] | None:
    """The runs in a file of OLMo-core's output; None if the file has no step line of that form.

    The number of parameters, printed before the first step, begins a new part where it comes after steps.
    """
    if not holds(path, _MARK):
        return None
    curves, step, evaluating = [Curve(name=run_name(path), origin=str(path))], 0, False
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            curve = curves[-1]
            if match := _STEP.search(line):
                step, evaluating = int(match[1].replace(",", "")), False
                curve.total_steps = int(match[2].replace(",", "")) if match[2] != "???" else curve.total_steps
            elif match := _SCALED.search(line):
                curve.add(step, {"tokens": (number(match[1]) or 0.0) * _SCALE[match[2]]})
            elif match := _METRIC.search(line):
                if (value := number(match[2])) is not None:
                    curve.add(step, {_KEYS.get(match[1], "lr"): value})
            elif _EVALS.search(line):
                evaluating = True
            elif evaluating and (match := _LOSS.search(line)):
                if (value := number(match[2])) is not None:
                    curve.add(step, {f"loss_{match[1].lower()}": value})
            elif match := _SIZE.search(line):
                if curve.points:
                    curve, step = Curve(name=curve.name, origin=curve.origin), 0
                    curves.append(curve)
                curve.facts["params"] = number(match[1])
            elif (match := _EMBEDDING.search(line)) and "params" in curve.facts:
                curve.facts["params_embedding"] = curve.facts["params"] - (number(match[1]) or 0.0)
    for curve in curves:
        curve.headed = bool(curve.facts)
    return curves
