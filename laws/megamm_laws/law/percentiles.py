"""95% intervals as percentiles of draws."""

import numpy as np

LEVEL = 0.95
"""Of every interval, unless it says another."""


def percentile_intervals(draws: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """95% percentile interval of each quantity over its draws (R,)."""
    tail = 50 * (1 - LEVEL)
    return {name: np.percentile(x, [tail, 100 - tail]).tolist() for name, x in draws.items()}


def percentile_band(values: np.ndarray) -> np.ndarray:
    """95% percentile interval over the first axis, (2, m); infinite values are allowed."""
    tail = 50 * (1 - LEVEL)
    finite = np.isfinite(values).all()
    # Interpolating between two infinities would give NaN.
    return np.percentile(values, [tail, 100 - tail], axis=0, method="linear" if finite else "nearest")
