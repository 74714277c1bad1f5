"""How far the true surface departs from the form of the law, and by how much that widens the intervals of a fit.

Resampling runs takes their residuals for independent. A surface that bends smoothly away from E + A/N^alpha + B/D^beta
makes neighbouring runs err together, so that more of them do not help, and part of the bend goes into the parameters
where no residual shows it. Kennedy and O'Hagan (2001, "Bayesian calibration of computer models", JRSS B 63(3)) name the
remedy: log loss = log law + bend + noise, with a Gaussian process for the bend. Here it is smooth in log N plus smooth
in log D. Its size is judged by the restricted likelihood (Patterson and Thompson 1971, Biometrika 58(3)), which sees
only what the five parameters have not absorbed, under a prior that holds no bend for likely; each bootstrap draw of
the parameters is then moved by what one bend of a size drawn from the posterior does to the fit.

Where runs share a trunk, the bootstrap resamples trunks and so holds their offsets; the likelihood has them as a third
component, lest they be taken for a bend.

Shapes: n runs, R draws, k columns of a factor; theta (5,) as in megamm.scaling.minimise. Sizes are of log loss.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np

from megamm.scaling import laws, minimise
from megamm.scaling.design import sensitivities
from megamm.scaling.minimise import Problem

PRIOR = 0.3
"""Probability, before any residual is seen, that the surface bends; likewise that trunks differ."""
RATIOS = (0.7, 1.4, 2.8)
"""Standard deviations of bend and of trunk offsets, in those of the noise, held for equally likely if not zero."""
LENGTH = 0.2
"""Correlation length of the bend as a share of the range of log N and of log D."""
RANK = 8
"""Components that hold the bend along one of the two."""
QUADRATIC = 1e3
"""A Huber delta that no residual of log loss reaches: least squares."""
CLIP = 3.0
"""Residuals are cut at this many robust deviations, lest a mistuned run be taken for a bend."""
LEAST_SPREAD = 0.65
"""The resampled spread is drawn in no further than to this share: tables of 9 runs would be held for too certain."""
LEAST = 3
"""Residual degrees of freedom below which nothing is said of a bend."""


@dataclass(kw_only=True)
class ModelError:
    """What the residuals say of a bend: its posterior."""

    probability: float = 0.0
    """That there is one."""
    sd: float = 0.0
    """Its standard deviation, in log loss: posterior mean, counting none as zero."""
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """95% of the same."""


@dataclass(kw_only=True)
class _Hypothesis:
    """Bend and offsets of trunks as multiples of the noise, and what the residuals say of them."""

    ratio: float
    """Standard deviation of the bend along one axis, in that of the noise."""
    log_posterior: float
    squares: float
    """Sum of squares of the residuals, made independent: noise variance times a chi-squared."""


def widen(
    problem: Problem, theta: np.ndarray, draws: np.ndarray, clusters: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, ModelError]:
    """The bootstrap ``draws`` (R, 5) of theta moved by bends of likely size, and what is known of that size.

    Args:
        theta: the optimum.
        clusters: (n,) int, which unit of the bootstrap each run belongs to.
    """
    n, resamples = len(problem.y), len(draws)
    basis, residual = _free_residual(problem, theta)
    degrees = n - basis.shape[1]
    if degrees < LEAST:
        return draws, ModelError()
    bend = np.concatenate([_smooth(problem.u), _smooth(problem.v)], axis=1)
    units = int(clusters.max()) + 1
    shared = units < n
    trunks = (clusters[:, None] == np.arange(units if shared else 0)).astype(float)
    offsets = (0.0, *RATIOS) if shared else (0.0,)
    found = [
        _judge(basis, residual, ((bend, ratio), (trunks, offset))) for ratio in (0.0, *RATIOS) for offset in offsets
    ]
    weights = np.exp(np.array([h.log_posterior for h in found]) - max(h.log_posterior for h in found))
    picks = rng.choice(len(found), size=resamples, p=weights / weights.sum())
    squares = np.array([h.squares for h in found])[picks]
    size = np.array([h.ratio for h in found])[picks] * np.sqrt(squares / rng.chisquare(degrees, resamples))
    bends = size[:, None] * (rng.standard_normal((resamples, bend.shape[1])) @ bend.T)
    own = np.ones(resamples)
    if not shared:
        # The resampled residuals hold the bend as well, and only the share of the noise belongs to resampling. Nor
        # does all their spread: resampled pairs overstate that of p parameters in small tables, by simulation about
        # n / (n - p) times (docs/calibration.md).
        share = np.clip(squares / max(residual @ residual, 1e-300), 0.0, 1.0)
        own = np.sqrt(share) * max(1 - len(theta) / n, LEAST_SPREAD)
    moved = np.clip(theta + own[:, None] * (draws - theta), *problem.bounds)
    moved[size > 0] = follow(problem, moved[size > 0], bends[size > 0])
    spread = np.sqrt(2) * size  # along both axes
    interval = np.percentile(spread, [2.5, 97.5]).tolist()
    return moved, ModelError(probability=float((size > 0).mean()), sd=float(spread.mean()), interval=interval)


@dataclass(kw_only=True)
class _Targets(Problem):
    """Log losses that differ from problem to problem: ``evaluate`` is given them (b, n) in place of weights."""

    def evaluate(self, theta: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
        return minimise.evaluate(replace(self, y=weights), theta, np.ones((1, weights.shape[1])), delta)


def follow(problem: Problem, draws: np.ndarray, bends: np.ndarray) -> np.ndarray:
    """Least-squares fits (R, 5) to the laws of ``draws`` (R, 5), each with its bend (R, n) of log loss added.

    A fit and no linear map: in small tables directions are flat, and E may be at zero.
    """
    targets = _Targets(**{f.name: getattr(problem, f.name) for f in fields(Problem)})
    return minimise.minimise(targets, draws, _log_law(problem, draws) + bends, delta=QUADRATIC)[0]


def _log_law(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Log loss (R, n) by the laws ``theta`` (R, 5)."""
    return np.log(laws.predict(problem.to_parameters(theta), *_runs(problem)))


def _runs(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """N and D of the runs, (n,) each."""
    return np.exp(problem.u + problem.mean_log_n), np.exp(problem.v + problem.mean_log_d)


def _free_residual(problem: Problem, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis of what theta can follow (n, p), and the residuals free of it (n,).

    Residuals are cut at CLIP robust deviations; those of least absolute deviations pass through as many runs as there
    are parameters, so that these are left out of the deviation.
    """
    low, high = problem.bounds
    inside = (theta > low + 1e-9) & (theta < high - 1e-9)  # what a bound holds follows nothing
    J = sensitivities(problem, theta[None], *_runs(problem))[0] * inside
    residual = problem.y - _log_law(problem, theta[None])[0]
    size = np.sort(np.abs(residual))
    limit = CLIP * 1.4826 * np.median(size[min(len(theta), len(size) - 1) :])
    left, singular, _ = np.linalg.svd(J / np.maximum(np.linalg.norm(J, axis=0), 1e-300), full_matrices=False)
    basis = left[:, singular > 1e-8 * singular[0]]
    return basis, _without(basis, np.clip(residual, -limit, limit))


def _without(basis: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``x`` (n, ...) less its part within the orthonormal ``basis`` (n, p)."""
    return x - basis @ (basis.T @ x)


def _smooth(x: np.ndarray) -> np.ndarray:
    """Factor (n, RANK) of the covariance of a bend of unit variance along ``x`` (n,): squared-exponential."""
    u = x / max(float(np.ptp(x)), 1e-12)
    values, vectors = np.linalg.eigh(np.exp(-0.5 * ((u[:, None] - u) / LENGTH) ** 2))
    return vectors[:, -RANK:] * np.sqrt(np.maximum(values[-RANK:], 0.0))


def _judge(basis: np.ndarray, residual: np.ndarray, components: tuple[tuple[np.ndarray, float], ...]) -> _Hypothesis:
    """The restricted likelihood of the ``residual`` (n,) with the variance of the noise integrated out, and the prior.

    Args:
        components: factors (n, k) and their standard deviations in that of the noise, the bend first.
    """
    factor = np.concatenate(
        [size * part for part, size in components if size] or [np.zeros((len(residual), 0))], axis=1
    )
    free = _without(basis, factor)
    gram = np.eye(factor.shape[1]) + factor.T @ free
    pull = free.T @ residual
    squares = max(float(residual @ residual - pull @ np.linalg.solve(gram, pull)), 1e-300)
    degrees = len(residual) - basis.shape[1]
    log_likelihood = -0.5 * np.linalg.slogdet(gram)[1] - 0.5 * degrees * np.log(squares)
    log_prior = sum(np.log(PRIOR / len(RATIOS) if size else 1 - PRIOR) for _, size in components)
    return _Hypothesis(ratio=components[0][1], log_posterior=float(log_likelihood + log_prior), squares=squares)
