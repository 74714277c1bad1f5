"""The best layouts of a config on a number of GPUs: all that are worth a look, estimated and ranked.

The batch, rows and model stay as they are; axes, schedule, rows of a micro-batch and recomputation are chosen. Left
out as never better here: tensor ranks beyond a node, pieces of rows under 1,024 positions, more recomputation than
memory asks for, and without a pipeline smaller micro-batches than fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megamm.config import Config
from megamm.errors import InputError
from megamm.estimate.assumptions import Assumptions
from megamm.estimate.hardware import Gpu
from megamm.estimate.memory import rank_memory
from megamm.estimate.step import WAITING, Estimate, estimate_layout
from megamm.model.counts import TokenStats
from megamm.parallel.layout import STAGES_PER_RANK, Layout, resolve_layout
from megamm.parallel.layout_rules import layout_problems

LEAST_PIECE = 1024
MOST_PIPELINE = 32
MOST_ROUNDS = 8
"""Micro-batches per pipeline rank that are tried at most: beyond, little of the bubble is left."""
RECOMPUTE: tuple[Literal["none", "per_op", "full"], ...] = ("none", "per_op", "full")
POLICIES = ((True, True), (False, False))
"""``reshard_after_forward`` and ``reduce_every_pass``: little memory, or little communication."""


@dataclass(kw_only=True)
class Found:
    """One layout of the search: its config, estimate and why it is where it is in the ranking."""

    config: Config
    estimate: Estimate
    reasons: list[str]

    @property
    def settings(self) -> dict[str, int | str]:
        """What to set to train with it."""
        p, train = self.config.parallel, self.config.train
        found: dict[str, int | str] = {f"parallel.{axis}": size for axis, size in self.estimate.layout.sizes().items()}
        if p.pipeline > 1:
            found["parallel.pipeline_schedule"] = p.pipeline_schedule
            found["parallel.micro_batches"] = self.estimate.layout.micro_batches
        if self.estimate.layout.world_size > 1:
            names = ("reshard_after_forward", "reduce_every_pass")
            found |= {f"parallel.{name}": str(getattr(p, name)).lower() for name in names}
        return found | {"train.micro_rows": self.estimate.layout.micro_rows, "train.recompute": train.recompute}


@dataclass(kw_only=True)
class Ranking:
    """All layouts that fit, best first; and how many were tried and did not fit in memory."""

    found: list[Found]
    tried: int
    too_large: int
    least_memory: float
    """Bytes of the smallest of those that did not fit, without the reserve."""


def search(config: Config, world_size: int, gpu: Gpu, stats: TokenStats, assumptions: Assumptions) -> Ranking:
    """Rank the layouts of a config.

    Args:
        config: resolved; its parallel section, micro_rows and recompute are ignored.
        world_size: ranks, one per device that torch sees.

    Raises:
        InputError: the type is not bfloat16, or no layout shares the batch on so many ranks.
    """
    assumptions.check()
    if config.train.dtype != "bfloat16":
        raise InputError(f"train.dtype: {config.train.dtype}; GPUs are known by their bfloat16 rate, set bfloat16")
    # ``rank_memory`` does not count the reserve.
    limit = gpu.memory / gpu.dies - assumptions.reserve
    ranking = Ranking(found=[], tried=0, too_large=0, least_memory=float("inf"))
    for by_recompute in _candidates(config, world_size, assumptions):
        for candidates in by_recompute:
            fitting = _first_fitting(candidates, world_size, limit, stats, ranking)
            if fitting is None:
                continue
            one, layout, memory = fitting
            found = estimate_layout(one, layout, gpu, stats, assumptions, memory)
            ranking.found.append(Found(config=one, estimate=found, reasons=reasons(found)))
            if one is candidates[0]:
                break  # the largest micro-batch fits: more recomputation would only cost time
    if not ranking.tried:
        resolve_layout(config, world_size)  # says what does not fit, where that is the config
        raise InputError(f"--gpus: no layout shares train.batch_rows {config.train.batch_rows} on {world_size} ranks")
    # Of layouts that take the same time the one with the smaller axes comes first.
    ranking.found.sort(key=lambda one: (one.estimate.step_time, sum(one.estimate.layout.sizes().values())))
    return ranking


def _first_fitting(
    candidates: list[Config], world_size: int, limit: float, stats: TokenStats, ranking: Ranking
) -> tuple[Config, Layout, dict[str, float]] | None:
    """The first that holds at most ``limit`` bytes, with its layout and memory; those before it are counted."""
    for one in candidates:
        ranking.tried += 1
        layout = resolve_layout(one, world_size)
        memory = rank_memory(one, layout, stats)
        held = sum(memory.values())
        if held <= limit:
            return one, layout, memory
        ranking.too_large += 1
        ranking.least_memory = min(ranking.least_memory, held)
    return None


def reasons(found: Estimate) -> list[str]:
    """What takes the time, the most first, and how full the memory is."""
    kinds = {
        "computation": 0.0,
        "the pipeline's bubble": found.times.get(WAITING, 0.0),
        "tensor-parallel collectives": found.times.get("tensor-parallel collectives", 0.0),
        "context-parallel collectives": found.times.get("context-parallel collectives", 0.0),
        "expert-parallel exchanges": found.times.get("expert-parallel collectives", 0.0),
        "gathering and reducing parameters": found.times.get("communication not hidden", 0.0),
        "optimizer and copies": found.times["clipping and AdamW"] + found.times["casts and copies of weights"],
    }
    kinds["computation"] = found.step_time - sum(kinds.values())
    shares = sorted(((time / found.step_time, name) for name, time in kinds.items()), reverse=True)
    text = [f"{share:.0%} {name}" for share, name in shares if share >= 0.01]
    return [*text, f"memory {found.memory_total / found.memory_limit:.0%} full"]


def _candidates(config: Config, world_size: int, a: Assumptions) -> Iterator[list[list[Config]]]:
    """Groups of lists: of a list the first that fits is the best; a group goes from no to full recomputation."""
    for axes in _axes(config, world_size, a):
        rows = _micro_rows(config, world_size, axes)
        for schedule in STAGES_PER_RANK if axes["pipeline"] > 1 else ("1f1b",):
            for reshard, reduce in POLICIES:
                changes: dict[str, Any] = {**axes, "pipeline_schedule": schedule, "micro_batches": None}
                changes |= {"reshard_after_forward": reshard, "reduce_every_pass": reduce}
                parallel = replace(config.parallel, **changes)
                yield from _of_policy(replace(config, parallel=parallel), world_size, rows)


def _of_policy(config: Config, world_size: int, rows: list[int]) -> Iterator[list[list[Config]]]:
    """The groups of one schedule and policy: over rows of a micro-batch and recomputation."""
    made = {
        (how, n): replace(config, train=replace(config.train, micro_rows=n, recompute=how))
        for how in RECOMPUTE
        for n in rows
    }
    fitting = {key: one for key, one in made.items() if not layout_problems(one, world_size)}
    # Smaller micro-batches shrink a pipeline's bubble, so that each size is looked at; without a pipeline the largest
    # that fits is best.
    if config.parallel.pipeline > 1:
        yield from ([[fitting[how, n] for how in RECOMPUTE if (how, n) in fitting]] for n in rows)
    else:
        yield [[fitting[how, n] for n in rows[::-1] if (how, n) in fitting] for how in RECOMPUTE]


def _axes(config: Config, world_size: int, a: Assumptions) -> Iterator[dict[str, int]]:
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    pieces, num = config.data.row_length // LEAST_PIECE, config.model.experts.num
    experts = [n for n in range(1, num + 1) if num % n == 0] or [1]
    for tensor in (n for n in divisors if n <= a.ranks_per_node):
        for context in (n for n in divisors if n <= max(1, pieces)):
            for pipeline in (n for n in divisors if n <= min(MOST_PIPELINE, config.model.depth)):
                rest = tensor * context * pipeline
                if world_size % rest:
                    continue
                data = world_size // rest
                node = max(1, a.ranks_per_node // (tensor * context))
                # Shards over all ranks, over one node, over eight.
                for shard in sorted({data, *(n for n in (node, 8 * node) if data % n == 0 and n < data)}):
                    for expert in (n for n in experts if shard * context % n == 0):
                        yield {
                            "dp_replicate": data // shard,
                            "dp_shard": shard,
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "context": context,
                            "expert": expert,
                        }


def _micro_rows(config: Config, world_size: int, axes: dict[str, int]) -> list[int]:
    """Rows of a micro-batch to try, increasing: powers of two, and what a rank has in all."""
    rows, left = divmod(config.train.batch_rows, axes["dp_replicate"] * axes["dp_shard"])
    if left or not rows:
        return []
    powers = [2**k for k in range(rows.bit_length()) if rows % 2**k == 0]
    found = sorted({*powers, rows})
    if axes["pipeline"] == 1:
        return found
    few = [n for n in found if axes["pipeline"] <= rows // n <= MOST_ROUNDS * axes["pipeline"]]
    # Where every size gives more rounds than that: the largest that still fills the pipeline.
    return few or [n for n in found if axes["pipeline"] <= rows // n][-1:]
