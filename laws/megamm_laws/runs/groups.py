"""Which runs a law is fitted to: the groups of a table, each of runs that started alike."""

from megamm_laws.runs.table import RunTable

INIT = "init"
SWEEP = "sweep"
"""Column that is empty for the runs that a ladder is made of, and says for others what was varied, such as `lr 2`."""
NATIVE = ("native", "scratch", "false", "0", "no", "")
"""What the column ``init`` says of a run that started from random weights; all else started from trained ones."""


def native_groups(table: RunTable, group_by: str | None = None) -> tuple[dict[str, RunTable], dict[str, list[str]]]:
    """Tables by the values of ``group_by``, each after :func:`law_runs`, and its lines on each, by name.

    By default groups are those of ``architecture`` where a run has one, else one group named `all`.

    Raises:
        InputError: see runs.RunTable.groups.
    """
    if group_by is None and any(row.get("architecture") for row in table.rows):
        group_by = "architecture"
    found = {name: law_runs(runs) for name, runs in table.groups(group_by).items()}
    return {name: runs for name, (runs, _) in found.items()}, {name: lines for name, (_, lines) in found.items()}


def law_runs(table: RunTable) -> tuple[RunTable, list[str]]:
    """The runs of one group that belong in its law, and lines on those left out: of a sweep, or not native.

    What was trained at another rate than the ladder's own is there to find the best rate (see sweeps); a law through
    some sizes at one rate and others at several would mix the two. A group that is all of a sweep keeps its runs.
    """
    own, lines = are_own(table), []
    if not any(own) and len(table):
        lines.append(f"all {len(table)} runs are of a sweep: this is no law of one ladder")
    elif not all(own):
        swept = table.select(not kept for kept in own)
        lines.append(f"{len(swept)} runs of a sweep were left out of the law (the first: {swept.places[0]})")
        table = table.select(own)
    native, more = native_runs(table)
    return native, lines + more


def are_own(table: RunTable) -> list[bool]:
    """Which runs are a ladder's own and of no sweep, (n,) bool."""
    return [not str(row.get(SWEEP) or "").strip() for row in table.rows]


def native_runs(table: RunTable, column: str = INIT) -> tuple[RunTable, list[str]]:
    """The native runs of one group, and a line on those left out.

    A run that starts from a trained model reaches a loss that its own tokens have not paid for, so that it has no
    place in the law of native ones; plan.transfer has one for it. A group without any native run keeps all of its
    runs, and the line says so.
    """
    native = are_native(table, column)
    kinds = ", ".join(sorted({str(row[column]).strip() for row, own in zip(table.rows, native) if not own}))
    if not kinds:
        return table, []
    if not any(native):
        return table, [f"all {len(table)} runs have {column} {kinds}: this is no law of native runs"]
    others = table.select(not own for own in native)
    line = f"{len(others)} runs with {column} {kinds} were left out of the law of native runs"
    return table.select(native), [f"{line}: {', '.join(others.places)}"]


def are_native(table: RunTable, column: str = INIT) -> list[bool]:
    """Which runs started from random weights, (n,) bool; one that says nothing of it did."""
    return [str(row.get(column) or "").strip().lower() in NATIVE for row in table.rows]
