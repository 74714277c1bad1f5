"""Which runs of two groups are the same experiment but for what sets the groups apart."""

from typing import Any

import numpy as np

from megamm_laws.runs.table import RunTable

NEAR = 0.1
"""Runs whose N, or D, differ by more than this in log are no match: ladders step by factors of 1.4 and more."""
ALIKE = ("seed", "mixture", "architecture")
"""Columns in which matched runs agree, where the two groups have a value in common at all."""


def matched_runs(first: RunTable, second: RunTable) -> np.ndarray:
    """Rows of the first and of the second that match, (m, 2) int; no run is in two of them.

    The closest in log N and log D are taken first. Neither the order of rows nor that of the groups decides.
    """
    points = [np.log(np.stack([t.numbers("params"), t.numbers("tokens")], axis=1)) for t in (first, second)]
    apart = np.abs(points[0][:, None] - points[1][None])
    allowed = (apart <= NEAR).all(-1)
    for column in ALIKE:
        values = [[_text(row.get(column)) for row in table.rows] for table in (first, second)]
        if set(filter(None, values[0])) & set(filter(None, values[1])):
            one, other = np.array(values[0])[:, None], np.array(values[1])[None]
            allowed &= (one == other) | (one == "") | (other == "")
    candidates = np.argwhere(allowed)
    names = [[_text(row.get("run")) for row in table.rows] for table in (first, second)]
    keys = [
        (
            round(float(apart[i, j].sum()), 9),
            *points[0][i],
            *sorted((names[0][i], names[1][j])),  # among equals, as several runs of one size without a seed are
            first.rows[i]["loss"],
            second.rows[j]["loss"],
        )
        for i, j in candidates
    ]
    taken: tuple[set[int], set[int]] = (set(), set())
    found = []
    for _, (i, j) in sorted(zip(keys, candidates.tolist())):
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            found.append((i, j))
    return np.array(found, int).reshape(-1, 2)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
