"""The same fits under other counts of FLOPs: is the order of two groups the same where the front end is not counted?

A fit is in parameters and tokens, so that a count only changes what a model of N parameters and D tokens costs,
C = 6 kappa (N/N0)^growth N D. Both are read off the runs. An encoder that grows slower than its decoder, or attention
and head that weigh less in wide models, make ``growth`` differ from zero; with one factor alone the frontier of a
ladder whose factor goes from 1.25 to 1.05 would be off by that much at its ends.
"""

from dataclasses import dataclass, replace

import numpy as np

from megamm_laws.comparison.compare import Comparison, compare
from megamm_laws.errors import InputError
from megamm_laws.fitting.fit import distinct
from megamm_laws.law.fitted import Law
from megamm_laws.runs import conventions
from megamm_laws.runs.groups import law_runs
from megamm_laws.runs.table import RunTable

COUNTED = {
    "counted": "front end counted",
    "decoder": "front end not counted",
    "exact": "every matrix product counted",
}
"""The first takes the FLOPs of the table as they are; the others are names in conventions.CONVENTIONS."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """C = 6 kappa (N/reference)^growth N D; ``misfit`` is the largest relative deviation of a run from it."""

    kappa: float
    growth: float
    reference: float
    misfit: float


def cost_of(params: np.ndarray, tokens: np.ndarray, flops: np.ndarray) -> Cost:
    """The cost of runs, by least squares of log(C/6ND) on log N; arrays (n,).

    ``growth`` is zero where the runs have one size only.
    """
    params, tokens, flops = (np.asarray(x, float) for x in (params, tokens, flops))
    ratio, log_n = np.log(flops / (6 * params * tokens)), np.log(params)
    reference = log_n.mean()
    x, growth = log_n - reference, 0.0
    # Where all runs cost the same per 6ND, rounding alone would give a slope.
    if distinct(params).max() > 0 and np.ptp(ratio) > 1e-9:
        growth = float(x @ (ratio - ratio.mean()) / (x @ x))
    misfit = float(np.abs(np.expm1(ratio - ratio.mean() - growth * x)).max())
    return Cost(kappa=float(np.exp(ratio.mean())), growth=growth, reference=float(np.exp(reference)), misfit=misfit)


def recount(law: Law, table: RunTable, counting: str) -> tuple[Law, Cost]:
    """The law with its runs' FLOPs counted another way, and the cost that was read off them.

    Args:
        table: the runs that the law was fitted to.
        counting: a key of COUNTED.

    Raises:
        conventions.MissingFactError: a run lacks a column that the count needs.
    """
    if counting == "counted":
        flops = table.numbers("flops")
    else:
        flops = np.array([conventions.convert_row(row, counting)["flops"] for row in table.rows])
    cost = cost_of(table.numbers("params"), table.numbers("tokens"), flops)
    span = (float(flops.min()), float(flops.max()))
    # The law itself, in N and D, stays: only what it costs is new.
    new = replace(law, kappa=cost.kappa, growth=cost.growth, reference=cost.reference, flops_range=span)
    return new, cost


@dataclass(kw_only=True)
class Recounted:
    """Two groups compared under one count of FLOPs."""

    counting: str
    laws: tuple[Law, Law]
    costs: tuple[Cost, Cost]
    comparison: Comparison


def compare_under_conventions(
    first: Law, second: Law, tables: tuple[RunTable, RunTable], flops_range: tuple[float, float] | None = None
) -> tuple[list[Recounted], list[str]]:
    """Both laws compared under each count that the runs allow, and lines on the counts that they do not.

    Args:
        tables: the runs that each law was fitted to.
        flops_range: as for compare.compare.
    """
    found, left_out = [], []
    for counting, explained in COUNTED.items():
        try:
            # The generator runs here, within the try: either table may lack the column.
            (law, cost), (other, other_cost) = (
                recount(law, table, counting) for law, table in zip((first, second), tables)
            )
        except conventions.MissingFactError as error:
            left_out.append(f"{explained}: some runs have no {error}; collect them again")
            continue
        comparison = compare(law, other, flops_range)
        found.append(Recounted(counting=counting, laws=(law, other), costs=(cost, other_cost), comparison=comparison))
    return found, left_out


def group_column(table: RunTable, groups: set[str]) -> str | None:
    """The column whose values are the groups of the fits; None where all runs are one group.

    Raises:
        InputError: there is no such column.
    """
    # First what a fit groups by when it is not told.
    for column in dict.fromkeys(["architecture", *table.columns]):
        if groups <= {str(row.get(column)) for row in table.rows}:
            return column
    if groups == {"all"}:
        return None
    raise InputError(
        f"{table.path}: no column holds the groups of fits.json ({', '.join(sorted(groups))}); "
        "run tools/fit_scaling_laws.py again"
    )


def runs_of(table: RunTable, column: str | None, group: str, loss_column: str = "loss") -> RunTable:
    """The runs that a law of ``group`` was fitted to: of the group those of no sweep that are native and have it."""
    runs, _ = law_runs(table.select(column is None or str(row.get(column)) == group for row in table.rows))
    return runs.select(np.isfinite(runs.numbers(loss_column)))
