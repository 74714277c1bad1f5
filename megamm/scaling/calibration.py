"""Do 95% intervals hold the truth 95% of the time? Ladders simulated from a known law say so.

A scenario names a ladder (sizes, lengths) and what disturbs its losses: noise between seeds, heavy tails, badly
tuned runs, offsets shared by all lengths of one size, and a smooth departure of the true surface from the fitted
form. Disturbances act on log loss and have median zero, so that the law stays the truth for the typical run.

Resampling runs one by one takes their residuals for independent. Where tuning is off for a whole size, or the
surface departs smoothly from the form, neighbouring runs err together and the interval is too narrow.
:func:`pigeonhole_draws` is a correction: it resamples sizes and lengths, each whole (Owen 2007, "The pigeonhole
bootstrap", Annals of Applied Statistics 1(2)), which holds errors shared along either, at the price of intervals that
are too wide where there are none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megamm.scaling import laws, minimise
from megamm.scaling.fit import Fit, distinct, fit_group
from megamm.scaling.runs import RunTable, check_rows

TRUTH = np.array([1.81722, 477.8, 0.34731, 2143.4, 0.36717])
"""The optimum on the 240 runs of Hoffmann et al. 2022 in Besiroglu et al. 2024."""
BEYOND = 10.0
"""The decisions N*, D*, L* are also judged at this multiple of the largest compute of the ladder."""

BINS = 8
"""Most classes of size and of length that the pigeonhole bootstrap tells apart."""


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
    losses = laws.predict(truth, sizes, tokens) * np.exp(noise)
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


def pigeonhole_draws(fit: Fit, resamples: int, seed: int = 0, bins: int = BINS) -> np.ndarray:
    """Optima over resampled sizes times resampled lengths, (R, 5) float64 like ``Fit.draws``.

    A run counts as often as its size and its length were drawn, multiplied. Sizes and lengths are the distinct
    values, or ``bins`` equal-count classes of them where there are more.
    """
    table, rng = fit.table, np.random.default_rng(seed)
    problem = minimise.Problem.of(*(table.numbers(c) for c in ("params", "tokens", fit.loss_column)))
    labels = [_classes(table.numbers(column), bins) for column in ("params", "tokens")]
    weights = np.zeros((resamples, len(table)))
    poor = np.ones(resamples, bool)
    for _ in range(100):  # three sizes and three lengths are the least that determines a law
        drawn = [_multinomial(label, int(poor.sum()), rng) for label in labels]
        weights[poor] = drawn[0] * drawn[1]
        poor = _poor(weights, labels)
        if not poor.any():
            break
    start = np.repeat(problem.to_theta(fit.parameters)[None], resamples, axis=0)
    return problem.to_parameters(minimise.minimise(problem, start, weights)[0])


def _poor(weights: np.ndarray, labels: list[np.ndarray]) -> np.ndarray:
    """Which resamples hold fewer than three sizes or three lengths (or than all there are), (R,) bool."""
    poor = np.zeros(len(weights), bool)
    for label in labels:
        present = weights @ (label[:, None] == np.arange(label.max() + 1)).astype(float) > 0
        poor |= present.sum(-1) < min(3, label.max() + 1)
    return poor


def _multinomial(labels: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often the class of each run was drawn, (R, n)."""
    count = int(labels.max()) + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)[:, labels]


def _classes(values: np.ndarray, bins: int) -> np.ndarray:
    """Class of each value, (n,) int: its distinct value, or one of ``bins`` equal-count classes."""
    labels = distinct(values)
    if labels.max() < bins:
        return labels
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])
    return distinct(np.searchsorted(edges, values, side="right") + 1.0)


def decisions(parameters: np.ndarray, top_flops: float) -> dict[str, np.ndarray]:
    """What a plan decides on, by name, each of the leading shape of ``parameters`` (..., 5)."""
    values = {"E": parameters[..., 0], "alpha": parameters[..., 2], "beta": parameters[..., 4]}
    values["a"] = parameters[..., 4] / (parameters[..., 2] + parameters[..., 4])
    for label, flops in (("C", top_flops), (f"{BEYOND:g}C", BEYOND * top_flops)):
        best = laws.optimum(parameters, np.array([flops]))
        values[f"N*({label})"], values[f"D*({label})"] = best[0][..., 0], best[1][..., 0]
        values[f"L*({label})"] = laws.frontier_loss(parameters, np.array([flops]))[..., 0]
    return values


@dataclass(kw_only=True)
class Coverage:
    """Share of simulations whose interval holds the truth, by decision, for each kind of bootstrap."""

    scenario: Scenario
    simulations: int
    percentile: dict[str, float]
    """Of ``Fit.draws``: runs, or trunks where there are any, resampled."""
    pigeonhole: dict[str, float]
    """Of :func:`pigeonhole_draws`, over one in ``pigeonhole_every`` ladders."""
    pigeonhole_every: int
    bias: dict[str, float]
    """Of the estimates, in their standard deviations."""


def cover(
    scenario: Scenario,
    simulations: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
    pigeonhole_every: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Coverage:
    """Fit ``simulations`` ladders of ``scenario`` and count the intervals that hold the truth.

    The pigeonhole bootstrap costs as much as the fit; it is made for one in ``pigeonhole_every`` ladders.
    """
    held: dict[str, dict[str, int]] = {"percentile": {}, "pigeonhole": {}}
    estimates: dict[str, list[float]] = {}
    truth: dict[str, np.ndarray] = {}
    for i in range(simulations):
        table = simulate(scenario, np.random.default_rng([seed, i]))
        fit = fit_group(table, resamples=resamples, seed=seed + i)
        top = fit.flops_range[1]
        truth = decisions(TRUTH, top)
        for name, value in decisions(fit.parameters, top).items():
            estimates.setdefault(name, []).append(float(value))
        kinds = {"percentile": fit.draws}
        if i % pigeonhole_every == 0:
            kinds["pigeonhole"] = pigeonhole_draws(fit, resamples, seed + i)
        for kind, draws in kinds.items():
            for name, values in decisions(draws, top).items():
                low, high = np.percentile(values, [2.5, 97.5])
                held[kind][name] = held[kind].get(name, 0) + bool(low <= truth[name] <= high)
        progress(i + 1)
    counts = {"percentile": simulations, "pigeonhole": -(-simulations // pigeonhole_every)}
    shares = {kind: {name: n / counts[kind] for name, n in hits.items()} for kind, hits in held.items()}
    bias = {name: float((np.mean(x) - truth[name]) / np.std(x)) for name, x in estimates.items()}
    return Coverage(scenario=scenario, simulations=simulations, pigeonhole_every=pigeonhole_every, bias=bias, **shares)
