"""The best learning rate, or batch, as a power law of size and length: rate* = c N^p D^q.

A weighted least-squares line through the logarithms of the optima of all cells. A cell weighs by one over its variance
plus the scatter that the cells have beyond it (DerSimonian and Laird's estimate by moments). Intervals are percentiles
of a parametric bootstrap: every optimum is drawn anew about the line, with its own spread, and the line fitted again.

Shapes: k cells, m terms, R draws.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.fitting.diagnostics import FAR
from megamm_laws.fitting.fit import check_draws
from megamm_laws.law.percentiles import percentile_band
from megamm_laws.runs.groups import native_runs
from megamm_laws.runs.table import RunTable, table_warnings
from megamm_laws.sweeps.cells import COLUMNS, MIN_RATES, Cell, Noise, cells_of, pooled_noise

GROUPED_BY = ("architecture", "mixture")
AXES = ("params", "tokens")
APART = 0.2
"""Spread that log N and log D need beside each other for exponents of their own."""
OFF = 2.0
"""Noise deviations of a loss that a rate has to cost to be off its optimum."""


@dataclass(kw_only=True, eq=False)
class RateLaw:
    """log rate* = values[0] + values[1:] . (log of the terms - middle)."""

    terms: tuple[str, ...]
    """Of AXES, those with an exponent."""
    middle: np.ndarray
    """(m,) means of the logs of the terms over the cells."""
    values: np.ndarray
    """(1 + m,)."""
    draws: np.ndarray
    """(R, 1 + m)."""
    scatter: float
    """Standard deviation of log rate* between cells beyond their own."""
    scatter_draws: np.ndarray
    """(R, 1), as few cells leave it uncertain."""

    def draws_at(self, params: float, tokens: float) -> np.ndarray:
        """log rate*: the value, then (R,) draws that hold the scatter of a new cell."""
        at = self._row(params, tokens)
        # A fixed seed: two calls for one place agree.
        new = np.random.default_rng(0).standard_normal(len(self.draws)) * self.scatter_draws[:, 0]
        return np.concatenate([[at @ self.values], self.draws @ at + new])

    def predict(self, params: float, tokens: float) -> tuple[float, float, float]:
        """Rate* and its 95% interval."""
        found = np.exp(self.draws_at(params, tokens))
        low, high = percentile_band(found[1:])
        return float(found[0]), float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        powers = percentile_band(self.draws)
        constant = np.concatenate([[1.0], -self.middle])
        return {
            "coefficient": float(np.exp(constant @ self.values)),
            "coefficient_interval": np.exp(percentile_band(self.draws @ constant)).tolist(),
            "exponents": {name: float(self.values[i]) for i, name in enumerate(self.terms, 1)},
            "intervals": {name: powers[:, i].tolist() for i, name in enumerate(self.terms, 1)},
            "scatter": self.scatter,
        }

    def _row(self, params: float, tokens: float) -> np.ndarray:
        logs = {"params": np.log(params), "tokens": np.log(tokens)}
        return np.concatenate([[1.0], np.array([logs[t] for t in self.terms]) - self.middle])


@dataclass(kw_only=True, eq=False)
class RateFit:
    """The cells of one architecture and mixture, and the law through them."""

    group: str
    column: str
    loss_column: str
    cells: list[Cell]
    noise: Noise
    law: RateLaw | None
    """None where no cell has an optimum."""
    seed: int
    planned: tuple[float, float] | None = None
    """Parameters and tokens of the run that a rate is wanted for."""
    warnings: list[str] = field(default_factory=list)

    @property
    def used(self) -> list[Cell]:
        """Cells with an optimum."""
        return [cell for cell in self.cells if cell.problem is None]

    def prediction(self) -> tuple[float, float, float] | None:
        """Rate* of the planned run with its 95% interval."""
        return self.law.predict(*self.planned) if self.law and self.planned else None

    def to_json(self) -> dict[str, Any]:
        """The entry of `rates.json`; an end of an interval that is open is null."""
        entry: dict[str, Any] = {
            "group": self.group,
            "column": self.column,
            "loss_column": self.loss_column,
            "cells": [self._cell_json(cell) for cell in self.cells],
            "law": self.law.to_json() if self.law else None,
            "noise": {
                "nats": self.noise.nats,
                "degrees": None if np.isinf(self.noise.degrees) else self.noise.degrees,
                "seed": self.seed,
            },
            "warnings": self.warnings,
        }
        if (found := self.prediction()) and self.planned:
            entry["planned"] = {
                "params": self.planned[0],
                "tokens": self.planned[1],
                "value": found[0],
                "interval": list(found[1:]),
            }
        return entry

    def _cell_json(self, cell: Cell) -> dict[str, Any]:
        best = int(cell.losses.argmin())
        entry: dict[str, Any] = {
            "params": cell.params,
            "tokens": cell.tokens,
            "n_runs": len(cell.rates),
            "range": [float(cell.rates[0]), float(cell.rates[-1])],
            "best_run": float(cell.rates[best]),
        }
        if cell.used is not None:
            entry["used"] = cell.used
        if (excess := cell.excess()) is not None:
            entry["excess"] = excess
        if cell.problem is not None:
            return entry | {"left_out": cell.problem}
        ends = [float(np.exp(end)) if np.isfinite(end) else None for end in cell.interval(self.noise)]
        found = {"optimum": float(np.exp(cell.optimum)), "interval": ends, "loss": cell.lowest}
        return entry | found | {"curvature": cell.curvature}


def fit_rates(
    table: RunTable,
    *,
    column: str = "lr",
    loss_column: str = "loss",
    used: float | None = None,
    planned: tuple[float, float] | None = None,
    noise: float | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> list[RateFit]:
    """Best values of ``column`` of every cell and the law through them, for each architecture and mixture.

    Args:
        column: one of COLUMNS.
        used: value that all ladders were trained with; None to read it from the column `sweep`.
        planned: parameters and tokens to extrapolate to.
        noise: spread of a loss between seeds, nats; None to take it from the residuals.
        draws: of the bootstrap.

    Raises:
        InputError: a column, number or value out of range; no group with a cell of MIN_RATES values.
    """
    check_draws("--draws", draws)
    if column not in COLUMNS:
        raise InputError(f"--column: {column} is none of {', '.join(COLUMNS)}")
    if noise is not None and not 0 < noise < 1:
        raise InputError(f"--noise: {noise} is not between 0 and 1 nat")
    for option, value in (("--used", used), *zip(("--params", "--tokens"), planned or ())):
        if value is not None and not 0 < value < np.inf:
            raise InputError(f"{option}: {value} is not a number above zero")
    fits = []
    for group, runs in _groups(table).items():
        runs, lines = native_runs(runs)
        cells, left_out = cells_of(runs, column, loss_column, used)
        if not any(cell.swept for cell in cells):
            continue
        spread = pooled_noise(cells, noise)
        # By the group's name, so that a group has the same draws whichever others are in the table.
        rng = np.random.default_rng([seed, zlib.crc32(group.encode())])
        law = _law([cell for cell in cells if cell.problem is None], spread, draws, rng)
        fit = RateFit(
            group=group,
            column=column,
            loss_column=loss_column,
            cells=cells,
            noise=spread,
            law=law,
            seed=seed,
            planned=planned,
        )
        fit.warnings = [*_warnings(fit), *lines, *left_out, *table_warnings(runs)]
        fits.append(fit)
    if not fits:
        raise InputError(
            f"{table.path}: column {column}: no size and length has {MIN_RATES} values; train some cells of the ladder "
            "at other ones, such as .5 and 2 times their own"
        )
    return fits


def _groups(table: RunTable) -> dict[str, RunTable]:
    """Tables by architecture and mixture, as far as these differ."""
    columns = [c for c in GROUPED_BY if len({row.get(c) for row in table.rows}) > 1] or [GROUPED_BY[0]]
    names = [", ".join(str(row.get(c) or "all") for c in columns) for row in table.rows]
    return {name: table.select(n == name for n in names) for name in dict.fromkeys(names)}


def _law(cells: list[Cell], noise: Noise, draws: int, rng: np.random.Generator) -> RateLaw | None:
    """The law through cells with an optimum."""
    # An optimum without an end to its interval is hardly known, but its large variance says so.
    if not cells:
        return None
    logs = np.log([[cell.params, cell.tokens] for cell in cells])
    chosen = _terms(logs)
    middle = logs[:, chosen].mean(axis=0)
    x = np.concatenate([np.ones((len(cells), 1)), logs[:, chosen] - middle], axis=1)
    y = np.array([cell.optimum for cell in cells])
    variance = np.array([cell.variance(noise) for cell in cells])
    scatter = _scatter(x, y, variance)
    solve = _solver(x, 1 / (variance + scatter))
    values = solve @ y
    # What is measured on few runs or cells is itself uncertain: its draws make the tails those of Student's t.
    factor = 1.0 if np.isinf(noise.degrees) else noise.degrees / rng.chisquare(noise.degrees, (draws, 1))
    spare = max(1, len(y) - x.shape[1])
    scatters = scatter * spare / rng.chisquare(spare, (draws, 1))
    drawn = x @ values + rng.standard_normal((draws, len(cells))) * np.sqrt(variance * factor + scatters)
    return RateLaw(
        terms=tuple(AXES[i] for i in chosen),
        middle=middle,
        values=values,
        draws=drawn @ solve.T,
        scatter=float(np.sqrt(scatter)),
        scatter_draws=np.sqrt(scatters),
    )


def _terms(logs: np.ndarray) -> list[int]:
    """Which of log N and log D (k, 2) the cells can give an exponent: both only if they vary apart."""
    varied = [i for i in (0, 1) if np.ptp(logs[:, i]) > APART]
    if len(varied) < 2:
        return varied if len(logs) > 1 else []
    n, d = (logs - logs.mean(axis=0)).T
    beside = d - n * (n @ d) / (n @ n)
    return varied if len(logs) > 2 and np.sqrt(np.mean(beside**2)) > APART else [0]


def _solver(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(1 + m, k): weighted least squares as a matrix that acts on y."""
    return np.linalg.solve(x.T @ (weights[:, None] * x), x.T * weights)


def _scatter(x: np.ndarray, y: np.ndarray, variance: np.ndarray) -> float:
    """Variance between cells beyond their own, by moments; 0 where no cell is to spare."""
    spare = len(y) - x.shape[1]
    if spare < 1:
        return 0.0
    weights = 1 / variance
    solve = _solver(x, weights)
    misfit = weights @ (y - x @ (solve @ y)) ** 2
    return max(0.0, float((misfit - spare) / (weights.sum() - np.trace(solve @ (weights[:, None] * x)))))


# ------------------------------------------------------------------------------------------------ warnings


def _warnings(fit: RateFit) -> list[str]:
    """What a law of rates is to be distrusted for, the gravest first."""
    swept = [cell for cell in fit.cells if cell.swept]
    found = [f"{cell.name}: {cell.problem}" for cell in swept if cell.problem is not None]
    for cell in fit.used:
        if not np.isfinite(cell.interval(fit.noise)).all():
            found.append(f"{cell.name}: the losses are too flat, within noise, for a best {fit.column}: sweep wider")
    found += [line for cell in fit.cells if (line := _off(fit, cell))]
    law = fit.law
    if law is None:
        return [*found, f"no cell has an optimum: there is no law of {fit.column}"]
    spare = len(fit.used) - 1 - len(law.terms)
    if spare < 2:
        found.append(
            f"{len(fit.used)} cells with an optimum for a law of {1 + len(law.terms)} constants: too few to show "
            "whether it holds; sweep at more sizes or budgets"
        )
    logs = np.log([[cell.params, cell.tokens] for cell in fit.used])
    if law.terms == ("params",) and np.ptp(logs[:, 1]) > APART:
        found.append("params and tokens grow together: one exponent stands for both; sweep one size at two budgets")
    return found + _far(fit, np.exp(logs))


def _off(fit: RateFit, cell: Cell) -> str | None:
    """A line on a cell whose used value costs more than the noise; one that was not swept is judged by the law."""
    if cell.problem is None:
        low, high = np.exp(cell.interval(fit.noise))
        best, excess, source = float(np.exp(cell.optimum)), cell.excess(), "the best is"
    elif cell.swept:
        best, excess, source = float(cell.rates[cell.losses.argmin()]), cell.excess(), "the best run had"
        low = high = best
    elif fit.law is not None and cell.used is not None:
        best, low, high = fit.law.predict(cell.params, cell.tokens)
        steepness = float(np.median([other.curvature for other in fit.used]))
        excess, source = steepness * float(np.log(cell.used / best)) ** 2, "the law gives"
    else:
        return None
    if cell.used is None or excess is None or excess <= OFF * fit.noise.nats or low <= cell.used <= high:
        return None
    ends = f" [{low:.3g}, {high:.3g}]" if low < high else ""
    return (
        f"{cell.name}: was trained at {fit.column} {cell.used:.3g}, {source} {best:.3g}{ends}: this "
        f"costs {excess:.3g} nats, the noise is {fit.noise.nats:.2g}"
    )


def _far(fit: RateFit, sizes: np.ndarray) -> list[str]:
    """Lines on a planned run that the cells, (k, 2) params and tokens, say little of."""
    if fit.planned is None or fit.law is None:
        return []
    found = []
    for axis, value, known in zip(AXES, fit.planned, sizes.T):
        factor = max(value / known.max(), known.min() / value)
        if factor > FAR:
            found.append(f"planned {axis} {value:.3g} lie {factor:.3g} times beyond the swept ones: an extrapolation")
    # Where both grow together the exponent of one stands for both, as long as their ratio stays.
    ratio = fit.planned[1] / fit.planned[0] / np.exp(np.log(sizes[:, 1] / sizes[:, 0]).mean())
    steady = fit.law.terms == ("params",) and np.ptp(np.log(sizes[:, 1])) > APART and abs(np.log(ratio)) < np.log(2)
    for axis, value, known in zip(AXES, fit.planned, sizes.T):
        change = max(value / known.max(), known.min() / value)
        if axis not in fit.law.terms and change > 2 and not steady:
            found.append(f"the law has no exponent of {axis}: how the best {fit.column} changes with it is not known")
    return found
