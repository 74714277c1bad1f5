"""lingua: ``metrics.jsonl`` in the folder of a run (lingua/metrics.py), with the files that lie beside it.

Read are ``loss/out``, ``optim/lr`` and ``optim/total_tokens`` per ``global_step``; validation losses from
``metrics.validation.jsonl``, where nats per token stand as log-likelihoods, below zero; the size from ``train.log``;
and the planned steps from ``config.yaml``. Exact FLOPs per token are the logged FLOPs/s over tokens/s.
"""

import re
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import number, whole_number
from megamm_laws.runs.readers.parts import holds
from megamm_laws.runs.table import parse_record

_MARK = re.compile(rb'"loss/out"')
_SIZE = re.compile(r"Model size: (\d[\d,]*) total parameters")
_BESIDE = ("metrics.validation.jsonl", "metrics.eval.jsonl")
"""Read with metrics.jsonl, or not at all."""
_NAMES = {"loss/out": "train_loss", "optim/lr": "lr", "optim/total_tokens": "tokens"}


def read_lingua(path: Path) -> list[Curve] | None:
    """The run in a ``metrics.jsonl``; none for a file that is read with one; None if it is neither.

    Raises:
        InputError: a damaged line before the last.
    """
    if path.name in _BESIDE and (path.parent / "metrics.jsonl").is_file():
        return []
    if path.suffix.lower() not in (".jsonl", ".ndjson") or not holds(path, _MARK):
        return None
    curve = Curve(name=run_name(path), origin=str(path))
    per_token = []
    for record in _records(path):
        step = whole_number(number(record.get("global_step")))
        if step is None:
            continue
        values = {ours: number(record.get(theirs)) for theirs, ours in _NAMES.items()}
        curve.add(step, {key: value for key, value in values.items() if value is not None})
        flops, tokens = number(record.get("speed/FLOPS")), number(record.get("speed/wps"))
        if flops and tokens:
            per_token.append(flops / tokens)
    if per_token:
        curve.facts["flops_exact_per_token"] = median(per_token)
    if path.name == "metrics.jsonl":
        _add_validations(curve, path.parent / _BESIDE[0])
        curve.facts |= _size(path.parent / "train.log")
        curve.total_steps = _planned(path.parent / "config.yaml")
    return [curve]


def _records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines(keepends=True)
    # The last one may be cut short by a kill.
    whole = [(i, line) for i, line in enumerate(lines, start=1) if line.strip() and line.endswith("\n")]
    return [parse_record(f"{path}: line {i}", line) for i, line in whole]


def _add_validations(curve: Curve, path: Path) -> None:
    for record in _records(path) if path.is_file() else []:
        step = whole_number(number(record.get("global_step")))
        losses = {
            f"loss_{source.lower()}": abs(value)
            for source, entry in record.items()
            if isinstance(entry, dict) and (value := number(entry.get("nll_per_token"))) is not None
        }
        if step is not None and losses:
            curve.add(step, losses)


def _size(path: Path) -> dict[str, float]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    sizes = _SIZE.findall(text)
    return {"params": float(sizes[-1].replace(",", ""))} if sizes else {}


def _planned(path: Path) -> int | None:
    try:
        return whole_number(number((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("steps"))) or None
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return None
