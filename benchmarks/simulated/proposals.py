"""Proposed runs against a regular grid at equal compute, on simulated ladders with a known law."""

from collections.abc import Callable

import numpy as np
from megamm_laws.fitting.fit import Fit, fit_group
from megamm_laws.law import power_law
from megamm_laws.proposals.design import (
    Decision,
    Ladder,
    allocation_exponent,
    candidate_grid,
    log_params_at,
    loss_at,
    noise_of,
    propose,
)
from megamm_laws.runs.table import RunTable, check_rows

from simulated.ladders import TRUTH

DECISIONS: dict[str, Callable[[float], Decision]] = {
    "L*(target)": loss_at,
    "log N*(target)": log_params_at,
    "a": lambda flops: allocation_exponent(),
}
RATIOS = (5.0, 80.0)
"""Tokens per parameter of pilot and grid."""
GRIDS = ((4, 3), (5, 4), (6, 5))
"""Numbers of sizes and lengths of the regular grids; a study is charged with the best one."""
SMALLEST = 2e7
FREEDOM = {"proposed": (0.0, np.inf), "same ratios": (RATIOS[0] / 1.01, RATIOS[1] * 1.01)}
"""Tokens per parameter that proposals may have."""
ROUNDS = (0.1, 0.3, 0.6)
"""Shares of the budget proposed, run and fitted before the next is proposed."""


def regular_grid(budget: float, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes from SMALLEST up, log-spaced, times tokens per parameter, with a total of ``budget`` FLOPs."""
    ratios = np.tile(np.geomspace(*RATIOS, shape[1]), shape[0])

    def sizes(top: float) -> np.ndarray:
        return np.repeat(np.geomspace(SMALLEST, top, shape[0]), shape[1])

    low, high = np.log(SMALLEST * 1.001), np.log(1e13)
    for _ in range(80):
        middle = (low + high) / 2
        n = sizes(np.exp(middle))
        low, high = (middle, high) if (6 * n**2 * ratios).sum() < budget else (low, middle)
    n = sizes(np.exp(low))
    return n, n * ratios


def simulate_runs(params: np.ndarray, tokens: np.ndarray, noise: float, rng: np.random.Generator) -> RunTable:
    """Runs of the law TRUTH with normal noise of log loss."""
    losses = power_law.predict(TRUTH, params, tokens) * np.exp(noise * rng.standard_normal(len(params)))
    rows = [
        {"run": f"r{i}", "params": n, "tokens": d, "loss": y} for i, (n, d, y) in enumerate(zip(params, tokens, losses))
    ]
    return check_rows(RunTable(path="simulated", rows=rows, lines=list(range(2, len(rows) + 2))))


def ladder_of(fit: Fit, decision: Decision, candidates: tuple[np.ndarray, np.ndarray], draws: int = 60) -> Ladder:
    """A fit as the start of a design; ``draws`` of its bootstrap are enough for an expectation."""
    return Ladder(
        name=fit.group,
        decision=decision,
        params=fit.table.numbers("params"),
        tokens=fit.table.numbers("tokens"),
        draws=fit.draws[:draws],
        noise=noise_of(fit.residuals),
        candidate_params=candidates[0],
        candidate_tokens=candidates[1],
        kappa=fit.kappa,
    )


def extend(table: RunTable, plan: tuple[np.ndarray, np.ndarray], noise: float, rng: np.random.Generator) -> RunTable:
    """``table`` and the runs of ``plan``, simulated."""
    rows = [*table.rows, *simulate_runs(*plan, noise, rng).rows]
    return RunTable(path="simulated", rows=rows, lines=list(range(2, len(rows) + 2)))


def follow_proposals(
    fit: Fit,
    decision: Decision,
    budget: float,
    ends: list[tuple[float, float]],
    ratios: tuple[float, float],
    noise: float,
    rng: np.random.Generator,
) -> Fit:
    """The fit after spending ``budget`` FLOPs on proposals within ``ends`` of sizes and lengths, in ROUNDS."""
    table, resamples = fit.table, len(fit.draws)
    for share in ROUNDS:
        runs = propose([ladder_of(fit, decision, candidate_grid(*ends, share * budget, ratios=ratios))], share * budget)
        plan = tuple(np.array([getattr(run, key) for run in runs]) for key in ("params", "tokens"))
        table = extend(table, plan, noise, rng)
        fit = fit_group(table, resamples=resamples, seed=fit.seed)
    return fit


def widths(
    name: str,
    budgets: np.ndarray,
    *,
    target: float = 1e23,
    noise: float = 0.003,
    pilot_flops: float = 1e19,
    simulations: int = 100,
    resamples: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Median width and median absolute error of a decision by budget, (b,) each, for `grid` and each of FREEDOM.

    Both start from the same pilot, a regular grid of 5 x 4 runs. The grid's shape is the one of least median width
    at each budget. The proposals stay within the sizes and lengths of these grids, and those of `same ratios` within
    their tokens per parameter as well.
    """
    decision = DECISIONS[name](target)
    truth = float(decision(TRUTH))
    pilot = regular_grid(pilot_flops, (5, 4))
    found = {key: np.empty((2, simulations, len(budgets))) for key in (*GRIDS, *FREEDOM)}
    for i in range(simulations):
        rng = np.random.default_rng([seed, i])
        start = simulate_runs(*pilot, noise, rng)
        first = fit_group(start, resamples=resamples, seed=seed + i)
        for j, budget in enumerate(budgets):
            grids = {shape: regular_grid(budget, shape) for shape in GRIDS}
            ends = [(min(p[k].min() for p in grids.values()), max(p[k].max() for p in grids.values())) for k in (0, 1)]
            fits = {
                shape: fit_group(extend(start, plan, noise, rng), resamples=resamples, seed=seed + i)
                for shape, plan in grids.items()
            }
            for key, ratios in FREEDOM.items():
                fits[key] = follow_proposals(first, decision, budget, ends, ratios, noise, rng)
            for key, fit in fits.items():
                low, high = np.percentile(decision(fit.resampled), [2.5, 97.5])  # noise alone: no form errs here
                found[key][:, i, j] = high - low, abs(float(decision(fit.parameters)) - truth)
        if (i + 1) % 10 == 0:
            progress(f"{i + 1} ladders")
    medians = {key: np.median(values, axis=1) for key, values in found.items()}
    best = np.argmin([medians[shape][0] for shape in GRIDS], axis=0)
    grid = np.stack([medians[GRIDS[k]][:, j] for j, k in enumerate(best)], axis=1)
    return {"grid": tuple(grid), **{key: tuple(medians[key]) for key in FREEDOM}}


def compute_ratio(budgets: np.ndarray, grid: np.ndarray, proposed: np.ndarray) -> np.ndarray:
    """FLOPs that the proposals need for the grid's width at each budget, over that budget (b,).

    Interpolated in logarithms. Where the proposals of the smallest budget are narrower already, the ratio is that of
    the smallest budget, an upper bound; NaN where those of the largest are not narrow enough.
    """
    reached = np.minimum.accumulate(proposed)  # noise may let the width rise; a narrower one was paid for already
    needed = np.interp(np.log(grid), np.log(reached[::-1]), np.log(budgets[::-1]), left=np.nan)
    return np.exp(needed) / budgets
