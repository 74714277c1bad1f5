"""Layouts: what fits is accepted, what does not is named in full, and what is suggested fits."""

import itertools
import math
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import Config, load
from megamm.errors import InputError
from megamm.model.counts import TokenStats, exact_flops_per_token
from megamm.parallel.layout import AXES, LayoutError, resolve_layout
from megamm.parallel.stages import cut_evenly, cut_stages, part_costs
from megamm.resolve import resolve_config

PAPER = TokenStats(patches=0.544, labels=0.45, pairs=580.0)
SIZES = ["--model.vocab_size=50432", "--model.image_size=224", "--model.patch_size=14", "--train.steps=10"]


def config_of(*overrides: str) -> Config:
    return resolve_config(load(None, [*SIZES, "--model.width=1024", "--model.head_dim=64", *overrides]))


def problems_of(world_size: int, *overrides: str) -> list[str]:
    with pytest.raises(LayoutError) as caught:
        resolve_layout(config_of(*overrides), world_size)
    return caught.value.problems


# ------------------------------------------------------------------------------------------------- what is accepted


def test_defaults_fill_the_data_axis():
    layout = resolve_layout(config_of(), 16)
    assert (layout.dp_shard, layout.world_size, layout.data_ranks, layout.num_stages) == (16, 16, 16, 1)
    assert (layout.micro_batches, layout.micro_rows) == (1, 128)
    assert str(layout) == "dp_shard 16" and str(resolve_layout(config_of(), 1)) == "1 rank"


def test_rows_without_a_pipeline_may_end_in_a_smaller_pass():
    layout = resolve_layout(config_of("--train.micro_rows=48"), 16)
    assert (layout.micro_batches, layout.micro_rows) == (3, 48)


def test_micro_batches_of_a_pipeline():
    interleaved = ["--parallel.pipeline=4", "--parallel.pipeline_schedule=interleaved"]
    layout = resolve_layout(config_of(*interleaved, "--parallel.tensor=2"), 64)
    assert (layout.num_stages, layout.stages_per_rank) == (8, 2)
    assert (layout.micro_batches, layout.micro_rows) == (8, 32)  # twice the ranks of the pipeline
    assert resolve_layout(config_of(*interleaved, "--train.micro_rows=8"), 64).micro_batches == 16
    layout = resolve_layout(config_of("--parallel.pipeline=4", "--parallel.micro_batches=32"), 64)
    assert (layout.micro_batches, layout.micro_rows, layout.num_stages) == (32, 4, 4)


sizes = st.sampled_from([1, 1, 1, 2, 3, 4, 6, 8, 16])


@settings(max_examples=300, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 7, 8, 12, 64, 96, 1024]),
    axes=st.fixed_dictionaries(
        dict.fromkeys((*AXES, "expert"), sizes) | {"dp_shard": st.sampled_from([-1, -1, 1, 2, 8])}
    ),
    architecture=st.sampled_from(["early", "late", "text"]),
    schedule=st.sampled_from(["1f1b", "interleaved", "zero_bubble"]),
    micro=st.sampled_from([None, 1, 3, 8]),
    micro_rows=st.sampled_from([None, 1, 5]),
    row=st.sampled_from([1024, 1000, 1001]),
)
def test_what_is_accepted_fits_and_what_is_suggested_is_accepted(
    world, axes, architecture, schedule, micro, micro_rows, row
):
    values = {f"parallel.{axis}": size for axis, size in axes.items()} | {
        "model.architecture": architecture,
        "parallel.pipeline_schedule": schedule,
        "parallel.micro_batches": "null" if micro is None else micro,
        "train.micro_rows": "null" if micro_rows is None else micro_rows,
        "data.row_length": row,
    }
    overrides = [f"--{name}={value}" for name, value in values.items()]
    try:
        check(config_of(*overrides), world)
    except LayoutError as error:
        assert error.problems and error.suggestions
        assert len(set(error.suggestions)) == len(error.suggestions) <= 3
        for flags in error.suggestions:
            check(config_of(*overrides, *shlex.split(flags)), world)


def check(config: Config, world: int) -> None:
    layout = resolve_layout(config, world)
    assert math.prod(getattr(layout, axis) for axis in AXES) == layout.world_size == world
    assert layout.shard_ranks % layout.expert == 0
    heads = config.model.width // config.model.head_dim
    assert heads % layout.tensor == 0 and config.model.vocab_size % layout.tensor == 0
    assert config.data.row_length % (layout.context * layout.tensor) == 0
    rows = layout.data_ranks * layout.micro_batches * layout.micro_rows
    if layout.pipeline > 1:
        assert rows == config.train.batch_rows and layout.micro_batches >= layout.pipeline
        assert layout.num_stages <= config.model.depth
    else:
        assert rows - layout.data_ranks * layout.micro_rows < config.train.batch_rows <= rows


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("world", "overrides", "expected"),
    [
        (0, [], "world size: 0 is not positive"),
        (8, ["--parallel.dp_shard=4"], "world size: 8 ranks, but dp_shard 4 = 4"),
        (8, ["--parallel.context=3"], "world size: 8 ranks are not a multiple of context 3 = 3"),
        (32, ["--parallel.tensor=32"], "parallel.tensor: 32 does not divide the heads 16"),
        (8, ["--parallel.tensor=8", "--model.key_heads=4"], "parallel.tensor: 8 does not divide model.key_heads 4"),
        (2, ["--parallel.tensor=2", "--model.vocab_size=50433"], "does not divide model.vocab_size 50433"),
        (4, ["--parallel.tensor=4", "--model.hidden_multiple=1"], "does not divide the SwiGLU width"),
        (
            16,
            ["--parallel.tensor=16", "--model.architecture=late"],
            "parallel.tensor: 16 does not divide the vision tower's heads 8",
        ),
        (
            2,
            ["--parallel.tensor=2", "--model.architecture=late", "--model.image_size=210"],
            "parallel.tensor: 2 does not divide the patches of an image (model.image_size, model.patch_size) 225",
        ),
        (32, ["--parallel.pipeline=32"], "parallel.pipeline: 32 for 24 blocks (model.depth)"),
        (
            16,
            ["--parallel.pipeline=16", "--parallel.pipeline_schedule=interleaved"],
            "16 x 2 stages of interleaved for 24 blocks",
        ),
        (8, ["--parallel.pipeline=4", "--parallel.micro_batches=3"], "3 leave some of the 4 stages empty"),
        (8, ["--parallel.pipeline=4", "--parallel.micro_batches=24"], "24 does not divide the 1024 rows"),
        (8, ["--parallel.pipeline=4", "--train.micro_rows=24"], "train.micro_rows: 24 does not divide the 1024 rows"),
        (8, ["--parallel.pipeline=4", "--train.micro_rows=512"], "take 4 or more (or smaller train.micro_rows)"),
        (
            4,
            ["--parallel.pipeline=4", "--parallel.micro_batches=8", "--train.micro_rows=5"],
            "8 of train.micro_rows 5 on 1 data-parallel ranks are not train.batch_rows 2048",
        ),
        (
            4,
            [
                "--parallel.pipeline=4",
                "--parallel.pipeline_schedule=interleaved",
                "--parallel.micro_batches=9",
                "--train.batch_rows=9",
            ],
            "9 do not make 2 equal rounds over 4 ranks",
        ),
        (8, ["--parallel.micro_batches=4"], "parallel.micro_batches: 4 without a pipeline"),
        (7, [], "train.batch_rows: 2048 is not a multiple of the 7 data-parallel ranks"),
        (4, ["--parallel.context=4", "--data.row_length=1028"], "data.row_length: 1028 is not a multiple of 8"),
        (4, ["--parallel.tensor=4", "--data.row_length=1026"], "data.row_length: 1026 is not a multiple of 4"),
        (8, ["--parallel.expert=3"], "parallel.expert: 3 does not divide dp_shard 8 x context 1"),
    ],
)
def test_misfits(world, overrides, expected):
    assert any(expected in line for line in problems_of(world, *overrides)), problems_of(world, *overrides)


def test_sizes_that_cannot_be():
    """Settings made in Python, which no reader has checked."""
    config = config_of()
    config.parallel.tensor, config.parallel.dp_shard = 0, 0
    with pytest.raises(LayoutError) as caught:
        resolve_layout(config, 8)
    assert caught.value.problems == [
        "parallel.dp_shard: 0 is not positive (-1: all that the other axes leave)",
        "parallel.tensor: 0 is not positive",
    ]


def test_all_misfits_at_once():
    overrides = ["--parallel.tensor=32", "--parallel.pipeline=32", "--data.row_length=1001", "--train.batch_rows=2047"]
    found = problems_of(2048, *overrides)
    for text in ("the heads 16", "32 for 24 blocks", "train.batch_rows: 2047", "data.row_length: 1001"):
        assert any(text in line for line in found)


def test_suggestions_are_near_and_can_be_pasted():
    with pytest.raises(InputError) as caught:
        resolve_layout(config_of("--parallel.tensor=3"), 8)
    text = str(caught.value)
    assert "nearest that fit:\n    --parallel.tensor 4\n    --parallel.tensor 2\n" in text
    with pytest.raises(LayoutError) as caught:
        resolve_layout(config_of("--parallel.pipeline=4", "--parallel.micro_batches=24"), 8)
    assert caught.value.suggestions[0] in ("--parallel.micro_batches 16", "--parallel.micro_batches 32")


def test_no_torch():
    code = "import sys, megamm.parallel.layout, megamm.parallel.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --------------------------------------------------------------------------------------------------------- stages


def test_costs_of_parts_add_up():
    for architecture in ("early", "late", "text"):
        model = config_of(f"--model.architecture={architecture}").model
        stats = TokenStats(patches=0.0, labels=1.0, pairs=512.5) if architecture == "text" else PAPER
        costs = part_costs(model, stats)
        total = costs.inputs + sum(costs.blocks) + costs.head
        assert total == pytest.approx(exact_flops_per_token(model, stats), rel=1e-12)
        assert costs.head == pytest.approx(6 * model.vocab_size * model.width * stats.labels)
        assert (costs.inputs > 0) == (architecture != "text")


@pytest.mark.parametrize("architecture", ["early", "late"])
@pytest.mark.parametrize("num_stages", [1, 2, 5, 8, 24])
def test_stages_hold_every_part_once(architecture, num_stages):
    model = config_of(f"--model.architecture={architecture}").model
    stages = cut_stages(model, PAPER, num_stages)
    assert len(stages) == num_stages
    assert list(itertools.chain(*(stage.blocks for stage in stages))) == list(range(24))
    assert [stage.inputs for stage in stages] == [True] + [False] * (num_stages - 1)
    assert [stage.head for stage in stages] == [False] * (num_stages - 1) + [True]
    assert sum(stage.cost for stage in stages) == pytest.approx(exact_flops_per_token(model, PAPER))


def test_a_dear_tower_and_a_dear_head_stand_alone():
    model = config_of("--model.architecture=late", "--model.vision.width=1024").model  # 13 times a block
    stages = cut_stages(model, PAPER, 8)
    assert not len(stages[0].blocks) and (stages[0].first_block, stages[0].last_block) == (0, -1)
    assert stages[0].cost == max(stage.cost for stage in stages)
    assert all(len(stage.blocks) for stage in cut_stages(config_of().model, PAPER, 4))
    with pytest.raises(ValueError, match="25 stages for 24 blocks"):
        cut_stages(model, PAPER, 25)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.integers(0, 20), min_size=3, max_size=9).filter(any),
    num_stages=st.integers(1, 5),
)
def test_the_cut_is_the_best_of_all(parts, num_stages):
    """Against all cuts: least costliest run, then fewest runs without a block, then the least sum of squares."""
    n = len(parts)
    if num_stages > n - 2:
        return

    def key(ends):
        edges = [0, *ends]
        runs = [sum(parts[a:b]) for a, b in itertools.pairwise(edges)]
        empty = sum((a, b) in ((0, 1), (n - 1, n)) for a, b in itertools.pairwise(edges))
        return max(runs), empty, sum(run**2 for run in runs)

    cuts = itertools.combinations(range(1, n), num_stages - 1)
    best = min(key([*cut, n]) for cut in cuts)
    assert key(cut_evenly(tuple(float(part) for part in parts), num_stages)) == best
