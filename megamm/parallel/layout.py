"""Axes of a layout and their sizes on a number of ranks.

    pipeline > dp_replicate > dp_shard > context > tensor      outermost to innermost: tensor ranks are neighbours

A rank's parameters are sharded over ``dp_shard x context`` ranks. Ranks of ``dp_replicate x dp_shard`` read rows of
their own; those that differ only in tensor, context or pipeline work on the same rows. The expert axis takes no ranks
of its own: it cuts the same ``dp_shard x context`` ranks anew, neighbours first, and expert weights are sharded over
the rest of them.

No torch in here: a dry run, the estimator and the launcher check a layout where no GPU is.
"""

import math
from dataclasses import dataclass

from megamm.config import Config
from megamm.errors import ProblemsError
from megamm.parallel.layout_nearest import nearest_layouts
from megamm.parallel.layout_rules import AXES, STAGES_PER_RANK, Wanted, layout_problems

__all__ = ["AXES", "STAGES_PER_RANK", "Layout", "LayoutError", "resolve_layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of all axes on a number of ranks, and how a step's rows pass through them.

    Attributes:
        expert: ranks of ``dp_shard x context`` that share the experts of a layer.
        schedule: of the pipeline.
        micro_batches: passes of a data rank in a step.
        micro_rows: rows of each (without a pipeline the last one may have fewer).
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    schedule: str = "1f1b"
    micro_batches: int = 1
    micro_rows: int = 1

    @property
    def world_size(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def data_ranks(self) -> int:
        """Ranks that read rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_ranks(self) -> int:
        """Ranks over which each parameter is sharded."""
        return self.dp_shard * self.context

    @property
    def stages_per_rank(self) -> int:
        return STAGES_PER_RANK[self.schedule] if self.pipeline > 1 else 1

    @property
    def num_stages(self) -> int:
        return self.pipeline * self.stages_per_rank

    def sizes(self) -> dict[str, int]:
        """The axes that are larger than 1, as the settings name them."""
        # expert is no axis of its own: it cuts ranks that others have.
        found = {axis: getattr(self, axis) for axis in (*AXES, "expert")}
        return {axis: size for axis, size in found.items() if size > 1}

    def __str__(self) -> str:
        sizes = self.sizes()
        if not sizes:
            return "1 rank"
        axes = [f"{axis} {size}" for axis, size in sizes.items() if axis != "expert"]
        text = " x ".join(axes) + (f", expert {self.expert} of these" if self.expert > 1 else "")
        return text + (f", {self.schedule}" if self.pipeline > 1 else "")


class LayoutError(ProblemsError):
    """A config that does not fit its ranks: every misfit, and the nearest layouts that fit.

    Attributes:
        suggestions: settings to add to the command line, nearest first.
    """

    def __init__(self, problems: list[str], suggestions: list[str]):
        super().__init__("layout", problems)
        self.suggestions = suggestions
        if suggestions:
            self.args = ("\n  ".join([self.args[0], "nearest that fit:", *(f"  {line}" for line in suggestions)]),)


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout of a config on ``world_size`` ranks.

    Args:
        config: resolved (megamm.resolve).
        world_size: ranks, one per device.

    Raises:
        LayoutError: an InputError that lists every misfit and the nearest layouts that fit.
    """
    problems = layout_problems(config, world_size)
    if problems:
        raise LayoutError(problems, nearest_layouts(config, world_size) if world_size > 0 else [])
    return _layout(config, Wanted.of(config, world_size))


def _layout(config: Config, wanted: Wanted) -> Layout:
    """A layout that fits."""
    rank_rows = wanted.batch_rows // wanted.data_ranks
    if wanted.pipeline > 1:
        # Exactly: a pipeline passes tensors of one shape, so all of its micro-batches are equally long.
        passes, rows = wanted.passes, rank_rows // wanted.passes
    else:
        rows = min(wanted.micro_rows or rank_rows, rank_rows)
        passes = -(-rank_rows // rows)
    axes = {axis: getattr(wanted, axis) for axis in (*AXES, "expert")}
    return Layout(**axes, schedule=wanted.schedule, micro_batches=passes, micro_rows=rows)
