"""Fit the scaling law to a table of runs: optimum, bootstrap intervals, held-out error, warnings.

Objective `huber_log`: the sum over runs of Huber(log prediction - log loss) with delta 1e-3. Standard errors are
those of the optimum over resampled runs; runs that share a trunk (the same constant-rate steps, so not independent)
are resampled together. Intervals are percentiles of fits to simulated losses (uncertainty/model_error.py), which
know what a surface that departs from the form, and what runs of one size or trunk share, does to a fit.
"""

import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.law import power_law, solver
from megamm_laws.law.constraints import Constraints
from megamm_laws.law.fitted import Law, Pairing
from megamm_laws.law.percentiles import percentile_intervals
from megamm_laws.runs.table import RunTable
from megamm_laws.uncertainty.model_error import ModelError, simulated_fits

OBJECTIVE = "huber_log"
MIN_RUNS = 5
MIN_RUNS_HOLDOUT = 8
MIN_CLUSTERS = 4
HOLDOUT_SHARE = 0.2
MOST_DRAWS = 100_000
AGREE_RELATIVE = 1e-6
AGREE_ABSOLUTE = 1e-12
"""Objectives closer than these are one optimum; the second is for data without noise."""


@dataclass(kw_only=True)
class Fit:
    """A fitted law of one group of runs; arrays are float64 in the order of power_law.PARAMETERS."""

    group: str
    form: str
    loss_column: str
    table: RunTable
    parameters: np.ndarray
    """(5,)"""
    resampled: np.ndarray
    """(R, 5): the optimum of each bootstrap resample; its spread is the published kind of standard error."""
    draws: np.ndarray
    """(R, 5): fits to losses simulated with all errors that the residuals show; all intervals are made of these."""
    objective: float
    starts_total: int
    starts_at_optimum: int
    gradient_norm: float
    """Of the objective in (E, log A, alpha, log B, beta), without components that push against a bound."""
    condition_number: float
    """Of the reweighted least-squares matrix at the optimum, scaled to a unit diagonal."""
    kappa: float
    """Median of flops/(6*params*tokens)."""
    seed: int
    model_error: ModelError | None = None
    """None where the form or the few runs have no estimate of it; ``draws`` are then ``resampled``."""
    clusters: int
    """Independent units that the bootstrap resamples: trunks, and runs without one."""
    redrawn: int = 0
    """Resamples drawn again because they held fewer than 3 distinct sizes."""
    holdout: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    """Further entries of `fits.json`, made by diagnostics.examine."""
    warnings: list[str] = field(default_factory=list)
    constraints: Constraints | None = None
    pairings: dict[str, Pairing] = field(default_factory=dict)
    """By the name of the other group: draws of both fits together, where their runs match (uncertainty.pairing)."""

    @property
    def law(self) -> Law:
        """The law with its draws, apart from the table that it was fitted to."""
        return Law(
            name=self.group,
            parameters=self.parameters,
            draws=self.draws,
            kappa=self.kappa,
            flops_range=self.flops_range,
            form=self.form,
            warnings=list(self.warnings),
            pairings=dict(self.pairings),
        )

    @property
    def names(self) -> list[str]:
        return list(power_law.PARAMETERS)

    @property
    def flops_range(self) -> tuple[float, float]:
        flops = self.table.numbers("flops")
        return float(flops.min()), float(flops.max())

    @property
    def exponents(self) -> dict[str, float]:
        values = power_law.exponents(self.parameters, self.flops_range, self.kappa)
        return {name: float(value) for name, value in values.items()}

    @property
    def exponent_draws(self) -> dict[str, np.ndarray]:
        """Each exponent over the draws, (R,)."""
        return power_law.exponents(self.draws, self.flops_range, self.kappa)

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95% percentile intervals of every parameter and exponent."""
        return self._percentiles(self.draws)

    @property
    def noise_intervals(self) -> dict[str, list[float]]:
        """The same by resampling alone: what a change must exceed to be more than noise."""
        return self._percentiles(self.resampled)

    def _percentiles(self, draws: np.ndarray) -> dict[str, list[float]]:
        """95% percentile intervals of every parameter and exponent over ``draws`` (R, 5)."""
        values = dict(zip(power_law.PARAMETERS, draws.T)) | power_law.exponents(draws, self.flops_range, self.kappa)
        return percentile_intervals(values)

    @property
    def residuals(self) -> np.ndarray:
        """log prediction - log loss of each run, (n,)."""
        return log_residuals(self.parameters, self.table, self.loss_column)

    def to_json(self) -> dict[str, Any]:
        """The entry of `fits.json`."""
        return {
            "group": self.group,
            "form": self.form,
            "parameters": dict(zip(power_law.PARAMETERS, self.parameters.tolist())),
            "starts": {"total": self.starts_total, "at_optimum": self.starts_at_optimum},
            "noise_intervals": self.noise_intervals,
            "standard_errors": dict(zip(power_law.PARAMETERS, self.resampled.std(axis=0, ddof=1).tolist())),
            **({} if self.constraints is None else {"constraints": asdict(self.constraints)}),
            **({} if self.model_error is None else {"model_error": asdict(self.model_error)}),
            **common_entry(self),
            **self.checks,
            "warnings": self.warnings,
        }


def common_entry(fit: Any) -> dict[str, Any]:
    """What the entries in `fits.json` of fits of all forms have alike."""
    table = fit.table
    ratios = table.numbers("tokens") / table.numbers("params")
    return {
        "objective_name": OBJECTIVE,
        "loss_column": fit.loss_column,
        "n_runs": len(table),
        "objective": fit.objective,
        "gradient_norm": fit.gradient_norm,
        "condition_number": fit.condition_number,
        "intervals": fit.intervals,
        "exponents": fit.exponents,
        "kappa": fit.kappa,
        "ranges": {
            **{name: [float(end(table.numbers(name))) for end in (np.min, np.max)] for name in ("params", "tokens")},
            "flops": list(fit.flops_range),
            "tokens_per_param": [float(ratios.min()), float(ratios.max())],
        },
        "bootstrap": {"resamples": len(fit.draws), "seed": fit.seed, "clusters": fit.clusters},
        "holdout": fit.holdout,
    }


def fit_group(
    table: RunTable,
    *,
    group: str = "all",
    loss_column: str = "loss",
    form: str = "chinchilla",
    resamples: int = 1000,
    seed: int = 0,
    constraints: Constraints | None = None,
) -> Fit:
    """Fit the runs of ``table`` that have a ``loss_column``.

    Raises:
        InputError: unknown form or column, too few resamples, fewer than 5 runs, or a given E that no loss is above.
    """
    if form != "chinchilla":
        raise InputError(f"--form: {form!r} is unknown; known: chinchilla (see outputs.fit_table for the others)")
    table, dropped = measured_runs(table, loss_column, resamples)
    if len(table) < MIN_RUNS:
        lines = ", ".join(map(str, table.lines)) or "none"
        raise InputError(
            f"{table.path}: group {group!r}, column {loss_column}: {len(table)} runs (line {lines}), but the "
            f"{len(power_law.PARAMETERS)} parameters need at least {MIN_RUNS}; add runs or remove the group"
        )
    problem = fit_problem(table, loss_column, constraints)
    floor, lowest = (constraints.fixed if constraints else {}).get("E", 0.0), float(table.numbers(loss_column).min())
    if floor >= lowest:
        raise InputError(f"--fix E={floor:g}: expected less than the lowest {loss_column} of {group!r}, {lowest:g}")
    ends, objectives = optima(problem)
    theta, objective = ends[0], float(objectives[0])
    _, gradient, _, reweighted = solver.evaluate(problem, theta[None], np.ones((1, len(table))), solver.DELTA)
    free, at, gradient, (reweighted,) = solver.reduced(problem, theta[None], gradient, reweighted)
    gradient = solver.projected_gradient(free, at, gradient)[0]
    if constraints is None:
        # The batch works on centred logarithms; the chain rule takes the gradient back to log A and log B.
        gradient[[2, 4]] -= gradient[[1, 3]] * [problem.mean_log_n, problem.mean_log_d]
    # Of the group's name, so that a group has the same draws whichever others are in the table.
    rng = np.random.default_rng([seed, zlib.crc32(group.encode())])
    # Where the runs leave a direction flat, the starts end all along it, and so must the draws.
    near = ends[objectives <= objective * 1.01 + AGREE_ABSOLUTE]
    found = _uncertainty(problem, theta, near, table, resamples, rng)
    fit = Fit(
        group=group,
        form=form,
        loss_column=loss_column,
        table=table,
        parameters=problem.to_parameters(theta),
        objective=objective,
        starts_total=len(objectives),
        starts_at_optimum=int((objectives <= objective * (1 + AGREE_RELATIVE) + AGREE_ABSOLUTE).sum()),
        gradient_norm=float(np.linalg.norm(gradient)),
        condition_number=solver.condition_number(reweighted[0]),
        kappa=power_law.flops_factor(table.numbers("params"), table.numbers("tokens"), table.numbers("flops")),
        seed=seed,
        constraints=constraints,
        **found,
    )
    fit.holdout = hold_out(fit)
    fit.warnings += dropped
    return fit


def _uncertainty(
    problem: solver.Problem,
    theta: np.ndarray,
    starts: np.ndarray,
    table: RunTable,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The fields of a Fit that tell how far ``theta`` (5,) may be off; resamples start from ``starts`` (m, 5)."""
    clusters = cluster_labels(table)
    weights, redrawn = resample(table, clusters, resamples, rng)
    resampled, _ = solver.minimise(problem, starts[rng.integers(len(starts), size=resamples)], weights)
    units = int(clusters.max()) + 1
    draws, model_error = simulated_fits(problem, theta, resampled, offset_labels(table), rng)
    return {
        "resampled": problem.to_parameters(resampled),
        "draws": problem.to_parameters(draws),
        "model_error": model_error,
        "clusters": units,
        "redrawn": redrawn,
    }


def check_draws(option: str, number: int) -> None:
    """Raise InputError where ``number`` draws are too few for intervals or too many for memory."""
    if not 10 <= number <= MOST_DRAWS:
        raise InputError(f"{option}: {number} draws cannot give intervals; give at least 10 and at most {MOST_DRAWS}")


def measured_runs(table: RunTable, loss_column: str, resamples: int) -> tuple[RunTable, list[str]]:
    """The runs that have a ``loss_column``, and a line on those that have not.

    Raises:
        InputError: no such column, or too few or too many ``resamples``.
    """
    check_draws("--bootstrap", resamples)
    if loss_column not in table.loss_columns:
        raise InputError(f"{table.path}: no loss column {loss_column!r}; has {', '.join(table.loss_columns)}")
    measured = ~np.isnan(table.numbers(loss_column))
    places = table.select(~measured).places
    line = f"{len(places)} runs have no {loss_column} and were left out: {', '.join(places)}"
    return table.select(measured), [line] if places else []


def log_residuals(parameters: np.ndarray, table: RunTable, loss_column: str = "loss") -> np.ndarray:
    """log prediction - log loss of each run, (n,)."""
    prediction = power_law.predict(parameters, table.numbers("params"), table.numbers("tokens"))
    return np.log(prediction) - np.log(table.numbers(loss_column))


def huber_log(parameters: np.ndarray, table: RunTable, loss_column: str = "loss", delta: float = 1e-3) -> float:
    """The objective at ``parameters`` (5,): the sum over runs of Huber_delta of the log residual."""
    size = np.abs(log_residuals(parameters, table, loss_column))
    return float(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum())


def cluster_labels(table: RunTable) -> np.ndarray:
    """Which independent unit each run belongs to, (n,) int: its trunk, or itself where it has none.

    Of fewer than 4 units hardly a resample but the table itself determines the law, so that intervals would have
    no width: each run is then a unit of its own, and ``diagnostics`` says that the intervals are too narrow.
    """
    # Branches of a trunk repeat its luck: they are one observation, not several.
    keys = [row.get("trunk") or i for i, row in enumerate(table.rows)]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) < MIN_CLUSTERS:
        return np.arange(len(keys))
    return np.array([numbers[key] for key in keys])


def offset_labels(table: RunTable) -> np.ndarray:
    """Which runs share an offset, (n,) int: those of one trunk; where none is named, those of one size: its tuning."""
    clusters = cluster_labels(table)
    return clusters if clusters.max() + 1 < len(table) else distinct(table.numbers("params"))


def resample(table: RunTable, clusters: np.ndarray, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """How often each run counts in each resample, (R, n) float64, and the number of resamples drawn again.

    A resample with fewer than 3 distinct N or D (where the table has 3) cannot determine the law and is drawn
    again, up to 100 times; that narrows the intervals, so that a fit says how often it happened.
    """
    count = int(clusters.max()) + 1
    sizes = []
    for column in ("params", "tokens"):
        labels = distinct(table.numbers(column))
        sizes.append((labels[:, None] == np.arange(labels.max() + 1)).astype(float))

    def draw(number: int) -> np.ndarray:
        return rng.multinomial(count, np.full(count, 1 / count), size=number).astype(float)[:, clusters]

    weights, redrawn = draw(resamples), 0
    for _ in range(100):
        poor = np.zeros(resamples, bool)
        for member in sizes:
            poor |= ((weights @ member) > 0).sum(-1) < min(3, member.shape[1])
        if not poor.any():
            break
        redrawn = redrawn or int(poor.sum())
        weights[poor] = draw(int(poor.sum()))
    return weights, redrawn


def distinct(values: np.ndarray) -> np.ndarray:
    """Number of the distinct size that each value belongs to, (n,) int; values within 1% are one size."""
    order = np.argsort(values, kind="stable")
    labels = np.empty(len(values), int)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(values[order])) > 0.01)])
    return labels


def hold_out(fit: Fit, share: float = HOLDOUT_SHARE) -> dict[str, Any]:
    """Refit without the runs of largest compute and predict them; tell how far the exponent a moves.

    Held back: the highest ``share`` of the runs by FLOPs, together with any run tied with them. A loss may be
    predicted to 1% while the exponent of the allocation drifts by far more: ``a_drift`` is without minus with
    them, ``a_drift_in_half_widths`` the same in half-widths of the interval of a by noise alone.
    """
    table = fit.table
    held = largest_runs(table, share)
    rest = table.select(~held)
    if len(rest) < MIN_RUNS_HOLDOUT:
        return {
            "skipped": f"{len(rest)} runs would be left without the {held.sum()} of largest compute; "
            f"at least {MIN_RUNS_HOLDOUT} are needed"
        }
    for column in ("params", "tokens"):
        if distinct(rest.numbers(column)).max() < 2:
            return {"skipped": f"fewer than 3 distinct {column} would be left"}
    problem = fit_problem(rest, fit.loss_column, fit.constraints)
    parameters = problem.to_parameters(optima(problem)[0][0])
    kept_back = table.select(held)
    error = np.expm1(log_residuals(parameters, kept_back, fit.loss_column))
    return hold_out_entry(fit, held, error, float(power_law.exponents(parameters, fit.flops_range)["a"]), share)


def largest_runs(table: RunTable, share: float = HOLDOUT_SHARE) -> np.ndarray:
    """Which runs a hold-out keeps back, (n,) bool: the highest ``share`` by FLOPs, with any run tied with them."""
    flops = table.numbers("flops")
    number = max(1, round(share * len(table)))
    return flops >= np.sort(flops)[-number] * (1 - 1e-9)  # ties go together, or the order of the rows would decide


def hold_out_entry(
    fit: Any, held: np.ndarray, error: np.ndarray, a_without: float | None, share: float = HOLDOUT_SHARE
) -> dict[str, Any]:
    """What `fits.json` says of a hold-out: relative errors of the runs ``held`` back and the drift of a.

    ``fit`` is a Fit or a FormFit; ``a_without`` is None for a form that has no such exponent.
    """
    flops = fit.table.numbers("flops")
    found: dict[str, Any] = {
        "rule": f"the {held.sum()} runs of largest FLOPs (highest {share:.0%})",
        "n": int(held.sum()),
        "runs": fit.table.select(held).names,
        "relative_error_loss": float(np.abs(error).mean()),
        "relative_errors": error.tolist(),
        "compute_ratio": float(flops.max() / flops[~held].max()),
    }
    if a_without is None:
        return found
    low, high = fit.noise_intervals["a"]
    drift = a_without - fit.exponents["a"]
    return found | {
        "a_without": a_without,
        "a_with": fit.exponents["a"],
        "a_drift": drift,
        "a_drift_in_half_widths": abs(drift) / max(0.5 * (high - low), 1e-12),
    }


def fit_problem(table: RunTable, loss_column: str, constraints: Constraints | None = None) -> solver.Problem:
    """The runs of ``table`` as megamm_laws.law.solver needs them."""
    params, tokens, loss = (table.numbers(c) for c in ("params", "tokens", loss_column))
    return solver.Problem.of(params, tokens, loss, constraints)


def optima(problem: solver.Problem) -> tuple[np.ndarray, np.ndarray]:
    """Where all starts end: theta (starts, 5) and objectives (starts,), the best first."""
    theta, objective = solver.minimise(problem, solver.starts(problem), np.ones((1, len(problem.y))))
    order = np.argsort(objective, kind="stable")
    return theta[order], objective[order]
