"""Cells of a sweep: runs of one size and length at several learning rates or batches, and the best value of each.

Near its lowest point the loss is a quadratic in the logarithm of the rate. It is fitted by least squares; its lowest
point gets Fieller's interval, which is exact for the ratio of two estimates and has no end where the curve is flat.

Shapes: n runs of one cell.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import stats

from megamm_laws.errors import InputError
from megamm_laws.fitting.isoflop import NOISE
from megamm_laws.law.percentiles import LEVEL
from megamm_laws.runs.groups import SWEEP, are_own
from megamm_laws.runs.table import RunTable, parse_number

COLUMNS = {"lr": "learning rate", "batch_tokens": "tokens per batch"}
"""What can be swept, and what people call it."""
SAME = 1.01
"""Tokens within this factor are one budget: whole steps of unlike batches do not end at the same token."""
MIN_RATES = 3
REACH = 2
"""Rates on either side of the best one that a quadratic is fitted to."""
NEAR = 0.03
"""Relative loss above the best beyond which a rate is no longer near it; the two neighbours always are."""


@dataclass(kw_only=True, eq=False)
class Noise:
    """Spread of a loss between runs."""

    nats: float
    degrees: float
    """Of freedom behind it; infinite where it was given or is the least one."""

    @property
    def quantile(self) -> float:
        """Standard deviations to either side that hold 95%."""
        tail = (1 + LEVEL) / 2
        return NormalDist().inv_cdf(tail) if np.isinf(self.degrees) else float(stats.t.ppf(tail, self.degrees))


@dataclass(kw_only=True, eq=False)
class Cell:
    """Runs of one size and length."""

    params: float
    tokens: float
    rates: np.ndarray
    """(n,), ascending; a rate may be repeated."""
    losses: np.ndarray
    """(n,) nats."""
    used: float | None = None
    """Rate of the run that counts for the ladder; None where it is not known."""
    near: np.ndarray | None = None
    """(n,) bool: runs that the quadratic is fitted to; None without one."""
    centre: float = 0.0
    """Log of the best rate; the quadratic is one in log rate - centre."""
    coefficients: np.ndarray | None = None
    """(3,) of 1, x, x^2."""
    covariance: np.ndarray | None = None
    """(3, 3) of these, of a noise of one nat."""
    problem: str | None = None
    """Why there is no usable optimum."""

    @property
    def name(self) -> str:
        return f"{self.params:.4g} parameters, {self.tokens:.4g} tokens"

    @property
    def swept(self) -> bool:
        return len(np.unique(self.rates)) >= MIN_RATES

    @property
    def optimum(self) -> float:
        """Log of the best rate by the quadratic."""
        _, b, c = self._fitted
        return self.centre - b / (2 * c)

    @property
    def lowest(self) -> float:
        """Loss there, nats."""
        return float(self.curve(np.exp(self.optimum)))

    @property
    def curvature(self) -> float:
        """Nats lost one unit of log rate away from the optimum."""
        return float(self._fitted[2])

    @property
    def _fitted(self) -> np.ndarray:
        assert self.coefficients is not None
        return self.coefficients

    def curve(self, rates: np.ndarray | float) -> np.ndarray:
        """The quadratic at ``rates``, nats."""
        return np.polynomial.polynomial.polyval(np.log(rates) - self.centre, self._fitted)

    def variance(self, noise: Noise) -> float:
        """Of the log of the optimum, to first order."""
        assert self.covariance is not None
        _, b, c = self._fitted
        slope = np.array([0.0, -1 / (2 * c), b / (2 * c * c)])
        return float(slope @ self.covariance @ slope) * noise.nats**2

    def interval(self, noise: Noise) -> tuple[float, float]:
        """95% interval of the log of the optimum by Fieller's theorem; infinite where the curve may well be flat.

        All x whose slope b + 2cx is not told from zero.
        """
        assert self.covariance is not None
        _, b, c = self._fitted
        scale = (noise.quantile * noise.nats) ** 2
        v = self.covariance * scale
        square, linear, constant = 4 * (c * c - v[2, 2]), 4 * (b * c - v[1, 2]), b * b - v[1, 1]
        if square <= 0:
            return -np.inf, np.inf
        root = np.sqrt(linear * linear - 4 * square * constant)
        return self.centre + (-linear - root) / (2 * square), self.centre + (-linear + root) / (2 * square)

    def excess(self) -> float | None:
        """Nats that the used rate costs over the optimum, or else over the best run; None where it is not known."""
        if self.used is None or not self.swept:
            return None
        lowest = self.lowest if self.problem is None else float(self.losses.min())
        at = np.isclose(self.rates, self.used, rtol=SAME - 1)
        if at.any():
            return float(self.losses[at].mean()) - lowest
        return float(self.curve(self.used)) - lowest if self.problem is None else None


def cells_of(table: RunTable, column: str, loss_column: str, used: float | None) -> tuple[list[Cell], list[str]]:
    """The cells of one group by size and length, each with its quadratic, and lines on what was left out.

    Args:
        used: rate that counts for every ladder; None to take it from the column `sweep` where there is one.

    Raises:
        InputError: no such column, or a value that is no number above zero.
    """
    table, lines = _with_values(table, column, loss_column)
    params, tokens = np.log(table.numbers("params")), np.log(table.numbers("tokens"))
    found, taken = [], np.zeros(len(table), bool)
    for i in np.lexsort((tokens, params)):
        if taken[i]:
            continue
        apart = np.maximum(np.abs(params - params[i]), np.abs(tokens - tokens[i]))
        mine = ~taken & (apart <= np.log(SAME))
        taken |= mine
        found.append(_cell(table.select(mine), column, loss_column, used, lines))
    return found, lines


def pooled_noise(cells: list[Cell], given: float | None) -> Noise:
    """The noise from the residuals of all quadratics, NOISE at least; or as given."""
    if given is not None:
        return Noise(nats=given, degrees=np.inf)
    squares, degrees = 0.0, 0
    for cell in cells:
        if cell.problem is None and cell.near is not None:
            residuals = cell.losses[cell.near] - cell.curve(cell.rates[cell.near])
            squares += float(residuals @ residuals)
            degrees += len(residuals) - 3
    if degrees and (nats := float(np.sqrt(squares / degrees))) > NOISE:
        return Noise(nats=nats, degrees=degrees)
    return Noise(nats=NOISE, degrees=np.inf)


def _with_values(table: RunTable, column: str, loss_column: str) -> tuple[RunTable, list[str]]:
    """The finished runs that have a rate, as a number, and a loss; and a line on all others."""
    if column not in table.columns:
        raise InputError(f"{table.path}: no column {column}; has {', '.join(table.columns)}")
    if loss_column not in table.loss_columns:
        raise InputError(f"{table.path}: no loss column {loss_column!r}; has {', '.join(table.loss_columns)}")
    rows = []
    for row, place in zip(table.rows, table.places):
        found = {c: parse_number(f"{table.path}: {place}", c, row.get(c)) for c in COLUMNS if c in table.columns}
        rows.append({**row, **found})
    table = RunTable(path=table.path, rows=rows, lines=table.lines)
    kept = {
        f"without {column}": [row[column] is not None for row in table.rows],
        f"without {loss_column}": [row.get(loss_column) is not None for row in table.rows],
        "that are intermediate checkpoints": [row.get("checkpoint") != "intermediate" for row in table.rows],
    }
    lines = []
    for what, keep in kept.items():
        if not all(keep):
            first = table.select(not k for k in keep).places[0]
            lines.append(f"{keep.count(False)} runs {what} were left out (the first: {first})")
    return table.select(map(all, zip(*kept.values()))), lines


def _cell(table: RunTable, column: str, loss_column: str, used: float | None, lines: list[str]) -> Cell:
    """One cell; of several values of the other column, each rate keeps the best one."""
    params, tokens = float(np.median(table.numbers("params"))), float(np.median(table.numbers("tokens")))
    if used is None and SWEEP in table.columns:
        own = table.select(are_own(table)).numbers(column)
        used = float(own[0]) if len(np.unique(own)) == 1 else None
    other = next(name for name in COLUMNS if name != column)
    if other in table.columns and len({row[other] for row in table.rows}) > 1:
        table = _best_of_other(table, column, other, loss_column)
        lines.append(f"{params:.4g} parameters, {tokens:.4g} tokens: {other} differs; each {column} keeps its best one")
    order = np.argsort(table.numbers(column), kind="stable")
    cell = Cell(
        params=params,
        tokens=tokens,
        rates=table.numbers(column)[order],
        losses=table.numbers(loss_column)[order],
        used=used,
    )
    _fit(cell)
    return cell


def _best_of_other(table: RunTable, column: str, other: str, loss_column: str) -> RunTable:
    """At each value of ``column`` the runs of that value of ``other`` whose mean loss is the lowest."""
    means: dict[Any, dict[Any, list[float]]] = {}
    for row in table.rows:
        means.setdefault(row[column], {}).setdefault(row[other], []).append(row[loss_column])
    best = {value: min(found, key=lambda key: np.mean(found[key])) for value, found in means.items()}
    return table.select(row[other] == best[row[column]] for row in table.rows)


def _fit(cell: Cell) -> None:
    """Fit the quadratic near the best rate, or say why there is none."""
    rates, where = np.unique(cell.rates, return_inverse=True)
    if len(rates) < MIN_RATES:
        few = f"{len(rates)} values, at least {MIN_RATES} are needed"
        cell.problem = "not swept" if len(rates) == 1 else few
        return
    means = np.bincount(where, cell.losses) / np.bincount(where)
    best = int(means.argmin())
    if best in (0, len(rates) - 1):
        end, more = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        cell.problem = f"the best value, {rates[best]:.4g}, is the {end} one: add {more} ones"
        return
    distance = np.abs(np.arange(len(rates)) - best)
    near = (distance <= 1) | ((distance <= REACH) & (means <= means[best] * (1 + NEAR)))
    cell.near, cell.centre = near[where], float(np.log(rates[best]))
    x = np.log(cell.rates[cell.near]) - cell.centre
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    cell.covariance = np.linalg.inv(design.T @ design)
    cell.coefficients = cell.covariance @ design.T @ cell.losses[cell.near]
    inside = cell.coefficients[2] > 0 and np.log(rates[0]) <= cell.optimum <= np.log(rates[-1])
    if not inside:
        cell.problem = "the losses near the best value have no lowest point: add values around it, or seeds"
