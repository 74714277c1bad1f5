"""Minimise the `huber_log` objective from many starts, and on many resamples, as one batch.

The objective is the weighted sum over runs of Huber_delta(log(E + A/N^alpha + B/D^beta) - log loss). With
delta 1e-3 nearly every run sits on a linear branch, as in a least-absolute-deviations fit, which makes quasi-
Newton methods crawl from kink to kink. Here instead: exact Newton steps, damped by the matrix of iteratively
reweighted least squares (whose step descends on its own), while delta shrinks from 3e-2 to its final value.
The price is second derivatives by hand; the gain is that thousands of 5-parameter problems cost a few batched
array operations.

Shapes: n runs, b problems in the batch. theta (b, 5) holds (E, log A', alpha, log B', beta), where A' and B'
are the terms at the geometric mean of N and of D, which takes the correlation of log A with alpha out.
float64.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megamm_laws.law.constraints import EXPONENT_BOUNDS, Constraints, Subspace

# That of Hoffmann et al. 2022.
DELTA = 1e-3
CONTINUATION = (3e-2, 5e-3)
CHUNK = 64
"""Problems solved together: their arrays stay in the cache."""


class Solvable(Protocol):
    """What :func:`minimise` needs of a problem: :class:`Problem`, or that of any form (forms.base.FormProblem)."""

    y: np.ndarray
    """(n,) log loss."""
    continuation: tuple[float, ...]
    held: tuple[int, ...]
    subspace: Subspace | None
    """Where theta is bound by constraints."""

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]: ...

    def evaluate(self, theta: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, ...]: ...


@dataclass(kw_only=True)
class Problem:
    """Runs as centred logarithms, with the bounds of theta."""

    u: np.ndarray
    v: np.ndarray
    y: np.ndarray
    mean_log_n: float
    mean_log_d: float
    continuation: tuple[float, ...] = CONTINUATION
    held: tuple[int, ...] = ()
    """Components of theta that stay where a start puts them, as a profile likelihood needs."""
    subspace: Subspace | None = None

    @classmethod
    def of(
        cls, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, constraints: Constraints | None = None
    ) -> "Problem":
        log_n, log_d = np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float))
        mean_n, mean_d = float(log_n.mean()), float(log_d.mean())
        y = np.log(np.asarray(loss, float))
        bound = None if constraints is None else constraints.within(mean_n, mean_d)
        return cls(u=log_n - mean_n, v=log_d - mean_d, y=y, mean_log_n=mean_n, mean_log_d=mean_d, subspace=bound)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest theta: E >= 0, EXPONENT_BOUNDS, terms e^-16 to e^3 times the median loss."""
        middle = float(np.median(self.y))
        low, high = EXPONENT_BOUNDS
        return (
            # A term of e^-16 of the loss is 1e-7 of it, far below delta: as good as none, and its logarithm stays
            # finite.
            np.array([0.0, middle - 16, low, middle - 16, low]),
            np.array([np.exp(self.y.max()), middle + 3, high, middle + 3, high]),
        )

    def evaluate(self, theta: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
        """See :func:`evaluate`."""
        return evaluate(self, theta, weights, delta)

    def to_parameters(self, theta: np.ndarray) -> np.ndarray:
        """(..., 5) theta to (..., 5) (E, A, alpha, B, beta)."""
        E, a, alpha, b, beta = np.moveaxis(theta, -1, 0)
        A, B = np.exp(a + alpha * self.mean_log_n), np.exp(b + beta * self.mean_log_d)
        return np.stack([E, A, alpha, B, beta], axis=-1)

    def to_theta(self, parameters: np.ndarray) -> np.ndarray:
        """(..., 5) (E, A, alpha, B, beta) to (..., 5) theta."""
        E, A, alpha, B, beta = np.moveaxis(np.asarray(parameters, float), -1, 0)
        a, b = np.log(A) - alpha * self.mean_log_n, np.log(B) - beta * self.mean_log_d
        return np.stack([E, a, alpha, b, beta], axis=-1)


def evaluate(
    problem: Problem, theta: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Objective (b,), gradient (b, 5), Hessian (b, 5, 5) and reweighted least-squares matrix (b, 5, 5).

    ``weights`` is (b, n) or (1, n): how often each run counts.
    """
    u, v = problem.u, problem.v
    term_n = np.exp(theta[:, 1:2] - theta[:, 2:3] * u)
    term_d = np.exp(theta[:, 3:4] - theta[:, 4:5] * v)
    inverse = 1.0 / (theta[:, 0:1] + term_n + term_d)
    residual = -np.log(inverse) - problem.y
    size = np.abs(residual)
    psi = np.clip(residual, -delta, delta)
    # The derivative of the Huber function, with which each run pulls at the parameters.
    pull = weights * psi
    J = np.empty((len(theta), 5, len(u)))
    J[:, 0] = inverse
    np.multiply(term_n, inverse, out=J[:, 1])
    np.multiply(J[:, 1], -u, out=J[:, 2])
    np.multiply(term_d, inverse, out=J[:, 3])
    np.multiply(J[:, 3], -v, out=J[:, 4])
    gradient = (J @ pull[:, :, None])[:, :, 0]
    transposed = J.transpose(0, 2, 1)
    # Second derivatives of log p are p''/p - J J^T; p'' is zero but for the two blocks below.
    hessian = (J * (weights * (size <= delta) - pull)[:, None]) @ transposed
    # A term differentiated by its own logarithm is the term again, so that these sums over the runs are those of the
    # gradient, already at hand.
    hessian[:, [1, 3], [1, 3]] += gradient[:, [1, 3]]
    hessian[:, [1, 2, 3, 4], [2, 1, 4, 3]] += gradient[:, [2, 2, 4, 4]]
    hessian[:, 2, 2] += ((J[:, 1] * pull) @ (u * u)[:, None])[:, 0]
    hessian[:, 4, 4] += ((J[:, 3] * pull) @ (v * v)[:, None])[:, 0]
    # psi(r)/r, which is 1 within delta: written so that no residual of zero is divided by.
    reweighted = (J * (weights * (delta / np.maximum(size, delta)))[:, None]) @ transposed
    # Both branches at once: r^2/2 within delta, delta (|r| - delta/2) beyond.
    objective = (pull * (residual - 0.5 * psi)).sum(-1)
    return objective, gradient, hessian, reweighted


def starts(problem: Problem, per_axis: int = 6) -> np.ndarray:
    """theta (per_axis^2, 5): a grid over (alpha, beta), with E, A, B by non-negative least squares there."""
    axis = np.geomspace(0.1, 1.2, per_axis)
    alpha, beta = (x.ravel() for x in np.meshgrid(axis, axis, indexing="ij"))
    # Dividing by the loss makes the linear residual that of the logarithm, to first order.
    scale = np.exp(-problem.y)
    columns = np.stack(
        [np.broadcast_to(scale, (len(alpha), len(scale))), scale * np.exp(-alpha[:, None] * problem.u)],
        axis=1,
    )
    columns = np.concatenate([columns, (scale * np.exp(-beta[:, None] * problem.v))[:, None]], axis=1)
    best = np.zeros((len(alpha), 3))
    best_residual = np.full(len(alpha), np.inf)
    for subset in ([0, 1, 2], [1, 2], [0, 1], [0, 2], [0], [1], [2]):  # the active sets of three variables
        X = columns[:, subset]
        # Runs of one size make the columns of E and A parallel; the ridge keeps that solvable.
        gram = X @ X.transpose(0, 2, 1) + 1e-12 * len(scale) * np.eye(len(subset))
        solution = np.linalg.solve(gram, X.sum(-1)[:, :, None])[:, :, 0]
        residual = ((np.einsum("bk,bkn->bn", solution, X) - 1.0) ** 2).sum(-1)
        better = (solution >= 0).all(-1) & (residual < best_residual)
        best_residual[better] = residual[better]
        best[better] = 0.0
        best[np.ix_(better, subset)] = solution[better]
    floor = 1e-2 * np.exp(np.median(problem.y))  # a term of exactly zero could not grow again
    E, A, B = np.maximum(best, floor).T
    return within(problem, np.stack([E, np.log(A), alpha, np.log(B), beta], axis=-1))


def within(problem: Solvable, theta: np.ndarray) -> np.ndarray:
    """``theta`` (b, P) within the bounds and the constraints of ``problem``."""
    clipped = np.clip(theta, *problem.bounds)
    return clipped if problem.subspace is None else problem.subspace.project(clipped)


def minimise(
    problem: Solvable, theta: np.ndarray, weights: np.ndarray, delta: float = DELTA
) -> tuple[np.ndarray, np.ndarray]:
    """Descend from each ``theta`` (b, 5) on runs weighted by ``weights`` (b, n) or (1, n).

    Returns theta (b, 5) and objective (b,) at the optima found.
    """
    theta = np.array(theta, float) if problem.subspace is None else problem.subspace.project(np.asarray(theta, float))
    # A view: one row of weights may stand for a thousand starts.
    weights = np.broadcast_to(weights, (len(theta), len(problem.y)))
    objective = np.empty(len(theta))
    # Chunks outside, stages inside: a chunk goes through all stages while its arrays are in the cache.
    for begin in range(0, len(theta), CHUNK):
        part = slice(begin, begin + CHUNK)
        for stage in (*(d for d in problem.continuation if d > delta), delta):
            last = stage == delta
            # A stage before the last has only to bring theta near: its optimum is not the one that is wanted.
            theta[part], objective[part] = _descend(
                problem, theta[part], weights[part], stage, 200 if last else 6, 1e-11 if last else 1e-3
            )
    return theta, objective


@dataclass(kw_only=True)
class _Free:
    """The free components (k,) of a problem with constraints."""

    bounds: tuple[np.ndarray, np.ndarray]
    y: np.ndarray
    continuation: tuple[float, ...] = ()
    held: tuple[int, ...] = ()
    subspace: Subspace | None = None

    def evaluate(self, theta: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
        raise NotImplementedError("only its steps are made here")


def reduced(
    problem: Solvable, theta: np.ndarray, gradient: np.ndarray, *matrices: np.ndarray
) -> tuple[Solvable, np.ndarray, np.ndarray, list[np.ndarray]]:
    """A problem, theta, gradient (b, k) and matrices (b, k, k) in the free components; all as they are where all are.

    The problem knows bounds only.
    """
    bound = problem.subspace
    if bound is None:
        return problem, theta, gradient, list(matrices)
    low, high = problem.bounds
    free, P = bound.free, bound.directions
    return (
        _Free(bounds=(low[free], high[free]), y=problem.y),
        theta[:, free],
        gradient @ P,
        [P.T @ matrix @ P for matrix in matrices],
    )


def projected_gradient(problem: Solvable, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient (b, 5) without the components that push theta against a bound."""
    low, high = problem.bounds
    # Exact comparisons will do: np.clip puts what runs into a bound on the bound itself.
    blocked = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    blocked[:, list(problem.held)] = True
    return np.where(blocked, 0.0, gradient)


def condition_number(matrix: np.ndarray) -> float:
    """Condition number of a positive semidefinite matrix (p, p) scaled to a unit diagonal; at most 1e16."""
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    # Scaled, or the number would be about the units of theta. The least eigenvalue may come out as zero or below by
    # rounding.
    values = np.linalg.eigvalsh(matrix / np.outer(scale, scale))
    return float(min(1e16, values[-1] / max(values[0], 1e-300)))


def _descend(
    problem: Solvable, theta: np.ndarray, weights: np.ndarray, delta: float, steps: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Projected, damped Newton at one delta; problems leave the batch as they converge."""
    theta = theta.copy()
    result = np.empty(len(theta))
    live = np.arange(len(theta))
    x, w = theta, weights
    # As in Levenberg-Marquardt: a step that helped is trusted more, one that did not is braked hard.
    damping = np.full(len(x), 0.3)
    value, gradient, hessian, reweighted = problem.evaluate(x, w, delta)
    for _ in range(steps):
        trial = within(problem, x + _step(problem, x, gradient, hessian, reweighted, damping))
        new = problem.evaluate(trial, w, delta)
        # Also false for NaN: a trial that overflowed is turned away.
        better = new[0] < value
        move = np.abs(trial - x).max(-1)
        pick = better[:, None]
        x = np.where(pick, trial, x)
        value = np.where(better, new[0], value)
        gradient = np.where(pick, new[1], gradient)
        hessian = np.where(pick[:, None], new[2], hessian)
        reweighted = np.where(pick[:, None], new[3], reweighted)
        # From 1e-6 on: many good steps take the damping to nearly nothing, from where a few bad ones must bring it
        # back.
        damping = np.where(better, damping * 0.1, np.maximum(damping, 1e-6) * 8.0)
        # A rejected step may only mean too little damping: then it must be tiny, or damped to nothing, to
        # stop.
        done = (move < tolerance) | (damping > 1e8)
        if done.any():
            theta[live[done]], result[live[done]] = x[done], value[done]
            keep = ~done
            live, x, w, value, damping = live[keep], x[keep], w[keep], value[keep], damping[keep]
            gradient, hessian, reweighted = gradient[keep], hessian[keep], reweighted[keep]
            if not len(live):
                return theta, result
    theta[live], result[live] = x, value
    return theta, result


def _step(
    problem: Solvable,
    theta: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    reweighted: np.ndarray,
    damping: np.ndarray,
) -> np.ndarray:
    """Solve (hessian + damping * reweighted) step = -gradient over the components free to move: (b, 5)."""
    bound = problem.subspace
    problem, theta, gradient, (hessian, reweighted) = reduced(problem, theta, gradient, hessian, reweighted)
    step = _free_step(problem, theta, gradient, hessian, reweighted, damping)
    return step if bound is None else step @ bound.directions.T


def _free_step(
    problem: Solvable,
    theta: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    reweighted: np.ndarray,
    damping: np.ndarray,
) -> np.ndarray:
    """The step where all components may move but for bounds and ``held``."""
    projected = projected_gradient(problem, theta, gradient)
    # What a bound blocks is where the projection took something away; a gradient that is zero by itself may still move
    # with the others.
    free = ~((projected == 0) & (gradient != 0))
    free[:, list(problem.held)] = False
    identity = np.eye(theta.shape[1])
    diagonal = np.einsum("bii->bi", reweighted)
    # Where runs leave a parameter free the matrix is singular; a ridge picks the shortest of all steps there.
    ridge = 1e-12 * diagonal.max(-1, keepdims=True) + damping[:, None] * (1e-3 * diagonal) + 1e-30
    matrix = hessian + damping[:, None, None] * reweighted + ridge[:, :, None] * identity
    # Rows of the identity keep one shape for the whole batch; their right-hand side is zero, so that they do not move.
    matrix = np.where(free[:, :, None] & free[:, None, :], matrix, identity)
    try:
        return -np.linalg.solve(matrix, projected[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # one singular problem must not stop the batch
        return -np.einsum("bij,bj->bi", np.linalg.pinv(matrix), projected)


def sensitivities(problem: Problem, theta: np.ndarray, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Gradient of log L in theta (R, 5) at each of (m,) runs: (R, m, 5)."""
    # By the means of the problem's own runs, whatever runs are asked about: theta is in these units.
    u, v = np.log(params) - problem.mean_log_n, np.log(tokens) - problem.mean_log_d
    term_n = np.exp(theta[:, 1:2] - theta[:, 2:3] * u)
    term_d = np.exp(theta[:, 3:4] - theta[:, 4:5] * v)
    columns = [np.ones_like(term_n), term_n, -u * term_n, term_d, -v * term_d]
    return np.stack(columns, axis=-1) / (theta[:, 0:1] + term_n + term_d)[:, :, None]
