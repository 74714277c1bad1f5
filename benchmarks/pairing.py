#!/usr/bin/env python
"""Power and coverage of the comparison of two groups whose runs match, over simulated pairs of ladders: a table.

Both ladders are 6 sizes x 5 lengths with noise of 0.2%, an offset of 0.2% per size and a bend of 0.4%, in log loss. The
groups share part of these errors. The true gap is 0 or 0.5% of the loss; seen means that the 95% interval of the
difference at 1e20 FLOPs leaves out zero. Losses that are 0.5% higher throughout have the same fit with E, A and B 0.5%
higher, so that both gaps are judged by one pair of fits.
"""

import sys
import time
from dataclasses import dataclass, replace
from multiprocessing import Pool

import numpy as np
from megamm_laws.arguments import ArgumentParser
from megamm_laws.comparison.compare import Comparison, compare
from megamm_laws.fitting.fit import fit_group
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law, Pairing
from megamm_laws.runs.table import RunTable, check_rows
from megamm_laws.uncertainty.pairing import pair_fits
from simulated.ladders import TRUTH

from megamm.errors import exit_on_error

SIZES, LENGTHS = 6, 5
NOISE, OFFSET, BEND = 0.002, 0.002, 0.004
GAP = 0.005
AT = np.array([1e20])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What two ladders share: correlation of their noise, and of what the form misses."""

    name: str
    noise: float
    form: float
    unmatched: bool = False
    """Whether the second ladder has half of its sizes, with their offsets, midway between those of the first."""


CELLS = (
    Cell(name="bend and offsets common, noise apart", noise=0.0, form=1.0),
    Cell(name="correlation 0", noise=0.0, form=0.0),
    Cell(name="correlation 0.5", noise=0.5, form=0.5),
    Cell(name="correlation 0.9", noise=0.9, form=0.9),
    Cell(name="half unmatched, correlation 0", noise=0.0, form=0.0, unmatched=True),
    Cell(name="half unmatched, correlation 0.9", noise=0.9, form=0.9, unmatched=True),
    Cell(name="half unmatched, bend and offsets common", noise=0.0, form=1.0, unmatched=True),
)


def simulate(cell: Cell, rng: np.random.Generator) -> list[RunTable]:
    """Two ladders of equal laws."""
    grid = np.geomspace(5e7, 5e9, SIZES)
    sizes = [grid, grid.copy()]
    moved = np.arange(SIZES) % 2 == 1
    if cell.unmatched:
        sizes[1][moved] *= np.sqrt(grid[1] / grid[0])
    ladders = [_parts(rng) for _ in range(3)]  # of the first, of the second, of both
    tables = []
    for g in range(2):
        n = np.repeat(sizes[g], LENGTHS)
        d = n * np.tile(np.geomspace(5, 80, LENGTHS), SIZES)
        (own, own_bend), (both, bend) = (_errors(ladders[k], n, d) for k in (g, 2))
        apart = np.repeat(moved & cell.unmatched & (g == 1), LENGTHS)
        shares = [np.where(apart, 0.0, share) for share in (cell.noise, cell.form)]
        mixed = [np.sqrt(share) * y + np.sqrt(1 - share) * x for share, x, y in zip(shares, own, both)]
        log_loss = sum(mixed) + np.sqrt(cell.form) * bend + np.sqrt(1 - cell.form) * own_bend
        losses = power_law.predict(TRUTH, n, d) * np.exp(log_loss)
        rows = [{"params": a, "tokens": b, "loss": y} for a, b, y in zip(n, d, losses)]
        tables.append(check_rows(RunTable(path="simulated", rows=rows, lines=list(range(2, len(rows) + 2)))))
    return tables


def _parts(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Standard errors of one ladder: noise by run, offsets by size, period and phase of a sine in log N and log D."""
    return {
        "noise": rng.standard_normal(SIZES * LENGTHS),
        "offsets": rng.standard_normal(SIZES),
        "waves": np.stack([rng.uniform(0.5, 2, 2), rng.random(2)]),
    }


def _errors(parts: dict[str, np.ndarray], n: np.ndarray, d: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Noise and offsets, and bend, of runs (n,): a sine along each of log N and log D, variance 1 over phases."""
    ends = np.log([[5e7, 5e9], [2.5e8, 4e11]])
    axes = [(np.log(x) - low) / (high - low) for x, (low, high) in zip((n, d), ends)]
    bend = sum(np.sin(2 * np.pi * (period * u + phase)) for u, period, phase in zip(axes, *parts["waves"]))
    return [NOISE * parts["noise"], OFFSET * np.repeat(parts["offsets"], LENGTHS)], BEND * bend


def raised(law: Law, other: str) -> Law:
    """The law, and its draws with those of ``other``, of losses that are higher by GAP."""
    by = np.array([1 + GAP, 1 + GAP, 1, 1 + GAP, 1])
    return replace(law, parameters=law.parameters * by, draws=law.draws * by, pairings={})


def judge(task: tuple[int, int, int, int]) -> np.ndarray:
    """(2, 5) for matched and for independent draws: gap seen, false alarm, truth held at 1e20, whole curve, width."""
    index, i, resamples, seed = task
    cell = CELLS[index]
    tables = simulate(cell, np.random.default_rng([seed, index, i]))
    fits = [fit_group(table, group="AB"[g], resamples=resamples, seed=i) for g, table in enumerate(tables)]
    pair_fits(fits)
    found = []
    for keep in (True, False):
        first, second = (fit.law if keep else replace(fit.law, pairings={}) for fit in fits)
        plain = compare(first, second)
        higher = raised(second, first.name)
        if keep and "B" in first.pairings:
            pairing = first.pairings["B"]
            by = higher.parameters / second.parameters
            draws = {"A": pairing.draws["A"], "B": pairing.draws["B"] * by}
            new = Pairing(draws=draws, matched=pairing.matched, correlation=pairing.correlation)
            first, higher = replace(first, pairings={"B": new}), replace(higher, pairings={"A": new})
        low, high = _at(plain)
        above = _at(compare(first, higher))
        whole = ((plain.simultaneous[0] <= 0) & (plain.simultaneous[1] >= 0)).all()
        level = np.interp(np.log(AT[0]), np.log(plain.flops), plain.loss)
        found.append([above[1] < 0, not low <= 0 <= high, low <= 0 <= high, whole, (high - low) / level])
    return np.array(found, float)


def _at(comparison: Comparison) -> tuple[float, float]:
    """The interval of the difference at 1e20 FLOPs."""
    x = np.log(comparison.flops)
    low, high = (float(np.interp(np.log(AT[0]), x, end)) for end in comparison.pointwise)
    return low, high


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200, help="of ladders per row (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=300, metavar="R")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.pairs} pairs a row, {arguments.bootstrap} draws; independent draws in brackets\n")
    head = ("errors of the two ladders", "gap of 0.5% seen", "false alarms", "held at 1e20", "whole curve", "width")
    print("| " + " | ".join(head) + " |\n| --- |" + " --- |" * (len(head) - 1), flush=True)
    with Pool(arguments.jobs) as pool:
        for index, cell in enumerate(CELLS):
            if arguments.only not in cell.name:
                continue
            begin = time.perf_counter()
            tasks = [(index, i, arguments.bootstrap, arguments.seed) for i in range(arguments.pairs)]
            found = np.stack(list(pool.imap_unordered(judge, tasks, chunksize=4)))
            shares, width = 100 * found[:, :, :4].mean(0), 100 * np.median(found[:, :, 4], axis=0)
            cells = [f"{one:.1f}% ({other:.1f}%)" for one, other in shares.T] + [f"{width[0]:.2f}% ({width[1]:.2f}%)"]
            print(f"| {cell.name} | " + " | ".join(cells) + " |", flush=True)
            print(f"{cell.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_on_error(main)
