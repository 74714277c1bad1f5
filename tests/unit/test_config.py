"""Config: YAML and overrides, unknown keys, all problems at once."""

import subprocess
import sys

import pytest
import torch
from dataset_factory import make_dataset

from megamm.config import Config, ModelConfig, default_head_dim, load
from megamm.dry_run import describe_run
from megamm.errors import InputError
from megamm.model.counts import count_parameters
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import hidden_width, num_heads, resolve_model
from megamm.model.vision import VisionTower
from megamm.resolve import remarks, resolve_config
from megamm.settings import build, parse_overrides, to_yaml
from megamm.train import load_all, resolved_yaml
from megamm.yaml_text import parse_yaml

EARLY_WIDTHS = (800, 1088, 1632, 2208, 2624, 3232, 5120)
LATE_WIDTHS = ((384, 768), (512, 1024), (768, 1536), (1024, 2048), (1184, 2464), (1536, 3072))
"""Of the tower and of the decoder."""


def test_yaml_and_overrides_merge(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {width: 64, depth: 2}\ntrain: {tokens: 1e7}\ndata: {sources: {a: {path: p, weight: 2}}}\n")
    config = load(path, ["--model.width", "128", "--data.sources.b.path=q"])
    assert (config.model.width, config.model.depth) == (128, 2)
    assert config.train.tokens == 1e7
    assert {name: source.weight for name, source in config.data.sources.items()} == {"a": 2.0, "b": 1.0}


def test_resolved_yaml_reads_back():
    config = load(None, ["--train.steps", "5", "--data.sources.a.path", "p"])
    assert build(Config, parse_yaml(to_yaml(config), "written")) == config


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
        "model.depth: expected a whole number from 1 to 10,000, found 'many'",
        "data.sources.a.pth: unknown key; did you mean 'path'?",
        "data.sources.a.path: missing",
        "optimizer.lr: expected a number from 1e-12 to 1e+38, found -1",
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


def test_heads_are_at_least_64_wide_where_that_fits():
    assert [default_head_dim(w) for w in (768, 1024, 64, 24, 200, 808)] == [64, 64, 64, 24, 40, 8]
    made = [resolve_model(ModelConfig(architecture="text", width=w)) for w in (800, 1632, 2208, 3232, 200)]
    assert [(m.head_dim, num_heads(m)) for m in made] == [(80, 10), (96, 17), (96, 23), (64, 50), (40, 5)]


def test_a_model_whose_heads_leave_a_rest_is_read_back_as_it_is():
    """Its head width does not divide its width, of which it leaves a 101st."""
    settings = {"model": {"width": 3232, "head_dim": 64}, "train": {"steps": 5}}
    assert num_heads(build(Config, settings).model) == 50
    with pytest.raises(InputError, match=r"model.head_dim: 96 must be even and divide model.width 800 up to a rest"):
        build(Config, {"model": {"width": 800, "head_dim": 96}, "train": {"steps": 5}})


def test_a_decoder_whose_heads_leave_a_rest_counts_what_it_has():
    config = resolve_model(
        ModelConfig(
            architecture="text", width=130, depth=1, head_dim=64, vocab_size=64, hidden_multiple=8, patch_size=2
        )
    )
    model = MultimodalModel(config, seed=0)
    assert num_heads(config) == 2 and model.blocks["0"].attention.out.weight.shape == (130, 128)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


PAPER = [
    *[("early", w, None, n) for w, n in zip(EARLY_WIDTHS, (275, 464, 932, 1630, 2280, 3350, 8130), strict=True)],
    *[("late", w, v, n) for (v, w), n in zip(LATE_WIDTHS, (290, 494, 1000, 1750, 2430, 3710), strict=True)],
]
"""Architecture, width, width of the tower and millions of parameters, from the paper's tables."""


@pytest.mark.parametrize(("architecture", "width", "tower", "millions"), PAPER)
def test_every_size_of_the_paper_can_be_built(architecture, width, tower, millions):
    sizes = ["--model.vocab_size=50432", "--model.image_size=224", "--model.patch_size=14", "--train.steps=5"]
    sizes += [
        f"--model.architecture={architecture}",
        f"--model.width={width}",
        f"--model.vision.width={tower or 'null'}",
    ]
    config = resolve_config(load(None, sizes))
    model, vision = config.model, config.model.vision
    assert 0.98 * model.width < num_heads(model) * model.head_dim <= model.width and 64 <= model.head_dim <= 128
    assert vision.width % vision.head_dim == 0
    assert model.head_dim % 8 == 0 and vision.head_dim % 8 == 0
    assert count_parameters(model).total == pytest.approx(millions * 1e6, rel=0.01)
    assert f"{count_parameters(model).total:,}" in describe_run(config)


def test_the_tower_of_the_late_model_of_2430_million_parameters_runs():
    """Its width is no multiple of the decoder's head width; a shallow one, whose widths are the paper's."""
    config = ModelConfig(
        architecture="late", width=2464, depth=1, vocab_size=64, image_size=28, patch_size=14, hidden_multiple=8
    )
    config.vision.width = 1184
    tower = VisionTower(resolve_model(config))
    assert (config.head_dim, config.vision.head_dim) == (88, 32)
    patches = torch.zeros(4, 3 * 14 * 14, dtype=torch.uint8)
    assert tower(patches, torch.tensor([[2, 2]]), torch.float32).shape == (1, 4, 2464)


@pytest.mark.parametrize(
    ("settings", "tower"),
    [
        ({"width": 48, "head_dim": 16}, (32, 16)),  # half of the width, in heads of the decoder's
        ({"width": 48, "head_dim": 16, "vision": {"width": 24}}, (24, 24)),
        ({"width": 48, "head_dim": 16, "vision": {"head_dim": 8}}, (24, 8)),
        ({"width": 800}, (400, 80)),
    ],
)
def test_defaults_of_the_tower(settings, tower):
    model = resolve_model(build(Config, {"model": settings, "train": {"steps": 5}}).model)
    assert (model.vision.width, model.vision.head_dim) == tower


def test_tokens_become_steps_and_missing_sizes_are_named():
    sizes = ["--model.vocab_size", "512", "--model.image_size", "32", "--model.patch_size", "8"]
    config = resolve_config(load(None, ["--train.tokens", "2097153", *sizes]))
    assert config.train.steps == 2
    with pytest.raises(InputError, match=r"model\.vocab_size: set it"):
        resolve_config(load(None, ["--train.steps", "1"]))


def test_a_warm_up_longer_than_the_run_is_said():
    sizes = ["--model.vocab_size=512", "--model.image_size=32", "--model.patch_size=8", "--train.steps=3"]
    assert remarks(resolve_config(load(None, [*sizes, "--schedule.warmup_steps=3"]))) == []
    (line,) = remarks(resolve_config(load(None, [*sizes, "--schedule.warmup_steps=4"])))
    assert line.startswith("schedule.warmup_steps: 4, but the run has 3 steps")
    assert line in describe_run(load(None, [*sizes, "--schedule.warmup_steps=4"]))


def test_the_printed_config_is_what_a_run_would_have(tmp_path):
    make_dataset(tmp_path / "data", kind="caption", num_documents=20)
    options = ["--train.tokens=5000", "--train.batch_rows=4", "--data.row_length=1000", "--model.width=64"]
    found = [f"--data.sources.a.path={tmp_path / 'data'}"]
    text = resolved_yaml(load(None, [*options, *found]))
    values = parse_yaml(text, "printed")
    assert "#" not in text and values["train"]["steps"] == 2 and values["train"]["tokens"] is None
    assert values["model"]["vocab_size"] == 300 and values["model"]["vision"]["width"] == 64
    assert build(Config, values) == resolve_config(load(None, [*options, *found]))
    text = resolved_yaml(load(None, [*options, "--data.sources.a.path=/nowhere"]))
    assert text.startswith("# not resolved: /nowhere/dataset.json: not found")
    values = parse_yaml(text, "printed")
    assert values["train"]["steps"] == 2 and values["model"]["head_dim"] == 64 and values["model"]["vocab_size"] is None


def test_command_line_contract(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "megamm.train", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    sizes = ["--model.vocab_size=512", "--model.image_size=32", "--model.patch_size=8", "--train.steps=3"]
    dry = run("--dry-run", *sizes)
    assert dry.returncode == 0 and "FLOPs per token" in dry.stdout and "memory per rank" in dry.stdout
    printed = run("--print_config", *sizes)
    assert printed.returncode == 0 and parse_yaml(printed.stdout, "printed")["model"]["vocab_size"] == 512
    bad = run("--model.widht=3", *sizes)
    assert bad.returncode == 2 and "did you mean 'width'?" in bad.stderr
    shown = run("--help")
    assert shown.returncode == 0 and "--optimizer.lr" in shown.stdout


def test_several_configs_are_read_before_any_is_refused(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(f"train: {{steps: 5}}\nmodel: {{wdth_{name}: 3}}\n")
    with pytest.raises(InputError, match=r"(?s)a\.yaml: model\.wdth_a: unknown.*b\.yaml: model\.wdth_b: unknown"):
        load_all([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"head_dim": 0}}, "model.head_dim: expected a whole number from 2 to 10,000, or null, found 0"),
        (
            {"model": {"vocab_size": 0, "patch_size": 0}},
            "model.vocab_size: expected a whole number from 1 to 1,000,000,000, or null, found 0",
        ),
        (
            {"model": {"vision": {"width": -5}}},
            "model.vision.width: expected a whole number from 2 to 1,000,000, or null, found -5",
        ),
        ({"model": {"depth": 1_000_000}}, "model.depth: expected a whole number from 1 to 10,000, found 1000000"),
        ({"model": {"vision": 3}}, "model.vision: expected a mapping of settings, found 3"),
        ({"model": 3}, "model: expected a mapping of settings, found 3"),
        (
            {"data": {"row_length": 10**11}},
            "data.row_length: expected a whole number from 8 to 2,147,483,647, found 100000000000",
        ),
    ],
)
def test_settings_that_no_run_has(values, message):
    with pytest.raises(InputError) as caught:
        build(Config, {"train": {"steps": 5}} | values)
    assert message in str(caught.value)
