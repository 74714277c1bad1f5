"""Budgets as real ones are: which runs are of one budget, what their losses are at it, how noisy its curve is."""

from statistics import NormalDist

import numpy as np

from megamm_laws.law import power_law, solver
from megamm_laws.runs.table import RunTable

GAPS = (0.05, 0.2)
"""Gaps in log FLOPs: smaller ones part no budgets, larger ones do."""
WIDEST_BUDGET = 0.3
"""Share more FLOPs than its smallest run that a budget may have: runs of one jitter by 2 to 4%."""
SAME_BUDGET = 0.05
"""Runs with at most this share more FLOPs than the smallest are on its budget where gaps part none."""


def budgets(table: RunTable) -> list[RunTable]:
    """The runs of each budget, ascending.

    Budgets are parted by the gaps in log FLOPs: somewhere between 5 and 20% gaps within budgets end and those between
    them begin, and the widest stretch without a gap says where. A chain of small gaps that spans over 30% is no
    budget: there a run of over 5% more FLOPs than the first begins another.
    """
    flops = table.numbers("flops")
    order = np.argsort(flops, kind="stable")
    gaps = np.diff(np.log(flops[order]))
    ends = np.sort(gaps[(gaps > GAPS[0]) & (gaps < GAPS[1])])
    ends = np.concatenate([[GAPS[0]], ends, [GAPS[1]]])
    widest = int(np.diff(np.log(ends)).argmax())
    limit = float(np.sqrt(ends[widest] * ends[widest + 1]))
    groups = []
    for part in np.split(order, np.flatnonzero(gaps > limit) + 1):
        if flops[part[-1]] <= flops[part[0]] * (1 + WIDEST_BUDGET):
            groups.append(part)
        else:
            groups += by_the_first(part, flops)
    return [table.select(np.isin(np.arange(len(flops)), part)) for part in groups if len(part)]


def by_the_first(order: np.ndarray, flops: np.ndarray) -> list[np.ndarray]:
    """Runs (their numbers, in the order of FLOPs) parted where one has over 5% more than the first of its part."""
    parts: list[list[int]] = []
    for i in order:
        if not parts or flops[i] > flops[parts[-1][0]] * (1 + SAME_BUDGET):
            parts.append([])
        parts[-1].append(int(i))
    return [np.array(part) for part in parts]


def at_budget(table: RunTable, column: str, law: np.ndarray) -> RunTable:
    """The runs of one budget as if all had its median FLOPs, spent on more or fewer tokens.

    Each loss moves by what the law (its five parameters) says of these tokens: a few percent of compute, along a slope
    that is known far better.
    """
    flops, params, tokens, loss = (table.numbers(c) for c in ("flops", "params", "tokens", column))
    moved = tokens * np.median(flops) / flops
    shift = power_law.predict(law, params, moved) - power_law.predict(law, params, tokens)
    rows = [
        row | {"tokens": float(d), column: float(y)}
        for row, d, y in zip(table.rows, moved, np.maximum(loss + shift, 1e-3))
    ]
    return RunTable(path=table.path, rows=rows, lines=table.lines)


def law_of(table: RunTable, column: str) -> np.ndarray | None:
    """Parameters of the law through all runs, None for too few of them."""
    if len(table) <= len(power_law.PARAMETERS):
        return None
    params, tokens, loss = (table.numbers(name) for name in ("params", "tokens", column))
    problem = solver.Problem.of(params, tokens, loss)
    theta, values = solver.minimise(problem, solver.starts(problem), np.ones((1, len(table))))
    return problem.to_parameters(theta[int(np.nanargmin(values))])


def noise_of_curves(profiles: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Standard deviation of a loss by the roughness of the curves, nats; None where no curve has 4 runs.

    Args:
        profiles: log N, ascending, and loss of the runs of each budget.

    Five neighbours (four, where there are no more) have one combination that no cubic (quadratic) adds to: a divided
    difference. Scaled to the variance of one loss, their sizes tell the noise, by the median, so that a few spoilt runs
    do not.
    """
    sizes = []
    for x, y in profiles:
        width = min(5, len(x))
        if width < 4:
            continue
        for i in range(len(x) - width + 1):
            near = x[i : i + width]
            weights = np.array([1 / np.prod(near[j] - np.delete(near, j)) for j in range(width)])
            sizes.append(abs(weights @ y[i : i + width]) / np.linalg.norm(weights))
    return float(np.median(sizes) / NormalDist().inv_cdf(0.75)) if sizes else None
