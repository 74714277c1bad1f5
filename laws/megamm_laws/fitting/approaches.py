"""The three approaches of Hoffmann et al. 2022 on one table, side by side.

1, envelope: the runs that no run of equal or less compute beats, and a line through their sizes.
2, isoFLOP: the lowest point of each budget's profile (megamm_laws.fitting.isoflop); no law across budgets.
3, parametric: the fitted law.

Approach 1 was meant for whole training curves; on finished runs it sees only the sizes that were tried, so its
exponent is the roughest. That the three agree is the evidence that a table can give about its own law.
"""

from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.fitting.fit import Fit, cluster_labels
from megamm_laws.fitting.isoflop import NOISE, fit_isoflops
from megamm_laws.law.percentiles import LEVEL
from megamm_laws.runs.table import RunTable

MIN_ENVELOPE = 4
RESAMPLES = 200


def side_by_side(fit: Fit) -> list[dict[str, Any]]:
    """Three entries: ``approach``, ``method``, ``a``, ``interval`` (95%) and ``points``, or ``skipped`` with why."""
    return [
        {"approach": 1, "method": "envelope", **_envelope_entry(fit)},
        {"approach": 2, "method": "isoFLOP", **_isoflop_entry(fit)},
        {
            "approach": 3,
            "method": "parametric",
            "a": fit.exponents["a"],
            "interval": fit.intervals["a"],
            "points": len(fit.table),
        },
    ]


def disagreement(entries: list[dict[str, Any]]) -> list[str]:
    """A warning for each pair of approaches whose intervals do not overlap."""
    known = [entry for entry in entries if "a" in entry]
    found = []
    for i, one in enumerate(known):
        for two in known[i + 1 :]:
            if one["interval"][1] < two["interval"][0] or two["interval"][1] < one["interval"][0]:
                found.append(
                    f"approaches disagree: a = {one['a']:.3f} by {one['method']}, {two['a']:.3f} by {two['method']}, "
                    "with intervals apart"
                )
    return found


def envelope(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the runs whose loss no run of equal or less compute reaches, by compute."""
    # The last key counts first: by compute, and by loss among equals, of which only the lowest can then be on it.
    order = np.lexsort((loss, flops))
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))
    return order[loss[order] < lowest[:-1]]


def _envelope_entry(fit: Fit) -> dict[str, Any]:
    table = fit.table
    chosen = envelope(table.numbers("flops"), table.numbers(fit.loss_column))
    exponent = _slope(table, fit.loss_column, np.ones(len(table), bool))
    if exponent is None:
        return {"skipped": f"{len(chosen)} runs are on the lower envelope, at least {MIN_ENVELOPE} are needed"}
    clusters = cluster_labels(table)
    count = int(clusters.max()) + 1
    rng = np.random.default_rng(fit.seed)
    # How often a unit was drawn is of no account: a run that counts twice leaves the envelope as it is.
    drawn = (
        _slope(table, fit.loss_column, np.isin(clusters, rng.integers(count, size=count))) for _ in range(RESAMPLES)
    )
    draws = [draw for draw in drawn if draw is not None]
    if len(draws) < RESAMPLES // 2:
        return {"skipped": "most resamples have too few runs on the lower envelope"}
    tail = 50 * (1 - LEVEL)
    return {"a": exponent, "interval": np.percentile(draws, [tail, 100 - tail]).tolist(), "points": len(chosen)}


def _slope(table: RunTable, column: str, keep: np.ndarray) -> float | None:
    """Slope of log N on log C along the envelope of the runs kept; None where too few are on it."""
    params, flops, loss = (table.numbers(c)[keep] for c in ("params", "flops", column))
    chosen = envelope(flops, loss)
    log_c = np.log(flops[chosen])
    # Within a factor of two in compute the sizes tried decide the slope, not the law.
    if len(chosen) < MIN_ENVELOPE or np.ptp(log_c) < np.log(2):
        return None
    return float(np.polyfit(log_c, np.log(params[chosen]), 1)[0])


def _isoflop_entry(fit: Fit) -> dict[str, Any]:
    # Runs scatter about the law by at least their noise; the intervals should not be narrower than that says.
    spread = 1.4826 * float(np.median(np.abs(fit.residuals - np.median(fit.residuals))))
    # From log loss into nats, and well below the 1 nat that fit_isoflops refuses.
    noise = min(0.5, max(NOISE, spread * float(np.median(fit.table.numbers(fit.loss_column)))))
    try:
        found = fit_isoflops(
            fit.table, group=fit.group, loss_column=fit.loss_column, noise=noise, draws=500, seed=fit.seed
        )
    except InputError:
        return {"skipped": "fewer than 2 budgets have 3 sizes or more around a minimum"}
    return {"a": found.exponents["a"], "interval": found.intervals["a"], "points": len(found.used), "noise": noise}
