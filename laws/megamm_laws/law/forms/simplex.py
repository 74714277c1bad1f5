"""The mixture of lowest predicted loss: a search over the simplex of shares.

The loss may be one fitted loss or the mean of several (one per target domain): a single exponential law, for one, is
lowest at a corner, the mean of several inside.

Shapes: M domains, m points of the simplex, R bootstrap draws.
"""

from math import comb
from typing import Any

import numpy as np
from scipy.optimize import minimize

from megamm_laws.law.forms.base import Form
from megamm_laws.law.forms.shares import PREFIX, domains
from megamm_laws.law.percentiles import LEVEL

POINTS = 6000
DRAWS = 200
CHUNK = 20
FLOOR = 1e-9
"""Least share in the last descent: powers below one are infinitely steep at zero."""


def simplex_grid(parts: int, points: int = POINTS) -> np.ndarray:
    """(m, parts): all shares in equal steps, as fine as ``points`` allow."""
    steps = 1
    # The number of points that one step more would give. Two domains would allow thousands of steps: 0.1% is enough.
    while comb(steps + parts, parts - 1) <= points and steps < 1000:
        steps += 1
    rows = np.zeros((1, 0), int)
    for _ in range(parts - 1):
        left = steps - rows.sum(axis=1)
        rows = np.concatenate(
            [np.column_stack([np.repeat(row[None], n + 1, axis=0), np.arange(n + 1)]) for row, n in zip(rows, left)]
        )
    return np.column_stack([rows, steps - rows.sum(axis=1)]) / steps


def optimal_mixture(
    losses: list[tuple[Form, dict[str, float]]], names: list[str], params: float, tokens: float
) -> tuple[dict[str, float], float]:
    """Shares by domain that minimise the mean of ``losses`` (form, parameters) at one size, and that mean in nats.

    A grid first, since a mixture law need not be convex; then sequential quadratic programming from the best point.
    """

    def loss(h: np.ndarray) -> np.ndarray:
        return _mean_loss(losses, names, h, params, tokens)

    grid = simplex_grid(len(names))
    start = grid[int(loss(grid).argmin())]
    # Off the faces of the simplex, where powers of a share have no finite slope.
    inside = np.maximum(start, 1e-4) / np.maximum(start, 1e-4).sum()
    found = minimize(
        lambda h: float(loss(np.maximum(h, FLOOR)[None])[0]),
        inside,
        method="SLSQP",
        bounds=[(FLOOR, 1.0)] * len(names),
        constraints={"type": "eq", "fun": lambda h: h.sum() - 1},
        # The loss is flat at its lowest: shares are good to about the square root of the tolerance.
        options={"ftol": 1e-12, "maxiter": 200},
    )
    end = np.maximum(found.x, FLOOR)
    best = min((start, end / end.sum()), key=lambda h: loss(h[None])[0])  # a descent may end worse than it began
    return dict(zip(names, best.tolist())), float(loss(best[None])[0])


def optimal_mixture_draws(
    losses: list[tuple[Form, dict[str, np.ndarray]]], names: list[str], params: float, tokens: float
) -> np.ndarray:
    """(R, M): the best grid point for each draw; the parameters of ``losses`` are (R,)."""
    grid = simplex_grid(len(names))
    # The losses may have been fitted with different numbers of draws.
    number = min(len(column) for _, values in losses for column in values.values())
    best = []
    for begin in range(0, number, CHUNK):
        part = slice(begin, min(begin + CHUNK, number))
        chunk = [(form, {name: column[part] for name, column in values.items()}) for form, values in losses]
        best.append(grid[_mean_loss(chunk, names, grid, params, tokens).argmin(axis=1)])
    return np.concatenate(best)


def mixture_entry(fits: list[Any]) -> dict[str, Any]:
    """For `fits.json`: the best shares for the mean of the losses of ``fits`` (FormFit of one group), with intervals.

    At the size and length of the largest run; 95% percentiles over (at most 200) bootstrap draws, taken row by row.
    """
    table, columns = fits[0].table, fits[0].problem.data.columns
    largest = int(table.numbers("flops").argmax())
    params, tokens = (float(table.numbers(c)[largest]) for c in ("params", "tokens"))
    names = domains(columns)
    shares, loss = optimal_mixture([(fit.form, fit.values) for fit in fits], names, params, tokens)
    draws = [(fit.form, dict(zip(fit.names, fit.draws[:DRAWS].T))) for fit in fits]
    tail = 50 * (1 - LEVEL)
    ends = np.percentile(optimal_mixture_draws(draws, names, params, tokens), [tail, 100 - tail], axis=0)
    measured = {name: columns[PREFIX + name] for name in names}
    return {
        "losses": [fit.loss_column for fit in fits],
        "params": params,
        "tokens": tokens,
        "loss": loss,
        "shares": shares,
        "intervals": dict(zip(names, ends.T.tolist())),
        "measured": {name: [float(column.min()), float(column.max())] for name, column in measured.items()},
    }


def _mean_loss(losses: list, names: list[str], h: np.ndarray, params: float, tokens: float) -> np.ndarray:
    """Mean of the predicted losses at the shares ``h`` (m, M): (m,) or (R, m)."""
    shares = {PREFIX + name: h[:, i] for i, name in enumerate(names)}
    n, d = np.full(len(h), params), np.full(len(h), tokens)
    return sum(form.predict(values, n, d, **shares) for form, values in losses) / len(losses)
