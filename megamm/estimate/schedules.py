"""Orders of a pipeline's passes, as torch.distributed.pipelining runs them, and what they take and hold.

Rank r holds stages r, r + P, ...; a stage's backward is one action (B), or in zero_bubble the gradient of its input
(I) and later that of its weights (W). Schedule1F1B, ScheduleInterleaved1F1B and ScheduleInterleavedZeroBubble; a test
compares the orders with theirs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megamm.parallel.layout import STAGES_PER_RANK


class Action(NamedTuple):
    """One pass of a micro-batch through a stage; ``kind`` is F, B, I or W."""

    stage: int
    kind: str
    micro: int


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds of one micro-batch in a stage: forward, and backward for the input and for the weights."""

    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a schedule takes.

    Attributes:
        time: from the first pass to the last, seconds.
        busy: seconds of each rank.
        bubble: share of all ranks' time that they wait, for each other or because stages are uneven.
    """

    time: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        return 1 - sum(self.busy) / (len(self.busy) * self.time) if self.time else 0.0


# A search asks for the same few orders once per layout and rank.
@functools.lru_cache(maxsize=256)
def orders(schedule: str, num_ranks: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of every rank in the order in which it takes them."""
    rank_order = _one_forward_one_backward if schedule == "1f1b" else _interleaved
    return tuple(tuple(rank_order(schedule, num_ranks, rank, micro_batches)) for rank in range(num_ranks))


def _one_forward_one_backward(_: str, num_ranks: int, rank: int, micro_batches: int) -> list[Action]:
    # A micro-batch comes back after the ranks behind this one: as many forwards fit before the first backward.
    ahead = min(num_ranks - rank, micro_batches)
    found = [Action(rank, "F", m) for m in range(ahead)]
    for m in range(micro_batches):
        found.append(Action(rank, "B", m))
        if m + ahead < micro_batches:
            found.append(Action(rank, "F", m + ahead))
    return found


def _interleaved(schedule: str, num_ranks: int, rank: int, micro_batches: int) -> list[Action]:
    chunks, split = STAGES_PER_RANK[schedule], schedule == "zero_bubble"
    in_round = micro_batches // max(1, micro_batches // num_ranks)
    total = chunks * micro_batches

    def forward(k: int) -> Action:
        turn, within = divmod(k, in_round)
        return Action(turn % chunks * num_ranks + rank, "F", turn // chunks * in_round + within)

    def backward(k: int, kind: str) -> Action:
        turn, within = divmod(k, in_round)
        stage = (chunks - 1 - turn % chunks) * num_ranks + rank
        return Action(stage, kind, turn // chunks * in_round + within)

    hops = (num_ranks - 1 - rank) * (1 if split else 2)
    ahead = min((chunks - 1) * in_round + hops, total)
    found = [forward(k) for k in range(ahead)]
    weights = 0  # weight gradients taken so far: rank r puts r of them off
    for k in range(total):
        if ahead + k < total:
            found.append(forward(ahead + k))
        found.append(backward(k, "I" if split else "B"))
        if split and k >= rank:
            found.append(backward(weights, "W"))
            weights += 1
    if split:
        found += [backward(k, "W") for k in range(weights, total)]
    return found


def simulate(
    schedule: str, num_ranks: int, micro_batches: int, stages: Sequence[StageTimes], send: float = 0.0
) -> Timing:
    """Run a schedule: every rank takes its actions in order, each as soon as what it needs has arrived.

    Args:
        stages: of all ranks, in the model's order.
        send: seconds from the end of a pass to its arrival at the next stage.
    """
    order = orders(schedule, num_ranks, micro_batches)
    last = len(stages) - 1
    done: dict[tuple[int, bool, int], float] = {}  # (stage, forward?, micro-batch) -> end
    clock, busy, position = [0.0] * num_ranks, [0.0] * num_ranks, [0] * num_ranks
    waiting = True
    while waiting:
        waiting, moved = False, False
        for rank in range(num_ranks):
            todo = order[rank]
            while position[rank] < len(todo):
                stage, kind, micro = todo[position[rank]]
                ready: float | None = 0.0
                if kind == "F" and stage:
                    ready = done.get((stage - 1, True, micro))
                elif kind in "BI":
                    # The last stage's backward begins with its own loss, the others' with a gradient that is sent.
                    ready = done.get((stage, True, micro)) if stage == last else done.get((stage + 1, False, micro))
                if ready is None:
                    waiting = True
                    break
                times = stages[stage]
                if kind == "F":
                    spent = times.forward
                elif kind == "W":
                    spent = times.weight_gradient
                else:
                    spent = times.input_gradient + (times.weight_gradient if kind == "B" else 0.0)
                local = kind == "W" or (kind == "F" and not stage) or (kind in "BI" and stage == last)
                clock[rank] = max(clock[rank], ready + (0.0 if local else send)) + spent
                busy[rank] += spent
                # Nobody waits for the gradients of weights.
                if kind != "W":
                    done[stage, kind == "F", micro] = clock[rank]
                position[rank] += 1
                moved = True
        if waiting and not moved:
            raise RuntimeError(f"the {schedule} schedule of {num_ranks} ranks does not advance")
    return Timing(time=max(clock), busy=tuple(busy))


def held_at_most(order: Sequence[Action], held: Sequence[float]) -> dict[int, int]:
    """Micro-batches of each stage that a rank holds at its fullest moment.

    A micro-batch holds ``held[stage]`` from its forward to its backward; what the weights' gradient still needs after
    that of the input is taken as all.
    """
    counts: dict[int, int] = dict.fromkeys((stage for stage, _, _ in order), 0)
    now = most = 0.0
    fullest = dict(counts)
    for stage, kind, _ in order:
        if kind == "I":
            continue
        step = 1 if kind == "F" else -1
        counts[stage] += step
        now += step * held[stage]
        if now > most:
            most, fullest = now, dict(counts)
    return fullest
