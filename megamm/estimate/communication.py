"""What ranks send each other in a step, by axis, and how long a collective takes.

Ring collectives: of n ranks each sends (n - 1)/n of the whole and waits for n - 1 hops. Ranks are laid out as the axes
are (megamm.parallel.layout): tensor ranks are neighbours, so that they share a node where there are no more of them
than it has ranks.
"""

import math
from dataclasses import dataclass, replace

from megamm.config import Config
from megamm.estimate.assumptions import Assumptions
from megamm.estimate.hardware import Gpu
from megamm.estimate.memory import SIZES, units_of, whole_parameters
from megamm.estimate.operations import FLOAT32
from megamm.model.counts import TokenStats, key_width
from megamm.parallel.layout import Layout
from megamm.parallel.stages import Stage

START, HOP_IN_NODE, HOP_BETWEEN, TREE_HOP = 14e-6, 1.9e-6, 4.0e-6, 8.5e-6
"""Seconds to start a collective, of a hop over NVLink, over the network, and up or down a tree between nodes: what
NCCL's own model of its LL128 protocol takes (src/graph/tuning.cc)."""


@dataclass(kw_only=True, frozen=True)
class RankGroup:
    """Ranks of one axis: how many, and how many ranks apart they are."""

    size: int
    stride: int

    def on_node(self, ranks_per_node: int) -> int:
        """How many of them share a node."""
        return max(1, min(self.size, ranks_per_node // self.stride))

    def nodes(self, ranks_per_node: int) -> int:
        return math.ceil(self.size / self.on_node(ranks_per_node))


@dataclass(kw_only=True, frozen=True)
class Traffic:
    """Bytes that a rank sends in a step by collectives of one kind, and what they can hide behind."""

    name: str
    axis: str
    group: RankGroup
    bytes: float
    collectives: float
    during: str
    """forward, backward, last backward (the last pass only) or exposed."""
    kind: str = "ring"
    """ring (gather or reduce: each rank's share goes once around), all-reduce, or send (to one other rank)."""


def groups_of(layout: Layout) -> dict[str, RankGroup]:
    """The ranks of each axis; ``shard`` is dp_shard and context together, which expert_shard and expert cut anew."""
    shard, e = layout.tensor * layout.shard_ranks, layout.expert
    return {
        "tensor": RankGroup(size=layout.tensor, stride=1),
        "context": RankGroup(size=layout.context, stride=layout.tensor),
        "shard": RankGroup(size=layout.shard_ranks, stride=layout.tensor),
        "expert": RankGroup(size=e, stride=layout.tensor),
        "expert_shard": RankGroup(size=layout.shard_ranks // e, stride=layout.tensor * e),
        "dp_replicate": RankGroup(size=layout.dp_replicate, stride=shard),
        "pipeline": RankGroup(size=layout.pipeline, stride=shard * layout.dp_replicate),
        "world": RankGroup(size=layout.world_size, stride=1),
    }


def data_traffic(config: Config, layout: Layout, stages: list[Stage]) -> list[Traffic]:
    """What sharding and replicating the parameters of a rank's stages sends in a step.

    Every pass gathers each unit in the type of the activations, for the forward and, where it was dropped, again for
    the backward; the first one has nothing to hide behind. Gradients are reduced in float32.
    """
    groups, parallel = groups_of(layout), config.parallel
    passes, again, found = layout.micro_batches, parallel.reshards, []
    forwards, backwards = passes, passes * again
    reduced = passes if parallel.reduce_every_pass else 1
    if layout.pipeline > 1:
        # A schedule reduces once a step, and keeps gathered parameters after a backward.
        reduced, forwards = 1, min(passes, layout.pipeline) if again else 1

    def add(name: str, axis: str, amount: float, collectives: float, during: str, kind: str = "ring") -> None:
        group = groups[axis]
        around = (group.size - 1) / group.size * (2 if kind == "all-reduce" else 1)
        if group.size > 1 and collectives:
            one = Traffic(
                name=name,
                axis=axis,
                group=group,
                bytes=around * amount,
                collectives=collectives,
                during=during,
                kind=kind,
            )
            found.append(one)

    during = "backward" if reduced == passes else "last backward"
    all_units = units_of(config.model, layout, stages)
    for axis in ("shard", "expert_shard"):
        units = [unit for unit in all_units if (unit.name == "experts") == (axis == "expert_shard")]
        sizes = [unit.size * (unit.gathered or SIZES[config.train.dtype]) for unit in units]
        what = "units" if axis == "shard" else "experts"
        first = axis == "shard"
        add("gather the first unit", axis, forwards * sum(sizes[:first]), forwards * first, "exposed")
        rest = forwards * (len(units) - first)
        add(f"gather the other {what}", axis, forwards * sum(sizes[first:]), rest, "forward")
        add(f"gather {what} again", axis, backwards * sum(sizes), backwards * len(units), "backward")
        whole = FLOAT32 * sum(unit.size for unit in units)
        add(f"reduce gradients of {what}", axis, reduced * whole, reduced * len(units), during)
    shard = FLOAT32 * sum(unit.share for unit in all_units)
    add("sum gradients of replicas", "dp_replicate", reduced * shard, reduced * len(all_units), during, "all-reduce")
    return found


def stage_traffic(
    config: Config, layout: Layout, stage: Stage, stats: TokenStats, forward: bool = True
) -> list[Traffic]:
    """What tensor and context ranks send for one micro-batch in a stage's forward or backward; nothing hides it.

    Tensor ranks gather the input of a block's two pairs of products and scatter the sum of what they give, and the
    other way round in the backward; they scatter the inputs' sum. The head gathers its input and, as it computes its
    gradients ahead, sums them over the labelled rows, both in the forward. Gradients of parameters that all have whole
    are summed after each backward.
    Context ranks gather keys and values (and a tower's features), and scatter the sum of their gradients. Expert ranks
    exchange positions, of which an even load is assumed.
    """
    model, size, groups = config.model, SIZES[config.train.dtype], groups_of(layout)
    positions = layout.micro_rows * config.data.row_length / layout.context
    patches, v = positions * stats.patches, model.vision
    t, c, found = layout.tensor, layout.context, []
    late = stage.inputs and model.architecture == "late"

    def add(name: str, axis: str, amount: float, collectives: float, kind: str = "ring") -> None:
        group = groups[axis]
        if collectives and group.size > 1:
            sent = amount * size * (group.size - 1) / group.size * (2 if kind == "all-reduce" else 1)
            found.append(
                Traffic(
                    name=name,
                    axis=axis,
                    group=group,
                    bytes=sent,
                    collectives=collectives,
                    during="exposed",
                    kind=kind,
                )
            )

    num, row = len(stage.blocks), positions * model.width
    add("tensor: inputs and sums of blocks", "tensor", 4 * num * row, 4 * num)
    if late:
        add("tensor: inputs and sums of the tower", "tensor", 4 * v.depth * patches * v.width, 4 * v.depth)
        # Every tensor rank has a share of each image's patches.
        add("context: features of the tower", "context", c * patches * model.width / t, 1)
    add("tensor: inputs", "tensor", row * stage.inputs, stage.inputs)
    if stage.head and forward:
        add("tensor: input of the head", "tensor", row, 1)
        # A gradient of the input, and from each rank two float32 numbers, of every labelled row.
        labelled = positions * stats.labels * (model.width + 2 * t * FLOAT32 / size)
        add("tensor: sums over labelled rows", "tensor", labelled, 2, "all-reduce")
    if not forward:
        whole = whole_parameters(model, stage)
        add("tensor: gradients of whole parameters", "tensor", sum(whole), len(whole), "all-reduce")
    if model.experts.num:  # to the experts and back; every tensor rank has all positions there
        copies = positions * model.experts.top_k * model.width
        add("expert: positions to their experts and back", "expert", num * 2 * copies, 2 * num)
    # The amount is that of the whole group: c ranks' positions.
    add("context: keys and values", "context", num * 2 * c * positions * key_width(model) / t, num)
    return found


def stage_bytes(config: Config, layout: Layout) -> float:
    """Bytes of one micro-batch from a rank of a stage to the next stage (tensor ranks send a share each)."""
    positions = layout.micro_rows * config.data.row_length / layout.context / layout.tensor
    return positions * config.model.width * SIZES[config.train.dtype]


def link_rate(group: RankGroup, gpu: Gpu, assumptions: Assumptions) -> float:
    """Bytes/s at which each rank of a group sends in a ring collective.

    Rings run through a group's ranks of a node before they leave it, each by another network card, so that these ranks'
    cards serve them together: the slower of the fast links and the cards.
    """
    on_node = group.on_node(assumptions.ranks_per_node)
    rates = [gpu.link / gpu.dies] if on_node > 1 else []
    if group.nodes(assumptions.ranks_per_node) > 1:
        rates.append(on_node * assumptions.node_bandwidth)
    return assumptions.network * min(rates)


def latency(group: RankGroup, kind: str, assumptions: Assumptions) -> float:
    """Seconds of one collective of no bytes."""
    nodes = group.nodes(assumptions.ranks_per_node)
    if kind == "send":
        return START + (HOP_BETWEEN if group.stride * 2 > assumptions.ranks_per_node else HOP_IN_NODE)
    ring = (group.size - nodes) * HOP_IN_NODE + (nodes - 1) * HOP_BETWEEN
    if kind == "all-reduce":
        tree = (group.on_node(assumptions.ranks_per_node) - 1) * HOP_IN_NODE + math.ceil(math.log2(nodes)) * TREE_HOP
        # There and back: numbers are summed, then the sums are spread.
        return START + 2 * min(ring, tree)
    return START + ring


def seconds(item: Traffic, gpu: Gpu, assumptions: Assumptions) -> float:
    """Seconds of all collectives of an item, one after the other."""
    if item.group.size < 2:
        return 0.0
    group = item.group
    if item.kind == "send":  # from node to node unless the next rank of the axis is on the same one
        fast = group.stride * 2 <= assumptions.ranks_per_node
        group = replace(group, size=2)
        rate = assumptions.network * (gpu.link / gpu.dies if fast else assumptions.node_bandwidth)
        return item.bytes / rate + item.collectives * latency(group, item.kind, assumptions)
    return item.bytes / link_rate(group, gpu, assumptions) + item.collectives * latency(group, item.kind, assumptions)
