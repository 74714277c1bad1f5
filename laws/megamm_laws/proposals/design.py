"""Which runs to make next: those that shrink the interval of one decision most for their FLOPs.

Log losses are taken as y = log L(N, D; theta) + noise of one size, so that runs carry the Fisher information
M = sum of J J' with J the gradient of log L in theta, and a decision q(theta) has variance g' M^-1 g with g its
gradient (the delta method; c-optimal design, Atkinson, Donev and Tobias 2007, "Optimum Experimental Designs",
chapter 10). theta is unknown: everything is computed at every bootstrap draw and averaged in the logarithm. Runs are
added one by one (rank-one updates), by gain over cost to a power; of a few powers the best design within the budget
is kept, since gain per FLOP alone overlooks one large run that would do.

theta = (E, log A', alpha, log B', beta) as in megamm_laws.law.solver.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.law import power_law
from megamm_laws.law.solver import Problem, sensitivities

COST_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
PRIOR = np.array([2.0, 5.0, 0.5, 5.0, 0.5])
"""Standard deviations of a weak normal prior on theta, which keeps M invertible for the poorest ladders."""
NEGLIGIBLE = 1e-3
"""A design stops growing where no run shrinks the expected interval by this share."""
FORM_DOMINATES = (
    "most of the interval is the bend of the form: more runs among those so far will not narrow it, only larger runs "
    "or another form"
)

Decision = Callable[[np.ndarray], np.ndarray]
"""A scalar of the law: parameters (..., 5) to (...)."""


def loss_at(flops: float, kappa: float = 1.0) -> Decision:
    """L*(C), the lowest loss that ``flops`` buy, in nats."""
    return lambda parameters: power_law.frontier_loss(parameters, np.array([flops]), kappa)[..., 0]


def log_params_at(flops: float, kappa: float = 1.0) -> Decision:
    """log N*(C), the compute-optimal number of parameters."""
    return lambda parameters: np.log(power_law.optimum(parameters, np.array([flops]), kappa)[0][..., 0])


def allocation_exponent() -> Decision:
    """a in N* ~ C^a."""
    return lambda parameters: parameters[..., 4] / (parameters[..., 2] + parameters[..., 4])


@dataclass(kw_only=True)
class Ladder:
    """The runs of a group so far and what may be added to them.

    A decision on two groups, such as the difference of their frontiers, has one ladder per group: the groups' runs
    are independent, so that their variances add.
    """

    name: str
    decision: Decision
    params: np.ndarray
    """(n,) of the runs so far."""
    tokens: np.ndarray
    draws: np.ndarray
    """(R, 5) bootstrap draws of (E, A, alpha, B, beta)."""
    noise: float
    """Standard deviation of log loss between runs of one setting."""
    candidate_params: np.ndarray
    """(m,)"""
    candidate_tokens: np.ndarray
    kappa: float = 1.0

    @property
    def cost(self) -> np.ndarray:
        """FLOPs of each candidate, (m,)."""
        return 6.0 * self.kappa * self.candidate_params * self.candidate_tokens


@dataclass(kw_only=True)
class Proposal:
    """A run to make; ``width`` is the expected width by noise of the decision's interval after it over that before all.

    See :func:`narrowed` for the whole interval.
    """

    group: str
    params: float
    tokens: float
    flops: float
    width: float


@dataclass(kw_only=True)
class _State:
    """A ladder during the search: inverse information and gradients at each draw."""

    inverse: np.ndarray
    """(R, 5, 5): covariance of theta."""
    gradient: np.ndarray
    """(R, 5) of the decision."""
    jacobian: np.ndarray
    """(R, m, 5) of the candidates, in units of the noise."""
    cost: np.ndarray
    used: np.ndarray

    def variance(self) -> np.ndarray:
        """Variance of the decision at each draw, (R,)."""
        return np.einsum("ri,rij,rj->r", self.gradient, self.inverse, self.gradient)

    def reductions(self) -> np.ndarray:
        """By how much each candidate would lower the variance, (R, m)."""
        spread = self.jacobian @ self.inverse
        along = np.einsum("rmi,ri->rm", spread, self.gradient)
        # 1 is the variance of the noise, in whose units the candidates' jacobian is.
        return along**2 / (1 + np.einsum("rmi,rmi->rm", spread, self.jacobian))

    def add(self, index: int) -> None:
        """Take candidate ``index`` into the design (Sherman and Morrison)."""
        spread = np.einsum("rij,rj->ri", self.inverse, self.jacobian[:, index])
        scale = 1 + np.einsum("ri,ri->r", spread, self.jacobian[:, index])
        self.inverse = self.inverse - spread[:, :, None] * spread[:, None, :] / scale[:, None, None]
        self.used[index] = True


def gradient_of(problem: Problem, decision: Decision, theta: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient of a decision in theta by central differences, (R, 5)."""
    # Central differences lose least near the cube root of the precision of floats, 6e-6.
    moves = step * np.eye(theta.shape[1])
    ahead, behind = (decision(problem.to_parameters(theta[:, None] + sign * moves)) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def propose(ladders: list[Ladder], budget: float, max_runs: int = 40) -> list[Proposal]:
    """The runs that shrink the decision's interval most within ``budget`` FLOPs, in the order of their choice.

    Raises:
        InputError: no candidate fits into the budget.
    """
    if all(ladder.cost.min(initial=np.inf) > budget for ladder in ladders):
        raise InputError(f"--budget: {budget:.3g} FLOPs is less than the cheapest candidate run")
    designs = [_greedy(ladders, budget, power, max_runs) for power in COST_POWERS]
    return min(designs, key=lambda design: design[-1].width if design else 1.0)


def _greedy(ladders: list[Ladder], budget: float, power: float, max_runs: int) -> list[Proposal]:
    states = [_start(ladder) for ladder in ladders]
    chosen: list[Proposal] = []
    left, before = budget, np.sum([state.variance() for state in states], axis=0)
    current = before
    while len(chosen) < max_runs:
        best = None
        for ladder, state in zip(ladders, states):
            # Of the width, hence the half; of the sum of the variances of all ladders, to which each adds its own.
            gains = -0.5 * np.log(np.maximum(1 - state.reductions() / current[:, None], 1e-12)).mean(axis=0)
            gains[state.used | (state.cost > left)] = -np.inf
            score = np.where(gains > NEGLIGIBLE, gains / state.cost**power, -np.inf)
            index = int(score.argmax())
            if np.isfinite(score[index]) and (best is None or score[index] > best[0]):
                best = score[index], ladder, state, index
        if best is None:
            break
        _, ladder, state, index = best
        state.add(index)
        left -= state.cost[index]
        current = sum(s.variance() for s in states)
        chosen.append(
            Proposal(
                group=ladder.name,
                params=float(ladder.candidate_params[index]),
                tokens=float(ladder.candidate_tokens[index]),
                flops=float(state.cost[index]),
                width=float(np.exp(0.5 * np.log(current / before).mean())),
            )
        )
    return chosen


def _start(ladder: Ladder) -> _State:
    """Information of the runs so far at each draw, and the candidates' sensitivities."""
    # Losses of one will do: sensitivities need only the means of log N and log D.
    problem = Problem.of(ladder.params, ladder.tokens, np.ones(len(ladder.params)))
    theta = problem.to_theta(ladder.draws)
    # A draw with a term of zero says nothing of its exponent; its logarithm must stay finite.
    theta = np.nan_to_num(theta, neginf=-16.0)
    # In units of the noise, so that the information below needs no further weight.
    runs = sensitivities(problem, theta, ladder.params, ladder.tokens) / ladder.noise
    information = runs.transpose(0, 2, 1) @ runs + np.diag(PRIOR**-2.0)
    cost = ladder.cost
    return _State(
        inverse=np.linalg.inv(information),
        gradient=gradient_of(problem, ladder.decision, theta),
        jacobian=sensitivities(problem, theta, ladder.candidate_params, ladder.candidate_tokens) / ladder.noise,
        cost=cost,
        used=np.zeros(len(cost), bool),
    )


def candidate_grid(
    params: tuple[float, float],
    tokens: tuple[float, float],
    max_flops: float,
    kappa: float = 1.0,
    ratios: tuple[float, float] = (0.0, np.inf),
    per_axis: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs that may be proposed, each (m,): a log grid of sizes and lengths from lowest to highest.

    None has more than ``max_flops``, or tokens per parameter outside ``ratios``.
    """
    n, d = (np.geomspace(*ends, per_axis) if ends[1] > ends[0] else np.array(ends[:1]) for ends in (params, tokens))
    n, d = (x.ravel() for x in np.meshgrid(n, d, indexing="ij"))
    # The corner of the grid may cost just the limit, which rounding must not forbid.
    keep = (6 * kappa * n * d <= max_flops * (1 + 1e-9)) & (d / n >= ratios[0]) & (d / n <= ratios[1])
    return n[keep], d[keep]


def ratio_range(params: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Lowest and highest tokens per parameter of runs (n,), with 1% to spare for rounding."""
    ratios = tokens / params
    return float(ratios.min() * 0.99), float(ratios.max() * 1.01)


def narrowed(noise_left: float, noise_share: float) -> float:
    """Width of an interval after runs that leave ``noise_left`` of its width by noise, over that before.

    The squares of the widths by noise and by the error of the form add up, and the second stays: runs within reach of
    those so far see the same bend.

    Args:
        noise_share: width by noise alone over that of the whole interval.
    """
    share = min(noise_share, 1.0) ** 2
    return float(np.sqrt(1 - share * (1 - noise_left**2)))


def form_dominates(noise_share: float) -> bool:
    """Whether over half of the squared width is the error of the form; see :func:`narrowed`."""
    return noise_share**2 < 0.5


def noise_of(residuals: np.ndarray, parameters: int = len(power_law.PARAMETERS)) -> float:
    """Standard deviation of log loss from a fit's residuals (n,): 1.4826 times their median size, over n - 5.

    At least 1e-4, so that simulated data without noise can be designed for.
    """
    count = len(residuals)
    scale = 1.4826 * float(np.median(np.abs(residuals)))
    return max(scale * np.sqrt(count / max(count - parameters, 1)), 1e-4)
