"""What a single run may come out at: the uncertainty of its law, and the noise between runs."""

from typing import Any

import numpy as np

from megamm_laws.law.solver import DELTA


def noise_between_runs(entry: dict[str, Any]) -> float:
    """Standard deviation of log loss between runs, from a fit's objective (``huber_log``) in fits.json.

    Beyond delta the Huber loss is delta (|r| - delta/2), so the objective gives the mean |r|; of a normal that is
    0.798 standard deviations. With n - 5 degrees of freedom.
    """
    n = entry["n_runs"]
    mean = entry["objective"] / (n * DELTA) + DELTA / 2
    return float(mean / 0.798 * np.sqrt(n / max(n - 5, 1)))


def with_noise(
    value: float, interval: list[float | None], noise: float, deviations: float = 1.96
) -> list[float | None]:
    """The interval of a loss ``value`` of the law, widened by normal noise of one run.

    The distance of each end from the value and that of the noise add as independent errors do, in squares (Donner and
    Zou 2010, "MOVER"). Percentiles of draws with noise on them may come out narrower than those of the draws where
    these leave gaps; this is wider at both ends, whatever the draws.

    Args:
        interval: nats; an open end is None.
        noise: standard deviation in log loss.
        deviations: of a normal that hold the interval's share; 1.96 for 95%.
    """
    ends: list[float | None] = []
    for end, sign in zip(interval, (-1, 1)):
        distance = max(0.0, sign * np.log(end / value)) if end else 0.0
        more = np.hypot(distance, deviations * noise) - distance
        ends.append(None if end is None else float(end * np.exp(sign * more)))
    return ends
