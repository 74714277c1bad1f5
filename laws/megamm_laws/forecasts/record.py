"""The record: all forecasts of a folder with their scores, and how often they were right."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.files import read_json
from megamm_laws.forecasts.forecast import SHARES, check_signed
from megamm_laws.pictures.units import count, digits


@dataclass(kw_only=True)
class Line:
    """One loss of one forecast."""

    name: str
    """Of the file, without ``.json``."""
    column: str
    forecast: dict[str, Any]
    said: dict[str, Any]
    score: dict[str, Any] | None
    """None as long as the run is not scored."""

    def cells(self) -> list[str]:
        """The text of each of HEADS."""
        run, low_high = self.forecast["run"], self.said["run"]["95"]
        ends = ", ".join("open" if end is None else digits(end) for end in low_high)
        cells = [self.name, self.forecast["date"][:10], self.forecast["by"], count(run["params"]), count(run["tokens"])]
        cells += [self.column, f"{digits(self.said['value'])} [{ends}]"]
        if self.score is None:
            return [*cells, "", "", "not trained yet"]
        inside = self.score["inside"]
        verdict = next((f"inside {share}%" for share in SHARES if inside[str(share)]), f"outside {SHARES[-1]}%")
        return [*cells, digits(self.score["actual"]), f"{np.expm1(self.score['error']):+.2%}", verdict]


HEADS = ("forecast", "date", "by", "params", "tokens", "loss", "said (95%)", "came out", "error", "verdict")


def read_forecasts(folder: Path | str) -> list[Line]:
    """A line for each loss of each forecast below ``folder``, oldest first.

    Raises:
        InputError: the folder is missing, or a file has been changed since it was signed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name the folder that holds the forecasts")
    forecasts, scores = {}, {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if "forecast_sha256" in content:
            scores[content["forecast_sha256"]] = check_signed(path, content, "score")["losses"]
        elif "by" in content and "losses" in content:  # other files may lie beside them
            forecasts[path] = check_signed(path, content, "forecast")
    lines = []
    for path, forecast in forecasts.items():
        found = scores.get(forecast["sha256"], {})
        lines += [
            Line(name=path.stem, column=column, forecast=forecast, said=said, score=found.get(column))
            for column, said in forecast["losses"].items()
        ]
    return sorted(lines, key=lambda line: line.forecast["date"])


def summary(lines: list[Line]) -> str:
    """How often the intervals held what came out, in a sentence."""
    scored = [line.score for line in lines if line.score is not None]
    if not scored:
        return f"Losses forecast: {len(lines)}, none scored yet."
    held = ", ".join(f"{sum(s['inside'][str(share)] for s in scored)} inside {share}%" for share in SHARES)
    error = np.mean([abs(s["error"]) for s in scored])
    return f"Losses forecast: {len(lines)}, scored: {len(scored)}; {held}; mean error {error:.2%} of the loss."


def to_markdown(lines: list[Line]) -> str:
    """The record as a page."""
    rows = [HEADS, ["---"] * len(HEADS), *(line.cells() for line in lines)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return f"# Forecasts\n\n{summary(lines)}\n\n{table}\n"
