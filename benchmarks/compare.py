#!/usr/bin/env python
"""Coverage of the comparison of two groups, over simulated pairs of ladders whose laws cross: a Markdown table.

How often the simultaneous band holds the whole true difference, and the 95% intervals of gain and crossover the truth.
"""

import sys

import numpy as np
from megamm_laws.arguments import ArgumentParser
from megamm_laws.comparison.compare import compare, gain_at
from megamm_laws.fitting.fit import fit_group
from megamm_laws.law import power_law
from simulated.ladders import TRUTH, Scenario, simulate

from megamm.errors import exit_on_error

OTHER = TRUTH * [0.97, 1.08, 1.0, 1.08, 1.0]
"""Behind at small compute, ahead at large."""
AT = (1e18, 1e20, 1e22)


def crossing(low: float, high: float) -> float:
    """Where the true frontiers cross, by bisection in log C."""
    for _ in range(200):
        middle = np.sqrt(low * high)
        difference = [power_law.frontier_loss(p, np.array([middle]))[0] for p in (TRUTH, OTHER)]
        low, high = (middle, high) if difference[0] < difference[1] else (low, middle)
    return low


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=300)
    parser.add_argument("--bootstrap", type=int, default=400, metavar="R")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    true_crossing = crossing(1e16, 1e24)
    print(f"true crossover {true_crossing:.3g} FLOPs, {arguments.simulations} pairs, {arguments.bootstrap} resamples\n")
    print("| ladder | band, whole curve | " + " | ".join(f"gain at {c:.0e}" for c in AT) + " | crossover | found |")
    print("| --- |" + " --- |" * (len(AT) + 3))
    for scenario in (Scenario(name="30 runs, noise 0.3%"), Scenario(name="60 runs, noise 0.3%", sizes=10, lengths=6)):
        held = np.zeros(len(AT) + 2)
        found = 0
        for i in range(arguments.simulations):
            pair = []
            for j, truth in enumerate((TRUTH, OTHER)):
                table = simulate(scenario, np.random.default_rng([arguments.seed, i, j]), truth)
                fit = fit_group(table, group="AB"[j], resamples=arguments.bootstrap, seed=i)
                pair.append(fit.law)
            result = compare(*pair)
            exact = power_law.frontier_loss(TRUTH, result.flops) - power_law.frontier_loss(OTHER, result.flops)
            held[0] += ((result.simultaneous[0] <= exact) & (exact <= result.simultaneous[1])).all()
            for k, c in enumerate(AT):
                ratio = power_law.frontier_flops(OTHER, power_law.frontier_loss(TRUTH, np.array([c])))[0] / c
                low, high = gain_at(*pair, c).interval
                held[1 + k] += low <= ratio <= high
            if result.crossover:
                found += 1
                low, high = result.crossover.interval
                held[-1] += (low or 0) <= true_crossing <= (high or np.inf)
            if (i + 1) % 50 == 0:
                print(f"{scenario.name}: {i + 1} pairs", file=sys.stderr, flush=True)
        shares = [*held[:-1] / arguments.simulations, held[-1] / max(1, found)]
        cells = " | ".join(f"{100 * share:.1f}%" for share in shares)
        print(f"| {scenario.name} | {cells} | {100 * found / arguments.simulations:.0f}% |", flush=True)


if __name__ == "__main__":
    exit_on_error(main)
