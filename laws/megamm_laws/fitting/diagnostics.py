"""What to distrust in a fit, one sentence each, with the figures that say so."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megamm_laws.fitting.approaches import disagreement, side_by_side
from megamm_laws.fitting.fit import HOLDOUT_SHARE, Fit, distinct, hold_out, offset_labels
from megamm_laws.fitting.form_fit import FormFit
from megamm_laws.fitting.stability import drop_table, drop_warnings
from megamm_laws.law import power_law
from megamm_laws.law.constraints import EXPONENT_BOUNDS
from megamm_laws.runs.table import RunTable, table_warnings
from megamm_laws.uncertainty.intervals import joint_intervals, optimum_intervals, profile_intervals

FEW_RUNS = 8
FEW_CLUSTERS = 8
WIDE_INTERVAL = 0.2
OUTLIER_MADS = 6.0
SLACK = 1.5
"""Factor by which an optimum may leave the measured sizes without a warning."""
SHOWN = 10
FEW_RATIOS = 4
FAR = 10.0
"""Multiple of the largest measured compute beyond which a prediction is told to be an extrapolation."""
TOO_FAR = 100.0
"""The same, beyond which it is a guess: the law's form is a belief more than a measurement there."""
WIDTHS_APART = 2.5
HOLDOUT_SHARES = (0.1, HOLDOUT_SHARE, 0.4)
FEW_UNITS = 5
"""Sizes or trunks below which what each is off cannot be told from the three constants of the law along that axis."""
LIKELY = 0.5
"""Probability from which an error that runs share is told."""


def examine(fit: Fit) -> None:
    """Add to ``fit`` the drop-k table, joint and profile intervals and the three approaches, and all warnings."""
    fit.checks = {
        "drop_k": drop_table(fit),
        "holdouts": hold_outs(fit),
        "joint": joint_intervals(fit),
        "optimum": optimum_intervals(fit),
        "profile_intervals": profile_intervals(fit),
        "approaches": side_by_side(fit),
    }
    fit.warnings += warnings_of(fit)


def hold_outs(fit: Fit) -> list[dict[str, Any]]:
    """Hold-outs of more and more of the largest runs, as far as enough are left: whether error and drift grow."""
    # The usual share is at hand already: each hold-out costs a fit from all starts.
    found = [(share, fit.holdout if share == HOLDOUT_SHARE else hold_out(fit, share)) for share in HOLDOUT_SHARES]
    keys = ("n", "compute_ratio", "relative_error_loss", "a_without", "a_drift", "a_drift_in_half_widths")
    return [{"share": share, **{key: x[key] for key in keys}} for share, x in found if "skipped" not in x]


def extrapolation(flops: float, flops_range: tuple[float, float]) -> str | None:
    """A warning where ``flops`` is more than ten times the largest measured compute, else None."""
    ratio = flops / flops_range[1]
    if ratio <= FAR * (1 + 1e-9):  # ten times is the default of some tools, and rounding is no extrapolation
        return None
    return f"extrapolation: {flops:.3g} FLOPs are {ratio:.0f} times the largest run, {flops_range[1]:.3g}"


def warnings_of(fit: Fit, partners: Sequence[RunTable] = ()) -> list[str]:
    """All warnings about ``fit``, the gravest kinds first.

    Args:
        partners: runs of the other groups whose exponents are those of ``fit`` too (forms.shared).
    """
    return [
        *identification(fit, partners),
        *bounds(fit),
        *_starts(fit, shared=bool(partners)),
        *shared_errors(fit),
        *_stability(fit),
        *_design(fit),
        *bootstrap(fit),
        *outliers(fit),
    ]


def identification(fit: Fit, partners: Sequence[RunTable] = ()) -> list[str]:
    """Whether the runs determine the law at all; ``partners`` as for warnings_of."""
    found = []
    low, high = fit.noise_intervals["a"]
    if high - low > WIDE_INTERVAL:
        found.append(
            f"exponents are not identified: the 95% interval of a by noise alone, {low:.3f} to {high:.3f}, is wider "
            f"than {WIDE_INTERVAL}; add runs that differ more in size and length"
        )
    n = len(fit.table)
    if n < FEW_RUNS:
        found.append(
            f"{n} runs for {len(power_law.PARAMETERS)} parameters; intervals are too narrow below {FEW_RUNS} runs"
        )
    for column, (constant, exponent) in {"params": ("A", "alpha"), "tokens": ("B", "beta")}.items():
        number, *others = (_levels(table.numbers(column)) for table in (fit.table, *partners))
        # An exponent that another group determines leaves two unknowns of this term, for which two sizes do.
        given = max(others, default=0) >= 3
        if number < (2 if given else 3):
            what = "constants" if given else "exponents"
            term = constant if given else f"{constant}, {exponent}"
            found.append(
                f"{what} are not identified: with {number} distinct {column}, {term} and E cannot be told "
                f"apart; at least {2 if given else 3} are needed"
            )
    return found


def _levels(values: np.ndarray) -> int:
    """How many distinct ones there are."""
    return int(distinct(values).max()) + 1


def bounds(fit: Fit) -> list[str]:
    """Parameters at the end of what is searched, and terms that do not matter."""
    E, A, alpha, B, beta = fit.parameters
    lowest = float(fit.table.numbers(fit.loss_column).min())
    found = []
    if lowest * 0.02 > E:
        found.append(f"E = {E:.3g} is close to 0: no irreducible loss shows in this range, and alpha, beta are low")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not EXPONENT_BOUNDS[0] * 1.01 < value < EXPONENT_BOUNDS[1] * 0.99:
            found.append(f"{name} = {value:.3g} is at the bound of the search, {EXPONENT_BOUNDS}")
    terms = {
        "A/N^alpha": A * fit.table.numbers("params") ** -alpha,
        "B/D^beta": B * fit.table.numbers("tokens") ** -beta,
    }
    for name, term in terms.items():
        if term.max() < 1e-3 * lowest:
            found.append(f"{name} is below 0.1% of the loss everywhere: its exponent means nothing")
    return found


def _starts(fit: Fit, shared: bool) -> list[str]:
    share = fit.starts_at_optimum / fit.starts_total
    if share >= 0.5:
        return []
    what = " of all groups together" if shared else ""
    found = [f"only {fit.starts_at_optimum} of {fit.starts_total} starts ended at the optimum{what}"]
    values = fit.resampled.copy()
    # log A at the mean size, not at N = 1, or every fit would show a correlation of 1 with alpha.
    for term, exponent, column in ((1, 2, "params"), (3, 4, "tokens")):
        values[:, term] = np.log(values[:, term]) - values[:, exponent] * np.log(fit.table.numbers(column)).mean()
    spread = values.std(axis=0) > 1e-9 * np.abs(values).max(axis=0)
    # A constant that never moved, at a bound, has no correlation: dividing by its spread gives NaN.
    if spread.sum() < 2:
        return found
    correlation = np.corrcoef(values[:, spread].T)
    names = np.array(power_law.PARAMETERS)[spread]
    for i, j in zip(*np.triu_indices(len(names), 1)):
        if abs(correlation[i, j]) > 0.99:
            found.append(f"{names[i]} and {names[j]} are correlated at {correlation[i, j]:.3f}: they trade off")
    return found


def shared_errors(fit: Fit) -> list[str]:
    """Errors that more runs of the same kind do not average out."""
    error, found = fit.model_error, list[str]()
    if error is None:
        return found
    (low, high), (below, above) = fit.intervals["a"], fit.noise_intervals["a"]
    # Both intervals, since a reader must see how much of the width is the form's.
    if error.bend.probability > LIKELY:
        found.append(
            f"neighbouring runs err together: the surface departs from the form by {error.bend.sd:.2%} of the loss "
            f"(probability {error.bend.probability:.2f}); with it the 95% interval of a is {low:.3f} to {high:.3f}, "
            f"by noise alone {below:.3f} to {above:.3f}"
        )
    if error.offsets and error.offsets.probability > LIKELY:
        # As in the fit: runs of one trunk share an offset where trunks are the units, else those of one size.
        unit = "size" if fit.clusters == len(fit.table) else "trunk"
        number = int(offset_labels(fit.table).max()) + 1
        if number < FEW_UNITS:
            return [
                *found,
                f"cannot tell whether the runs of one {unit} err together: {number} {unit}s are too few for the law "
                f"and for what each {unit} is off; the intervals allow for it, and at least {FEW_UNITS} would tell",
            ]
        found.append(
            f"the runs of one {unit} err together, by {error.offsets.sd:.2%} of the loss (probability "
            f"{error.offsets.probability:.2f}): is each tuned alike? More of them count, more runs of each do not"
        )
    return found


def _stability(fit: Fit) -> list[str]:
    found = drop_warnings(fit.checks.get("drop_k", []), fit.noise_intervals)
    if fit.holdout.get("a_drift_in_half_widths", 0) > 1:
        found.append(
            f"held out: a is {fit.holdout['a_without']:.3f} without the runs of largest FLOPs and "
            f"{fit.holdout['a_with']:.3f} with them, apart by more than the half-width of its interval by noise alone"
        )
    # Not the wider intervals: a profile likelihood knows of no error of the form either.
    resampled = fit.noise_intervals
    for name, (low, high) in fit.checks.get("profile_intervals", {}).items():
        width = resampled[name][1] - resampled[name][0]
        if low is None or high is None:
            found.append(f"the profile likelihood of {name} has an open end: the objective is flat there")
        elif not 1 / WIDTHS_APART < (high - low) / max(width, 1e-12) < WIDTHS_APART:
            found.append(
                f"the profile likelihood gives {name} the interval {low:.4f} to {high:.4f}, the bootstrap "
                f"{resampled[name][0]:.4f} to {resampled[name][1]:.4f}"
            )
    return found + disagreement(fit.checks.get("approaches", []))


def _design(fit: Fit) -> list[str]:
    found = coverage(fit)
    params, tokens = fit.table.numbers("params"), fit.table.numbers("tokens")
    best = power_law.optimum(fit.parameters, np.array(fit.flops_range), fit.kappa)
    for name, values, optimal in (("params", params, best[0]), ("tokens", tokens, best[1])):
        if optimal.min() < values.min() / SLACK or optimal.max() > values.max() * SLACK:
            found.append(
                f"extrapolation: the optimal {name} over the runs' compute, {optimal.min():.3g} to "
                f"{optimal.max():.3g}, leave the measured {values.min():.3g} to {values.max():.3g}"
            )
    mixtures = sorted({str(row.get("mixture")) for row in fit.table.rows if row.get("mixture")})
    if len(mixtures) > 1:
        found.append(f"mixtures {', '.join(mixtures)} are fitted together; --group-by mixture keeps them apart")
    return found


def coverage(fit: Fit | FormFit) -> list[str]:
    """What the runs lack under any law."""
    found = []
    params, tokens, flops = (fit.table.numbers(c) for c in ("params", "tokens", "flops"))
    if np.ptp(np.log(params)) > 0 and np.ptp(np.log(tokens)) > 0:
        correlation = np.corrcoef(np.log(params), np.log(tokens))[0, 1]
        if abs(correlation) > 0.98:
            found.append(f"params and tokens vary together (correlation {correlation:.3f}): vary them apart")
    ratios = _levels(tokens / params)
    if ratios < FEW_RATIOS:
        found.append(f"only {ratios} distinct tokens per parameter: the optimal ratio rests on the form of the law")
    ratio = flops / (6 * params * tokens)
    if ratio.max() > 1.2 * ratio.min():
        found.append(
            f"flops/(6*params*tokens) varies from {ratio.min():.3g} to {ratio.max():.3g}; "
            f"frontiers use its median, {fit.kappa:.3g}"
        )
    return found + table_warnings(fit.table)


def bootstrap(fit: Fit | FormFit) -> list[str]:
    """Resamples that make intervals rough or too narrow."""
    found = []
    trunks = [row["trunk"] for row in fit.table.rows if row.get("trunk")]
    # Trunks with several runs, yet as many units as runs: cluster_labels found too few trunks to resample.
    if len(trunks) > len(set(trunks)) and fit.clusters == len(fit.table):
        found.append(
            f"only {len(set(trunks))} trunks: runs were resampled as if independent, so that intervals are too narrow "
            "and a verdict at 95% claims too much; add sizes"
        )
    if fit.clusters < FEW_CLUSTERS and fit.clusters < len(fit.table):
        found.append(f"the bootstrap resamples only {fit.clusters} trunks: intervals are rough")
    if fit.redrawn > 0.01 * len(fit.draws):
        found.append(
            f"{fit.redrawn / len(fit.draws):.0%} of the resamples held fewer than 3 distinct sizes and were "
            "drawn again: intervals are too narrow"
        )
    return found


def outliers(fit: Fit | FormFit) -> list[str]:
    """The runs more than 6 usual deviations off the fit, by name, the furthest first."""
    residuals = fit.residuals
    middle = np.median(residuals)
    # Below 1e-4 a residual is beyond what any run can measure, however well the others agree.
    # 1.4826 makes the median deviation of a normal distribution its standard deviation, which outliers do not move.
    spread = max(1.4826 * float(np.median(np.abs(residuals - middle))), 1e-4)
    distance = (residuals - middle) / spread
    order = np.argsort(-np.abs(distance))
    # Residuals are prediction over loss, hence the turned signs below: people ask how far the loss is off.
    order = order[np.abs(distance[order]) > OUTLIER_MADS]
    names = fit.table.places
    found = [
        f"outlier: {names[i]} has a loss {abs(np.expm1(-residuals[i])):.1%} "
        f"{'above' if residuals[i] < 0 else 'below'} the fit, {abs(distance[i]):.0f} usual deviations off"
        for i in order[:SHOWN]
    ]
    return found + ([f"{len(order) - SHOWN} more outliers"] if len(order) > SHOWN else [])
