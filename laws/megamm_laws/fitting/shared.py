"""One pair of exponents for several groups: L_g = E_g + A_g/N^alpha + B_g/D^beta.

Early and late fusion, or two mixtures, often differ in their constants and hardly in their exponents; sharing alpha
and beta then narrows both frontiers. Whether the runs allow it is tested against separate exponents.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import fdtrc

from megamm_laws.errors import InputError
from megamm_laws.fitting.diagnostics import warnings_of
from megamm_laws.fitting.fit import (
    AGREE_ABSOLUTE,
    AGREE_RELATIVE,
    MIN_RUNS,
    Fit,
    cluster_labels,
    fit_problem,
    hold_out_entry,
    largest_runs,
    log_residuals,
    measured_runs,
    optima,
    resample,
)
from megamm_laws.fitting.stability import drop_plan, drop_rows, refit
from megamm_laws.law import power_law, solver
from megamm_laws.law.forms.base import Data, Form, FormProblem, Parameter, Point, Term, amplitude, exponent
from megamm_laws.runs.table import RunTable
from megamm_laws.uncertainty.intervals import deviance_scale, joint_intervals, optimum_intervals

NAME = "shared"


class SharedExponents(Form):
    """E, A and B of each group, alpha and beta of all; the column ``group`` numbers the group of each run."""

    name = NAME
    formula = power_law.FORMS[NAME].formula
    source = "Hoffmann et al. 2022, equation 10, with exponents in common"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        found = [exponent("alpha"), exponent("beta")]
        for g in range(int(columns["group"].max()) + 1):
            found += [
                amplitude(f"E_{g}"),
                amplitude(f"A_{g}", "params", "alpha"),
                amplitude(f"B_{g}", "tokens", "beta"),
            ]
        return found

    def terms(self, at: Point, data: Data) -> list[Term]:
        groups = data.columns["group"]
        # Zero where a run is of another group, whose amplitudes then do not touch it: one term serves all groups.
        members = {g: (groups == g).astype(float) for g in range(int(groups.max()) + 1)}
        return [
            at.linear({f"E_{g}": member for g, member in members.items()}),
            at.linear({**{f"A_{g}": member for g, member in members.items()}, "alpha": -data.u}),
            at.linear({**{f"B_{g}": member for g, member in members.items()}, "beta": -data.v}),
        ]


def fit_shared(
    groups: dict[str, RunTable], *, loss_column: str = "loss", resamples: int = 1000, seed: int = 0
) -> list[Fit]:
    """Fit all groups with common exponents; a Fit per group, whose draws belong together row by row.

    Objective, starts, gradient norm and condition number are those of the whole; ``checks["sharing"]`` tests the
    shared exponents against separate ones. Other warnings than that are added by examine_shared.

    Raises:
        InputError: one group only, or one with fewer than 5 runs.
    """
    groups, dropped = _measured(groups, loss_column, resamples)
    tables = list(groups.values())
    whole = _join(tables)
    labels = np.repeat(np.arange(len(tables)), [len(t) for t in tables]).astype(float)
    problem = FormProblem.of(SharedExponents(), whole, loss_column, columns={"group": labels})
    theta, objectives = solver.minimise(problem, problem.starts(), np.ones((1, len(whole))))
    best = int(objectives.argmin())
    objective = float(objectives[best])
    _, gradient, _, reweighted = problem.evaluate(theta[best][None], np.ones((1, len(whole))), solver.DELTA)
    # Each group is resampled by itself, from a seed of its own, as in a fit of that group alone: it keeps its number of
    # runs and its draws.
    seeds = [np.random.default_rng([seed, zlib.crc32(name.encode())]) for name in groups]
    drawn = [resample(table, cluster_labels(table), resamples, rng) for table, rng in zip(tables, seeds)]
    # Row r of every group goes into one fit, so that the draws of two groups have exponents in common.
    weights = np.concatenate([w for w, _ in drawn], axis=1)
    draws, _ = solver.minimise(problem, np.repeat(theta[best][None], resamples, axis=0), weights)
    values, draws = (problem.to_parameters(x) for x in (theta[best], draws))
    held_out = _hold_out(tables, loss_column)
    sharing = _sharing(tables, problem, theta[best], objective, loss_column)
    dropping = _Dropping.of(problem, theta[best], whole, loss_column)
    fits = []
    for g, (name, table) in enumerate(groups.items()):
        columns = _columns(g)
        fit = Fit(
            group=name,
            form=NAME,
            loss_column=loss_column,
            table=table,
            parameters=values[columns],
            resampled=draws[:, columns],
            draws=draws[:, columns],
            objective=objective,
            starts_total=len(objectives),
            starts_at_optimum=int((objectives <= objective * (1 + AGREE_RELATIVE) + AGREE_ABSOLUTE).sum()),
            gradient_norm=float(np.linalg.norm(solver.projected_gradient(problem, theta[best][None], gradient))),
            condition_number=solver.condition_number(reweighted[0]),
            kappa=power_law.flops_factor(*(table.numbers(c) for c in ("params", "tokens", "flops"))),
            seed=seed,
            clusters=int(cluster_labels(table).max()) + 1,
            redrawn=drawn[g][1],
        )
        fit.holdout = _group_hold_out(fit, held_out, g)
        fit.checks = {"joint": joint_intervals(fit), "optimum": optimum_intervals(fit)}
        fit.checks |= {"drop_k": dropping.rows(fit, g), "sharing": {"groups": list(groups), **sharing}}
        fit.warnings += dropped[name]
        if sharing["p_value"] < 0.05:
            fit.warnings.append(
                f"shared exponents are rejected at p = {sharing['p_value']:.2g}: the groups differ in alpha or beta"
            )
        fits.append(fit)
    return fits


def examine_shared(fits: list[Fit]) -> list[Fit]:
    """Add to the ``fits`` of all groups, as fit_shared gives them, the warnings that a plain fit has."""
    for fit in fits:
        fit.warnings += warnings_of(fit, [other.table for other in fits if other is not fit])
    return fits


def _columns(g: int) -> list[int]:
    """Where E, A, alpha, B and beta of a group stand among the parameters."""
    return [2 + 3 * g, 3 + 3 * g, 0, 4 + 3 * g, 1]


@dataclass(kw_only=True)
class _Dropping:
    """Refits of all groups together without some runs of the whole table: parameters (m, P), objective (m,)."""

    plan: list[tuple[str, int, np.ndarray]]
    table: RunTable
    parameters: np.ndarray
    objective: np.ndarray

    @classmethod
    def of(cls, problem: FormProblem, theta: np.ndarray, table: RunTable, column: str) -> "_Dropping":
        plan = drop_plan(table, column, len(theta) + MIN_RUNS)
        starts = np.concatenate([theta[None], problem.starts(3)])
        ends, objective = refit(problem, starts, np.stack([weights for *_, weights in plan]))
        return cls(plan=plan, table=table, parameters=problem.to_parameters(ends), objective=objective)

    def rows(self, fit: Fit, g: int) -> list[dict[str, Any]]:
        """The drop-k table of one group: its own E, the exponents of all."""
        alpha, beta = self.parameters[:, 0], self.parameters[:, 1]
        values = {"E": self.parameters[:, 2 + 3 * g], "alpha": alpha, "beta": beta, "a": beta / (alpha + beta)}
        return drop_rows(self.plan, self.table, values, self.objective, fit.noise_intervals)


def _measured(
    groups: dict[str, RunTable], column: str, resamples: int
) -> tuple[dict[str, RunTable], dict[str, list[str]]]:
    """The runs of each group that have the loss, and a line on those that have not."""
    kept, dropped = {}, {}
    for name, table in groups.items():
        kept[name], dropped[name] = measured_runs(table, column, resamples)
        if len(kept[name]) < MIN_RUNS:
            raise InputError(
                f"{table.path}: group {name!r}, column {column}: {len(kept[name])} runs, at least {MIN_RUNS} are needed"
            )
    if len(kept) < 2:
        path = next(iter(kept.values())).path
        raise InputError(f"{path}: one group only ({', '.join(kept)}): --form {NAME} needs --group-by with two or more")
    return kept, dropped


def _join(tables: list[RunTable]) -> RunTable:
    rows, lines = [r for t in tables for r in t.rows], [line for t in tables for line in t.lines]
    return RunTable(path=tables[0].path, rows=rows, lines=lines)


def _sharing(
    tables: list[RunTable], problem: FormProblem, theta: np.ndarray, objective: float, column: str
) -> dict[str, Any]:
    """Rise of the objective by sharing, and the p-value of the robust likelihood-ratio test."""
    free = sum(float(optima(fit_problem(table, column))[1][0]) for table in tables)
    residuals = problem.log_prediction(theta[None])[0] - problem.y
    # Sharing ties two exponents of every group after the first; separate fits have five parameters each.
    extra, number = 2 * (len(tables) - 1), 5 * len(tables)
    spare = max(1, len(residuals) - number)
    # Separate fits cannot be worse, but a search may stop a little short.
    statistic = 2 * max(0.0, objective - free) / deviance_scale(residuals, number)
    return {
        "objective_shared": objective,
        "objective_free": free,
        "p_value": float(fdtrc(extra, spare, statistic / extra)),
    }


def _hold_out(tables: list[RunTable], column: str) -> dict[str, Any]:
    """Refit without the fifth of each group's runs of largest FLOPs: parameters, and which runs were held."""
    held = [largest_runs(table) for table in tables]
    rest = [table.select(~mask) for table, mask in zip(tables, held)]
    if min(map(len, rest)) < MIN_RUNS:
        return {"skipped": f"fewer than {MIN_RUNS} runs of a group would be left"}
    labels = np.repeat(np.arange(len(rest)), [len(t) for t in rest]).astype(float)
    problem = FormProblem.of(SharedExponents(), _join(rest), column, columns={"group": labels})
    theta, objective = solver.minimise(problem, problem.starts(), np.ones((1, len(labels))))
    return {"parameters": problem.to_parameters(theta[int(objective.argmin())]), "held": held}


def _group_hold_out(fit: Fit, found: dict[str, Any], g: int) -> dict[str, Any]:
    if "skipped" in found:
        return dict(found)
    parameters = found["parameters"][_columns(g)]
    kept_back = fit.table.select(found["held"][g])
    error = np.expm1(log_residuals(parameters, kept_back, fit.loss_column))
    return hold_out_entry(fit, found["held"][g], error, float(parameters[4] / (parameters[2] + parameters[4])))
