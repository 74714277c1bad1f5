"""Compute-optimal sizes from isoFLOP profiles: the lowest point of each budget's curve, then a line through them.

Approach 2 of Hoffmann et al. 2022 in the variant of Porian et al. 2024 (arXiv 2406.19146): at each budget an
Akima spline of log loss over log N, its lowest point on a fine grid strictly inside the measured sizes; the
spread of that point when every loss moves by seed noise; and log N* on log C by least squares, weighted by the
spread. No law is assumed across budgets, so that the result is a check on the parametric fit; only where the runs of
a budget differ in FLOPs by some percent, each loss is moved these percent along a fitted law. The noise is taken from
the roughness of the curves: what one size does better or worse than its neighbours moves the optimum like noise.

Shapes: n runs of one budget, m grid points, R noise draws, k budgets.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from megamm_laws.errors import InputError
from megamm_laws.fitting.fit import check_draws
from megamm_laws.fitting.isoflop_budgets import at_budget, budgets, law_of, noise_of_curves
from megamm_laws.law.percentiles import LEVEL
from megamm_laws.runs.groups import native_groups
from megamm_laws.runs.table import RunTable, table_warnings

NOISE = 0.002
"""Least standard deviation of a loss between seeds, nats: the value of Porian et al. for losses below e^3."""
EVEN_BUDGET = 0.001
"""Difference in FLOPs within a budget above which its losses are moved: more compute lowers a loss at any size."""
TOLD_BUDGET = 0.02
"""Such a difference that is told of."""
GRID_PER_RUN = 25
FLOOR = 0.33
"""Least spread of log N*, as a share of the mean distance of the runs in log N."""
MIN_RUNS = 3
MIN_BUDGETS = 2
FEW_BUDGETS = 4
QUANTITIES = ("params", "tokens", "loss")
EXPONENTS = ("a", "b", "c")


@dataclass(kw_only=True)
class Profile:
    """One budget: its runs by size, the curve through them, and its lowest point under noise."""

    flops: float
    flops_range: tuple[float, float]
    """Of its runs."""
    params: np.ndarray
    """(n,), ascending."""
    tokens: np.ndarray
    loss: np.ndarray
    grid: np.ndarray
    """(m,) params."""
    curve: np.ndarray
    """(m,) loss in nats."""
    draws: np.ndarray
    """(R, 3): log of params, tokens and loss at the lowest point of each noise draw; NaN where at an edge."""
    spread: np.ndarray
    """(3,): standard deviation of the logs, floored and raised by the share of draws at an edge."""
    parabola: float
    """N* by a parabola through the runs around the lowest one, NaN where it has no minimum."""
    problem: str | None = None
    """Why the profile has no usable minimum; such a profile is shown but not used."""

    @property
    def optimum(self) -> np.ndarray:
        """(3,): log N*, log D*, log L*, medians over the noise draws."""
        return np.nanmedian(self.draws, axis=0)

    @property
    def interval(self) -> np.ndarray:
        """(2, 3): ends of the 95% intervals of N*, D*, L* by ``spread``; NaN without a usable minimum.

        Not percentiles of the draws: where the curve has a kink at a measured size hardly a draw leaves it, and an
        interval without width would claim to know N* to within less than the distance of the sizes.
        """
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * self.spread
        return np.exp([self.optimum - half, self.optimum + half])


@dataclass(kw_only=True)
class IsoFlopFit:
    """Power laws through the optima of one group: log y = exponent * log C + log coefficient."""

    group: str
    loss_column: str
    table: RunTable
    profiles: list[Profile]
    exponents: dict[str, float]
    """a, b, c of N* ~ C^a, D* ~ C^b, L* ~ C^c."""
    coefficients: dict[str, float]
    exponent_draws: np.ndarray
    """(R, 3)."""
    parabola_a: float | None
    noise: float
    seed: int
    warnings: list[str] = field(default_factory=list)

    @property
    def used(self) -> list[Profile]:
        return [profile for profile in self.profiles if profile.problem is None]

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95% percentile intervals of the exponents over the noise draws."""
        tail = 50 * (1 - LEVEL)
        return {
            name: np.percentile(x, [tail, 100 - tail]).tolist() for name, x in zip(EXPONENTS, self.exponent_draws.T)
        }

    def to_json(self) -> dict[str, Any]:
        """The entry of `isoflops.json`."""
        budgets = []
        for profile in self.profiles:
            entry: dict[str, Any] = {
                "flops": profile.flops,
                "flops_range": list(profile.flops_range),
                "n_runs": len(profile.params),
                "params_range": [float(profile.params[0]), float(profile.params[-1])],
            }
            if profile.problem is None:
                low, high = profile.interval
                for i, name in enumerate(QUANTITIES):
                    entry[name] = float(np.exp(profile.optimum[i]))
                    entry[f"{name}_interval"] = [float(low[i]), float(high[i])]
                entry["spread_log_params"] = float(profile.spread[0])
            else:
                entry["left_out"] = profile.problem
            budgets.append(entry)
        return {
            "group": self.group,
            "method": "akima",
            "loss_column": self.loss_column,
            "n_runs": len(self.table),
            "exponents": self.exponents,
            "coefficients": self.coefficients,
            "intervals": self.intervals,
            "parabola": {"a": self.parabola_a},
            "budgets": budgets,
            "noise": {"nats": self.noise, "draws": len(self.exponent_draws), "seed": self.seed},
            "warnings": self.warnings,
        }


def fit_isoflops(
    table: RunTable,
    *,
    group: str = "all",
    loss_column: str = "loss",
    noise: float | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> IsoFlopFit:
    """Optima of every budget of ``table`` and the power laws through them.

    Args:
        noise: standard deviation of a loss between seeds, nats; None to take it from the curves, NOISE at least.
        draws: noise draws behind the intervals.

    Raises:
        InputError: no such column, a number of draws or a noise out of range, or fewer than 2 budgets with
            a minimum.
    """
    check_draws("--draws", draws)
    if noise is not None and not 0 < noise < 1:
        raise InputError(f"--noise: {noise} is not between 0 and 1 nat")
    if loss_column not in table.loss_columns:
        raise InputError(f"{table.path}: no loss column {loss_column!r}; has {', '.join(table.loss_columns)}")
    measured = ~np.isnan(table.numbers(loss_column))
    warnings = [f"{place} has no {loss_column} and was left out" for place in table.select(~measured).places]
    table = table.select(measured)
    # By the group's name, so that a group has the same draws whichever others are in the table; by a checksum, since
    # Python's hash of a text differs from process to process.
    profiles, left_out, noise = _profiles(table, loss_column, noise, draws, [seed, zlib.crc32(group.encode())])
    warnings += left_out
    used = [profile for profile in profiles if profile.problem is None]
    if len(used) < MIN_BUDGETS:
        reasons = "; ".join(f"{p.flops:.3g} FLOPs: {p.problem}" for p in profiles if p.problem)
        raise InputError(
            f"{table.path}: group {group!r}, column {loss_column}: {len(used)} budgets with a minimum inside the "
            f"measured sizes, at least {MIN_BUDGETS} are needed{' (' + reasons + ')' if reasons else ''}; give at "
            f"least {MIN_RUNS} sizes at equal flops"
        )
    slopes, intercepts = _lines(used, np.stack([p.optimum for p in used])[None])
    drawn, _ = _lines(used, np.stack([p.draws for p in used], axis=1))
    fit = IsoFlopFit(
        group=group,
        loss_column=loss_column,
        table=table,
        profiles=profiles,
        exponents=dict(zip(EXPONENTS, slopes[0].tolist())),
        coefficients=dict(zip(QUANTITIES, np.exp(intercepts[0]).tolist())),
        # In a draw that leaves fewer than two budgets a minimum there is no slope.
        exponent_draws=drawn[np.isfinite(drawn).all(-1)],
        parabola_a=_parabola_exponent(used),
        noise=noise,
        seed=seed,
    )
    fit.warnings = [*_warnings(fit), *warnings]
    return fit


def _profiles(
    table: RunTable, column: str, noise: float | None, draws: int, seed: list[int]
) -> tuple[list[Profile], list[str], float]:
    """The profiles of all budgets of enough sizes, a line on every run that is in none, and the noise."""
    rng = np.random.default_rng(seed)
    levels, lines, law = [], [], None
    for level in budgets(table):
        flops = level.numbers("flops")
        span = (float(flops.min()), float(flops.max()))
        if span[1] > span[0] * (1 + EVEN_BUDGET):
            law = law_of(table, column) if law is None else law
            level = level if law is None else at_budget(level, column, law)
        # After the move: of two runs of one size the one with more compute has the lower loss.
        level, repeated = _best_of_each_size(level, column)
        lines += repeated
        if len(level) < MIN_RUNS:
            left = ", ".join(level.places)
            lines.append(f"{left}: fewer than {MIN_RUNS} sizes at {float(np.median(flops)):.3g} FLOPs, left out")
            continue
        levels.append((level, span))
    if noise is None:
        curves = [(level.numbers("params"), level.numbers(column)) for level, _ in levels]
        found = noise_of_curves([(np.log(np.sort(n)), y[np.argsort(n)]) for n, y in curves])
        noise = max(NOISE, found or 0.0)
    return [profile_of(level, column, noise, draws, rng, span) for level, span in levels], lines, noise


def profile_of(
    table: RunTable, column: str, noise: float, draws: int, rng: np.random.Generator, span: tuple[float, float]
) -> Profile:
    """The profile of one budget's runs, whose sizes are distinct; ``span`` are its smallest and largest FLOPs."""
    order = np.argsort(table.numbers("params"))
    params, tokens, loss = (table.numbers(c)[order] for c in ("params", "tokens", column))
    x = np.log(params)
    grid = np.geomspace(params[0], params[-1], (len(params) - 1) * GRID_PER_RUN)
    # In logarithms: at equal compute tokens go with one over the size, a straight line there.
    log_tokens = np.interp(np.log(grid), x, np.log(tokens))
    # A draw must stay positive whatever the noise asked for.
    noisy = np.maximum(loss + noise * rng.standard_normal((draws, len(loss))), 0.1 * loss)
    curve = Akima1DInterpolator(x, np.log(loss))(np.log(grid))
    # One spline for all draws: it runs along the first axis, so that each draw is a column.
    curves = Akima1DInterpolator(x, np.log(noisy).T)(np.log(grid))
    lowest = curves.argmin(axis=0)
    inside = (lowest > 0) & (lowest < len(grid) - 1)
    found = np.stack([np.log(grid)[lowest], log_tokens[lowest], curves[lowest, np.arange(draws)]], axis=1)
    found[~inside] = np.nan
    profile = Profile(
        flops=float(np.median(table.numbers("flops"))),
        flops_range=span,
        params=params,
        tokens=tokens,
        loss=loss,
        grid=grid,
        curve=np.exp(curve),
        draws=found,
        spread=np.full(3, np.nan),
        parabola=_parabola(x, np.log(loss)),
    )
    edge = {0: "smallest", len(grid) - 1: "largest"}.get(int(curve.argmin()))
    if edge:
        # "smallest" becomes "smaller", "largest" becomes "larger".
        profile.problem = f"the minimum lies at the edge, the {edge} size: add {edge[:-3]}er ones"
    elif inside.mean() < 0.5:
        profile.problem = f"under noise the minimum lies at an edge in {1 - inside.mean():.0%} of draws"
    else:
        # The logarithm of a loss moves by the noise over the loss.
        floors = [FLOOR * np.ptp(v) / (len(params) - 1) for v in (x, np.log(tokens))] + [FLOOR * noise / loss.min()]
        profile.spread = np.maximum(np.nanstd(found, axis=0), floors) / inside.mean()
    return profile


def fit_isoflop_table(
    table: RunTable,
    *,
    group_by: str | None = None,
    losses: str = "loss",
    noise: float | None = None,
    draws: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[IsoFlopFit]:
    """Fit each group and loss column, as outputs.fit_table does.

    Raises:
        InputError: see :func:`fit_isoflops`.
    """
    groups, initialised = native_groups(table, group_by)
    columns = table.loss_columns if losses == "all" else [name.strip() for name in losses.split(",")]
    fits = []
    for group, runs in groups.items():
        for column in columns:
            progress(f"fitting {group}, {column}")
            fit = fit_isoflops(runs, group=group, loss_column=column, noise=noise, draws=draws, seed=seed)
            # First of all: which runs the law is about, before what is wrong with it.
            fit.warnings[:0] = initialised[group]
            fits.append(fit)
    return fits


def _best_of_each_size(table: RunTable, column: str) -> tuple[RunTable, list[str]]:
    """The run of lowest loss of each size, and a line for every run that this leaves out."""
    params, loss = table.numbers("params"), table.numbers(column)
    best = {n: min(np.flatnonzero(params == n), key=lambda i: loss[i]) for n in np.unique(params)}
    keep = np.isin(np.arange(len(table)), list(best.values()))
    lines = [
        f"{place} was left out: another run of the same size and budget has a lower {column}"
        for place in table.select(~keep).places
    ]
    return table.select(keep), lines


def _lines(profiles: list[Profile], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of (R, k, 3) logs on log C; slopes and intercepts (R, 3), without NaN budgets."""
    x = np.log([p.flops for p in profiles])[None, :, None]
    weights = np.broadcast_to(np.stack([p.spread for p in profiles]) ** -2.0, values.shape)
    weights = np.where(np.isnan(values), 0.0, weights)
    # A weight of zero is not enough: zero times NaN is NaN.
    y = np.nan_to_num(values)
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = (weights * x).sum(1, keepdims=True) / total, (weights * y).sum(1, keepdims=True) / total
        slope = (weights * (x - mean_x) * (y - mean_y)).sum(1) / (weights * (x - mean_x) ** 2).sum(1)
    return slope, mean_y[:, 0] - slope * mean_x[:, 0]


def _parabola(x: np.ndarray, y: np.ndarray) -> float:
    """N* of the parabola through the (at most 5) runs around the lowest one; NaN where it is not convex."""
    i = int(y.argmin())
    part = slice(max(0, i - 2), i + 3)
    if len(x[part]) < 3:
        return float("nan")
    # About the lowest run: squares of log N, of about 20, would be ill-conditioned beside their small differences.
    second, first, _ = np.polyfit(x[part] - x[i], y[part], 2)
    return float(np.exp(x[i] - first / (2 * second))) if second > 0 else float("nan")


def _parabola_exponent(profiles: list[Profile]) -> float | None:
    kept = [p for p in profiles if np.isfinite(p.parabola)]
    if len(kept) < MIN_BUDGETS:
        return None
    return float(np.polyfit(np.log([p.flops for p in kept]), np.log([p.parabola for p in kept]), 1)[0])


def _warnings(fit: IsoFlopFit) -> list[str]:
    found = table_warnings(fit.table)
    if len(fit.used) < FEW_BUDGETS:
        found.append(f"only {len(fit.used)} budgets have a minimum: the exponents are rough below {FEW_BUDGETS}")
    spans = [high / low - 1 for low, high in (profile.flops_range for profile in fit.profiles)]
    if max(spans) > TOLD_BUDGET:
        found.append(
            f"{sum(span > TOLD_BUDGET for span in spans)} of {len(spans)} budgets have runs that differ in FLOPs, by "
            f"up to {max(spans):.1%}: their losses were moved to the budget along the law's slope"
        )
    for profile in fit.profiles:
        name = f"{profile.flops:.3g} FLOPs"
        if profile.problem:
            found.append(f"{name}: {profile.problem}; not used")
            continue
        if not np.isfinite(profile.parabola):
            found.append(f"{name}: the profile is not convex around its minimum")
        rise = np.diff(profile.loss)
        steps = np.sign(rise) * (np.abs(rise) > 4 * fit.noise)  # smaller steps may be noise
        steps = steps[steps != 0]
        # A fall after a rise: beyond one minimum the loss goes down to another.
        if (np.diff(steps) < 0).any():
            found.append(f"{name}: more than one minimum; some runs may be spoilt")
        edge = np.isnan(profile.draws[:, 0]).mean()
        if edge > 0.05:
            found.append(f"{name}: under noise the minimum lies at an edge in {edge:.0%} of draws")
    if fit.parabola_a is not None:
        low, high = fit.intervals["a"]
        if not low <= fit.parabola_a <= high:
            found.append(f"parabolas give a = {fit.parabola_a:.4f}, outside the interval {low:.4f} to {high:.4f}")
    return found
