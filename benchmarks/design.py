#!/usr/bin/env python
"""Compute that proposed runs need for the interval that a regular grid gives, on simulated ladders.

Each ladder starts from the same cheap pilot. A regular grid (sizes x tokens per parameter, its top set by the budget;
the best of several numbers of points is taken) and the proposals of megamm_laws.proposals.design, bound to the same
largest size and length (`same ratios`: and to the grid's tokens per parameter), are then simulated with noise, fitted,
and their 95% intervals compared at several budgets.
"""

import sys

import numpy as np
from megamm_laws.arguments import ArgumentParser
from megamm_laws.law import power_law
from simulated.ladders import TRUTH
from simulated.proposals import DECISIONS, compute_ratio, widths

from megamm.errors import exit_on_error


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--bootstrap", type=int, default=200, metavar="R")
    parser.add_argument("--noise", type=float, default=0.003, help="sd of log loss between runs (default: %(default)s)")
    parser.add_argument("--target", type=float, default=1e23, help="FLOPs of the decision (default: %(default)s)")
    parser.add_argument("--decision", nargs="+", choices=list(DECISIONS), default=list(DECISIONS), help="default: all")
    arguments = parser.parse_args()
    budgets = np.geomspace(3e19, 3e21, 5)
    best = power_law.optimum(TRUTH, np.array([arguments.target]))
    print(f"target {arguments.target:.3g} FLOPs: N* {best[0][0]:.3g}, D* {best[1][0]:.3g}; noise {arguments.noise:.2%}")
    for name in arguments.decision:
        result = widths(
            name,
            budgets,
            target=arguments.target,
            noise=arguments.noise,
            simulations=arguments.simulations,
            resamples=arguments.bootstrap,
            progress=lambda text, name=name: print(f"{name}: {text}", file=sys.stderr, flush=True),
        )
        print(f"\n{name}: median width of the 95% interval (median absolute error)\n")
        kinds = [kind for kind in result if kind != "grid"]
        ratios = {kind: compute_ratio(budgets, result["grid"][0], result[kind][0]) for kind in kinds}
        print("| extra FLOPs | regular grid | " + " | ".join(f"{kind} | compute for the same" for kind in kinds) + " |")
        print("| --- | --- |" + " --- | --- |" * len(kinds))
        for i, budget in enumerate(budgets):
            cells = [f"{budget:.2g}", _cell(result["grid"], i)]
            for kind in kinds:
                bound = "at most " if result["grid"][0][i] > result[kind][0][0] else ""
                cells += [_cell(result[kind], i), f"{bound}{ratios[kind][i]:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def _cell(medians: tuple[np.ndarray, np.ndarray], i: int) -> str:
    return f"{medians[0][i]:.4f} ({medians[1][i]:.4f})"


if __name__ == "__main__":
    exit_on_error(main)
