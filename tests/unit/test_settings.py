"""Settings: every number has a range, every odd value is one clear error, and the help lists what works."""

import math
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import Config, load
from megamm.errors import InputError
from megamm.settings import build, leaves, marked, sentences, setting_of
from megamm.study.ladders import SingleRunConfig, StudyConfig
from megamm.train import make_parser, show
from megamm.yaml_text import dump_yaml

STUDY = {"name": "s", "architectures": ["early"], "widths": [64], "tokens": [1000]}


def numbers_in(hint) -> set[type]:
    """The kinds of number that a type holds, itself or in lists, mappings and unions."""
    if hint in (int, float):
        return {hint}
    return set().union(*map(numbers_in, typing.get_args(hint))) if typing.get_args(hint) else set()


NUMBERS = {".".join(path): (field, hint) for path, field, hint in leaves(Config) if numbers_in(hint)}
ODD = st.one_of(
    st.sampled_from([0, -1, 1, 1.0, 1e6, 2.5, -0.0, 1e-320, 1e300, -1e300, 10**30, 10**400, -(10**400)]),
    st.sampled_from([math.nan, math.inf, -math.inf, None, True, False, "", "many", "5", "1e-3", [], [3], {}, {"a": 1}]),
    st.integers(),
    st.floats(),
)


@pytest.mark.parametrize("cls", [Config, StudyConfig, SingleRunConfig])
def test_every_number_has_a_finite_range_and_every_setting_a_sentence(cls):
    for path, field, hint in leaves(cls):
        about = setting_of(field)
        if numbers_in(hint):
            end = about.max if about.below is None else about.below
            assert about.min is not None and math.isfinite(about.min) and math.isfinite(end), path
            assert about.min < end
    for owner in {cls, *(hint for hint in typing.get_type_hints(Config).values())}:
        assert all(sentences(owner).values()), owner


def put(path: str, value) -> dict:
    """A config that is whole but for one setting."""
    values = {"train": {} if path == "train.tokens" else {"steps": 5}, "data": {"sources": {"NAME": {"path": "p"}}}}
    values["eval"] = {"tasks": {"NAME": {"path": "p", "kind": "vqa"}}} if path.startswith("eval.tasks.") else {}
    section = values
    *names, last = path.split(".")
    for name in names:
        section = section.setdefault(name, {})
    section[last] = value
    return values


@pytest.mark.parametrize("path", NUMBERS)
@settings(max_examples=60, deadline=None)
@given(value=ODD)
def test_an_odd_value_is_in_range_or_one_clear_error(path, value):
    field, hint = NUMBERS[path]
    values = put(path, value)
    try:
        found = build(Config, values)
    except InputError as error:
        assert path in str(error) and "\n" not in str(error) and len(str(error)) < 300
        return
    for name in path.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    about = setting_of(field)
    for number in found if isinstance(found, list) else [found]:
        if number is None:
            assert type(None) in typing.get_args(hint)
            continue
        assert type(number) in numbers_in(hint) and math.isfinite(number)
        assert number == about.also or about.min <= number <= (about.max if about.below is None else about.below)
        assert number != about.below


@settings(max_examples=60, deadline=None)
@given(value=ODD, path=st.sampled_from(sorted(NUMBERS)))
def test_yaml_and_python_mean_the_same(value, path):
    def outcome(make):
        try:
            return make()
        except InputError as error:
            return str(error)

    values = put(path, value)
    options = [f"--{section}={dump_yaml(entries)}" for section, entries in values.items()]
    assert outcome(lambda: build(Config, values)) == outcome(lambda: load(None, options))


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [(n, v, n) for n in ("widths", "tokens") for v in ([-64], [math.nan], [True], ["64"], [0], 64, {"64": {}})]
    + [("widths", {64.5: {}}, "widths.64.5"), ("mixtures", {"m": {"a": -1}}, "mixtures.m.a")]
    + [("baselines", [{"architecture": "text", "width": 64, "tokens": math.inf}], "baselines.0.tokens")],
)
def test_a_study_is_checked_by_the_same_rules(name, value, where):
    with pytest.raises(InputError, match=re.escape(where)):
        build(StudyConfig, STUDY | {name: value})


def test_a_base_may_leave_open_what_the_study_sets_but_not_misspell_it():
    assert build(StudyConfig, STUDY | {"base": {"optimizer": {"lr": 1}}}).base.optimizer.lr == 1.0
    with pytest.raises(InputError, match=r"base\.optimizer\.lr: expected a number from 1e-12"):
        build(StudyConfig, STUDY | {"base": {"optimizer": {"lr": 0}}})


@pytest.mark.parametrize(("value", "found"), [(0, 0.0), (1, 1.0), (1e-9, 1e-9)])
def test_a_factor_of_zero_freezes_the_tower(value, found):
    assert build(Config, put("optimizer.vision_lr_factor", value)).optimizer.vision_lr_factor == found


def test_whole_numbers_may_be_written_as_powers_of_ten():
    window = build(Config, put("data.window_tokens", 1e7)).data.window_tokens
    assert window == 10_000_000 and type(window) is int


def test_text_is_text():
    with pytest.raises(InputError, match=r"train\.run_dir: expected text, found 7; put it in quotes"):
        load(None, ["--train.steps=5", "--train.run_dir=007"])
    assert load(None, ["--train.steps=5", "--train.run_dir='007'"]).train.run_dir == "007"
    assert load(None, ["--train.steps=5", "--train.run_dir=2026-01-31"]).train.run_dir == "2026-01-31"


def test_names_may_be_numbers_but_not_twice():
    config = build(Config, {"train": {"steps": 5}, "data": {"sources": {2026: {"path": "p"}}}})
    assert list(config.data.sources) == ["2026"]
    with pytest.raises(InputError, match=r"data\.sources\.7: stands twice"):
        build(Config, {"train": {"steps": 5}, "data": {"sources": {7: {"path": "p"}, "7": {"path": "q"}}}})


def test_marks():
    free, study = marked(Config, "free"), marked(Config, "study")
    assert {"data.workers", "parallel.tensor", "checkpoint.every", "train.run_dir"} <= set(free)
    assert {".".join(path) for path, *_ in leaves(Config) if path[0] == "parallel"} <= set(free)
    assert not {"data.seed", "train.seed", "optimizer.lr", "model.width", "train.steps"} & set(free)
    assert study == [
        "model.width",
        "train.run_dir",
        "train.steps",
        "train.tokens",
        "train.variant",
        "train.sweep",
        "train.branch_from",
        "checkpoint.steps",
    ]


def test_every_option_of_the_help_works(capsys):
    flags = make_parser().parse_args(["--help"])
    show(make_parser(), flags, [])
    text = " ".join(capsys.readouterr().out.split()).partition(" model: ")[2]
    options = re.findall(r"--((?:[a-z_]+\.)+[A-Z]*\.?[a-z_0-9]+) VALUE .*?\(([^()]*)\)(?= --| [a-zA-Z_.]+:|$)", text)
    assert [name for name, _ in options] == [".".join(path) for path, *_ in leaves(Config)]
    picked = {"model.vision.width": "400", "train.tokens": "1e7"}  # these must go with other settings
    for name, takes in options:
        wanted, _, default = takes.partition("; default ")
        if name in picked:
            value = picked[name]
        elif default and default != "null":
            value = default
        else:
            value = next(iter(re.findall(r"(?:from|one of) ([-\w.]+)", wanted)), None)
            value = f"[{value}]" if wanted.startswith("a list") else value or "some/folder"
        rest = [] if name.startswith("train.tokens") else ["--train.steps=5"]
        rest += ["--optimizer.freeze=[blocks.]"] if name == "optimizer.freeze_until" else []
        rest += ["--eval.tasks.NAME={path: p, kind: vqa}"] if name.startswith("eval.tasks.") else []
        config = load(None, ["--data.sources.NAME.path=p", *rest, f"--{name}={value}"])
        found = config
        for part in name.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found is not None, name
