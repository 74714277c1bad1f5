"""Communication, step time and MFU of a run on a number of GPUs: a roofline of every group of operations.

A pass of a group takes the longer of its FLOPs at a share of the peak rate and its bytes at a share of the memory
bandwidth. Parameters are spread over all ranks (FSDP2): each block is gathered for the forward and again for the
backward, gradients are reduced once a step, and what computation hides of that costs nothing. Other axes would add
traffic to :func:`traffic` and a bubble to :class:`Estimate`; the layout built here has none.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from megamm.config import Config
from megamm.errors import InputError
from megamm.scaling.estimate.memory import SIZES, largest_block, micro_batches, rank_memory, rest_parameters
from megamm.scaling.estimate.operations import FLOAT32, Operation, Work, operations
from megamm.scaling.flops import TokenStats, count_parameters, exact_flops_per_token, paper_flops
from megamm.scaling.plan.hardware import Efficiency, Gpu

OPTIMIZER_BYTES = 40
"""Moved per parameter of a shard: fused AdamW reads 16 and writes 12, the gradient's norm reads 4, clipping moves 8."""


@dataclass(kw_only=True, frozen=True)
class Assumptions:
    """What the data sheets do not say. Nothing here was measured on a GPU.

    Attributes:
        matmul: share of the peak rate that large matrix products reach.
        attention: the same for attention, of the pairs that the mask admits (tiles compute more).
        memory: share of the memory bandwidth that element-wise kernels and the optimizer reach.
        network: share of the links' bandwidth that collectives reach.
        overlap: share of the computation that communication can hide behind.
        ranks_per_node: ranks that share a node's fast links.
        node_bandwidth: bytes/s per rank, in each direction, between nodes.
        reserve: bytes per rank for the CUDA context, NCCL and fragmentation.
    """

    matmul: float = 0.6
    attention: float = 0.35
    memory: float = 0.75
    network: float = 0.75
    overlap: float = 0.9
    ranks_per_node: int = 8
    node_bandwidth: float = 50e9
    reserve: float = 3e9

    def check(self) -> None:
        """Raises InputError where a share is none, or a number is not positive."""
        for name in SHARES:
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name}: {getattr(self, name):g} is not above 0 and at most 1")
        for name in ("ranks_per_node", "node_bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name.replace('_', '-')}: {getattr(self, name):g} is not a finite number above 0")
        if not 0 <= self.reserve < float("inf"):
            raise InputError(f"--reserve: {self.reserve:g} is not a finite number of bytes")


SHARES = {
    "matmul": (0.45, 0.75),
    "attention": (0.25, 0.55),
    "memory": (0.6, 0.9),
    "network": (0.5, 0.9),
    "overlap": (0.6, 1.0),
}
"""Shares and the ends between which they are taken to lie, together, for the interval of the MFU."""


@dataclass(kw_only=True, frozen=True)
class Traffic:
    """Bytes that a rank sends in a step by one collective, and what they can hide behind."""

    name: str
    bytes: float
    during: str
    """forward, backward, last backward (the last pass only) or exposed."""


@dataclass(kw_only=True)
class Estimate:
    """One layout on one GPU. Times in seconds of a step of one rank, memory in bytes of one rank."""

    gpu: str
    layout: dict[str, int]
    tokens_per_step: int
    rows_per_pass: int
    passes: int
    params: int
    stats: TokenStats
    assumptions: Assumptions
    memory: dict[str, float]
    memory_limit: float
    traffic: list[Traffic]
    bytes_between_nodes: float
    """Of the traffic, what a rank's network card sends."""
    times: dict[str, float]
    """Of each group of operations, the optimizer, and communication that nothing hides."""
    flops: float
    """Of a step, by 6ND."""
    flops_exact: float
    peak_flops: float
    """Of all ranks together."""
    bubble: float = 0.0
    """Share of the step that a pipeline idles; there is none."""
    warnings: list[str] = field(default_factory=list)

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    @property
    def step_time(self) -> float:
        return sum(self.times.values()) / (1 - self.bubble)

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
        InputError: the layout does not fit the batch, the type is not bfloat16, or an assumption cannot be.
    """
    assumptions = assumptions or Assumptions()
    assumptions.check()
    rank_rows, passes = micro_batches(config, world_size)
    _check(config, world_size)
    model, rows = config.model, config.train.batch_rows
    positions = rows * config.data.row_length
    counts = count_parameters(model)
    # All rows of the rank's share, in passes; a short last one is a part of a pass.
    full_passes = rows / world_size / rank_rows
    groups = operations(model, rank_rows * config.data.row_length, stats, SIZES[config.train.dtype])
    found = Estimate(
        gpu=gpu.name,
        layout={"data": world_size},
        tokens_per_step=positions,
        rows_per_pass=rank_rows,
        passes=passes,
        params=counts.total,
        stats=stats,
        assumptions=assumptions,
        memory=rank_memory(config, world_size, stats) | {"reserve (assumed)": assumptions.reserve},
        memory_limit=gpu.memory / gpu.dies,
        traffic=traffic(config, world_size, passes),
        bytes_between_nodes=0.0,
        times={},
        flops=paper_flops(counts, positions, positions * stats.patches),
        flops_exact=exact_flops_per_token(model, stats) * positions,
        peak_flops=world_size * gpu.peak_flops / gpu.dies,
    )
    nodes = -(-world_size // assumptions.ranks_per_node)
    if nodes > 1:
        sent = sum(item.bytes for item in found.traffic)
        found.bytes_between_nodes = sent / min(world_size, assumptions.ranks_per_node)
    found.times = _times(found, groups, full_passes, gpu, counts.total / world_size)
    if found.memory_total > found.memory_limit:
        found.warnings.append(
            f"{found.memory_total / 1e9:.1f} GB do not fit in the {found.memory_limit / 1e9:.0f} GB of a {gpu.name}: "
            "lower train.micro_rows or take more ranks"
        )
    return found


def _check(config: Config, world_size: int) -> None:
    if config.parallel.data not in (None, world_size):
        raise InputError(f"--world-size: {world_size}, but parallel.data is {config.parallel.data}")
    if config.train.dtype != "bfloat16":
        raise InputError(
            f"train.dtype: {config.train.dtype}, but GPUs are known by their bfloat16 rate; add --train.dtype bfloat16"
        )


def traffic(config: Config, world_size: int, passes: int) -> list[Traffic]:
    """What one rank sends in a step. Blocks are gathered in the type of the activations, the rest in float32."""
    if world_size == 1:
        return []
    model = config.model
    counts = count_parameters(model)
    rest, sent = rest_parameters(model, counts), (world_size - 1) / world_size
    blocks, size = counts.total - rest, SIZES[config.train.dtype]
    first = size * largest_block(model)  # its gathering has nothing to hide behind
    gathered = passes * sent * size * blocks
    return [
        Traffic(name="gather tables and front end", bytes=passes * sent * FLOAT32 * rest, during="exposed"),
        Traffic(name="gather the first block", bytes=passes * sent * first, during="exposed"),
        Traffic(name="gather the other blocks, forward", bytes=gathered - passes * sent * first, during="forward"),
        Traffic(name="gather blocks, backward", bytes=gathered, during="backward"),
        Traffic(name="reduce gradients of blocks", bytes=sent * FLOAT32 * blocks, during="last backward"),
        Traffic(name="reduce gradients of tables and front end", bytes=sent * FLOAT32 * rest, during="exposed"),
    ]


def collective_bandwidth(gpu: Gpu, world_size: int, assumptions: Assumptions) -> float:
    """Bytes/s at which each rank sends in a ring collective.

    Rings run through all ranks of a node before they leave it, each by another network card, so that a node's cards
    serve its ranks together: the slower of the fast links and ``ranks_per_node`` cards.
    """
    on_node = min(world_size, assumptions.ranks_per_node)
    rates = [gpu.link / gpu.dies] if on_node > 1 else []
    if world_size > on_node:
        rates.append(on_node * assumptions.node_bandwidth)
    return assumptions.network * min(rates)


def _times(found: Estimate, groups: list[Operation], passes: float, gpu: Gpu, shard: float) -> dict[str, float]:
    """Seconds of a step by group of operations, then what is not computation."""
    a, world_size = found.assumptions, found.layout["data"]
    forward = {g.name: passes * _roofline(g, g.forward, gpu, a) for g in groups}
    backward = {g.name: passes * _roofline(g, g.backward, gpu, a) for g in groups}
    times = {name: forward[name] + backward[name] for name in forward}
    bandwidth = a.memory * gpu.bandwidth / gpu.dies
    # Weights: cast from float32 by one process; else cast as a shard, then copied in and out of a gathered buffer.
    weights = 6 * found.params * found.passes
    if found.traffic:
        gathered = sum(item.bytes for item in found.traffic if item.name.startswith("gather"))
        weights = 4 * gathered + 2 * found.passes * (FLOAT32 + 2) * shard
    times["casts and copies of weights"] = weights / bandwidth
    times["clipping and AdamW"] = OPTIMIZER_BYTES * shard / bandwidth
    if found.traffic:
        rate, seconds = collective_bandwidth(gpu, world_size, a), defaultdict(float)
        for item in found.traffic:
            seconds[item.during] += item.bytes / rate
        hides = (a.overlap * sum(forward.values()), a.overlap * sum(backward.values()))
        times["communication not hidden"] = _exposed(seconds, *hides, found.passes)
    return times


def _roofline(group: Operation, work: Work, gpu: Gpu, a: Assumptions) -> float:
    """Seconds of one pass of a group."""
    by_memory = work.bytes / (a.memory * gpu.bandwidth / gpu.dies)
    if group.kind == "memory":
        return by_memory
    rate = (a.attention if group.kind == "attention" else a.matmul) * gpu.peak_flops / gpu.dies
    return max((work.flops + work.extra) / rate, by_memory)


def _exposed(seconds: dict[str, float], forward: float, backward: float, passes: int) -> float:
    """Seconds of communication that the forward and backward of a step do not hide; gradients go in the last pass."""
    gather, reduce = seconds.get("backward", 0.0), seconds.get("last backward", 0.0)
    last = max(0.0, gather / passes + reduce - backward / passes)
    others = (passes - 1) / passes * max(0.0, gather - backward)
    return seconds.get("exposed", 0.0) + max(0.0, seconds.get("forward", 0.0) - forward) + others + last


def estimated_efficiency(
    config: Config, world_size: int, gpu: Gpu, stats: TokenStats, assumptions: Assumptions | None = None
) -> Efficiency:
    """The MFU by 6ND for a plan; its interval has all shares at the low, then all at the high ends of ``SHARES``."""
    assumptions = assumptions or Assumptions()
    middle = estimate(config, world_size, gpu, stats, assumptions)
    ends = []
    for i, outer in enumerate((min, max)):
        shares = {name: outer(ends_of[i], getattr(assumptions, name)) for name, ends_of in SHARES.items()}
        ends.append(estimate(config, world_size, gpu, stats, replace(assumptions, **shares)).mfu_6nd)
    return Efficiency(
        mfu=middle.mfu_6nd,
        interval=(ends[0], ends[1]),
        source=f"estimated for {middle.params:.3g} parameters on {world_size} ranks of {gpu.name}, data parallel, by "
        "6ND; nothing measured, the interval is that of the assumed efficiencies",
        params=middle.params,
        warnings=tuple(middle.warnings),
    )
