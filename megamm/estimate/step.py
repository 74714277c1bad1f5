"""Step time and MFU of a run on a number of GPUs: a roofline of every group of operations, and a pipeline's schedule.

A pass of a group takes the longest of its FLOPs at a share of the peak rate, its bytes at a share of the memory
bandwidth, and the launches of its kernels. What tensor and context ranks send stands between operations and is hidden
by nothing; gathering parameters and reducing gradients hides behind computation as far as this is long enough. Stages
of a pipeline are run through the order of their schedule.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megamm.config import Config
from megamm.errors import InputError
from megamm.estimate.assumptions import SHARES, Assumptions
from megamm.estimate.communication import Traffic, data_traffic, groups_of, latency, seconds, stage_bytes, stage_traffic
from megamm.estimate.hardware import Efficiency, Gpu
from megamm.estimate.memory import SIZES, rank_memory, units_of
from megamm.estimate.operations import FLOAT32, Operation, Work, part_operations, repeated
from megamm.estimate.schedules import StageTimes, simulate
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token, paper_flops
from megamm.parallel.layout import Layout, resolve_layout
from megamm.parallel.stages import Stage, cut_stages

OPTIMIZER_BYTES = 40
"""Moved per parameter of a shard: fused AdamW reads 16 and writes 12, the gradient's norm reads 4, clipping moves 8."""
WAITING = "waiting for other stages"


@dataclass(kw_only=True)
class Estimate:
    """One layout on one GPU. Times in seconds of a step of one rank, memory in bytes of the fullest rank."""

    gpu: str
    layout: Layout
    tokens_per_step: int
    params: int
    stats: TokenStats
    assumptions: Assumptions
    memory: dict[str, float]
    memory_limit: float
    traffic: list[Traffic]
    """Of the pipeline rank that sends most."""
    bytes_between_nodes: float
    """Of the traffic, what a rank's network card sends."""
    times: dict[str, float]
    """Of each group of operations, communication, waiting and the optimizer; with a pipeline the mean of its ranks."""
    bubble: float
    """Share of the passes' time that pipeline ranks wait, for each other or because stages are uneven."""
    flops: float
    """Of a step, by 6ND."""
    flops_exact: float
    peak_flops: float
    """Of all ranks together."""
    warnings: list[str] = field(default_factory=list)

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_total <= self.memory_limit

    @property
    def step_time(self) -> float:
        return sum(self.times.values())

    @property
    def mfu(self) -> float:
        """By the operations of the exact count, as training logs it."""
        return self.flops_exact / (self.step_time * self.peak_flops)

    @property
    def mfu_6nd(self) -> float:
        """By 6ND, as plans count."""
        return self.flops / (self.step_time * self.peak_flops)


def estimate(
    config: Config, world_size: int, gpu: Gpu, stats: TokenStats, assumptions: Assumptions | None = None
) -> Estimate:
    """Estimate a run.

    Args:
        config: resolved (megamm.resolve).
        world_size: ranks, one per device.
        stats: of the training set, per position.

    Raises:
        InputError: the layout does not fit, the type is not bfloat16, or an assumption cannot be.
    """
    assumptions = assumptions or Assumptions()
    assumptions.check()
    layout = resolve_layout(config, world_size)
    if config.train.dtype != "bfloat16":
        raise InputError(
            f"train.dtype: {config.train.dtype}, but GPUs are known by their bfloat16 rate; add --train.dtype bfloat16"
        )
    return estimate_layout(config, layout, gpu, stats, assumptions)


def estimate_layout(
    config: Config, layout: Layout, gpu: Gpu, stats: TokenStats, a: Assumptions, memory: dict[str, float] | None = None
) -> Estimate:
    """The same of a layout that fits; ``memory``: what ``rank_memory`` gave, where it is known."""
    model, positions = config.model, config.train.batch_rows * config.data.row_length
    counts, stages = count_parameters(model), cut_stages(model, stats, layout.num_stages)
    ranks = range(layout.pipeline)
    memory = rank_memory(config, layout, stats) if memory is None else memory
    sent = [_all_traffic(config, layout, stages, rank, stats) for rank in ranks]
    times, bubble = _times(config, layout, stages, sent, gpu, stats, a)
    most = max(sent, key=lambda items: sum(item.bytes for item in items))
    found = Estimate(
        gpu=gpu.name,
        layout=layout,
        tokens_per_step=positions,
        params=counts.total,
        stats=stats,
        assumptions=a,
        memory=memory | {"reserve (assumed)": a.reserve},
        memory_limit=gpu.memory / gpu.dies,
        traffic=most,
        bytes_between_nodes=sum(map(_between_nodes, most, [a] * len(most))),
        times=times,
        bubble=bubble,
        flops=paper_flops(counts, positions, positions * stats.patches),
        flops_exact=exact_flops_per_token(model, stats) * positions,
        peak_flops=layout.world_size * gpu.peak_flops / gpu.dies,
    )
    if not found.fits:
        found.warnings.append(
            f"{found.memory_total / 1e9:.1f} GB do not fit in the {found.memory_limit / 1e9:.0f} GB of a {gpu.name}: "
            "lower train.micro_rows, set train.recompute, or take more ranks"
        )
    return found


def _between_nodes(item: Traffic, a: Assumptions) -> float:
    """What one network card sends of it: ranks of a group that share a node share their cards."""
    if item.kind == "send":
        return item.bytes if item.group.stride * 2 > a.ranks_per_node else 0.0
    return item.bytes / item.group.on_node(a.ranks_per_node) if item.group.nodes(a.ranks_per_node) > 1 else 0.0


def _all_traffic(config: Config, layout: Layout, stages: list[Stage], rank: int, stats: TokenStats) -> list[Traffic]:
    """What a pipeline rank sends in a step."""
    mine = stages[rank :: layout.pipeline]
    found = data_traffic(config, layout, mine)
    sums: dict[str, Traffic] = {}
    for stage in mine:
        again = config.train.recompute == "full"
        ways = [stage_traffic(config, layout, stage, stats, forward) for forward in (True, False)]
        for item in ways[0] * (1 + again) + ways[1]:
            more = sums.get(item.name, replace(item, bytes=0.0, collectives=0.0))
            times = _passes(config, layout)
            sums[item.name] = replace(
                more, bytes=more.bytes + times * item.bytes, collectives=more.collectives + times * item.collectives
            )
    found += sums.values()
    if layout.pipeline > 1:
        # A stage sends its stream on unless it is the last, and a gradient back unless it is the first.
        edges = sum((not stage.inputs) + (not stage.head) for stage in mine) * layout.micro_batches
        found.append(
            Traffic(
                name="pipeline: streams and their gradients",
                axis="pipeline",
                group=groups_of(layout)["pipeline"],
                bytes=edges * stage_bytes(config, layout),
                collectives=edges,
                during="schedule",
                kind="send",
            )
        )
    return found


def _passes(config: Config, layout: Layout) -> float:
    """Micro-batches of a data rank's share of the batch; a short last one is a part of one."""
    return config.train.batch_rows / layout.data_ranks / layout.micro_rows


@dataclass(kw_only=True)
class _StageWork:
    """Seconds of one micro-batch in a stage by group of operations and kind of communication."""

    forward: dict[str, float]
    backward: dict[str, float]
    weights: float
    """Of the backward, what only the weights' gradients take."""

    def times(self) -> StageTimes:
        backward = sum(self.backward.values())
        return StageTimes(
            forward=sum(self.forward.values()),
            input_gradient=backward - self.weights,
            weight_gradient=self.weights,
        )


def _stage_work(
    config: Config,
    layout: Layout,
    stage: Stage,
    parts: dict[str, list[Operation]],
    gpu: Gpu,
    stats: TokenStats,
    a: Assumptions,
) -> _StageWork:
    groups = [repeated(group, len(stage.blocks)) for group in parts["block"]]
    groups += parts["inputs"] * stage.inputs + parts["head"] * stage.head
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    weights = 0.0
    for group in groups:
        ahead, back = _roofline(group, group.forward, gpu, a), _roofline(group, group.backward, gpu, a)
        # Of the two products of a backward one is the weights'.
        if group.kind == "matmul" and group.backward.flops > group.forward.flops:
            weights += back / 2
        forward[group.name] += ahead
        backward[group.name] += back + ahead * _again(config.train.recompute, group)
    for item in stage_traffic(config, layout, stage, stats):
        forward[f"{item.axis}-parallel collectives"] += seconds(item, gpu, a)
        # What is computed again gathers its inputs again.
        if config.train.recompute == "full" and "blocks" in item.name:
            backward[f"{item.axis}-parallel collectives"] += seconds(item, gpu, a)
    for item in stage_traffic(config, layout, stage, stats, forward=False):
        backward[f"{item.axis}-parallel collectives"] += seconds(item, gpu, a)
    return _StageWork(forward=dict(forward), backward=dict(backward), weights=weights)


def _again(recompute: str, group: Operation) -> float:
    """How often the backward computes a group's forward again; not that of inputs and head, which are no blocks."""
    block = group.name.removeprefix("vision: ") in BLOCK_GROUPS
    again = recompute == "full" or (recompute == "per_op" and group.kind == "memory")
    return float(block and again)


BLOCK_GROUPS = (
    "qkv",
    "attention",
    "attention output",
    "gate and up",
    "down",
    "norms, rotary, SwiGLU, residuals",
    "router",
    "copies of positions for experts",
)


def _roofline(group: Operation, work: Work, gpu: Gpu, a: Assumptions) -> float:
    """Seconds of one pass of a group."""
    least = max(work.bytes / (a.memory * gpu.bandwidth / gpu.dies), work.kernels * a.launch)
    if group.kind == "memory":
        return least
    rate = (a.attention if group.kind == "attention" else a.matmul) * gpu.peak_flops / gpu.dies
    return max((work.flops + work.extra) / rate, least)


def _times(
    config: Config,
    layout: Layout,
    stages: list[Stage],
    sent: list[list[Traffic]],
    gpu: Gpu,
    stats: TokenStats,
    a: Assumptions,
) -> tuple[dict[str, float], float]:
    """Seconds of a step by what they are spent on, and the bubble."""
    positions = layout.micro_rows * config.data.row_length / layout.context
    parts = part_operations(config.model, positions, stats, SIZES[config.train.dtype], layout.tensor)
    works = [_stage_work(config, layout, stage, parts, gpu, stats, a) for stage in stages]
    passes = _passes(config, layout)
    times: dict[str, float] = defaultdict(float)
    for work in works:
        for name, spent in _both(work):
            # The work of all stages shared out: the mean of the pipeline's ranks.
            times[name] += passes * spent / layout.pipeline
    bubble = 0.0
    if layout.pipeline > 1:
        send = Traffic(
            name="send",
            axis="pipeline",
            group=groups_of(layout)["pipeline"],
            bytes=stage_bytes(config, layout),
            collectives=1,
            during="schedule",
            kind="send",
        )
        run = simulate(
            layout.schedule,
            layout.pipeline,
            layout.micro_batches,
            tuple(work.times() for work in works),
            seconds(send, gpu, a),
        )
        times[WAITING] = run.bubble * run.time
        bubble = run.bubble
    # A step ends when its slowest rank has ended.
    ends = [_step_ends(config, layout, stages, works, sent, rank, gpu, a) for rank in range(layout.pipeline)]
    return dict(times) | max(ends, key=lambda one: sum(one.values())), bubble


def _both(work: _StageWork) -> Iterable[tuple[str, float]]:
    yield from work.forward.items()
    yield from work.backward.items()


def _step_ends(
    config: Config,
    layout: Layout,
    stages: list[Stage],
    works: list[_StageWork],
    sent: list[list[Traffic]],
    rank: int,
    gpu: Gpu,
    a: Assumptions,
) -> dict[str, float]:
    """Seconds that a pipeline rank spends on parameters: copies, exposed communication, the optimizer."""
    mine = works[rank :: layout.pipeline]
    items = [item for item in sent[rank] if item.axis in ("shard", "expert_shard", "dp_replicate")]
    units = units_of(config.model, layout, stages[rank :: layout.pipeline])
    held, shard = sum(unit.size for unit in units), sum(unit.share for unit in units)
    bandwidth = a.memory * gpu.bandwidth / gpu.dies
    # Weights: cast from float32 by one process; else cast as a shard, then copied in and out of a gathered buffer.
    weights = 6 * held * layout.micro_batches
    if layout.world_size > 1:
        gathers = sum(item.collectives for item in items if item.name.startswith("gather")) / len(units)
        weights = max(gathers, 1.0) * (2 * 2 * SIZES[config.train.dtype] * held + (FLOAT32 + 2) * shard)
    found = {
        "casts and copies of weights": weights / bandwidth,
        "clipping and AdamW": OPTIMIZER_BYTES * shard / bandwidth,
    }
    if layout.world_size > 1:
        # The gradient's norm and the losses, each one number.
        found["sums over all ranks"] = 2 * latency(groups_of(layout)["world"], "all-reduce", a)
    if items:
        spent: dict[str, float] = defaultdict(float)
        for item in items:
            spent[item.during] += seconds(item, gpu, a)
        passes = _passes(config, layout)
        forward = a.overlap * passes * sum(sum(work.forward.values()) for work in mine)
        backward = a.overlap * passes * sum(sum(work.backward.values()) for work in mine)
        found["communication not hidden"] = _exposed(spent, forward, backward, layout.micro_batches)
    return found


def _exposed(spent: dict[str, float], forward: float, backward: float, passes: int) -> float:
    """Seconds of communication that the forward and backward of a step do not hide."""
    every, last = spent.get("backward", 0.0), spent.get("last backward", 0.0)
    # What is reduced once a step has only the last pass's backward to hide behind.
    in_last = max(0.0, every / passes + last - backward / passes)
    in_others = (passes - 1) / passes * max(0.0, every - backward)
    return spent.get("exposed", 0.0) + max(0.0, spent.get("forward", 0.0) - forward) + in_others + in_last


def mfu_interval(config: Config, layout: Layout, gpu: Gpu, stats: TokenStats, a: Assumptions) -> tuple[float, float]:
    """The MFU by 6ND with all shares at the low, then all at the high ends of ``SHARES``."""
    ends = []
    for i, outer in enumerate((min, max)):
        shares = {name: outer(ends_of[i], getattr(a, name)) for name, ends_of in SHARES.items()}
        ends.append(estimate_layout(config, layout, gpu, stats, replace(a, **shares)).mfu_6nd)
    return ends[0], ends[1]


def estimated_efficiency(
    config: Config, world_size: int, gpu: Gpu, stats: TokenStats, assumptions: Assumptions | None = None
) -> Efficiency:
    """The MFU by 6ND for a plan, with its interval."""
    assumptions = assumptions or Assumptions()
    middle = estimate(config, world_size, gpu, stats, assumptions)
    return Efficiency(
        mfu=middle.mfu_6nd,
        interval=mfu_interval(config, middle.layout, gpu, stats, assumptions),
        source=f"estimated for {middle.params:.3g} parameters on {world_size} ranks of {gpu.name} ({middle.layout}), "
        "by 6ND; nothing measured, the interval is that of the assumed efficiencies",
        params=middle.params,
        warnings=tuple(middle.warnings),
    )
