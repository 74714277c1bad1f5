"""How far a fit moves when runs are taken away: the drop-k table.

Runs of highest loss are often undertrained, and the largest ones alone say where the law goes; Besiroglu et al.
2024 (arXiv 2404.10102) show that five runs decide the exponents of the Chinchilla data. So both kinds are dropped,
k at a time, and the exponents are printed for every k, whether they move or not.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from megamm_laws.fitting.fit import MIN_RUNS_HOLDOUT, Fit, distinct, fit_problem
from megamm_laws.law import solver
from megamm_laws.runs.table import RunTable

STEPS = (1, 2, 3, 5, 10, 20)
DROP_SHARE = 0.1
"""No more runs than this share (but 2) are dropped: the interval of the whole table is no measure of much less."""
STARTS_PER_AXIS = 3
WATCHED = ("alpha", "beta", "a")
SHOWN = ("E", *WATCHED)


def drop_table(fit: Fit) -> list[dict[str, Any]]:
    """The drop-k table of a fit of the plain law; see drop_refits."""
    problem = fit_problem(fit.table, fit.loss_column, fit.constraints)
    starts = np.concatenate([problem.to_theta(fit.parameters)[None], solver.starts(problem, STARTS_PER_AXIS)])
    return drop_refits(fit, problem, np.clip(starts, *problem.bounds), MIN_RUNS_HOLDOUT, lambda parameters: parameters)


def drop_refits(
    fit: Any,
    problem: Any,
    starts: np.ndarray,
    least: int,
    law: Callable[[np.ndarray], np.ndarray | None],
) -> list[dict[str, Any]]:
    """A row for k = 0 and for each k runs of highest loss, and of largest FLOPs, taken away; see drop_rows.

    All refits are one batch: a dropped run has weight zero. ``fit`` is a Fit or a FormFit, ``problem`` its runs,
    ``starts`` (s, P) where each refit begins, ``least`` the runs that must be left. ``law`` gives the plain law
    (m, 5) that parameters (m, P) imply, or None; without it there is no a.
    """
    plan = drop_plan(fit.table, fit.loss_column, least)
    theta, objective = refit(problem, starts, np.stack([weights for *_, weights in plan]))
    parameters = problem.to_parameters(theta)
    values = {name: column for name, column in zip(fit.names, parameters.T) if name in SHOWN}
    implied = law(parameters)
    if implied is not None:
        values["a"] = implied[:, 4] / (implied[:, 2] + implied[:, 4])
    return drop_rows(plan, fit.table, values, objective, fit.noise_intervals)


def drop_plan(table: RunTable, loss_column: str, least: int) -> list[tuple[str, int, np.ndarray]]:
    """What is dropped (`nothing`, `highest loss` or `largest FLOPs`), k, and weights (n,) with zero for those runs.

    At least ``least`` runs are left, of 3 distinct sizes and lengths.
    """
    n = len(table)
    plan = [("nothing", 0, np.ones(n))]
    for column, dropped in ((loss_column, "highest loss"), ("flops", "largest FLOPs")):
        order = np.argsort(-table.numbers(column), kind="stable")
        for k in STEPS:
            weights = np.ones(n)
            weights[order[:k]] = 0.0
            # No larger k can pass where this one does not.
            if k > max(2, DROP_SHARE * n) or n - k < least or not _spans(table, weights > 0):
                break
            plan.append((dropped, k, weights))
    return plan


def drop_rows(
    plan: list[tuple[str, int, np.ndarray]],
    table: RunTable,
    values: dict[str, np.ndarray],
    objective: np.ndarray,
    intervals: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """The rows of the table: ``dropped``, ``k``, ``runs`` (names), ``n_runs``, ``values`` (one per row of ``plan``),
    ``objective`` and ``outside``, the names in :data:`WATCHED` that left their interval.
    """
    rows = []
    for i, (dropped, k, weights) in enumerate(plan):
        here = {name: float(column[i]) for name, column in values.items()}
        outside = [x for x in WATCHED if x in here and not intervals[x][0] <= here[x] <= intervals[x][1]]
        rows.append(
            {
                "dropped": dropped,
                "k": k,
                "runs": [name for name, weight in zip(table.names, weights) if weight == 0],
                "n_runs": len(table) - k,
                **here,
                "objective": float(objective[i]),
                # An optimum may lie outside its own percentiles, which says nothing of stability.
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
                f"{row[name]:.4f}, out of its interval {low:.4f} to {high:.4f} by noise alone"
            )
    return found


def _spans(table: RunTable, keep: np.ndarray) -> bool:
    """Whether the runs kept have 3 distinct sizes and lengths, without which nothing is determined."""
    return all(distinct(table.numbers(c)[keep]).max() >= 2 for c in ("params", "tokens"))


def refit(problem: Any, starts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best of all ``starts`` (s, P) for each row of ``weights`` (m, n): theta (m, P) and objective (m,)."""
    m, s = len(weights), len(starts)
    # All starts with the first row of weights, then all with the second: the order that the reshapes below take apart.
    theta, objective = solver.minimise(problem, np.tile(starts, (m, 1)), np.repeat(weights, s, axis=0))
    objective = objective.reshape(m, s)
    best = objective.argmin(axis=1)
    return theta.reshape(m, s, -1)[np.arange(m), best], objective[np.arange(m), best]
