"""nanotron: the text that training prints (nanotron/trainer.py and logging).

Read are ``iteration: N / TOTAL | consumed_tokens: 2.1M | ... | lm_loss: X | lr: Y`` lines, the printed configuration
and the number of parameters. Numbers are printed with three digits and K, M, G, B or T: the loss is no better than
that. Tokens per step are taken from the configuration, and the size from the bytes of the weights, which have more
digits. There is no validation.
"""

import re
from pathlib import Path

from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import number
from megamm_laws.runs.readers.parts import holds

_MARK = re.compile(rb"iteration: \d+ / \d+ \|.*lm_loss: ")
_ITERATION = re.compile(r"iteration: (\d+) / (\d+) \|(.*)")
_SIZE = re.compile(r"Total number of parameters: ([\d.]+[KMGBT]?) \(([\d.]+)MiB\)")
_HEAD = re.compile(r"Config\(general=|Total number of parameters: ")
_SETTING = re.compile(
    r"\b(sequence_length|train_steps|micro_batch_size|batch_accumulation_per_replica|dp|seed|learning_rate|"
    r"hidden_size|num_hidden_layers|weight_decay)=([\w.+-]+)"
)
_SCALE = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_NAMES = {"lm_loss": "train_loss", "lr": "lr", "consumed_tokens": "tokens"}


def read_nanotron(path: Path) -> list[Curve] | None:
    """The runs in a file of nanotron's output; None if the file has no iteration line of that form."""
    if not holds(path, _MARK):
        return None
    curves = [Curve(name=run_name(path), origin=str(path))]
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            curve = curves[-1]
            if match := _ITERATION.search(line):
                curve.total_steps = int(match[2]) or None
                curve.add(int(match[1]), _point(match[3]))
                continue
            if curve.points and _HEAD.search(line):
                curve = Curve(name=curve.name, origin=curve.origin)
                curves.append(curve)
            for name, value in _SETTING.findall(line):
                curve.settings.setdefault(name, value)
            if match := _SIZE.search(line):
                curve.facts["params"] = _params(_human(match[1]) or 0.0, float(match[2]))
    for curve in curves:
        _finish(curve)
    return curves


def _finish(curve: Curve) -> None:
    curve.headed = bool(curve.facts or curve.settings)
    names = ("sequence_length", "micro_batch_size", "batch_accumulation_per_replica", "dp")
    sizes = [curve.settings.get(name, "") for name in names]
    if all(size.isdigit() for size in sizes):
        product = 1
        for size in sizes:
            product *= int(size)
        curve.facts["tokens_per_step"] = product
        for values in curve.points.values():
            values.pop("tokens", None)  # of three digits
    # How the batch is spread over ranks may change when a run is started again.
    for name in names[1:]:
        curve.settings.pop(name, None)


def _params(count: float, mebibytes: float) -> float:
    """Parameters from the bytes of the weights, of 1, 2, 4 or 8 each, whichever is nearest to the count."""
    if not mebibytes:
        return count
    return min((mebibytes * 2**20 / width for width in (1, 2, 4, 8)), key=lambda found: abs(found - count))


def _point(text: str) -> dict[str, float]:
    found = {}
    for part in text.split("|"):
        name, _, value = part.partition(": ")
        if (ours := _NAMES.get(name.strip())) and (parsed := _human(value.strip())) is not None:
            found[ours] = parsed
    return found


def _human(text: str) -> float | None:
    """A number such as ``2.1M``."""
    scale = _SCALE.get(text[-1:], 1.0)
    parsed = number(text[:-1] if text[-1:] in _SCALE else text)
    return None if parsed is None else parsed * scale
