"""Draws of two fits together: what matched runs of two groups have in common cancels in the difference of their laws.

Two ladders on one grid share the noise of the data's order, a bend of the surface away from the form and what all runs
of a size have in common. Drawn apart, each fit's errors count in full. Here log loss of both groups is one vector,

    log loss = log law + bend + offsets + noise,

as in uncertainty.model_error, where bend, offsets and noise of the second group each have a correlation with those of
the first. Sizes and correlations are judged by the restricted likelihood of the residuals of both groups, which sees
only what neither law has absorbed; a draw takes all of them from the posterior, so that groups that err apart, or of
which the runs cannot tell, are not taken for alike. Noise is shared by matched runs only, an offset by sizes (or
trunks) that hold matched runs, a bend as one function of N and D.

Shapes: n = n1 + n2 runs, R draws, k columns of a factor, H hypotheses. Sizes are of log loss.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from scipy.linalg import block_diag

from megamm_laws.fitting.fit import Fit, fit_problem, offset_labels
from megamm_laws.law.fitted import Pairing
from megamm_laws.law.solver import Problem
from megamm_laws.runs.matching import matched_runs
from megamm_laws.uncertainty import model_error
from megamm_laws.uncertainty.model_error import LENGTHS, RATIOS

LEAST_MATCHED = 8
"""Matched runs below which two groups are drawn apart: too few to tell a correlation from chance."""
CORRELATIONS = {0.0: 0.4, 0.5: 0.2, 0.875: 0.2, 1.0: 0.2}
"""Of bends, of offsets, with prior probabilities. Each step halves what does not cancel; the last leaves none."""
OF_NOISE = {0.0: 0.4, 0.5: 0.2, 0.875: 0.2, 0.97: 0.2}
"""The same of noise, of which no two runs have all in common."""
APART, ALIKE = 0.3, 0.3
"""Prior probability that the two groups share nothing at all; that they share all that the form misses.

The rest of the probability is for bends, offsets and noise each with a correlation of its own."""
NOISE_RATIOS = {0.5: 0.25, 1.0: 0.5, 2.0: 0.25}
"""Standard deviation of the second group's noise over the first's, with its prior probability."""


def pair_fits(fits: Sequence[Fit]) -> None:
    """Give each two of ``fits`` (of one table and loss column) whose runs match a Pairing, under ``Fit.pairings``."""
    for pair in combinations(sorted(fits, key=lambda fit: fit.group), 2):
        first, second = pair
        matches = matched_runs(first.table, second.table)
        if len(matches) < LEAST_MATCHED or any(fit.model_error is None for fit in pair):
            continue
        rng = np.random.default_rng([first.seed, *(zlib.crc32(fit.group.encode()) for fit in pair)])
        draws, correlation = joint_draws(first, second, matches, rng)
        pairing = Pairing(
            draws=dict(zip((first.group, second.group), draws)), matched=len(matches), correlation=correlation
        )
        first.pairings[second.group] = second.pairings[first.group] = pairing


def joint_draws(
    first: Fit, second: Fit, matches: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Parameters (R, 5) of both laws, row by row together, and the posterior mean correlation of matched runs' errors.

    Args:
        matches: (m, 2), rows of both tables that match.
    """
    pair = (first, second)
    problems = [fit_problem(fit.table, fit.loss_column, fit.constraints) for fit in pair]
    thetas = [problem.to_theta(fit.parameters) for problem, fit in zip(problems, pair)]
    free = [model_error.free_residual(problem, theta) for problem, theta in zip(problems, thetas)]
    model = _Model.of(problems, [offset_labels(fit.table) for fit in pair], matches)
    judged = model.judge(block_diag(*(basis for basis, _ in free)), np.concatenate([r for _, r in free]))
    resamples = min(len(fit.resampled) for fit in pair)
    errors, correlations = model.errors(judged, resamples, rng)
    count = len(first.table)
    # A draw in which nothing is shared has no need to take the sizes of one group's errors for those of the other.
    shared = np.flatnonzero(correlations)
    draws = []
    for problem, theta, fit, own in zip(problems, thetas, pair, (errors[:, :count], errors[:, count:])):
        starts = np.clip(problem.to_theta(fit.resampled[shared]), *problem.bounds)
        refitted = model_error.refit_losses(problem, starts, model_error.log_law(problem, theta[None]) + own[shared])
        both = fit.draws[:resamples].copy()
        both[shared] = problem.to_parameters(refitted)
        draws.append(both)
    return (draws[0], draws[1]), float(correlations.mean())


@dataclass(kw_only=True)
class _Judged:
    """Hypotheses (H,) with their weights; each names a noise, a shape of bends and the sizes of what is shared."""

    noise: np.ndarray
    shape: np.ndarray
    kind: np.ndarray
    weight: np.ndarray
    squares: np.ndarray
    """Sum of squares of the residuals made independent: the variance of the noise times a chi-squared."""
    degrees: int


@dataclass(kw_only=True)
class _Model:
    """What two groups may share."""

    factors: list[np.ndarray]
    """(n, k) by shape of the bend: bends alike in both groups, bends opposite in them; offsets likewise."""
    kinds: list[tuple[float, float, float, float]]
    """Size and correlation of the bend, of the offsets, in standard deviations of the first group's noise."""
    scales: np.ndarray
    """(kinds, k): standard deviation of each column. Those of alike and opposite parts are independent."""
    noises: list[tuple[float, float]]
    """Ratio of the second group's noise to the first's, and its correlation over matched runs."""
    roots: list[np.ndarray]
    """(n, n): Cholesky factor of the covariance of each of them."""

    @classmethod
    def of(cls, problems: Sequence[Problem], labels: Sequence[np.ndarray], matches: np.ndarray) -> "_Model":
        """Of two groups with the runs of ``problems``, those of one offset by ``labels``, and ``matches`` (m, 2)."""
        counts = [len(problem.y) for problem in problems]
        log_n = [problem.u + problem.mean_log_n for problem in problems]
        log_d = [problem.v + problem.mean_log_d for problem in problems]
        along_n, along_d = ([_bends(x, length) for length in LENGTHS] for x in (log_n, log_d))
        # By shape, and within it by group: bends along log N beside those along log D.
        bends = [[np.concatenate(parts, axis=1) for parts in zip(*both)] for both in product(along_n, along_d)]
        members = _members(labels, matches)
        share = any(member.sum(0).max() > 1 for member in members)
        kinds = [
            (bend, of_bend, offset, of_offsets)
            for bend, of_bend in ((0.0, 0.0), *product(RATIOS, CORRELATIONS))
            for offset, of_offsets in ((0.0, 0.0), *(product(RATIOS, CORRELATIONS) if share else ()))
        ]
        widths = (bends[0][0].shape[1], members[0].shape[1])
        noises = list(product(NOISE_RATIOS, OF_NOISE))
        return cls(
            factors=[np.concatenate([_alike_and_opposite(bend), _alike_and_opposite(members)], 1) for bend in bends],
            kinds=kinds,
            scales=np.stack([_scale(kind, widths) for kind in kinds]),
            noises=noises,
            roots=[_noise_root(counts, matches, *noise) for noise in noises],
        )

    def judge(self, basis: np.ndarray, residual: np.ndarray) -> _Judged:
        """Every hypothesis by the ``residual`` (n,) of two laws that can follow ``basis`` (n, p)."""
        degrees = len(residual) - basis.shape[1]
        rows: list[tuple[int, int, int]] = []
        likelihood: list[float] = []
        prior: list[float] = []
        squares: list[float] = []
        size = self.scales.shape[1]
        for i, root in enumerate(self.roots):
            q, r = np.linalg.qr(np.linalg.solve(root, basis))
            known = -np.log(np.diag(root)).sum() - np.log(np.abs(np.diag(r))).sum()
            pure = model_error.without(q, np.linalg.solve(root, residual))
            length = max(float(np.linalg.norm(pure)), 1e-150)  # losses without noise leave next to nothing
            for k, factor in enumerate(self.factors):
                free = model_error.without(q, np.linalg.solve(root, factor))
                # The Cholesky factor of the matrix bordered by the residuals gives determinant and squares at once.
                bordered = np.empty((len(self.scales), size + 1, size + 1))
                bordered[:, :-1, :-1] = np.eye(size) + free.T @ free * self.scales[:, :, None] * self.scales[:, None]
                bordered[:, -1, :-1] = bordered[:, :-1, -1] = free.T @ pure / length * self.scales
                bordered[:, -1, -1] = 1 + 1e-9  # rounding, where all is explained
                diagonal = np.linalg.cholesky(bordered).diagonal(axis1=1, axis2=2)
                left = (length * diagonal[:, -1]) ** 2
                found = known - np.log(diagonal[:, :-1]).sum(1) - 0.5 * degrees * np.log(left)
                for kind, (sizes, value, square) in enumerate(zip(self.kinds, found, left)):
                    if k and not sizes[0]:  # the same hypothesis whatever the shape of no bend
                        continue
                    rows.append((i, k, kind))
                    likelihood.append(value)
                    prior.append(_log_prior(self.noises[i], sizes, square / degrees))
                    squares.append(square)
        noise, shape, kinds = np.array(rows).T
        posterior = np.array(likelihood) + np.array(prior)
        weight = np.exp(posterior - posterior.max())
        return _Judged(
            noise=noise,
            shape=shape,
            kind=kinds,
            weight=weight / weight.sum(),
            squares=np.array(squares),
            degrees=degrees,
        )

    def errors(self, judged: _Judged, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Errors of all runs (R, n) with sizes drawn from the posterior, and the correlation of matched runs' (R,)."""
        picks = rng.choice(len(judged.weight), size=resamples, p=judged.weight)
        deviation = np.sqrt(judged.squares[picks] / rng.chisquare(judged.degrees, resamples))
        n, k = self.factors[0].shape
        noise, parts = rng.standard_normal((resamples, n)), rng.standard_normal((resamples, k))
        errors, correlations = np.empty((resamples, n)), np.empty(resamples)
        for pick in np.unique(picks):
            rows = np.flatnonzero(picks == pick)
            of_noise, kind = judged.noise[pick], judged.kind[pick]
            columns = self.factors[judged.shape[pick]] * self.scales[kind]
            errors[rows] = noise[rows] @ self.roots[of_noise].T + parts[rows] @ columns.T
            correlations[rows] = _correlation(self.noises[of_noise], self.kinds[kind])
        return deviation[:, None] * errors, correlations


def _bends(x: Sequence[np.ndarray], length: float) -> list[np.ndarray]:
    """Factors of one bend along an axis at the runs of each group: the same columns are the same function."""
    components = model_error.smooth_components(np.concatenate(x), length)
    return [
        model_error.pure_bend(own, part) for own, part in zip(x, (components[: len(x[0])], components[len(x[0]) :]))
    ]


def _members(labels: Sequence[np.ndarray], matches: np.ndarray) -> list[np.ndarray]:
    """Which runs of each group share an offset, (n1, m) and (n2, m): a column that both have holds matched runs."""
    first, second = labels
    names: dict[int, int] = {}
    for i, j in matches:
        if second[j] not in names and first[i] not in names.values():
            names[second[j]] = first[i]
    beyond = first.max() + 1
    other = np.array([names.get(label, beyond + label) for label in second])
    columns = np.unique(np.concatenate([first, other]))
    return [(own[:, None] == columns).astype(float) for own in (first, other)]


def _alike_and_opposite(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Factors (n1, k) and (n2, k) of two groups as one (n1 + n2, 2k): columns for both alike, columns for opposite."""
    first, second = parts
    return np.block([[first, first], [second, -second]]) / np.sqrt(2)


def _scale(kind: tuple[float, float, float, float], widths: tuple[int, int]) -> np.ndarray:
    """(k,): standard deviations of the columns of a factor under ``kind``."""
    parts = []
    for size, correlation, width in zip(kind[::2], kind[1::2], widths):
        parts.append(size * np.repeat(np.sqrt([1 + correlation, 1 - correlation]), width))
    return np.concatenate(parts)


def _noise_root(counts: Sequence[int], matches: np.ndarray, ratio: float, correlation: float) -> np.ndarray:
    """Cholesky factor (n, n) of the covariance of the noise, of variance 1 in the first group."""
    covariance = np.diag(np.repeat([1.0, ratio**2], counts))
    i, j = matches[:, 0], counts[0] + matches[:, 1]
    covariance[i, j] = covariance[j, i] = correlation * ratio
    return np.linalg.cholesky(covariance)


def _log_prior(noise: tuple[float, float], kind: tuple[float, float, float, float], variance: float) -> float:
    """Log prior of a hypothesis, of which the noise of the first group has this ``variance``."""
    (ratio, of_noise), (bend, of_bend, offset, of_offsets) = noise, kind
    of_form = [correlation for size, correlation in ((bend, of_bend), (offset, of_offsets)) if size]
    apart, alike = not any([of_noise, *of_form]), all(correlation == 1 for correlation in of_form)
    each = float(np.prod([CORRELATIONS[correlation] for correlation in of_form]))
    probability = APART * apart + OF_NOISE[of_noise] * (ALIKE * alike + (1 - APART - ALIKE) * each)
    return model_error.log_prior(bend, offset, variance) + float(np.log(NOISE_RATIOS[ratio] * probability))


def _correlation(noise: tuple[float, float], kind: tuple[float, float, float, float]) -> float:
    """Of the errors of two matched runs."""
    (ratio, of_noise), (bend, of_bend, offset, of_offsets) = noise, kind
    common = 2 * bend**2 * of_bend + offset**2 * of_offsets + ratio * of_noise
    form = 2 * bend**2 + offset**2
    return float(common / np.sqrt((1 + form) * (ratio**2 + form)))
