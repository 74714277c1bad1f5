"""The compute-optimal size under any form, by search: for forms whose frontier has no closed form."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megamm_laws.law.forms.base import Form
from megamm_laws.law.percentiles import LEVEL

POINTS = 161
REACH = 300.0
"""The search runs over sizes from 1/REACH to REACH times the square root of C/6."""
BUDGETS = 8
DRAWS = 200


def compute_optimum(
    form: Form, values: Mapping[str, Any], flops: np.ndarray, kappa: float = 1.0, **columns: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N*, D* and L* at each of ``flops`` (m,), where C = 6 kappa N D and further ``columns`` are fixed: (..., m) each.

    The lowest point of a grid in log N, sharpened by the parabola through it and its neighbours. NaN where the lowest
    point is at the end of the grid, so that there is no optimum.
    """
    found = []
    for c in np.asarray(flops, float):
        product = c / (6.0 * kappa)
        # In log N, where the loss is nearly symmetric about its lowest point.
        log_n = np.log(np.sqrt(product)) + np.linspace(-np.log(REACH), np.log(REACH), POINTS)
        n = np.exp(log_n)
        fixed = {name: np.full(POINTS, value) for name, value in columns.items()}
        loss = np.atleast_2d(form.predict(values, n, product / n, **fixed))
        i = np.clip(loss.argmin(axis=-1), 1, POINTS - 2)  # a parabola needs both neighbours
        rows = np.arange(len(loss))
        left, middle, right = loss[rows, i - 1], loss[rows, i], loss[rows, i + 1]
        curve = left - 2 * middle + right
        # No shift where the three are level, or bend downwards at the end of the grid.
        shift = 0.5 * (left - right) / np.where(curve > 0, curve, np.inf)
        inside = (middle <= left) & (middle <= right)
        best = np.where(inside, log_n[i] + shift * (log_n[1] - log_n[0]), np.nan)
        found.append(
            (np.exp(best), product / np.exp(best), np.where(inside, middle - 0.25 * (left - right) * shift, np.nan))
        )
    shape = np.shape(next(iter(values.values())))
    params, tokens, loss = (np.stack(column, axis=-1).reshape(*shape, -1) for column in zip(*found))
    return params, tokens, loss


def optima_by_sparsity(fit: Any) -> dict[str, Any]:
    """For `fits.json` of the MoE form: at each measured sparsity, the optimum at the largest compute and N* ~ C^a.

    FLOPs are those that the runs counted: kappa is their median of flops/(6*params*tokens) at that sparsity.
    """
    # Rounded, or runs of one design would be taken apart: a sparsity read off parameter counts differs a little from
    # size to size.
    table, sparsity = fit.table, fit.problem.data.columns["sparsity"].round(3)
    ratio = table.numbers("flops") / (6 * table.numbers("params") * table.numbers("tokens"))
    low, high = fit.flops_range
    budgets = np.geomspace(low, high, BUDGETS)
    draws = dict(zip(fit.names, fit.draws[:DRAWS].T))
    entries = []
    for s in np.unique(sparsity):
        kappa = float(np.median(ratio[sparsity == s]))
        best = compute_optimum(fit.form, fit.values, budgets, kappa, sparsity=float(s))
        drawn = compute_optimum(fit.form, draws, budgets, kappa, sparsity=float(s))
        entry: dict[str, Any] = {"sparsity": float(s), "kappa": kappa, "flops": float(budgets[-1])}
        for name, value, spread in zip(("params", "tokens", "loss"), best, drawn):
            entry[name] = _number(value[-1])
            entry[f"{name}_interval"] = _interval(spread[:, -1])
        entry["a"] = _number(_slope(budgets, best[0]))
        entry["a_interval"] = _interval(_slope(budgets, drawn[0]))
        entries.append(entry)
    return {"optimum_by_sparsity": entries}


def _slope(flops: np.ndarray, params: np.ndarray) -> np.ndarray:
    """Slope of log N* on log C, (...) from (..., m)."""
    # NaN where any budget has no optimum: a slope through the others would be of another range.
    x = np.log(flops) - np.log(flops).mean()
    return np.log(params) @ x / (x @ x)


def _number(value: Any) -> float | None:
    # JSON has no NaN.
    return float(value) if np.isfinite(value) else None


def _interval(values: np.ndarray) -> list[float] | None:
    """95% percentiles; None if more than a tenth of the draws have no optimum."""
    if np.isfinite(values).mean() < 0.9:
        return None
    tail = 50 * (1 - LEVEL)
    return np.nanpercentile(values, [tail, 100 - tail]).tolist()
