"""How far a fit moves when runs are taken away: the drop-k table.

Runs of highest loss are often undertrained, and the largest ones alone say where the law goes; Besiroglu et al.
2024 (arXiv 2404.10102) show that five runs decide the exponents of the Chinchilla data. So both kinds are dropped,
k at a time, and the exponents are printed for every k, whether they move or not.
"""

from typing import Any

import numpy as np

from megamm.scaling import laws, minimise
from megamm.scaling.fit import MIN_RUNS_HOLDOUT, Fit, distinct, fit_problem

STEPS = (1, 2, 3, 5, 10, 20)
DROP_SHARE = 0.1
"""No more runs than this share (but 2) are dropped: the interval of the whole table is no measure of much less."""
STARTS_PER_AXIS = 3
WATCHED = ("alpha", "beta", "a")
NAMES = {"loss": "highest loss", "flops": "largest FLOPs"}


def drop_table(fit: Fit) -> list[dict[str, Any]]:
    """A row for k = 0 and for each k runs of highest loss, and of largest FLOPs, taken away.

    Each row: ``dropped`` (`nothing`, `highest loss` or `largest FLOPs`), ``k``, ``runs`` (names), ``n_runs``,
    ``E``, ``alpha``, ``beta``, ``a``, ``objective`` and ``outside``, the names in :data:`WATCHED` that left the
    95% interval of the whole table. All refits are one batch: a dropped run has weight zero.
    """
    table, n = fit.table, len(fit.table)
    plan: list[tuple[str, int, np.ndarray]] = [("nothing", 0, np.ones(n))]
    for column, by in ((fit.loss_column, "loss"), ("flops", "flops")):
        order = np.argsort(-table.numbers(column), kind="stable")
        for k in STEPS:
            weights = np.ones(n)
            weights[order[:k]] = 0.0
            if k > max(2, DROP_SHARE * n) or n - k < MIN_RUNS_HOLDOUT or not _spans(fit, weights > 0):
                break
            plan.append((NAMES[by], k, weights))
    best, objective = _refit(fit, np.stack([weights for *_, weights in plan]))
    exponent = laws.exponents(best, fit.flops_range, fit.kappa)["a"]
    intervals = fit.intervals
    rows = []
    for i, (dropped, k, weights) in enumerate(plan):
        values = dict(zip(laws.PARAMETERS, best[i].tolist())) | {"a": float(exponent[i])}
        outside = [name for name in WATCHED if not intervals[name][0] <= values[name] <= intervals[name][1]]
        rows.append(
            {
                "dropped": dropped,
                "k": k,
                "runs": [name for name, weight in zip(table.names, weights) if weight == 0],
                "n_runs": n - k,
                **{name: values[name] for name in ("E", *WATCHED)},
                "objective": float(objective[i]),
                "outside": outside if k else [],
            }
        )
    return rows


def drop_warnings(rows: list[dict[str, Any]], intervals: dict[str, list[float]]) -> list[str]:
    """One line per kind and exponent that leaves its interval, at the smallest k that does it."""
    found, said = [], set()
    for row in rows:
        for name in row["outside"]:
            if (row["dropped"], name) in said:
                continue
            said.add((row["dropped"], name))
            low, high = intervals[name]
            runs = "run" if row["k"] == 1 else f"{row['k']} runs"
            found.append(
                f"unstable: without the {runs} of {row['dropped']}, {name} moves from {rows[0][name]:.4f} to "
                f"{row[name]:.4f}, out of its interval {low:.4f} to {high:.4f}"
            )
    return found


def _spans(fit: Fit, keep: np.ndarray) -> bool:
    """Whether the runs kept have 3 distinct sizes and lengths, without which nothing is determined."""
    return all(distinct(fit.table.numbers(c)[keep]).max() >= 2 for c in ("params", "tokens"))


def _refit(fit: Fit, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Optimum for each row of ``weights`` (m, n): parameters (m, 5) and objective (m,)."""
    problem = fit_problem(fit.table, fit.loss_column)
    starts = np.concatenate([problem.to_theta(fit.parameters)[None], minimise.starts(problem, STARTS_PER_AXIS)])
    starts = np.clip(starts, *problem.bounds)
    m, s = len(weights), len(starts)
    theta, objective = minimise.minimise(problem, np.tile(starts, (m, 1)), np.repeat(weights, s, axis=0))
    objective = objective.reshape(m, s)
    best = objective.argmin(axis=1)
    return problem.to_parameters(theta.reshape(m, s, -1)[np.arange(m), best]), objective[np.arange(m), best]
