"""The layouts nearest to one that does not fit: settings to add to the command line. No torch in here."""

import math
from collections.abc import Iterator
from dataclasses import replace

from megamm.config import Config
from megamm.parallel.layout_rules import Wanted, layout_problems, may_pass, row_unit

NUM_SUGGESTIONS = 3
NEAR = 4
"""Suggestions change an axis by at most this factor before all else is tried."""


def nearest_layouts(config: Config, world_size: int) -> list[str]:
    """Settings that make the config fit, nearest first; each was checked."""
    found: list[str] = []
    for changes in _by_distance(config, world_size):
        flags = " ".join(f"--{name} {'null' if value is None else value}" for name, value in changes.items())
        if flags not in found and not layout_problems(_changed(config, changes), world_size):
            found.append(flags)
            if len(found) == NUM_SUGGESTIONS:
                break
    return found


def _by_distance(config: Config, world_size: int) -> Iterator[dict[str, int | None]]:
    """Changes of settings: near layouts in the order of how much they change, then all others."""
    # Large worlds have too many layouts to repair and sort them all where a near one fits.
    for factor in (NEAR, world_size):
        near = [_repaired(config, world_size, axes) for axes in _near_axes(config, world_size, factor)]
        seen = sorted((x for x in near if x[1]), key=lambda x: (x[0], str(x[1])))
        yield from (changes for _, changes in seen)


def _near_axes(config: Config, world_size: int, factor: float) -> Iterator[dict[str, int]]:
    """Sizes that multiply to ``world_size``, each within ``factor`` of the one wanted; dp_shard fills the rest."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]

    def near(axis: str) -> list[int]:
        wanted = max(1, getattr(config.parallel, axis))
        # 1 always: to leave an axis out is the simplest repair.
        return [n for n in divisors if n == 1 or wanted / factor <= n <= wanted * factor]

    for tensor in near("tensor"):
        for pipeline in near("pipeline"):
            for context in near("context"):
                for replicate in near("dp_replicate"):
                    rest = tensor * pipeline * context * replicate
                    if world_size % rest:
                        continue
                    for expert in {1, *near("expert")} if config.parallel.expert > 1 else {1}:
                        yield {
                            "dp_replicate": replicate,
                            "dp_shard": world_size // rest,
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "context": context,
                            "expert": expert,
                        }


def _repaired(config: Config, world_size: int, axes: dict[str, int]) -> tuple[float, dict[str, int | None]]:
    """How far a layout is from the config, and the settings to change, those of rows and micro-batches with it."""
    parallel, changes, distance = config.parallel, {}, 0.0
    for axis, size in axes.items():
        have = getattr(parallel, axis)
        # -1 takes whatever the others leave, so it never has to change.
        if size != have and not (axis == "dp_shard" and have == -1):
            changes[f"parallel.{axis}"] = size
            # An axis that was not asked for comes after all changes of those that were.
            distance += 0.1 + abs(math.log2(size / max(1, have))) + (have == 1)
    wanted = Wanted.of(_changed(config, changes), world_size)
    # Data and batch weigh more than axes: a change of theirs is another run, not only another layout.
    unit = row_unit(wanted)
    if wanted.row_length % unit:
        changes["data.row_length"] = unit * max(1, round(wanted.row_length / unit))
        distance += 3
    rows, passes = _rows_and_passes(wanted)
    if rows != wanted.batch_rows:
        changes["train.batch_rows"] = rows
        distance += 3 + abs(math.log2(rows / wanted.batch_rows))
    if wanted.pipeline == 1:
        if wanted.micro_batches is not None:
            changes["parallel.micro_batches"] = None
    elif passes != wanted.passes or rows != wanted.batch_rows or wanted.micro_batches is not None:
        # micro_rows and micro_batches say the same twice: where both are set, both have to change.
        micro_rows = rows // wanted.data_ranks // passes
        if wanted.micro_rows not in (None, micro_rows):
            changes["train.micro_rows"] = micro_rows
        if passes != wanted.micro_batches and (wanted.micro_rows is None or wanted.micro_batches is not None):
            changes["parallel.micro_batches"] = passes
        distance += abs(math.log2(passes / max(1, wanted.passes))) / 2
    return distance, changes


def _rows_and_passes(wanted: Wanted) -> tuple[int, int]:
    """Rows of a batch and micro-batches of a step that go with the axes, near to those wanted."""
    ranks, rows = wanted.data_ranks, wanted.batch_rows
    if wanted.pipeline == 1:
        return ranks * max(1, round(rows / ranks)), 1

    passes = max(1, wanted.passes)
    if rows % ranks == 0:
        share = rows // ranks
        # First with the batch as it is, and only then with another one.
        fitting = [n for n in range(wanted.pipeline, share + 1) if share % n == 0 and may_pass(wanted, n)]
        if fitting:
            return rows, min(fitting, key=lambda n: (abs(math.log2(n / passes)), n))
    passes = passes if may_pass(wanted, passes) else wanted.pipeline * max(1, round(passes / wanted.pipeline))
    return ranks * passes * max(1, round(rows / ranks / passes)), passes


def _changed(config: Config, changes: dict[str, int | None]) -> Config:
    """The config with some settings of ``section.name`` changed."""
    sections: dict[str, dict[str, int | None]] = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})
