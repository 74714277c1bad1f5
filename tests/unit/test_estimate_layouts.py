"""The estimator on pipelines and in the search: schedules against torch's, memory against fake tensors."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from dataset_factory import make_dataset
from test_estimate import PAPER, batch_of, config_of, saved_bytes, small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules

from megamm.errors import InputError
from megamm.estimate.assumptions import Assumptions
from megamm.estimate.hardware import GPUS
from megamm.estimate.memory import kept_activations, rank_memory
from megamm.estimate.schedules import Action, StageTimes, held_at_most, orders, simulate
from megamm.estimate.search import search
from megamm.estimate.step import WAITING, estimate
from megamm.model import context
from megamm.model.counts import TokenStats
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.layout import STAGES_PER_RANK, resolve_layout
from megamm.sequence import Batch

ROOT = Path(__file__).parents[2]
ONE = StageTimes(forward=1.0, input_gradient=1.0, weight_gradient=1.0)
KINDS = {
    "F": schedules._ComputationType.FORWARD,
    "B": schedules._ComputationType.FULL_BACKWARD,
    "I": schedules._ComputationType.BACKWARD_INPUT,
    "W": schedules._ComputationType.BACKWARD_WEIGHT,
}
H100 = GPUS["h100"]

# ------------------------------------------------------------------------------------------------------ schedules


def order_of_torch(name: str, num_ranks: int, micro_batches: int, rank: int) -> list[tuple]:
    """What torch's schedule has a rank do; made without the stages, which need processes."""
    if name == "1f1b":
        one = object.__new__(schedules.Schedule1F1B)
        one._num_stages, one._n_microbatches = num_ranks, micro_batches
        found = one._get_pipeline_order()[rank]
    else:
        kind = {
            "interleaved": schedules.ScheduleInterleaved1F1B,
            "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        }[name]
        one = object.__new__(kind)
        one.n_local_stages, one.pp_group_size = STAGES_PER_RANK[name], num_ranks
        one._n_microbatches, one.number_of_rounds = micro_batches, max(1, micro_batches // num_ranks)
        one.microbatches_per_round = micro_batches // one.number_of_rounds
        found = one._calculate_single_rank_operations(rank)
    actions = [(a.stage_index, a.computation_type, a.microbatch_index) for a in found if a is not None]
    return [action for action in actions if action[1] in KINDS.values()]


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize(("num_ranks", "micro_batches"), [(2, 2), (2, 5), (3, 3), (4, 8), (4, 10), (8, 24)])
def test_orders_are_those_of_torch(name, num_ranks, micro_batches):
    if name != "1f1b" and micro_batches % max(1, micro_batches // num_ranks):
        pytest.skip("torch refuses unequal rounds")
    for rank, order in enumerate(orders(name, num_ranks, micro_batches)):
        expected = order_of_torch(name, num_ranks, micro_batches, rank)
        found = [(stage, KINDS[kind], micro) for stage, kind, micro in order]
        if name == "1f1b":  # torch numbers the last rank's forwards from 1 there, which it never runs by
            found, expected = [action[:2] for action in found], [action[:2] for action in expected]
            assert [a.micro for a in order if a.kind == "F"] == list(range(micro_batches))
        assert found == expected


@pytest.mark.parametrize(("num_ranks", "micro_batches"), [(2, 4), (4, 8), (8, 64)])
def test_bubbles_of_even_stages(num_ranks, micro_batches):
    """1F1B: (P - 1) / (M + P - 1), of an interleaved one with two stages a rank half as many passes."""
    idle = {"1f1b": num_ranks - 1, "interleaved": (num_ranks - 1) / 2}
    bubbles = {}
    for name, per_rank in STAGES_PER_RANK.items():
        run = simulate(name, num_ranks, micro_batches, (ONE,) * (num_ranks * per_rank))
        bubbles[name] = run.bubble
        assert all(busy == pytest.approx(3 * per_rank * micro_batches) for busy in run.busy)
        if name in idle:
            assert run.bubble == pytest.approx(idle[name] / (micro_batches + idle[name]), rel=0.03)
    assert bubbles["zero_bubble"] < bubbles["interleaved"] < bubbles["1f1b"]


def test_uneven_stages_and_slow_links_cost_time():
    even = simulate("1f1b", 4, 8, (ONE,) * 4)
    slow = StageTimes(forward=2.0, input_gradient=2.0, weight_gradient=2.0)
    assert simulate("1f1b", 4, 8, (ONE, slow, ONE, ONE)).time > 8 * 6
    assert simulate("1f1b", 4, 8, (ONE,) * 4, send=0.5).time > even.time
    assert simulate("1f1b", 1, 3, (ONE,)).time == 9 and simulate("1f1b", 1, 3, (ONE,)).bubble == 0


def test_what_is_held_at_most():
    assert held_at_most(orders("1f1b", 4, 8)[0], [1.0] * 4) == {0: 4}
    assert held_at_most(orders("1f1b", 4, 8)[3], [1.0] * 4) == {3: 1}
    # A stage that holds nothing does not count, whatever passes through it.
    order = [Action(0, "F", 0), Action(2, "F", 0), Action(2, "B", 0), Action(0, "F", 1), Action(0, "B", 0)]
    assert held_at_most(order, [1.0, 0.0, 0.0]) == {0: 2, 2: 0}


# ----------------------------------------------------------------------------------------------------- the estimate


def settings(**values) -> list[str]:
    return [f"--parallel.{name}={value}" for name, value in values.items()]


def test_each_axis_lowers_what_it_should():
    base = config_of("--train.micro_rows=4", "--parallel.dp_shard=8")
    layout = resolve_layout(base, 8)
    alone = rank_memory(base, layout, PAPER)
    for axis in ("tensor", "context", "pipeline"):
        config = config_of("--train.micro_rows=4", "--parallel.dp_shard=8", *settings(**{axis: 4}))
        memory = rank_memory(config, resolve_layout(config, 32), PAPER)
        assert memory["activations: blocks"] < alone["activations: blocks"] * (1.0 if axis == "pipeline" else 0.5) + 1
        assert memory["optimizer state"] < 0.35 * alone["optimizer state"]
    config = config_of("--train.micro_rows=4", "--parallel.dp_shard=8", *settings(dp_replicate=4))
    assert rank_memory(config, resolve_layout(config, 32), PAPER)["optimizer state"] == alone["optimizer state"]


def test_recompute_lowers_memory_and_costs_time():
    found = [estimate(config_of(f"--train.recompute={how}"), 64, H100, PAPER) for how in ("none", "per_op", "full")]
    kept = [one.memory["activations: blocks"] for one in found]
    assert kept[0] > 1.4 * kept[1] > 4 * kept[2]
    work = [sum(one.times.values()) - one.times["communication not hidden"] for one in found]
    assert work[0] < work[1] < work[2] < 1.4 * work[0]


def test_a_pipeline_waits_and_times_add_up():
    rows = ["--train.micro_rows=2", *settings(pipeline=4, dp_shard=16, reshard_after_forward="false")]
    one, interleaved, zero = (
        estimate(config_of(*rows, *settings(pipeline_schedule=name)), 64, H100, PAPER) for name in STAGES_PER_RANK
    )
    assert one.times[WAITING] > interleaved.times[WAITING] > zero.times[WAITING] > 0
    assert one.bubble > zero.bubble > 0 and sum(one.times.values()) == one.step_time
    # The last stage with the head waits for none, so that uneven stages are in the bubble.
    assert one.bubble > 3 / (64 + 3)


def test_axes_over_slow_links_are_slower():
    node = estimate(config_of(*settings(tensor=8)), 64, H100, PAPER)
    across = estimate(config_of(*settings(tensor=8)), 64, H100, PAPER, Assumptions(ranks_per_node=4))
    name = "tensor-parallel collectives"
    assert across.times[name] > 1.5 * node.times[name] and across.bytes_between_nodes > node.bytes_between_nodes


# ------------------------------------------------------------------------------------------- against fake tensors


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "pages", kind="interleaved", num_documents=200)


@pytest.mark.parametrize("architecture", ["early", "late"])
def test_activations_of_a_large_model_against_fake_tensors(prepared, architecture):
    """1.1B parameters and more: no byte of them is there, nor of what a forward keeps."""
    shape = ["--model.width=2048", "--model.depth=16", "--model.head_dim=64", "--model.hidden_multiple=256"]
    config = small(prepared, architecture, *shape)
    batch, masks, build_mask = batch_of(config), {}, context.build_mask

    def remember(_, lo, *rest):
        return masks.setdefault(lo.shape, build_mask(_, lo, *rest))

    # Masks look at their numbers, which fake tensors lack: they are those of a small model on the same rows.
    with mock.patch.object(context, "build_mask", remember):
        MultimodalModel(small(prepared, architecture).model, seed=0)(batch)
    positions = batch.tokens.numel()
    stats = TokenStats(patches=len(batch.patches) / positions, labels=batch.num_labels() / positions, pairs=0.0)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(context, "build_mask", lambda _, lo, *rest: masks[lo.shape]),
    ):
        model = MultimodalModel(config.model)
        fake = Batch(**{name: mode.from_tensor(x) for name, x in vars(batch).items()})
        measured = saved_bytes(model, fake, torch.float32)
    expected = sum(kept_activations(config.model, positions, stats, 4, fused=False).values())
    assert sum(p.numel() for p in model.parameters()) > 8e8
    assert expected == pytest.approx(measured, rel=0.1)


# ------------------------------------------------------------------------------------------------------ the search


def test_the_search_ranks_what_fits():
    config = config_of(width=2048)
    ranking = search(config, 16, H100, PAPER, Assumptions())
    times = [one.estimate.step_time for one in ranking.found]
    assert times == sorted(times) and len(times) + ranking.too_large == ranking.tried
    best = ranking.found[0]
    assert best.estimate.fits and any("computation" in text for text in best.reasons)
    # What it says to set gives what it estimated.
    flags = [f"--{name}={value}" for name, value in best.settings.items()]
    again = estimate(config_of(*flags, width=2048), 16, H100, PAPER)
    assert again.step_time == pytest.approx(best.estimate.step_time) and again.layout == best.estimate.layout
    plain = estimate(config_of("--train.micro_rows=16", width=2048), 16, H100, PAPER)
    assert best.estimate.step_time <= plain.step_time


def test_a_model_that_fits_nowhere():
    ranking = search(config_of("--model.depth=96", width=20480), 2, GPUS["l40s"], PAPER, Assumptions())
    assert not ranking.found and ranking.too_large == ranking.tried
    assert ranking.least_memory > GPUS["l40s"].memory
    with pytest.raises(InputError, match="2048 is not a multiple of the 7"):
        search(config_of("--train.batch_rows=2048", "--model.depth=5"), 7, H100, PAPER, Assumptions())


def test_the_search_of_the_script(tmp_path):
    out = tmp_path / "ranking.json"
    command = [sys.executable, str(ROOT / "tools" / "estimate.py"), "--config"]
    command += [str(ROOT / "examples" / "nmm" / "early-275m.yaml"), "--gpu", "mi250x", "--gpus", "4", "--search"]
    good = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    found = json.loads(out.read_text())
    assert found["fitting"] and found["layouts"][0]["estimate"]["layout"]["dp_shard"] >= 1
    assert "--parallel." in good.stdout and "memory" in good.stdout
    sizes = found["layouts"][0]["settings"]
    assert sizes["train.recompute"] == "none"
