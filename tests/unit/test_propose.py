"""Proposed sizes of a first study: tiny folders, captions or text only, long documents, very much data."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.resolve import times_read
from megamm.study import propose
from megamm.study.first_study import source_names, study_yaml
from megamm.study.ladders import expand
from megamm.study.propose import LADDERS, ProposedSetting, Source, Speed
from megamm.yaml_text import parse_yaml


def source(name: str = "pages", positions: int = 200_000, val: int = 20_000, **more: int) -> Source:
    return Source(name=name, positions=positions, val_positions=val, val_text_tokens=val, **more)


def sizes_of(sources: list[Source]) -> dict[str, int]:
    return {s.name: s.positions for s in sources}


def setting(
    *sources: Source, minutes: float = 10, images: bool = True, row_length: int = 256, **more
) -> ProposedSetting:
    sources = sources or (source(),)
    facts = {
        "architectures": ("early", "late") if images else ("early",),
        "baseline": "text" if images else None,
        "jobs": 2,
        "start": 3.0,
        "vocab_size": 1024,
        "image_size": 32,
        "patch_size": 8,
        "batch_rows": propose.batch_rows(sources, row_length, minutes, "cpu"),
        "eval_rows": propose.eval_rows(sources, row_length),
    }
    return ProposedSetting(sources=sources, minutes=minutes, row_length=row_length, **facts | more)


def machine(flops: float = 2e10, least: float = 0.02):
    """A machine of so many FLOP/s whose steps take ``least`` seconds and more."""

    def measure(setting: ProposedSetting):
        def speed(architecture: str, width: int, ladder: propose.ProposedLadder) -> Speed:
            work = 6 * setting.parameters(architecture, width, ladder) * setting.batch
            return Speed(step=least + work / flops, build=0.5)

        return speed

    return measure


def proposal(facts: ProposedSetting, **speed: float) -> propose.StudyProposal:
    return propose.propose_study(facts, machine(**speed)(facts))


@pytest.mark.parametrize(
    ("characters", "minutes", "device", "expected"),
    [
        (5_000, 10, "cpu", 512),
        (1_000_000, 10, "cpu", 1024),
        (50_000_000, 1000, "cpu", 8192),
        (50_000_000, 1, "cpu", 1024),  # most of it is never read in a minute
        (50_000_000, 1, "cuda", 8192),
        (10**13, 1e5, "cuda", 32_000),
    ],
)
def test_vocabulary_grows_with_the_text_that_is_read(characters, minutes, device, expected):
    assert propose.vocabulary(characters, minutes, device) == expected


@pytest.mark.parametrize(
    ("images", "side", "device", "patches"),
    [
        (0, 0, "cpu", 16),
        (300, 500, "cpu", 16),
        (2_000, 500, "cpu", 36),
        (300_000, 500, "cpu", 64),
        (300_000, 500, "cuda", 256),
        (300_000, 50, "cuda", 36),  # images are not enlarged
        (2_000, 20, "cpu", 16),
    ],
)
def test_images_are_few_patches(images, side, device, patches):
    size, patch = propose.image_sizes(images, side, device)
    assert size % patch == 0 and (size // patch) ** 2 == patches
    assert size <= max(32, side or size)


def test_rows_hold_most_documents_whole():
    assert propose.piece_length([30] * 100, 16, "cpu") == 128  # captions
    assert propose.piece_length([300] * 100, 16, "cpu") == 512
    assert propose.piece_length([30] * 200 + [400], 0, "cpu") == 128  # one long document among short ones
    assert propose.piece_length([50_000] * 5, 16, "cpu") == 512  # books: cut, whatever is chosen
    assert propose.piece_length([50_000] * 5, 16, "cuda") == 2048
    assert propose.piece_length([300] * 5, 256, "cuda") == 1024  # two images of 256 patches fit
    assert propose.piece_length([], 0, "cpu") == 512


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.2), (10_000, 0.2), (400_000, 0.05), (10**9, 0.01)])
def test_validation_is_large_enough_where_the_data_allow(tokens, share):
    assert propose.val_fraction(tokens) == share


def test_a_small_source_is_not_drowned_and_not_repeated_often():
    sources = [source("pages", 1_000_000), source("captions", 10_000)]
    weights = propose.mixture(sources, 100_000)
    assert weights["captions"] == pytest.approx(100 / 11, rel=0.02)  # roots: 1000 to 100
    times = times_read(1_000_000, propose.mixture(sources, 1_000_000), sizes_of(sources))
    assert times["captions"] == pytest.approx(4, rel=0.05) and times["pages"] < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(100, 10**9), min_size=1, max_size=5), st.floats(1e3, 1e10))
def test_mixtures(sizes, tokens):
    sources = [source(f"s{i}", size) for i, size in enumerate(sizes)]
    weights = propose.mixture(sources, tokens)
    assert sum(weights.values()) == pytest.approx(100, rel=0.05) and min(weights.values()) > 0
    times = list(times_read(tokens, weights, sizes_of(sources)).values())
    if tokens <= 4 * sum(sizes):
        assert max(times) <= 4 * 1.12  # weights are rounded to two digits
    else:
        assert max(times) <= 1.2 * min(times)


def test_a_tiny_folder_is_repeated_and_says_so():
    facts = setting(source(positions=3_000, val=600))
    made = proposal(facts)
    assert made.ladder.widths == (8, 16, 32, 64)
    assert made.tokens[-1] >= 0.9 * propose.GOOD_STEPS * facts.batch
    assert made.epochs["pages"] > 30
    assert any("read it" in text and text.startswith("pages") for text in made.warnings)
    assert any("validation has only 600 text tokens" in text for text in made.warnings)


def test_enough_data_asks_for_no_warning():
    made = proposal(setting(source(positions=20_000_000, val=50_000)))
    assert made.warnings == () and made.epochs["pages"] < 1 and len(made.ladder.widths) == 4
    assert made.minutes == pytest.approx(10, rel=0.15)


def test_captions_only_compares_and_text_only_cannot():
    made = proposal(setting(source("captions", 500_000)))
    assert {name for name, _ in made.ladder_minutes} == {"early", "late", "text"}
    assert made.num_runs == 2 * 4 * len(made.tokens) + 1
    made = proposal(setting(source("notes", 500_000), images=False))
    assert {name for name, _ in made.ladder_minutes} == {"early"} and made.num_runs == 4 * len(made.tokens)


def test_hundreds_of_thousands_of_documents_make_models_wide():
    """On a fast machine with much data; little data keep them small, however fast the machine is."""
    much = setting(source(positions=500_000_000), minutes=600, batch_rows=64)
    assert proposal(much, flops=1e13).ladder.widths[-1] >= 256
    little = setting(source(positions=200_000), minutes=600, batch_rows=4)
    assert proposal(little, flops=1e13).ladder.widths[-1] == 64


def test_no_time_gives_the_smallest_study_and_a_warning():
    made = proposal(setting(minutes=0.05))
    assert made.ladder == LADDERS[0] and len(made.tokens) == 3
    assert any("even the smallest study" in text for text in made.warnings)
    assert any("2 widths" in text for text in made.warnings)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1_000, 10**9),
    minutes=st.floats(0.05, 3000),
    flops=st.floats(1e9, 1e14),
    images=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_every_proposal_is_a_valid_study(tmp_path_factory, positions, minutes, flops, images, seed):
    facts = setting(source("a b: c", positions), source("notes", 5_000), minutes=minutes, images=images)
    made = proposal(facts, flops=flops)
    paths = {s.name: tmp_path_factory.getbasetemp() / "it's: #1" / s.name for s in facts.sources}
    content = study_yaml(facts, made, name="own: data", paths=paths, seed=seed, device="cpu", command="megamm-start x")
    values = parse_yaml(content, where="study.yaml")
    found = expand(values, tmp_path_factory.getbasetemp())
    assert len([run for run in found.runs if not run.trunk]) == made.num_runs
    assert {run.width for run in found.runs} == set(made.ladder.widths)
    assert max(run.tokens for run in found.runs) == made.tokens[-1]
    config = found.runs[0].config
    assert config.data.seed == config.train.seed == seed and config.data.row_length == 256
    assert [s.path for s in config.data.sources.values()] == [str(path) for path in paths.values()]
    assert math.isfinite(made.minutes) and made.minutes > 0


def test_names_of_sources():
    assert source_names(["a/my pages (2024)/", "b/notes.jsonl.gz", "c/notes", "/"]) == [
        "my-pages-2024",
        "notes",
        "notes-2",
        "data",
    ]
