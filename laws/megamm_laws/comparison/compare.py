"""Which of two groups reaches the lower loss at equal compute, and how sure that is.

Each group's frontier is L*(C) = min of L(N, D) over all N, D with C = 6 kappa (N/N0)^growth N D. C counts what the
runs' ``flops`` counted (for late fusion its encoder too), through the group's kappa and growth; see
``recounted.recount`` for other counts. Bands come from draws of both fits: where runs of the two groups match, from
those that were drawn together (uncertainty.pairing), so that what matched runs err by in common cancels; else paired
at random, since the groups were drawn independently. Those of shared exponents belong together row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.law.fitted import SHARED, Law, Pairing
from megamm_laws.law.percentiles import LEVEL, percentile_band

POINTS = 256
PLAUSIBLE = (1e9, 1e32)
"""FLOPs between which a training run can lie: seconds on a phone, a million times the largest of 2026."""
NOT_SEPARABLE = "not separable at 95%"


@dataclass(kw_only=True)
class Crossover:
    """Where two frontiers cross, in FLOPs; an end of the 95% interval is None if outside the range."""

    flops: float
    interval: tuple[float | None, float | None]
    further: int = 0
    """Changes of lead after this one, within the range."""


@dataclass(kw_only=True)
class Gain:
    """What the second group needs for the loss that the first reaches with ``flops``."""

    first: str
    second: str
    flops: float
    ratio: float
    """FLOPs of the second over ``flops``; infinite where its law never reaches that loss."""
    interval: tuple[float, float]
    """95% of the bootstrap."""
    beyond: float
    """``flops`` over the largest compute that both groups have runs at; above 1 it is an extrapolation."""

    @property
    def sentence(self) -> str:
        """As people say it: late needs 1.07x [0.98, 1.17] the FLOPs of early for the same loss at 1e21."""
        note = f", {self.beyond:.3g}x beyond the runs" if self.beyond > 1 + 1e-9 else ""
        if not np.isfinite(self.ratio):
            return f"{self.second} never reaches the loss of {self.first} at {self.flops:.3g} FLOPs{note}"
        low, high = (f"{end:.3g}" if np.isfinite(end) else "never" for end in self.interval)
        return (
            f"{self.second} needs {self.ratio:.3g}x [{low}, {high}] the FLOPs of {self.first} for the same loss at "
            f"{self.flops:.3g}{note}"
        )


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
    crossing_share: float
    """Share of the resamples in which the lead changes within the range."""
    extrapolated: bool
    """Whether the range leaves that of either group's runs."""
    loss: np.ndarray
    """(m,): L* halfway between the two frontiers, nats."""
    pairing: Pairing | None = None
    """What matched runs of the two groups have in common; None where the groups were drawn independently."""

    def smallest_gap(self, flops: float) -> float:
        """The least difference in loss, as a share of it, that would be seen at ``flops`` within the range.

        Half the width of the simultaneous band there: that of the verdict.
        """
        x = np.log(self.flops)
        width = np.interp(np.log(flops), x, self.simultaneous[1] - self.simultaneous[0])
        return float(0.5 * width / np.interp(np.log(flops), x, self.loss))


def compare(first: Law, second: Law, flops_range: tuple[float, float] | None = None) -> Comparison:
    """Compare two frontiers over ``flops_range``: by default where both groups have runs, else all of it.

    Raises:
        InputError: the range is empty.
    """
    ranges = (first.flops_range, second.flops_range)
    both = common_range(first, second)
    if flops_range is None:
        flops_range = both if both[0] < both[1] else (min(r[0] for r in ranges), max(r[1] for r in ranges))
    low, high = flops_range
    if not 0 < low < high:
        raise InputError(f"flops range {low:.3g} to {high:.3g} is empty; give two FLOPs, the lower one first")
    flops = np.geomspace(low, high, POINTS)
    draws = _pairs(first, second)
    frontiers = first.frontier(flops), second.frontier(flops)
    difference = frontiers[0] - frontiers[1]
    resampled = first.frontier(flops, draws[0]) - second.frontier(flops, draws[1])
    pointwise = percentile_band(resampled)
    return Comparison(
        first=first.name,
        second=second.name,
        flops=flops,
        difference=difference,
        pointwise=pointwise,
        simultaneous=_simultaneous(difference, resampled, pointwise),
        gain=_gain(first, second, flops),
        gain_interval=percentile_band(_gain(first, second, flops, draws)),
        crossover=_crossover(flops, difference, resampled),
        crossing_share=float((np.diff(np.sign(resampled), axis=1) != 0).any(axis=1).mean()),
        extrapolated=low < both[0] * (1 - 1e-9) or high > both[1] * (1 + 1e-9),
        loss=0.5 * (frontiers[0] + frontiers[1]),
        pairing=pairing_of(first, second),
    )


def check_flops(flops: float, option: str) -> None:
    """Raise InputError where no training run can have as many FLOPs."""
    if not PLAUSIBLE[0] <= flops <= PLAUSIBLE[1]:
        low, high = (f"{end:.0e}".replace("+", "") for end in PLAUSIBLE)
        raise InputError(f"{option}: {flops:g} FLOPs are not those of a training run, {low} to {high}")


def common_range(first: Law, second: Law) -> tuple[float, float]:
    """Compute at which both have runs: the higher lower end and the lower upper end, not always in order."""
    ranges = (first.flops_range, second.flops_range)
    return max(r[0] for r in ranges), min(r[1] for r in ranges)


def pairing_of(first: Law, second: Law) -> Pairing | None:
    """The draws of both laws together, where both come from one fit and their runs match."""
    pairing = first.pairings.get(second.name)
    # The same object on both sides: laws of two files may have the same names.
    return pairing if pairing is not None and pairing is second.pairings.get(first.name) else None


def gain_at(first: Law, second: Law, flops: float) -> Gain:
    """The compute that ``second`` needs for the loss of ``first`` at ``flops``, with its 95% interval."""
    at = np.array([flops], float)
    low, high = percentile_band(_gain(first, second, at, _pairs(first, second)))[:, 0]
    return Gain(
        first=first.name,
        second=second.name,
        flops=float(flops),
        ratio=float(_gain(first, second, at)[0]),
        interval=(float(low), float(high)),
        beyond=float(flops / common_range(first, second)[1]),
    )


def crossover_sentence(comparison: Comparison) -> str:
    """Where the frontiers cross, with the 95% interval, or that they do not within the range."""
    low, high = comparison.flops[[0, -1]]
    crossing = comparison.crossover
    if crossing is None:
        some = f" ({comparison.crossing_share:.0%} of the resamples cross in it)" if comparison.crossing_share else ""
        return f"crossover: none within range, {low:.2g} to {high:.2g} FLOPs{some}"
    ends = [f"{end:.2g}" if end else side for end, side in zip(crossing.interval, ("below range", "above range"))]
    again = f"; the lead changes {crossing.further} more times after it" if crossing.further else ""
    return f"crossover: {crossing.flops:.2g} FLOPs [{ends[0]}, {ends[1]}]{again}"


def verdict(comparison: Comparison, at: Sequence[float] = ()) -> str:
    """One sentence: who is ahead at which compute at 95% (simultaneous band), or that it cannot be said.

    Where nothing separates, it says the smallest gap that would have been seen ``at`` these FLOPs; those beyond the
    range are left out, and without any it is the upper end of the range.
    """
    first, second, flops = comparison.first, comparison.second, comparison.flops
    low, high = comparison.simultaneous
    parts = []
    for leader, other, ahead in ((first, second, high < 0), (second, first, low > 0)):
        for begin, end in _spans(ahead):
            parts.append((begin, end, f"{leader} is ahead of {other} from {flops[begin]:.2g} to {flops[end]:.2g}"))
    parts.sort()
    note = " (extrapolated beyond the runs)" if comparison.extrapolated else ""
    if not parts:
        seen = " and ".join(f"{gap:.2g}% of the loss at {c:.2g}" for c, gap in gaps(comparison, at))
        return (
            f"{first} and {second} are {NOT_SEPARABLE} from {flops[0]:.2g} to {flops[-1]:.2g} FLOPs{note}; "
            f"the smallest gap that would have been seen is {seen} FLOPs."
        )
    covered = sum(end - begin + 1 for begin, end, _ in parts)
    rest = "" if covered == len(flops) else f"; elsewhere up to {flops[-1]:.2g} they are {NOT_SEPARABLE}"
    if rest and parts[0][0] > 0:
        rest = f"; elsewhere from {flops[0]:.2g} to {flops[-1]:.2g} they are {NOT_SEPARABLE}"
    return "; ".join(text for *_, text in parts) + f" FLOPs at 95% (simultaneous band){rest}{note}."


def gaps(comparison: Comparison, at: Sequence[float] = ()) -> list[tuple[float, float]]:
    """FLOPs, and the smallest gap in % of the loss that would have been seen there: ``at`` as for verdict."""
    low, high = comparison.flops[[0, -1]]
    points = [float(c) for c in at if low * (1 - 1e-9) <= c <= high * (1 + 1e-9)] or [float(high)]
    return [(c, 100 * comparison.smallest_gap(c)) for c in points]


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


def _pairs(first: Law, second: Law) -> tuple[np.ndarray, np.ndarray]:
    """Draws of both laws, (R, 5) each: drawn together, or row by row where one refit gave both, or paired at random."""
    pairing = pairing_of(first, second)
    if pairing is not None:
        return pairing.draws[first.name], pairing.draws[second.name]
    pairs = min(len(first.draws), len(second.draws))
    if first.form == second.form == SHARED:
        return first.draws[:pairs], second.draws[:pairs]
    shuffled = np.random.default_rng(0).permutation(len(second.draws))[:pairs]
    return first.draws[:pairs], second.draws[shuffled]


def _gain(
    first: Law, second: Law, flops: np.ndarray, draws: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
) -> np.ndarray:
    """FLOPs of the second for the loss of the first at ``flops``, over ``flops``: (m,), or (R, m) for draws."""
    return second.flops_for(first.frontier(flops, draws[0]), draws[1]) / flops


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
    ends = percentile_band(np.array(crossings)[:, None])[:, 0]
    low, high = (float(np.exp(x)) if np.isfinite(x) else None for x in ends)
    return Crossover(flops=float(np.exp(position)), interval=(low, high), further=len(changes) - 1)


def _zero(x: np.ndarray, y: np.ndarray, i: int) -> float:
    """Zero of the chord from point i to i + 1."""
    return float(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i]))


def _spans(flags: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(int(b), int(e) - 1) for b, e in zip(edges[::2], edges[1::2])]
