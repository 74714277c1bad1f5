"""Whether the runs tell a law from its rivals, and what is decided if they do not.

Each rival (law/forms/rivals.py) is fitted to the same runs. A form is rejected where the best of all predicts them
better by more than chance would: the test of Vuong (1989, "Likelihood ratio tests for model selection and non-nested
hypotheses", Econometrica 57(2)). Its statistic is the sum over runs of the differences of the objective, in units of
the robust deviance, plus two per parameter as in Akaike's criterion; its spread is that of the sums of the runs that
err together, those of one trunk or else of one size. Against Student's t with as many degrees of freedom as there are
such units less one, one-sided at 5% divided by the number of comparisons.

Intervals of a decision then span the forms that are left: from the lowest end to the highest end of their intervals by
resampling.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from megamm_laws.fitting.fit import Fit, cluster_labels, offset_labels, resample
from megamm_laws.fitting.form_fit import descend_all
from megamm_laws.law import power_law, solver
from megamm_laws.law.forms.base import FormProblem
from megamm_laws.law.forms.optimum import compute_optimum
from megamm_laws.law.forms.rivals import rival_forms
from megamm_laws.law.percentiles import LEVEL
from megamm_laws.uncertainty.intervals import AHEAD, deviance_scale

STARTS = 6
"""Of each rival, beside those from the fitted law: rivals lie near it."""
RESAMPLES = 100
"""Of each form that is not rejected."""
BUDGETS = 8
"""Over the runs' range, through which the exponents of a form without a closed frontier are read."""
LEAST_FOUND = 0.9
"""Share of the resamples that must have an optimum for it to have an interval."""
ERROR = 0.05


@dataclass(kw_only=True)
class _Candidate:
    """A form fitted to the runs of a fit."""

    name: str
    formula: str
    source: str
    values: dict[str, float]
    number: int
    """Constants that were fitted, not given."""
    objective: float
    residuals: np.ndarray
    """log prediction - log loss, (n,)."""
    problem: FormProblem | None = None
    """None for the fitted law itself."""
    theta: np.ndarray | None = None
    statistic: float = 0.0
    rejected: bool = False


def judge_rivals(fit: Fit, budgets: tuple[float, ...] = ()) -> dict[str, Any]:
    """Entries ``rivals`` and ``decision`` of `fits.json`.

    Optima are given at the largest compute of the runs, ten times that and each of ``budgets`` (FLOPs).
    """
    fitted = [_itself(fit)]
    for form in rival_forms(fit.table.numbers("params"), fit.table.numbers("tokens")):
        problem = FormProblem.of(form, fit.table, fit.loss_column)
        if len(problem.declared) < len(fit.table):
            fitted.append(_fitted(fit, problem))
    critical = _reject(fit, fitted)
    flops = np.array(sorted({fit.flops_range[1], AHEAD * fit.flops_range[1], *budgets}))
    weights, _ = resample(fit.table, cluster_labels(fit.table), RESAMPLES, np.random.default_rng(fit.seed))
    entries = {c.name: _entry(fit, c, flops, weights) for c in fitted}
    left = [name for name, entry in entries.items() if not entry["rejected"]]
    # What is served is the law that was asked for: an interval without it would not hold the value beside it.
    spanned = [fit.form, *(name for name in left if name != fit.form)]
    return {
        "rivals": {"test": "Vuong 1989, by units of runs that err together", "critical": critical, "forms": entries},
        "decision": {
            "level": LEVEL,
            "forms": spanned,
            "exponents": {x: _hull([entries[name]["intervals"][x] for name in spanned]) for x in ("a", "b")},
            "optimum": [
                {"flops": float(c)}
                | {x: _hull([entries[name]["optimum"][i][f"{x}_interval"] for name in spanned]) for x in SIZES}
                | {f"{x}_values": _hull([[entries[name]["optimum"][i][x]] * 2 for name in spanned]) for x in SIZES}
                for i, c in enumerate(flops)
            ],
        },
    }


SIZES = ("params", "tokens")


def _itself(fit: Fit) -> _Candidate:
    return _Candidate(
        name=fit.form,
        formula=power_law.FORMS[fit.form].formula,
        source="equation 10 of arXiv 2203.15556",
        values=dict(zip(power_law.PARAMETERS, fit.parameters.tolist())),
        number=len(power_law.PARAMETERS) if fit.constraints is None else fit.constraints.number,
        objective=_huber(fit.residuals).sum(),
        residuals=fit.residuals,
    )


def _fitted(fit: Fit, problem: FormProblem) -> _Candidate:
    """The best of a few starts and of the fitted law, which most rivals hold or nearly hold."""
    starts = problem.starts(STARTS)
    E, A, alpha, B, beta = fit.parameters
    here = {"E": E, "A": A, "alpha": alpha, "B": B, "beta": beta}
    if "beta" not in problem.names:
        # One exponent in place of two: each term keeps its size at the mean of the runs.
        here["alpha"] = (alpha + beta) / 2
        here["A"] = A * np.exp((here["alpha"] - alpha) * problem.data.mean_log_n)
        here["B"] = B * np.exp((here["alpha"] - beta) * problem.data.mean_log_d)
    if "eta" in problem.names:
        here["B"] = B * np.exp(-beta * problem.data.mean_log_d)
    theta = problem.to_theta(np.array([here.get(name, 0.0) for name in problem.names]))[None]
    ends, objectives = descend_all(problem, np.clip(np.concatenate([theta, starts]), *problem.bounds))
    return _Candidate(
        name=problem.form.name,
        formula=problem.form.formula,
        source=problem.form.source,
        values=dict(zip(problem.names, problem.to_parameters(ends[0]).tolist())),
        number=len(problem.names),
        objective=float(objectives[0]),
        residuals=problem.log_prediction(ends[:1])[0] - problem.y,
        problem=problem,
        theta=ends[0],
    )


def _huber(residuals: np.ndarray) -> np.ndarray:
    """What each run adds to the objective."""
    size = np.abs(residuals)
    return np.where(size <= solver.DELTA, 0.5 * size**2, solver.DELTA * (size - 0.5 * solver.DELTA))


def _reject(fit: Fit, fitted: list[_Candidate]) -> float:
    """Set ``statistic`` and ``rejected`` of each; return the value that rejects."""
    # Of the form with the lowest objective, whose residuals hold least that is no noise.
    lowest = min(fitted, key=lambda c: c.objective)
    scale = deviance_scale(lowest.residuals, lowest.number)
    criterion = [2 * c.objective / scale + 2 * c.number for c in fitted]
    best = fitted[int(np.argmin(criterion))]
    units = offset_labels(fit.table)
    number = int(units.max()) + 1
    critical = float(stdtrit(max(1, number - 1), 1 - ERROR / max(1, len(fitted) - 1)))
    for candidate, value in zip(fitted, criterion):
        worse = value - min(criterion)
        if candidate is best or number < 2:
            continue
        each = 2 * (_huber(candidate.residuals) - _huber(best.residuals)) / scale
        sums = np.bincount(units, each)
        spread = np.sqrt(number / (number - 1) * ((sums - sums.mean()) ** 2).sum())
        candidate.statistic = float(worse / max(spread, 1e-12))
        candidate.rejected = candidate.statistic > critical
    return critical


def _entry(fit: Fit, candidate: _Candidate, flops: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """What `fits.json` says of one form; without intervals where it is rejected and is not the fitted law."""
    budgets = np.concatenate([np.geomspace(*_spread(fit.flops_range), BUDGETS), flops])
    if candidate.problem is None or candidate.theta is None:
        best = power_law.optimum(fit.parameters, budgets, fit.kappa)
        drawn = power_law.optimum(fit.resampled, budgets, fit.kappa)
        optimum, draws = np.stack(best), np.stack(drawn)
    else:
        form, problem = candidate.problem.form, candidate.problem
        optimum = np.stack(compute_optimum(form, candidate.values, budgets, fit.kappa)[:2])
        if candidate.rejected:
            draws = np.full((2, 1, len(budgets)), np.nan)
        else:
            # From the optimum, at the final delta at once: a resample's own is near.
            start = np.tile(candidate.theta, (len(weights), 1))
            theta, _ = solver.minimise(replace(problem, continuation=()), start, weights)
            values = dict(zip(problem.names, problem.to_parameters(theta).T))
            draws = np.stack(compute_optimum(form, values, budgets, fit.kappa)[:2])
    slopes, drawn_slopes = _slopes(budgets, optimum), _slopes(budgets, draws)
    return {
        "formula": candidate.formula,
        "source": candidate.source,
        "parameters": candidate.values,
        "objective": float(candidate.objective),
        "statistic": candidate.statistic,
        "rejected": bool(candidate.rejected),
        "exponents": {x: _number(slope) for x, slope in zip("ab", slopes)},
        "intervals": {x: _interval(slope) for x, slope in zip("ab", drawn_slopes)},
        "optimum": [
            {"flops": float(c)}
            | {x: _number(optimum[j, BUDGETS + i]) for j, x in enumerate(SIZES)}
            | {f"{x}_interval": _interval(draws[j, :, BUDGETS + i]) for j, x in enumerate(SIZES)}
            for i, c in enumerate(flops)
        ],
    }


def _spread(flops_range: tuple[float, float]) -> tuple[float, float]:
    """The range, widened where all runs have one compute: a slope needs two."""
    low, high = flops_range
    return (low, high) if high > low * 1.01 else (low / 1.01, high * 1.01)


def _slopes(budgets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Slope of the logarithm of ``sizes`` (2, ..., m) on log C over the runs' range: (2, ...)."""
    x = np.log(budgets[:BUDGETS])
    x = x - x.mean()
    return np.log(sizes[..., :BUDGETS]) @ x / (x @ x)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(values: np.ndarray) -> list[float] | None:
    """95% percentiles over (R,); None where too many resamples have no optimum."""
    tail = 50 * (1 - LEVEL)
    if np.isfinite(values).mean() < LEAST_FOUND:
        return None
    return np.nanpercentile(values, [tail, 100 - tail]).tolist()


def _hull(intervals: list[Any]) -> list[float] | None:
    """The lowest and the highest end; None where one of the intervals is open."""
    if any(ends is None or None in ends for ends in intervals):
        return None
    return [float(min(low for low, _ in intervals)), float(max(high for _, high in intervals))]
