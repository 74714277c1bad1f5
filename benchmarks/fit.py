#!/usr/bin/env python
"""Time the scaling-law fit against scipy's L-BFGS from the same starts, interleaved, on one core.

Set OMP_NUM_THREADS=1 to hold numpy to one core. Prints the objective, the share of starts that reach it, seconds
and their ratio, and the bootstrap's time and standard errors; then the checks of a fit (drop-k, profile likelihood)
and the isoFLOP fits of Porian et al. with 1,000 noise draws.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from megamm_laws.arguments import ArgumentParser
from megamm_laws.fitting.fit import cluster_labels, fit_group, resample
from megamm_laws.fitting.isoflop import fit_isoflops
from megamm_laws.fitting.stability import drop_table
from megamm_laws.law import power_law, solver
from megamm_laws.runs.table import RunTable, read_runs
from megamm_laws.uncertainty.intervals import profile_intervals
from scipy.optimize import minimize

FOLDER = Path(__file__).parents[1] / "tests" / "data"
DATA = FOLDER / "chinchilla_runs.csv"


def timed(function: Callable) -> tuple[float, object]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def lbfgs(problem: solver.Problem, starts: np.ndarray) -> np.ndarray:
    """The objective that L-BFGS-B reaches from each start, with the exact gradient."""
    one = np.ones((1, len(problem.y)))

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, *_ = solver.evaluate(problem, theta[None], one, solver.DELTA)
        return value[0], gradient[0]

    bounds = list(zip(*problem.bounds))
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-12}
    found = [minimize(objective, x, jac=True, bounds=bounds, method="L-BFGS-B", options=options) for x in starts]
    return np.array([result.fun for result in found])


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bootstrap", type=int, default=1000)
    arguments = parser.parse_args()
    runs = read_runs(DATA)
    runs = runs.select(runs.numbers("loss") < np.sort(runs.numbers("loss"))[-5])
    params, tokens, loss = (runs.numbers(c) for c in ("params", "tokens", "loss"))
    ones = np.ones((1, len(runs)))
    problem = solver.Problem.of(params, tokens, loss)
    times: dict[str, list[float]] = {"megamm": [], "scipy": []}
    for repeat in range(arguments.repeats + 1):  # the first is a warm-up
        ours, (theta, values) = timed(lambda: solver.minimise(problem, solver.starts(problem), ones))
        theirs, reached = timed(lambda: lbfgs(problem, solver.starts(problem)))
        if repeat:
            times["megamm"].append(ours)
            times["scipy"].append(theirs)
    best = values.min()
    print(f"objective {best:.9e} at {problem.to_parameters(theta[values.argmin()])}")
    for name, objective in (("megamm", values), ("scipy", reached)):
        share = (objective <= best * (1 + 1e-6)).mean()
        print(f"{name}: {statistics.median(times[name]):.4f} s for {len(values)} starts, {share:.0%} at the optimum")
    print(f"ratio {statistics.median(times['scipy']) / statistics.median(times['megamm']):.1f}")
    weights, _ = resample(runs, cluster_labels(runs), arguments.bootstrap, np.random.default_rng(0))
    start = np.repeat(theta[values.argmin()][None], arguments.bootstrap, axis=0)
    seconds, (draws, _) = timed(lambda: solver.minimise(problem, start, weights))
    errors = dict(zip(power_law.PARAMETERS, problem.to_parameters(draws).std(axis=0, ddof=1).round(5).tolist()))
    print(f"bootstrap: {arguments.bootstrap} resamples in {seconds:.3f} s; standard errors {errors}")
    time_checks(runs)


def time_checks(runs: RunTable) -> None:
    """Seconds of the checks of one fit, and of the isoFLOP fits."""
    fit = fit_group(runs, resamples=1000)
    for check in (drop_table, profile_intervals):
        seconds, _ = timed(lambda check=check: check(fit))
        print(f"{check.__name__}: {seconds:.3f} s")
    for name in ("tuned", "cosine"):
        table = read_runs(FOLDER / f"isoflop_refinedweb_{name}.csv")
        seconds, found = timed(lambda table=table: fit_isoflops(table, draws=1000))
        low, high = found.intervals["a"]
        print(f"isoFLOP {name}: {seconds:.3f} s for 1000 draws, a {found.exponents['a']:.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
