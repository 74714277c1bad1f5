"""Stages of a pipeline, cut by what they cost rather than by their number of blocks. No torch in here.

A stage is a run of blocks; the first also has the inputs (embedding, patch projection or vision tower), the last the
head. The cost is FLOPs per position of the data, so that the head counts on labelled positions only, and the vision
tower on patches.
"""

import functools
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megamm.config import ModelConfig
from megamm.model.counts import TokenStats, exact_flops_per_token

RESOLUTION = 2**30
"""Costs are rounded to this share of the model's, so that equal runs of blocks compare as equal."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage; ``last_block`` is its own, and ``first_block - 1`` where it has none.

    Attributes:
        inputs, head: whether it has them.
        cost: FLOPs of forward and backward per position of a row.
    """

    first_block: int
    last_block: int
    inputs: bool
    head: bool
    cost: float

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.last_block + 1)


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """FLOPs of forward and backward per position, by part of the model: ``blocks`` has one for each."""

    inputs: float
    blocks: tuple[float, ...]
    head: float


def part_costs(model: ModelConfig, stats: TokenStats) -> PartCosts:
    """What inputs, blocks and head cost; they add up to ``exact_flops_per_token``.

    Args:
        model: resolved.
        stats: per position.
    """
    total = exact_flops_per_token(model, stats)
    # What a part costs is what the count loses without it, so that the parts always add up to the whole.
    no_labels = exact_flops_per_token(model, _with(stats, labels=0.0))
    blocks = exact_flops_per_token(model, TokenStats(patches=0.0, labels=0.0, pairs=stats.pairs))
    return PartCosts(inputs=no_labels - blocks, blocks=(blocks / model.depth,) * model.depth, head=total - no_labels)


def _with(stats: TokenStats, labels: float) -> TokenStats:
    return replace(stats, labels=labels)


def cut_stages(model: ModelConfig, stats: TokenStats, num_stages: int) -> list[Stage]:
    """The cut whose costliest stage is cheapest; among these, one with blocks in every stage if there is, and then
    the most even one.

    Args:
        model: resolved.
        stats: per position of the data, the same on all ranks.
        num_stages: pipeline ranks times stages on each; at most ``model.depth``.

    Raises:
        ValueError: more stages than blocks, or none.
    """
    if not 1 <= num_stages <= model.depth:
        raise ValueError(f"{num_stages} stages for {model.depth} blocks")
    costs = part_costs(model, stats)
    # Part 0 is the inputs and part n - 1 the head, so block i is part i + 1.
    parts = (costs.inputs, *costs.blocks, costs.head)
    ends = [0, *cut_evenly(parts, num_stages)]
    found = []
    for first, end in pairwise(ends):
        inputs, head = first == 0, end == len(parts)
        blocks = range(max(first - 1, 0), min(end - 1, model.depth))
        found.append(
            Stage(
                first_block=blocks.start,
                last_block=blocks.stop - 1,
                inputs=inputs,
                head=head,
                cost=sum(parts[first:end]),
            )
        )
    return found


@functools.lru_cache(maxsize=256)
def cut_evenly(parts: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Ends (exclusive) of the ``num_stages`` runs of parts; the first part is the inputs, the last the head.

    Dynamic programming twice over the number of stages and the end of the last: first for the least cost of the
    costliest run; then, with no run above it, for the fewest runs without a block and the least sum of squares.
    """
    n = len(parts)
    total = sum(parts) or 1.0
    sums = np.concatenate([[0], np.cumsum([round(part / total * RESOLUTION) for part in parts])])
    never = 2 * RESOLUTION
    top = np.array([0] + [never] * n)  # of parts up to j in the stages so far, the costliest run
    for _ in range(num_stages):
        top = np.array([never, *(np.maximum(top[:j], sums[j] - sums[:j]).min() for j in range(1, n + 1))])
    limit = int(top[n]) + n  # runs that cost the same may differ by the rounding of their parts
    # Runs without a block: inputs alone, head alone. One outweighs any sum of squares.
    without = float(RESOLUTION) ** 2 * 4
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _ in range(num_stages):
        following, choice = np.full(n + 1, np.inf), np.zeros(n + 1, int)
        for j in range(1, n + 1):
            cost = (sums[j] - sums[:j]).astype(float)
            value = np.where(cost <= limit, best[:j] + cost**2, np.inf)
            if j in (1, n):  # a run that ends here may be inputs alone or head alone
                value[j - 1] += without
            choice[j] = int(value.argmin())
            following[j] = value[choice[j]]
        best = following
        choices.append(choice)
    ends = [n]
    # Back from the end: each choice says where the run before began. The first one begins at 0.
    for choice in reversed(choices[1:]):
        ends.append(int(choice[ends[-1]]))
    return tuple(ends[::-1])
