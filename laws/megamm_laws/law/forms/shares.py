"""The share of each domain in a run's data, read from a run table."""

from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.law.forms.base import column_numbers
from megamm_laws.runs.table import RunTable

PREFIX = "share_"
DOMAINS = ("caption", "interleaved", "text")
"""Domains of a ``mixture`` column of three numbers."""
# Not minus infinity, which times a zero is NaN in the derivatives; by the least power of a share, 0.03, still e^-30.
ABSENT = -1000.0


def read_shares(table: RunTable) -> dict[str, np.ndarray]:
    """``share_<domain>`` (n,) of every domain, checked to sum to one.

    Raises:
        InputError: no shares can be read, or those of a row do not sum to 1.
    """
    names = [c for c in table.columns if c.startswith(PREFIX)]
    if names:
        # A run on one domain alone has a share of 1, and column_numbers wants less than the upper end.
        shares = {name: column_numbers(table, name, 0.0, 1.0 + 1e-9, "a share") for name in names}
    else:
        parsed = [_parse(table.path, place, row.get("mixture")) for row, place in zip(table.rows, table.places)]
        shares = {PREFIX + name: column for name, column in zip(DOMAINS, np.array(parsed).T)}
    total = np.sum(list(shares.values()), axis=0)
    for place, value in zip(table.places, total):
        if abs(value - 1) > 0.01:
            raise InputError(f"{table.path}: {place}: shares {', '.join(shares)} sum to {value:.3g}, not 1")
    if len(shares) < 2:
        raise InputError(f"{table.path}: one domain only ({', '.join(shares)}): there is no mixture to fit")
    # Tables round them; the exponential law can do without a constant factor only where they sum to one.
    return {name: column / total for name, column in shares.items()}


def _parse(path: str, place: str, text: Any) -> list[float]:
    try:
        values = [float(part) for part in str(text).split("-")]
        total = sum(values)
        # ``not`` before the two sums, not their opposites: NaN, which float() reads, fails both.
        if len(values) != len(DOMAINS) or min(values) < 0 or not (abs(total - 1) <= 0.01 or abs(total - 100) <= 1):
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"{path}: {place}: column mixture: {text!r} is not three shares that sum to 100 (or 1), such as 45-45-10; "
            f"or give columns {PREFIX}<domain>"
        ) from error
    return [value / total for value in values]


def domains(columns: dict[str, np.ndarray]) -> list[str]:
    """Names of the domains, in the order of the columns."""
    return [name.removeprefix(PREFIX) for name in columns if name.startswith(PREFIX)]


def log_share(columns: dict[str, np.ndarray], domain: str) -> np.ndarray:
    """log of a share (n,), with ABSENT for zero."""
    share = columns[PREFIX + domain]
    # np.where computes both branches: the logarithm of zero would warn.
    return np.where(share > 0, np.log(np.maximum(share, 1e-300)), ABSENT)


def mean_shares(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean share of each domain over the runs: where a mixture law is given as a law of N and D."""
    return {PREFIX + name: float(np.mean(columns[PREFIX + name])) for name in domains(columns)}
