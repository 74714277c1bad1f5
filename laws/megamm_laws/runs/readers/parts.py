"""Which parts of logs are one run: restarts are joined, unlike runs never.

A log may hold several heads (two runs in one file, or a run and its restarts), and a run several logs (one per start,
rotated files, checkpoints). A new head begins a new part; here parts become runs.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.runs.readers.curve import Curve

AGREE = 1e-3
"""Relative difference below which two logs say the same: texts round to four digits or so."""
CHUNK = 1 << 20


def holds(path: Path, mark: re.Pattern[bytes]) -> bool:
    """Whether a file has a line with ``mark``; quick, so that a reader can tell a file that is not its own."""
    with path.open("rb") as file:
        rest = b""
        while chunk := file.read(CHUNK):
            if mark.search(rest + chunk):
                return True
            rest = chunk[chunk.rfind(b"\n") + 1 :]  # a line may be cut in two
    return False


def join_parts(curves: Iterable[Curve]) -> list[Curve]:
    """The runs in parts of logs that are given in the order of writing.

    Parts of one name and unit are taken for starts of one run where nothing in them differs and the later one goes on
    from the earlier; else they are runs of their own, named NAME, NAME-2, ...
    """
    groups: dict[tuple[str, Path | None], list[Curve]] = {}
    for part in curves:
        runs = groups.setdefault((part.name, part.unit), [])
        before = next((run for run in reversed(runs) if run.kind == part.kind or _say_the_same(run, part)), None)
        if before is not None and _is_one_run(before, part):
            if (
                before.points
                and part.points
                and part.first_step <= before.first_step
                and not _say_the_same(before, part)
            ):
                before.points = {}  # begun anew: nothing of the first try may stay
            before.merge(part)
        else:
            runs.append(part)
    found = []
    for runs in groups.values():
        counts: dict[str, int] = {}
        for run in runs:
            # Of another kind it is most likely the same run in another form: under the same name it is refused.
            number = counts[run.kind] = counts.get(run.kind, 0) + 1
            found.append(replace(run, name=f"{run.name}-{number}") if number > 1 else run)
    return found


def _is_one_run(before: Curve, part: Curve) -> bool:
    if not _are_alike(before, part):
        return False
    if not (before.headed and part.headed) or not before.points:
        # Without a head only its steps can tell.
        return not (before.points and part.points) or part.first_step > before.first_step
    if not part.points:
        return False
    if _say_the_same(before, part) or part.first_step > before.first_step:
        return True
    return not before.is_finished


def _are_alike(before: Curve, part: Curve) -> bool:
    """Whether nothing that both say of the run differs."""
    for one, other in ((before.facts, part.facts), (before.settings, part.settings)):
        for key in one.keys() & other.keys():
            # Rates are measured, and differ from start to start.
            if key != "flops_exact_per_token" and not _equal(one[key], other[key]):
                return False
    return not before.total_steps or not part.total_steps or before.total_steps == part.total_steps


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= AGREE * abs(a)
    return a == b


def _say_the_same(before: Curve, part: Curve) -> bool:
    """Whether the losses agree at all steps that both have, of which there are two at least."""
    pairs = [
        (value, part.points[step][key])
        for step, values in before.points.items()
        if step in part.points
        for key, value in values.items()
        if "loss" in key and key in part.points[step]
    ]
    if len(pairs) < 2:
        return False
    one, other = np.array(pairs, float).T
    return bool((np.abs(one - other) <= AGREE * np.abs(one)).all())
