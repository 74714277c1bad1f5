"""Do 95% intervals hold the truth 95% of the time? Ladders simulated from a known law say so.

A scenario names a ladder (sizes, lengths) and what disturbs its losses: noise between seeds, heavy tails, badly
tuned runs, offsets shared by all lengths of one size, and a smooth departure of the true surface from the fitted
form. Disturbances act on log loss and have median zero, so that the law stays the truth for the typical run.

Two intervals are judged: that of ``Fit.draws``, made by megamm_laws.uncertainty.model_error, and that of the plain
bootstrap beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from megamm_laws.fitting.fit import fit_group
from megamm_laws.law import power_law
from megamm_laws.runs.table import RunTable, check_rows

TRUTH = np.array([1.81722, 477.8, 0.34731, 2143.4, 0.36717])
"""The optimum on the 240 runs of Hoffmann et al. 2022 in Besiroglu et al. 2024."""
BEYOND = 10.0
"""The decisions N*, D*, L* are also judged at this multiple of the largest compute of the ladder."""


@dataclass(kw_only=True, frozen=True)
class Scenario:
    """A ladder and what disturbs it; every size in log loss, so 0.002 is 0.2% of the loss."""

    name: str
    sizes: int = 6
    lengths: int = 5
    noise: float = 0.003
    """Standard deviation between seeds."""
    tail_degrees: float | None = None
    """Degrees of freedom of a Student t in place of the normal, scaled to the same standard deviation."""
    mistuned: float = 0.0
    """Share of the runs that are badly tuned: their loss is higher by an exponential of mean 2%."""
    size_offset: float = 0.0
    """Standard deviation of an offset shared by all lengths of a size (its tuning)."""
    trunks: bool = False
    """Whether the runs of a size name a common trunk, so that the bootstrap resamples sizes."""
    bend: float = 0.0
    """Standard deviation of a smooth departure from the form, drawn anew for each ladder."""


SCENARIOS = (
    Scenario(name="noise, 30 runs"),
    Scenario(name="noise, 60 runs", sizes=10, lengths=6),
    Scenario(name="heavy tails", tail_degrees=4.0),
    Scenario(name="5% mistuned", noise=0.002, mistuned=0.05),
    Scenario(name="tuning differs by size, runs resampled", noise=0.002, size_offset=0.002),
    Scenario(name="tuning differs by size, sizes resampled", noise=0.002, size_offset=0.002, trunks=True),
    Scenario(
        name="tuning differs, 12 sizes resampled", sizes=12, lengths=4, noise=0.002, size_offset=0.002, trunks=True
    ),
    Scenario(name="surface bends, 30 runs", noise=0.002, bend=0.002),
    Scenario(name="surface bends, 60 runs", sizes=10, lengths=6, noise=0.002, bend=0.002),
    Scenario(name="surface bends, 240 runs", sizes=16, lengths=15, noise=0.002, bend=0.002),
    Scenario(name="surface bends twice as far, 30 runs", noise=0.002, bend=0.004),
    Scenario(name="surface bends, heavy tails", noise=0.002, tail_degrees=4.0, bend=0.002),
    Scenario(name="surface bends, little noise", noise=0.0005, bend=0.003),
    Scenario(name="surface bends, 8 sizes resampled", sizes=8, noise=0.002, size_offset=0.001, bend=0.002, trunks=True),
)


def simulate(scenario: Scenario, rng: np.random.Generator, truth: np.ndarray = TRUTH) -> RunTable:
    """A ladder of ``sizes`` x ``lengths`` runs, 5e7 to 5e9 parameters and 5 to 80 tokens per parameter."""
    sizes = np.repeat(np.geomspace(5e7, 5e9, scenario.sizes), scenario.lengths)
    tokens = sizes * np.tile(np.geomspace(5, 80, scenario.lengths), scenario.sizes)
    labels = np.repeat(np.arange(scenario.sizes), scenario.lengths)
    noise = scenario.noise * _noise(scenario.tail_degrees, len(sizes), rng)
    bad = rng.random(len(sizes)) < scenario.mistuned
    noise += bad * rng.exponential(0.02, len(sizes))
    noise += scenario.size_offset * rng.standard_normal(scenario.sizes)[labels]
    noise += scenario.bend * (_wave(np.log(sizes), rng) + _wave(np.log(tokens), rng)) / np.sqrt(2)
    losses = power_law.predict(truth, sizes, tokens) * np.exp(noise)
    rows = [{"params": n, "tokens": d, "loss": y} for n, d, y in zip(sizes, tokens, losses)]
    if scenario.trunks:
        rows = [{**row, "trunk": f"size-{label}"} for row, label in zip(rows, labels)]
    return check_rows(RunTable(path="simulated", rows=rows, lines=list(range(2, len(rows) + 2))))


def _noise(degrees: float | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit-variance noise, (count,)."""
    if degrees is None:
        return rng.standard_normal(count)
    return rng.standard_t(degrees, count) / np.sqrt(degrees / (degrees - 2))


def _wave(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random sine over x with unit variance over its phase; half to two periods over the range."""
    u = (x - x.min()) / np.ptp(x)
    return np.sqrt(2) * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * u + rng.random()))


def decisions(parameters: np.ndarray, top_flops: float) -> dict[str, np.ndarray]:
    """What a plan decides on, by name, each of the leading shape of ``parameters`` (..., 5)."""
    values = {"E": parameters[..., 0], "alpha": parameters[..., 2], "beta": parameters[..., 4]}
    values["a"] = parameters[..., 4] / (parameters[..., 2] + parameters[..., 4])
    for label, flops in (("C", top_flops), (f"{BEYOND:g}C", BEYOND * top_flops)):
        best = power_law.optimum(parameters, np.array([flops]))
        values[f"N*({label})"], values[f"D*({label})"] = best[0][..., 0], best[1][..., 0]
        values[f"L*({label})"] = power_law.frontier_loss(parameters, np.array([flops]))[..., 0]
    return values


@dataclass(kw_only=True)
class Coverage:
    """What the simulations of a scenario say of each decision."""

    scenario: Scenario
    simulations: int
    coverage: dict[str, float]
    """Share of ladders whose interval, as in `fits.json`, holds the truth."""
    resampling_coverage: dict[str, float]
    """The same for the plain bootstrap: runs, or trunks where there are any, resampled."""
    widening: dict[str, float]
    """Median over the ladders of the interval's width over that of the plain bootstrap."""
    bias: dict[str, float]
    """Of the estimates, in their standard deviations."""


def cover(
    scenario: Scenario,
    simulations: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Coverage:
    """Fit ``simulations`` ladders of ``scenario`` and count the intervals that hold the truth."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for i in range(simulations):
        table = simulate(scenario, np.random.default_rng([seed, i]))
        fit = fit_group(table, resamples=resamples, seed=seed + i)
        laws_of = (fit.parameters, TRUTH, fit.draws, fit.resampled)
        estimates, truths, draws, resampled = (decisions(x, fit.flops_range[1]) for x in laws_of)
        for name, truth in truths.items():
            ends = [np.percentile(x[name], [2.5, 97.5]) for x in (draws, resampled)]
            holds = [low <= truth <= high for low, high in ends]
            found.setdefault(name, []).append((*holds, np.ptp(ends[0]) / np.ptp(ends[1]), estimates[name] - truth))
        progress(i + 1)
    columns = {name: np.array(rows, float).T for name, rows in found.items()}
    return Coverage(
        scenario=scenario,
        simulations=simulations,
        coverage={name: float(x[0].mean()) for name, x in columns.items()},
        resampling_coverage={name: float(x[1].mean()) for name, x in columns.items()},
        widening={name: float(np.median(x[2])) for name, x in columns.items()},
        bias={name: float(x[3].mean() / x[3].std()) for name, x in columns.items()},
    )
