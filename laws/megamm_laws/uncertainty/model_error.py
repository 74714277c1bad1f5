"""How wrong a law's losses may be beyond noise, and how far its fit may therefore be off: the draws behind intervals.

Resampling runs takes their residuals for independent. A surface that bends smoothly away from E + A/N^alpha + B/D^beta
makes neighbouring runs err together, and so does what all runs of one size share (its tuning) or all branches of one
trunk (its steps); more runs of the kind do not help, and part goes into the parameters where no residual shows it.
Kennedy and O'Hagan (2001, "Bayesian calibration of computer models", JRSS B 63(3)) name the remedy: log loss = log
law + bend + offsets + noise, with a Gaussian process for the bend, here smooth in log N plus smooth in log D. The sizes
are judged by the restricted likelihood (Patterson and Thompson 1971, Biometrika 58(3)), which sees only what the five
parameters have not absorbed, under a prior that holds neither for certain. Each draw is then a fit, by the objective of
the fit itself, to losses made from the law with errors of sizes drawn from the posterior: a parametric bootstrap.

Shapes: n runs, R draws, k columns of a factor; theta (5,) as in megamm_laws.law.solver. Sizes are of log loss.
"""

from dataclasses import dataclass, fields, replace
from itertools import product
from statistics import NormalDist

import numpy as np

from megamm_laws.law import power_law, solver
from megamm_laws.law.solver import Problem, sensitivities

PRIOR_BEND, PRIOR_OFFSETS = 0.4, 0.55
"""Probability, before any residual is seen, that the surface bends; that runs share offsets."""
RATIOS = (1.0, 2.0, 4.0, 8.0)
"""Standard deviations of the bend along one axis and of offsets, in those of the noise: equally likely if not zero."""
USUAL = 0.005
"""Standard deviation of the bend, in log loss, beyond which it is held for unlikely (a half-normal prior).

Laws of this form predict held-out losses to about 1% (docs/fitting.md) and .55% (arXiv 2504.07951), extrapolation and
noise included. Without it, runs along a line in log N and log D, which leave most of a bend unseen, would allow any."""
LENGTHS = (0.22, 0.45)
"""Correlation lengths of the bend as a share of the range of log N, and of log D: equally likely, each axis by itself.

The longer one lets a bend of which the parameters follow most be as large as its faint trace allows."""
RANK = 8
"""Components that hold the bend along one of the two."""
CLIP = 2.1
"""Residuals are cut at this many robust deviations, lest a mistuned run be taken for a bend.

That takes 3% off the standard deviation of normal noise, and leaves heavy tails about what they do to such a fit."""
LEAST = 3
"""Residual degrees of freedom below which nothing is said."""


@dataclass(kw_only=True)
class Component:
    """The posterior of one kind of error."""

    probability: float
    """That it is there."""
    sd: float
    """Its standard deviation, in log loss: posterior mean, counting none as zero."""
    interval: list[float]
    """95% of the same."""

    @classmethod
    def of(cls, sizes: np.ndarray) -> "Component":
        """From draws of the standard deviation (R,), zero where there is none."""
        interval = np.percentile(sizes, [2.5, 97.5]).tolist()
        return cls(probability=float((sizes > 0).mean()), sd=float(sizes.mean()), interval=interval)


@dataclass(kw_only=True)
class ModelError:
    """What the residuals say of errors that runs share."""

    bend: Component
    """A smooth departure of the surface from the form."""
    offsets: Component | None
    """Of the runs of one size or trunk; None where no two runs share one."""


def simulated_fits(
    problem: Problem, theta: np.ndarray, starts: np.ndarray, groups: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, ModelError | None]:
    """Fits (R, 5) to losses made from the law ``theta`` with errors as large as the residuals make likely.

    Where fewer than LEAST residual degrees of freedom are left: ``starts`` and None.

    Args:
        theta: the optimum.
        starts: (R, 5), where each fit begins: a bootstrap's optima, for they lie all along what the runs leave flat.
        groups: (n,) int, which runs share an offset.
    """
    n, resamples = len(problem.y), len(starts)
    basis, residual = free_residual(problem, theta)
    degrees = n - basis.shape[1]
    if degrees < LEAST:
        return starts, None
    along_n, along_d = ([_smooth(x, length) for length in LENGTHS] for x in (problem.u, problem.v))
    shapes = [np.concatenate(pair, axis=1) for pair in product(along_n, along_d)]
    members = (groups[:, None] == np.arange(groups.max() + 1)).astype(float)
    shared = members.shape[1] < n
    hypotheses = [
        (bend, shape, offset)
        for bend, shape in ((0.0, 0), *product(RATIOS, range(len(shapes))))
        for offset in ((0.0, *RATIOS) if shared else (0.0,))
    ]
    judged = [_judge(basis, residual, (shapes[k], bend), (members, offset)) for bend, k, offset in hypotheses]
    log_posterior, squares = np.array(judged).T
    weights = np.exp(log_posterior - log_posterior.max())
    # One hypothesis for each draw, by its weight: intervals then hold the doubt about what kind of error it is.
    picks = rng.choice(len(hypotheses), size=resamples, p=weights / weights.sum())
    bends, shape_of, offsets = np.array(hypotheses)[picks].T
    # The noise is itself only estimated, from few degrees of freedom in a small ladder.
    noise = np.sqrt(squares[picks] / rng.chisquare(degrees, resamples))
    bends, offsets = noise * bends, noise * offsets
    errors = noise[:, None] * rng.standard_normal((resamples, n))
    errors += offsets[:, None] * (rng.standard_normal((resamples, members.shape[1])) @ members.T)
    for shape, factor in enumerate(shapes):
        rows = np.flatnonzero(shape_of == shape)
        errors[rows] += bends[rows, None] * (rng.standard_normal((len(rows), factor.shape[1])) @ factor.T)
    fits = refit_losses(problem, starts, log_law(problem, theta[None]) + errors)
    along_both = Component.of(np.sqrt(2) * bends)
    return fits, ModelError(bend=along_both, offsets=Component.of(offsets) if shared else None)


@dataclass(kw_only=True)
class _Targets(Problem):
    """Log losses that differ from problem to problem: ``evaluate`` is given them (b, n) in place of weights."""

    def evaluate(self, theta: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
        return solver.evaluate(replace(self, y=weights), theta, np.ones((1, weights.shape[1])), delta)


def refit_losses(problem: Problem, starts: np.ndarray, log_losses: np.ndarray) -> np.ndarray:
    """Fits (R, 5) of the runs' sizes and lengths to ``log_losses`` (R, n), each from its row of ``starts`` (R, 5)."""
    targets = _Targets(**{f.name: getattr(problem, f.name) for f in fields(Problem)})
    return solver.minimise(targets, starts, log_losses)[0]


def log_law(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Log loss (R, n) by the laws ``theta`` (R, 5)."""
    return np.log(power_law.predict(problem.to_parameters(theta), *_runs(problem)))


def _runs(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """N and D of the runs, (n,) each."""
    return np.exp(problem.u + problem.mean_log_n), np.exp(problem.v + problem.mean_log_d)


def free_residual(problem: Problem, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis of what theta can follow (n, p), and the residuals free of it (n,).

    Residuals are cut at CLIP robust deviations; those of least absolute deviations pass through as many runs as there
    are parameters, so that the median of the others is compared with the quantile of the normal that it then is.
    """
    low, high = problem.bounds
    inside = (theta > low + 1e-9) & (theta < high - 1e-9)  # what a bound holds follows nothing
    J = sensitivities(problem, theta[None], *_runs(problem))[0]
    # Constants that are given follow nothing either.
    J = J * inside if (bound := problem.subspace) is None else (J @ bound.directions) * inside[bound.free]
    residual = problem.y - log_law(problem, theta[None])[0]
    size, n, through = np.sort(np.abs(residual)), len(residual), min(J.shape[1], len(residual) - 1)
    limit = CLIP * np.median(size[through:]) / NormalDist().inv_cdf((3 * n + through) / (4 * n))
    left, singular, _ = np.linalg.svd(J / np.maximum(np.linalg.norm(J, axis=0), 1e-300), full_matrices=False)
    basis = left[:, singular > 1e-8 * singular[0]]
    return basis, without(basis, np.clip(residual, -limit, limit))


def without(basis: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``x`` (n, ...) less its part within the orthonormal ``basis`` (n, p)."""
    return x - basis @ (basis.T @ x)


def _smooth(x: np.ndarray, length: float) -> np.ndarray:
    """Factor (n, RANK) of the covariance of a bend along ``x`` (n,): see smooth_components and pure_bend."""
    return pure_bend(x, smooth_components(x, length))


def smooth_components(x: np.ndarray, length: float) -> np.ndarray:
    """Factor (n, RANK) of a squared-exponential covariance along ``x`` (n,)."""
    u = x / max(float(np.ptp(x)), 1e-12)
    values, vectors = np.linalg.eigh(np.exp(-0.5 * ((u[:, None] - u) / length) ** 2))
    return vectors[:, -RANK:] * np.sqrt(np.maximum(values[-RANK:], 0.0))


def pure_bend(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """``factor`` (n, k) over runs at ``x`` (n,) without mean and slope, for a straight line is no bend, and scaled.

    Over the runs its variance is 1 on average.
    """
    u = x / max(float(np.ptp(x)), 1e-12)
    factor = without(np.linalg.qr(np.stack([np.ones_like(u), u], axis=1))[0], factor)
    return factor / max(float(np.sqrt((factor**2).sum(1).mean())), 1e-3)  # below: rounding, where all are alike


def _judge(
    basis: np.ndarray, residual: np.ndarray, bend: tuple[np.ndarray, float], offset: tuple[np.ndarray, float]
) -> tuple[float, float]:
    """Log posterior of a hypothesis, and the sum of squares of the residuals made independent under it.

    The restricted likelihood of the ``residual`` (n,) with the variance of the noise integrated out, times the prior.
    The squares are that variance times a chi-squared.

    Args:
        bend, offset: factor (n, k) of each, and its standard deviation in that of the noise (a bend's along one axis).
    """
    parts = [size * part for part, size in (bend, offset) if size]
    factor = np.concatenate(parts or [np.zeros((len(residual), 0))], axis=1)
    free = without(basis, factor)
    gram = np.eye(factor.shape[1]) + factor.T @ free
    pull = free.T @ residual
    squares = max(float(residual @ residual - pull @ np.linalg.solve(gram, pull)), 1e-300)
    degrees = len(residual) - basis.shape[1]
    log_posterior = -0.5 * np.linalg.slogdet(gram)[1] - 0.5 * degrees * np.log(squares)
    return float(log_posterior + log_prior(bend[1], offset[1], squares / degrees)), squares


def log_prior(bend: float, offset: float, variance: float) -> float:
    """Log prior of a bend along one axis and of offsets, in standard deviations of a noise of ``variance``."""
    of_a_bend, of_offsets = PRIOR_BEND / (len(RATIOS) * len(LENGTHS) ** 2), PRIOR_OFFSETS / len(RATIOS)
    found = -((bend / USUAL) ** 2) * variance
    found += np.log(of_a_bend if bend else 1 - PRIOR_BEND)
    return float(found + np.log(of_offsets if offset else 1 - PRIOR_OFFSETS))
