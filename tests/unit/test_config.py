"""Config: YAML and overrides, unknown keys, all problems at once."""

import subprocess
import sys

import pytest
import yaml

from megamm.config import Config, build, load, parse_overrides, to_yaml
from megamm.errors import InputError
from megamm.model.sizes import default_head_dim, hidden_width
from megamm.resolve import resolve_config


def test_yaml_and_overrides_merge(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {width: 64, depth: 2}\ntrain: {tokens: 1e6}\ndata: {sources: {a: {path: p, weight: 2}}}\n")
    config = load(path, ["--model.width", "128", "--data.sources.b.path=q"])
    assert (config.model.width, config.model.depth) == (128, 2)
    assert config.train.tokens == 1e6
    assert {name: source.weight for name, source in config.data.sources.items()} == {"a": 2.0, "b": 1.0}


def test_resolved_yaml_reads_back():
    config = load(None, ["--train.steps", "5", "--data.sources.a.path", "p"])
    assert build(Config, yaml.safe_load(to_yaml(config))) == config


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError) as error:
        load(
            None,
            [
                "--model.wdth",
                "3",
                "--model.depth",
                "many",
                "--optimizer.lr",
                "-1",
                "--data.sources.a.pth",
                "x",
            ],
        )
    message = str(error.value)
    for part in (
        "model.wdth: unknown key; did you mean 'width'?",
        "model.depth: Expected a <class 'int'>. Got value: many",
        "data.sources.a.pth: unknown key; did you mean 'path'?",
        "optimizer.lr: -1.0 is not positive",
        "train.steps, train.tokens: give exactly one of the two",
    ):
        assert part in message
    assert message.startswith("config: 6 problems\n") and len(message.splitlines()) == 7


def test_one_problem_is_one_line():
    with pytest.raises(InputError) as error:
        load(None, ["--model.wdth", "3", "--train.steps", "5", "--data.sources.a.path", "p"])
    assert str(error.value) == "config: model.wdth: unknown key; did you mean 'width'?"


def test_the_files_of_a_problem_are_named(tmp_path):
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in paths:
        path.write_text("train: {steps: 5}\ndata: {sources: {a: {path: p}}}\nmodel: {wdth: 3}\n")
    with pytest.raises(InputError, match=rf"^{paths[0]}, {paths[1]}: model\.wdth"):
        load(paths)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n"])
def test_bad_yaml_is_one_clear_error(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load(path)


def test_overrides_need_a_value():
    with pytest.raises(InputError, match=r"--model\.width: a value must follow"):
        parse_overrides(["--model.width"])


def test_paper_sizes():
    """Hidden widths of arXiv 2504.07951: a multiple of 256 above 8/3 of the width."""
    assert [hidden_width(w, 256) for w in (800, 1088, 1632, 2208)] == [2304, 3072, 4352, 5888]
    assert [default_head_dim(w) for w in (768, 1024, 64, 24)] == [64, 64, 64, 24]


def test_tokens_become_steps_and_missing_sizes_are_named():
    sizes = ["--model.vocab_size", "512", "--model.image_size", "32", "--model.patch_size", "8"]
    config = resolve_config(load(None, ["--train.tokens", "2097153", *sizes]))
    assert config.train.steps == 2
    with pytest.raises(InputError, match=r"model\.vocab_size: set it"):
        resolve_config(load(None, ["--train.steps", "1"]))


def test_command_line_contract(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "megamm.train", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    sizes = ["--model.vocab_size=512", "--model.image_size=32", "--model.patch_size=8", "--train.steps=3"]
    dry = run("--dry-run", *sizes)
    assert dry.returncode == 0 and "FLOPs per token" in dry.stdout and "memory per rank" in dry.stdout
    printed = run("--print_config", *sizes)
    assert printed.returncode == 0 and yaml.safe_load(printed.stdout)["model"]["vocab_size"] == 512
    bad = run("--model.widht=3", *sizes)
    assert bad.returncode == 2 and "did you mean 'width'?" in bad.stderr
    shown = run("--help")
    assert shown.returncode == 0 and "--optimizer.lr" in shown.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"head_dim": 0}}, "model.head_dim: 0 is not positive"),
        ({"model": {"vocab_size": 0, "patch_size": 0}}, "model.vocab_size: 0 is not positive"),
        ({"model": {"vision": {"width": -5}}}, "model.vision.width: -5 is not positive"),
        ({"model": {"depth": 1_000_000}}, "model.depth: 1000000 is above 10000 blocks"),
        ({"model": {"vision": 3}}, "model.vision: expected a mapping of settings, found 3"),
        ({"model": 3}, "model: expected a mapping of settings, found 3"),
        ({"data": {"row_length": 10**11}}, "data.row_length: 100000000000 is not between 8 and 2147483647"),
    ],
)
def test_sizes_that_no_model_has(values, message):
    with pytest.raises(InputError) as caught:
        build(Config, {"train": {"steps": 5}} | values)
    assert message in str(caught.value)
