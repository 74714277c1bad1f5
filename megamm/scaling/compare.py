"""Which of two groups reaches the lower loss at equal compute, and how sure that is.

Each group's frontier is L*(C) = min over N of L(N, C/(6 kappa N)); C counts what the runs' ``flops`` counted
(for late fusion its encoder too), through the group's kappa. Bands come from the bootstrap draws of both
fits, paired at random since the groups were resampled independently.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.errors import InputError
from megamm.scaling import laws
from megamm.scaling.fit import LEVEL, Fit

POINTS = 256
NOT_SEPARABLE = "not separable at 95%"


@dataclass(kw_only=True)
class Law:
    """A fitted law: ``parameters`` (5,), ``draws`` (R, 5), ``kappa`` FLOPs per 6ND, compute of its runs."""

    name: str
    parameters: np.ndarray
    draws: np.ndarray
    kappa: float
    flops_range: tuple[float, float]

    @classmethod
    def of_fit(cls, fit: Fit) -> "Law":
        return cls(
            name=fit.group,
            parameters=fit.parameters,
            draws=fit.draws,
            kappa=fit.kappa,
            flops_range=fit.flops_range,
        )

    def frontier(self, flops: np.ndarray) -> np.ndarray:
        """L*(C): (m,) FLOPs to (m,) nats."""
        return laws.frontier_loss(self.parameters, flops, self.kappa)

    def band(self, flops: np.ndarray) -> np.ndarray:
        """Pointwise 95% band of the frontier, (2, m)."""
        return _percentiles(laws.frontier_loss(self.draws, flops, self.kappa))


@dataclass(kw_only=True)
class Crossover:
    """Where two frontiers cross, in FLOPs; an end of the 95% interval is None if outside the range."""

    flops: float
    interval: tuple[float | None, float | None]


@dataclass(kw_only=True)
class Comparison:
    """Two groups over a range of compute; m points, arrays float64."""

    first: str
    second: str
    flops: np.ndarray
    """(m,), evenly spaced in log C."""
    difference: np.ndarray
    """(m,): L* of the first minus L* of the second, nats; negative where the first is ahead."""
    pointwise: np.ndarray
    """(2, m): 95% band at each C on its own."""
    simultaneous: np.ndarray
    """(2, m): band that holds the whole curve with 95%."""
    gain: np.ndarray
    """(m,): FLOPs of the second for the loss of the first, over those of the first; may be infinite."""
    gain_interval: np.ndarray
    """(2, m): pointwise 95%."""
    crossover: Crossover | None
    extrapolated: bool
    """Whether the range leaves that of either group's runs."""


def key_of(group: str, loss_column: str = "loss") -> str:
    """Key of a fit's draws in bootstrap.npz: the group, followed by the column if that is not ``loss``."""
    return group if loss_column == "loss" else f"{group}/{loss_column}"


def read_laws(folder: Path | str, loss_column: str = "loss") -> dict[str, Law]:
    """The laws of one loss column by group, from the output folder of fit_scaling_laws.py.

    Raises:
        InputError: fits.json or bootstrap.npz is missing or not as written by that tool.
    """
    folder = Path(folder)
    try:
        fits = json.loads((folder / "fits.json").read_text(encoding="utf-8"))["fits"]
        found = {}
        with np.load(folder / "bootstrap.npz", allow_pickle=False) as draws:
            for fit in fits:
                if fit.get("loss_column", "loss") != loss_column:
                    continue
                found[fit["group"]] = Law(
                    name=fit["group"],
                    parameters=np.array([fit["parameters"][name] for name in laws.PARAMETERS], float),
                    draws=draws[key_of(fit["group"], loss_column)],
                    kappa=fit["kappa"],
                    flops_range=tuple(fit["ranges"]["flops"]),
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no readable fits ({error}); run tools/fit_scaling_laws.py again") from error
    return found


def compare(first: Law, second: Law, flops_range: tuple[float, float] | None = None) -> Comparison:
    """Compare two frontiers over ``flops_range``: by default where both groups have runs, else all of it.

    Raises:
        InputError: the range is empty.
    """
    ranges = (first.flops_range, second.flops_range)
    both = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if flops_range is None:
        flops_range = both if both[0] < both[1] else (min(r[0] for r in ranges), max(r[1] for r in ranges))
    low, high = flops_range
    if not 0 < low < high:
        raise InputError(f"flops range {low:.3g} to {high:.3g} is empty; give two FLOPs, the lower one first")
    flops = np.geomspace(low, high, POINTS)
    pairs = min(len(first.draws), len(second.draws))
    shuffled = np.random.default_rng(0).permutation(len(second.draws))[:pairs]
    draws = (first.draws[:pairs], second.draws[shuffled])
    difference = first.frontier(flops) - second.frontier(flops)
    resampled = laws.frontier_loss(draws[0], flops, first.kappa) - laws.frontier_loss(draws[1], flops, second.kappa)
    pointwise = _percentiles(resampled)
    return Comparison(
        first=first.name,
        second=second.name,
        flops=flops,
        difference=difference,
        pointwise=pointwise,
        simultaneous=_simultaneous(difference, resampled, pointwise),
        gain=_gain(first.parameters, second.parameters, first, second, flops),
        gain_interval=_percentiles(_gain(*draws, first, second, flops)),
        crossover=_crossover(flops, difference, resampled),
        extrapolated=low < both[0] * (1 - 1e-9) or high > both[1] * (1 + 1e-9),
    )


def verdict(comparison: Comparison) -> str:
    """One sentence: who is ahead at which compute at 95% (simultaneous band), or that it cannot be said."""
    first, second, flops = comparison.first, comparison.second, comparison.flops
    low, high = comparison.simultaneous
    parts = []
    for leader, other, ahead in ((first, second, high < 0), (second, first, low > 0)):
        for begin, end in _spans(ahead):
            parts.append((begin, end, f"{leader} is ahead of {other} from {flops[begin]:.2g} to {flops[end]:.2g}"))
    parts.sort()
    note = " (extrapolated beyond the runs)" if comparison.extrapolated else ""
    if not parts:
        return f"{first} and {second} are {NOT_SEPARABLE} from {flops[0]:.2g} to {flops[-1]:.2g} FLOPs{note}."
    covered = sum(end - begin + 1 for begin, end, _ in parts)
    rest = "" if covered == len(flops) else f"; elsewhere up to {flops[-1]:.2g} they are {NOT_SEPARABLE}"
    if rest and parts[0][0] > 0:
        rest = f"; elsewhere from {flops[0]:.2g} to {flops[-1]:.2g} they are {NOT_SEPARABLE}"
    return "; ".join(text for *_, text in parts) + f" FLOPs at 95% (simultaneous band){rest}{note}."


def _percentiles(values: np.ndarray) -> np.ndarray:
    """95% percentile interval over the first axis, (2, m); infinite values are allowed."""
    tail = 50 * (1 - LEVEL)
    finite = np.isfinite(values).all()
    return np.percentile(values, [tail, 100 - tail], axis=0, method="linear" if finite else "nearest")


def _simultaneous(center: np.ndarray, draws: np.ndarray, pointwise: np.ndarray) -> np.ndarray:
    """Widen the pointwise band by the one factor with which it holds 95% of whole curves: (2, m).

    A sup-t band whose lower and upper half-widths follow the percentiles, to keep the skew of the draws.
    """
    floor = 1e-12 * np.abs(draws).max() + 1e-300
    below = np.maximum(center - pointwise[0], floor)
    above = np.maximum(pointwise[1] - center, floor)
    excess = np.maximum((draws - center) / above, (center - draws) / below).max(axis=1)
    factor = max(1.0, float(np.quantile(excess, LEVEL)))
    return np.stack([center - factor * below, center + factor * above])


def _gain(
    first_parameters: np.ndarray, second_parameters: np.ndarray, first: Law, second: Law, flops: np.ndarray
) -> np.ndarray:
    """FLOPs of the second for the loss of the first at ``flops``, over ``flops``: (..., m)."""
    loss = laws.frontier_loss(first_parameters, flops, first.kappa)
    return laws.frontier_flops(second_parameters[..., None, :], loss, second.kappa) / flops


def _crossover(flops: np.ndarray, difference: np.ndarray, draws: np.ndarray) -> Crossover | None:
    """The first change of lead along the range, with the spread of the same change over the draws.

    A draw that keeps the later lead throughout crosses below the range, one that keeps the earlier, above.
    """
    changes = np.flatnonzero(np.sign(difference[1:]) * np.sign(difference[:-1]) < 0)
    if not len(changes):
        return None
    before = np.sign(difference[changes[0]])
    log_c = np.log(flops)
    position = float(_zero(log_c, difference, int(changes[0])))
    crossings = []
    for draw in draws * before:  # from here on the earlier lead is positive
        down = np.flatnonzero((draw[:-1] > 0) & (draw[1:] <= 0))
        if len(down):
            crossings.append(_zero(log_c, draw, int(down[0])))
        else:
            crossings.append(np.inf if draw[-1] > 0 else -np.inf)
    ends = _percentiles(np.array(crossings)[:, None])[:, 0]
    low, high = (float(np.exp(x)) if np.isfinite(x) else None for x in ends)
    return Crossover(flops=float(np.exp(position)), interval=(low, high))


def _zero(x: np.ndarray, y: np.ndarray, i: int) -> float:
    """Zero of the chord from point i to i + 1."""
    return float(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i]))


def _spans(flags: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(int(b), int(e) - 1) for b, e in zip(edges[::2], edges[1::2])]
