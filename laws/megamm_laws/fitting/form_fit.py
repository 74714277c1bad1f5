"""Fit any declared form to a table: optimum from many starts, clustered bootstrap, held-out error, warnings."""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.fitting.fit import (
    AGREE_ABSOLUTE,
    AGREE_RELATIVE,
    cluster_labels,
    common_entry,
    hold_out_entry,
    largest_runs,
    measured_runs,
    resample,
)
from megamm_laws.fitting.stability import drop_refits
from megamm_laws.law import power_law, solver
from megamm_laws.law.forms import FORMS
from megamm_laws.law.forms.base import Form, FormProblem
from megamm_laws.law.percentiles import percentile_intervals
from megamm_laws.runs.table import RunTable

POLISHED = 8
DROP_STARTS = 4
SPARE_RUNS = 3
"""Runs beyond the number of parameters that a held-out refit needs."""


@dataclass(kw_only=True)
class FormFit:
    """A fitted form of one group of runs; arrays follow ``names``."""

    group: str
    form: Form
    loss_column: str
    table: RunTable
    problem: FormProblem
    parameters: np.ndarray
    """(P,)"""
    draws: np.ndarray
    """(R, P)"""
    objective: float
    starts_total: int
    starts_at_optimum: int
    starts_near: int
    """Starts that ended within 1% of the optimum."""
    gradient_norm: float
    """Of the objective in theta: logs of amplitudes at the mean size and length, other parameters as they are."""
    condition_number: float
    kappa: float
    seed: int
    clusters: int
    redrawn: int = 0
    holdout: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return self.problem.names

    @property
    def values(self) -> dict[str, float]:
        return dict(zip(self.names, self.parameters.tolist()))

    @property
    def flops_range(self) -> tuple[float, float]:
        flops = self.table.numbers("flops")
        return float(flops.min()), float(flops.max())

    @property
    def residuals(self) -> np.ndarray:
        """log prediction - log loss of each run, (n,)."""
        theta = self.problem.to_theta(self.parameters)[None]
        return self.problem.log_prediction(theta)[0] - self.problem.y

    def law_of(self, parameters: np.ndarray) -> tuple[np.ndarray, dict] | None:
        """(E, A, alpha, B, beta) of ``parameters`` (..., P) and where it holds; see Form.law."""
        values = {name: parameters[..., i] for i, name in enumerate(self.names)}
        return self.form.law(values, self.problem.data.columns)

    @property
    def exponents(self) -> dict[str, float]:
        found = self.law_of(self.parameters)
        if found is None:
            return {}
        return {k: float(v) for k, v in power_law.exponents(found[0], self.flops_range, self.kappa).items()}

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95% percentile intervals of every parameter and exponent."""
        draws = dict(zip(self.names, self.draws.T))
        found = self.law_of(self.draws)
        if found is not None:
            draws |= power_law.exponents(found[0], self.flops_range, self.kappa)
        return percentile_intervals(draws)

    @property
    def noise_intervals(self) -> dict[str, list[float]]:
        """Those by resampling alone, which are all there are: the draws hold no error of the form."""
        return self.intervals

    def to_json(self) -> dict[str, Any]:
        """The entry of `fits.json`: as that of the plain law, and ``law``, the plain law at typical conditions."""
        found = self.law_of(self.parameters)
        law = {}
        if found is not None:
            law = {"law": {"at": found[1], "parameters": dict(zip(power_law.PARAMETERS, found[0].tolist()))}}
        return {
            "group": self.group,
            "form": self.form.name,
            "formula": self.form.formula,
            "source": self.form.source,
            "parameters": self.values,
            **law,
            "starts": {
                "total": self.starts_total,
                "at_optimum": self.starts_at_optimum,
                "within_1_percent": self.starts_near,
            },
            "standard_errors": dict(zip(self.names, self.draws.std(axis=0, ddof=1).tolist())),
            **common_entry(self),
            **self.extras,
            "warnings": self.warnings,
        }


def fit_form(
    table: RunTable,
    form: str | Form,
    *,
    group: str = "all",
    loss_column: str = "loss",
    resamples: int = 1000,
    seed: int = 0,
) -> FormFit:
    """Fit ``form`` (a name in FORMS, or a form) to the runs that have a ``loss_column``.

    Raises:
        InputError: unknown form or column, too few resamples, no more runs than parameters, or what form.read says.
    """
    if isinstance(form, str):
        if form not in FORMS:
            raise InputError(f"--form: {form!r} is unknown; known: {', '.join(FORMS)}")
        form = FORMS[form]
    table, dropped = measured_runs(table, loss_column, resamples)
    problem = FormProblem.of(form, table, loss_column)
    number = len(problem.declared)
    if len(table) <= number:
        raise InputError(
            f"{table.path}: group {group!r}, column {loss_column}: {len(table)} runs, but form {form.name} has "
            f"{number} parameters; add runs or choose a simpler form"
        )
    ends, objectives = descend_all(problem)
    theta, objective = ends[0], float(objectives[0])
    _, gradient, _, reweighted = problem.evaluate(theta[None], np.ones((1, len(table))), solver.DELTA)
    clusters = cluster_labels(table)
    rng = np.random.default_rng([seed, zlib.crc32(group.encode())])
    weights, redrawn = resample(table, clusters, resamples, rng)
    # Many parameters leave flat valleys: the starts end all along them, and so must the draws.
    near = ends[objectives <= objective * 1.01 + AGREE_ABSOLUTE]
    draws, _ = solver.minimise(problem, near[rng.integers(len(near), size=resamples)], weights)
    fit = FormFit(
        group=group,
        form=form,
        loss_column=loss_column,
        table=table,
        problem=problem,
        parameters=problem.to_parameters(theta),
        draws=problem.to_parameters(draws),
        objective=objective,
        starts_total=len(objectives),
        starts_at_optimum=int((objectives <= objective * (1 + AGREE_RELATIVE) + AGREE_ABSOLUTE).sum()),
        starts_near=int((objectives <= objective * 1.01 + AGREE_ABSOLUTE).sum()),
        gradient_norm=float(np.linalg.norm(solver.projected_gradient(problem, theta[None], gradient))),
        condition_number=solver.condition_number(reweighted[0]),
        kappa=power_law.flops_factor(*(table.numbers(c) for c in ("params", "tokens", "flops"))),
        seed=seed,
        clusters=int(clusters.max()) + 1,
        redrawn=redrawn,
    )
    fit.holdout = hold_out(fit)
    fit.extras = {"drop_k": drop_table(fit), **form.extras(fit)}
    fit.warnings += dropped
    return fit


def drop_table(fit: FormFit) -> list[dict[str, Any]]:
    """The drop-k table, from the optimum and a few other starts; see stability.drop_refits."""
    starts = np.concatenate([fit.problem.to_theta(fit.parameters)[None], fit.problem.starts(DROP_STARTS)])

    def law(parameters: np.ndarray) -> np.ndarray | None:
        found = fit.law_of(parameters)
        return None if found is None else found[0]

    return drop_refits(fit, fit.problem, starts, len(fit.names) + SPARE_RUNS, law)


def descend_all(problem: FormProblem, starts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where all starts end: theta (starts, P) and objectives (starts,), the best first.

    Forms with many parameters end in long flat valleys, so the best few go on for another round.
    """
    starts = problem.starts() if starts is None else starts
    one = np.ones((1, len(problem.y)))
    theta, objective = solver.minimise(problem, starts, one)
    leaders = np.argsort(objective, kind="stable")[:POLISHED]
    # At the final delta at once: the wide stages would lead theta away from where it has come to.
    again = solver.minimise(replace(problem, continuation=()), theta[leaders], one)
    theta[leaders], objective[leaders] = again
    order = np.argsort(objective, kind="stable")
    return theta[order], objective[order]


def hold_out(fit: FormFit) -> dict[str, Any]:
    """Refit without the fifth of the runs of largest FLOPs and predict them; drift of a, where the form has one."""
    table, held = fit.table, largest_runs(fit.table)
    rest = table.select(~held)
    if len(rest) < len(fit.names) + SPARE_RUNS:
        return {"skipped": f"{len(rest)} runs would be left for {len(fit.names)} parameters"}
    part = FormProblem.of(fit.form, rest, fit.loss_column)
    # Parameters depend on the columns, and the runs left may lack a domain.
    if part.names != fit.names:
        return {"skipped": "the runs left do not have all parameters of the form"}
    parameters = part.to_parameters(descend_all(part)[0][0])
    # By way of params and tokens: theta of the rest is in the units of its own means.
    theta = fit.problem.to_theta(parameters)[None]
    error = np.expm1(fit.problem.log_prediction(theta)[0] - fit.problem.y)[held]
    law = fit.law_of(parameters)
    without = None if law is None else float(law[0][4] / (law[0][2] + law[0][4]))
    return hold_out_entry(fit, held, error, without)
