"""Beyond one interval per number: joint intervals, the optimum's intervals, and profile likelihood.

The bootstrap resamples runs and so needs no model of the noise. The profile likelihood is a second opinion from
the shape of the objective alone: a value is kept if forcing it raises the objective by less than chance would,
residuals being independent and of one spread. Where the two disagree by much, trust neither.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import fdtri

from megamm_laws.fitting.fit import Fit, fit_problem
from megamm_laws.law import power_law, solver
from megamm_laws.law.percentiles import LEVEL

POINTS = 25
RATIO_POINTS = 11
REACH = 2.0
"""Profiles are searched over this many times the bootstrap interval's half-width."""
CENTRAL = 0.3
"""Share of residuals around zero from which their density there is estimated."""
JOINT = ("E", "alpha", "beta", "a")
AHEAD = 10.0
"""The optimum is also given at this multiple of the largest compute: as far as a fit should be asked."""


def simultaneous(center: np.ndarray, draws: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Intervals (2, m) that hold all m quantities at once in ``level`` of the draws (R, m), around ``center`` (m,).

    A sup-t region: the percentile intervals, stretched by one common factor, which keeps their skew.
    """
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    # At a bound all draws are equal, and a width of zero would be divided by below.
    floor = 1e-12 * np.abs(draws).max(axis=0) + 1e-300
    below, above = np.maximum(center - low, floor), np.maximum(high - center, floor)
    excess = np.maximum((draws - center) / above, (center - draws) / below).max(axis=1)
    factor = max(1.0, float(np.quantile(excess, level)))
    return np.stack([center - factor * below, center + factor * above])


def joint_intervals(fit: Fit) -> dict[str, Any]:
    """Simultaneous 95% intervals of E, alpha, beta and a, and how log A and log B move with the exponents.

    A and B have no interval here on purpose: at N = 1 and D = 1, far from any run, they only mirror alpha and beta.
    """
    values = dict(zip(power_law.PARAMETERS, fit.parameters)) | fit.exponents
    draws = dict(zip(power_law.PARAMETERS, fit.draws.T)) | fit.exponent_draws
    low, high = simultaneous(np.array([values[n] for n in JOINT]), np.stack([draws[n] for n in JOINT], axis=1))
    logs = np.stack([draws["E"], np.log(draws["A"]), draws["alpha"], np.log(draws["B"]), draws["beta"]])
    spread = logs.std(axis=1)
    # What does not move has no correlation: NaN, which JSON does not take.
    moving = spread > 1e-12 * np.abs(logs).max(axis=1)
    correlation = np.eye(len(logs))
    if moving.sum() > 1:
        correlation[np.ix_(moving, moving)] = np.corrcoef(logs[moving])
    return {
        "level": LEVEL,
        "intervals": {name: [float(a), float(b)] for name, a, b in zip(JOINT, low, high)},
        "correlation": {"names": ["E", "log A", "alpha", "log B", "beta"], "matrix": correlation.round(6).tolist()},
    }


def optimum_intervals(fit: Fit, flops: np.ndarray | None = None) -> list[dict[str, Any]]:
    """N*, D* and L* at each compute: value, pointwise 95% interval and one that holds all three at once.

    ``flops`` (m,) defaults to the largest compute of the runs and ten times that.
    """
    flops = fit.flops_range[1] * np.array([1.0, AHEAD]) if flops is None else np.asarray(flops, float)
    tail = 50 * (1 - LEVEL)
    names = ("params", "tokens", "loss")
    center, draws = (_log_optimum(fit, parameters, flops) for parameters in (fit.parameters, fit.draws))
    found = []
    for i, c in enumerate(flops):
        entry: dict[str, Any] = {"flops": float(c), "times_largest": float(c / fit.flops_range[1])}
        pointwise = np.exp(np.percentile(draws[:, i], [tail, 100 - tail], axis=0))
        # Stretched in logarithms, so that no end falls below zero; one may overflow, though.
        joint = np.exp(np.clip(simultaneous(center[i], draws[:, i]), -690.0, 690.0))
        for j, name in enumerate(names):
            entry[name] = float(np.exp(center[i, j]))
            entry[f"{name}_interval"] = pointwise[:, j].tolist()
            entry[f"{name}_joint_interval"] = joint[:, j].tolist()
        found.append(entry)
    return found


def profile_intervals(fit: Fit) -> dict[str, list[float | None]]:
    """Profile-likelihood 95% intervals of E, alpha, beta and a; an end is None where the search did not find it.

    The rise of the objective is judged by the robust likelihood-ratio test of M-estimators (Ronchetti 1982): twice
    the rise, times mean psi' / mean psi^2, is F-distributed with 1 and n - 5 degrees of freedom.
    None where constants are given: a profile holds one component still that another may be bound to.
    """
    if fit.constraints is not None:
        return {}
    problem = fit_problem(fit.table, fit.loss_column)
    theta = np.clip(problem.to_theta(fit.parameters), *problem.bounds)
    allowed = _allowed_rise(fit)
    intervals = fit.noise_intervals
    found = {}
    for name, index in (("E", 0), ("alpha", 2), ("beta", 4)):
        grid = _grid(theta[index], intervals[name], problem.bounds[0][index], problem.bounds[1][index], POINTS)
        rise = _profile(problem, theta, (index,), grid[:, None]) - fit.objective
        found[name] = _ends(grid, rise, allowed)
    # a = beta/(alpha + beta), so that alpha = (1 - a) sum and beta = a sum.
    ratio = theta[4] / (theta[2] + theta[4])
    grid = _grid(ratio, intervals["a"], 0.01, 0.99, POINTS)
    sums = fit.resampled[:, 2] + fit.resampled[:, 4]
    total = _grid(theta[2] + theta[4], np.percentile(sums, [2.5, 97.5]), 0.05, 5.0, 2 * RATIO_POINTS + 1)
    # a fixes only the ratio of the exponents: their sum is searched over too.
    values = np.stack([np.outer(1 - grid, total), np.outer(grid, total)], axis=-1)  # alpha, beta
    low, high = problem.bounds
    values = np.clip(values, low[[2, 4]], high[[2, 4]]).reshape(-1, 2)
    rise = _profile(problem, theta, (2, 4), values).reshape(len(grid), len(total)).min(axis=1) - fit.objective
    found["a"] = _ends(grid, rise, allowed)
    return found


def _log_optimum(fit: Fit, parameters: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """(..., m, 3): log N*, log D*, log L*."""
    params, tokens = power_law.optimum(parameters, flops, fit.kappa)
    return np.log(np.stack([params, tokens, power_law.frontier_loss(parameters, flops, fit.kappa)], axis=-1))


def _allowed_rise(fit: Fit) -> float:
    """By how much the objective may rise at 95%."""
    number = len(power_law.PARAMETERS)
    quantile = float(fdtri(1, max(1, len(fit.table) - number), LEVEL))
    return 0.5 * quantile * deviance_scale(fit.residuals, number)


def deviance_scale(residuals: np.ndarray, number: int) -> float:
    """mean psi^2 / mean psi' of log residuals (n,) after ``number`` parameters were fitted.

    Twice the rise of the `huber_log` objective under k restrictions, divided by this, is about chi-squared with k
    degrees of freedom if the residuals are independent and of one spread (Ronchetti 1982).
    """
    size, delta = np.abs(residuals), solver.DELTA
    # mean psi' is the share of residuals within delta, too few to count in a small ladder: count wider, scale down.
    width = max(delta, float(np.quantile(size, CENTRAL)))
    slope = (size <= width).mean() * delta / width
    variance = (np.minimum(size, delta) ** 2).sum() / max(1, len(size) - number)
    return max(variance / max(slope, 1e-12), 1e-300)


def _grid(center: float, interval: Any, lowest: float, highest: float, points: int) -> np.ndarray:
    """Evenly spaced on both sides of ``center``, which is on it, REACH half-widths far."""
    width = interval[1] - interval[0]
    least = 0.25 * width + 1e-9 * (1 + abs(center))  # a percentile interval may end right at the optimum
    below, above = (REACH * max(x, least) for x in (center - interval[0], interval[1] - center))
    half = points // 2 + 1
    low, high = max(lowest, center - below), min(highest, center + above)
    # center ends one half and begins the other; where it is at a bound, a half is that point many times.
    return np.unique(np.concatenate([np.linspace(low, center, half), np.linspace(center, high, half)]))


def _profile(problem: solver.Problem, theta: np.ndarray, held: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """Lowest objective (m,) with the components ``held`` at each row of ``values`` (m, len(held))."""
    starts = np.tile(theta, (len(values), 1))
    starts[:, list(held)] = values
    return solver.minimise(replace(problem, held=held), starts, np.ones((1, len(problem.y))))[1]


def _ends(grid: np.ndarray, rise: np.ndarray, allowed: float) -> list[float | None]:
    """Where the rise passes ``allowed`` on either side of its lowest point.

    Between grid points by a chord of the square root, which is straight for a quadratic.
    """
    middle = int(rise.argmin())
    # A search with a component held may end a hair below the optimum of the fit.
    rise, allowed = np.sqrt(np.maximum(rise, 0.0)), np.sqrt(allowed)
    ends: list[float | None] = []
    for step, stop in ((-1, -1), (1, len(grid))):
        end = None
        for i in range(middle, stop - step, step):
            if rise[i + step] > allowed:
                part = (allowed - rise[i]) / (rise[i + step] - rise[i])
                end = float(grid[i] + part * (grid[i + step] - grid[i]))
                break
        ends.append(end)
    return ends
