#!/usr/bin/env python
"""Coverage of the 95% interval of a by isoFLOP profiles over simulated tables whose budgets jitter: a Markdown table.

Each table has budgets of 9 sizes, 1.5 times apart, about the optimum of a known law, which lies anywhere between two
sizes. The FLOPs of each run differ from its budget by the jitter (normal, in log), spent on tokens; losses have noise.
Beside the fit as it is, the same with budgets parted at 5% and losses where they were: what was done before.
"""

import sys
import time
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from megamm_laws.arguments import ArgumentParser
from megamm_laws.errors import InputError
from megamm_laws.fitting import isoflop
from megamm_laws.fitting.isoflop_budgets import by_the_first
from megamm_laws.law import power_law
from megamm_laws.runs.table import RunTable, check_rows
from simulated.ladders import TRUTH

from megamm.errors import exit_on_error

SIZES, STEP = 9, 1.5
EXPONENT = TRUTH[4] / (TRUTH[2] + TRUTH[4])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table of results."""

    budgets: int
    noise: float
    """Nats."""
    jitter: float
    """Standard deviation of log FLOPs within a budget."""


CELLS = [
    Cell(budgets=budgets, noise=noise, jitter=jitter)
    for budgets, noise in ((8, 0.002), (8, 0.01), (5, 0.005))
    for jitter in (0.0, 0.02, 0.04)
]


def simulate(cell: Cell, rng: np.random.Generator) -> RunTable:
    """Runs of all budgets from 1e18 to 1e21 FLOPs."""
    rows = []
    for flops in np.geomspace(1e18, 1e21, cell.budgets):
        best = power_law.optimum(TRUTH, np.array([flops]))[0][0]
        n = best * STEP ** (np.arange(SIZES) - SIZES // 2 + rng.uniform(-0.5, 0.5))
        d = flops * np.exp(cell.jitter * rng.standard_normal(SIZES)) / (6 * n)
        loss = power_law.predict(TRUTH, n, d) + cell.noise * rng.standard_normal(SIZES)
        rows += [{"params": float(a), "tokens": float(b), "loss": float(y)} for a, b, y in zip(n, d, loss)]
    return check_rows(RunTable(path="simulated", rows=rows, lines=list(range(2, len(rows) + 2))))


def before(table: RunTable) -> list[RunTable]:
    """Budgets as they were parted: a run of over 5% more FLOPs than a budget's first begins another."""
    flops = table.numbers("flops")
    parts = by_the_first(np.argsort(flops, kind="stable"), flops)
    return [table.select(np.isin(np.arange(len(flops)), part)) for part in parts]


def judge(table: RunTable, draws: int, seed: int, **options: float) -> tuple[float, float, float]:
    """Error of a, and the ends of its interval about the truth; NaN where there is no fit."""
    try:
        fit = isoflop.fit_isoflops(table, draws=draws, seed=seed, **options)
    except InputError:
        return (np.nan,) * 3
    low, high = fit.intervals["a"]
    return fit.exponents["a"] - EXPONENT, low - EXPONENT, high - EXPONENT


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=200, help="per row (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=300, help="noise draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.tables} tables a row, {arguments.draws} draws; before in brackets\n")
    head = ("budgets", "noise", "jitter", "a held", "width", "error of a (root mean square)", "no fit")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for index, cell in enumerate(CELLS):
        begin, found = time.perf_counter(), []
        for i in range(arguments.tables):
            table = simulate(cell, np.random.default_rng([arguments.seed, index, i]))
            now = judge(table, arguments.draws, i)
            with patch.object(isoflop, "budgets", before), patch.object(isoflop, "EVEN_BUDGET", np.inf):
                found.append((now, judge(table, arguments.draws, i, noise=isoflop.NOISE)))
        cells = [[], [], [], []]
        for error, low, high in np.array(found).transpose(1, 2, 0):
            cells[0].append(f"{100 * np.mean((low <= 0) & (high >= 0)):.1f}%")
            cells[1].append(f"{np.nanmedian(high - low):.3f}")
            cells[2].append(f"{np.sqrt(np.nanmean(error**2)):.3f}")
            cells[3].append(f"{100 * np.isnan(error).mean():.0f}%")
        texts = [f"{now} ({then})" for now, then in cells]
        print(f"| {cell.budgets} | {cell.noise} | {cell.jitter:.0%} | " + " | ".join(texts) + " |", flush=True)
        print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_on_error(main)
