"""Studies: expansion into ladders, what trunks save, problems in the YAML, launchers, the tool's dry run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dataset_factory import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import Config, build
from megamm.errors import InputError
from megamm.resolve import resolve_config
from megamm.study.ladders import expand
from megamm.study.launchers import LocalLauncher, SlurmLauncher
from megamm.study.runner import resolve_study
from megamm.training.schedule import learning_rate_factor

TOOL = Path(__file__).parents[2] / "tools" / "run_study.py"
STEP = 4 * 32


def study(**changes) -> dict:
    base = {
        "model": {"depth": 2, "vocab_size": 300, "image_size": 16, "patch_size": 8},
        "data": {"sources": {"a": {"path": "data/a", "weight": 3}, "b": {"path": "data/b"}}, "row_length": 32},
        "schedule": {"warmup_steps": 5},
        "train": {"batch_rows": 4},
    }
    values = {"name": "s", "base": base, "architectures": ["early", "late"], "widths": [32, 64]}
    return values | {"tokens": [100 * STEP, 200 * STEP, 400 * STEP]} | changes


def test_grid_becomes_ladders_of_a_trunk_and_its_branches():
    found = expand(study(), Path("out"))
    assert list(found.ladders) == [f"{a}-w{w}-default" for a in ("early", "late") for w in ("0032", "0064")]
    assert len({run.name for run in found.runs}) == len(found.runs) == 16
    trunk, *branches = found.ladders["late-w0064-default"]
    assert trunk.trunk and trunk.config.schedule.cooldown == "none"
    assert trunk.steps == 320 and trunk.config.checkpoint.steps == [80, 160, 320] and trunk.config.checkpoint.final
    assert [(b.start, b.steps, b.tokens) for b in branches] == [
        (80, 100, 100 * STEP), (160, 200, 200 * STEP), (320, 400, 400 * STEP)
    ]  # fmt: skip
    for branch in branches:
        assert branch.config.train.branch_from == trunk.config.train.run_dir == f"out/runs/{trunk.ladder}/{trunk.name}"
        assert (branch.config.model.architecture, branch.config.model.width) == ("late", 64)
        assert branch.config.train.run_dir == f"out/runs/{branch.ladder}/{branch.name}"
        assert build(Config, yaml.safe_load(yaml.safe_dump(branch.values))) == branch.config
    assert [b.name for b in branches] == sorted(b.name for b in branches)


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(st.integers(8, 500), min_size=2, max_size=5, unique=True),
    fraction=st.floats(0.1, 0.8),
    shape=st.sampled_from(["inverse_sqrt", "one_minus_sqrt", "linear", "cosine"]),
)
def test_branch_repeats_the_rates_of_its_trunk_and_costs_what_is_left(steps, fraction, shape):
    values = study(architectures=["early"], widths=[32], tokens=[n * STEP for n in steps])
    values["base"]["schedule"] = {"warmup_steps": 1, "cooldown": shape, "cooldown_fraction": fraction}
    found = expand(values, Path("out"))
    trunk, *branches = found.runs
    assert [b.steps for b in branches] == sorted(steps)
    for branch in branches:
        assert branch.start in trunk.config.checkpoint.steps
        for step in range(branch.start):
            rates = [learning_rate_factor(r.config.schedule, step, r.steps) for r in (trunk, branch)]
            assert rates[0] == rates[1]
    for run in found.runs:
        run.config.model.head_dim = 16
    saving = found.saving({run.name: 0.5 for run in found.runs})
    expected = (1 - fraction) * max(steps) + fraction * sum(steps)
    assert saving["trained_to_longest"] == pytest.approx(expected / max(steps), abs=(len(steps) + 1) / max(steps))
    assert saving["apart_to_longest"] == pytest.approx(sum(steps) / max(steps))


def test_later_sections_win():
    values = study(
        architectures={
            "early": {},
            "slow": {"model": {"architecture": "late"}, "optimizer": {"lr": 2e-3, "clip": 7.0}},
        },
        widths={32: {"optimizer": {"lr": 3e-3}}, 64: {"model": {"depth": 9}}},
        baselines=[
            {"architecture": "text", "width": 64, "tokens": 9 * STEP + 1, "overrides": {"optimizer": {"lr": 0.5}}}
        ],
    )
    values["base"]["optimizer"] = {"lr": 1e-3, "clip": 5.0}
    ladders = expand(values, Path("out")).ladders
    picked = {
        name: (c.model.architecture, c.model.width, c.model.depth, c.optimizer.lr, c.optimizer.clip)
        for name, c in ((name, runs[0].config) for name, runs in ladders.items())
    }
    assert picked == {
        "early-w0032-default": ("early", 32, 2, 3e-3, 5.0),
        "early-w0064-default": ("early", 64, 9, 1e-3, 5.0),
        "slow-w0032-default": ("late", 32, 2, 3e-3, 7.0),
        "slow-w0064-default": ("late", 64, 9, 2e-3, 7.0),
        "text-w0064-default": ("text", 64, 9, 0.5, 5.0),
    }
    (single,) = ladders["text-w0064-default"]
    assert not single.trunk and single.config.train.branch_from is None
    assert single.steps == 10, "a budget is rounded up to whole steps"


def test_mixtures_set_the_weights_of_their_sources():
    mixtures = {"even": {"a": 1, "b": 1}, "only-b": {"b": 2}}
    ladders = expand(study(mixtures=mixtures, widths=[32]), Path("out")).ladders
    assert list(ladders) == [f"{a}-w0032-{m}" for m in mixtures for a in ("early", "late")]
    sources = {name: runs[1].config.data.sources for name, runs in ladders.items()}
    assert {k: v.weight for k, v in sources["early-w0032-even"].items()} == {"a": 1, "b": 1}
    assert {k: (v.path, v.weight) for k, v in sources["late-w0032-only-b"].items()} == {"b": ("data/b", 2)}


def test_all_problems_of_the_structure_are_named():
    values = study(tokns=[1], widths="many", mixtures={"m": {"c": 1}}, baselines=[{"architecture": "text"}])
    values["base"]["model"]["dpth"] = 3
    with pytest.raises(InputError) as error:
        expand(values, Path("out"), where="x.yaml")
    text = str(error.value)
    for part in (
        "x.yaml: ",
        "tokns: unknown key; did you mean 'tokens'",
        "base.model.dpth: unknown key",
        "widths",
        "baselines",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "base", "expected"),
    [
        ({"architectures": ["early", "latte"]}, {}, "model.architecture"),
        ({"widths": [32, 33]}, {}, "model.width: 33 is not a multiple of 8"),
        ({"widths": {32: {"optimizer": {"lrr": 1}}}}, {}, "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ({"mixtures": {"m": {"c": 1}}}, {}, "mixtures.m: c; known in base.data.sources: a, b"),
        ({"mixtures": {"m": {"a": 0}}}, {}, "data.sources.a.weight: 0.0 is not positive"),
        ({"tokens": [100 * STEP, 100 * STEP - 1]}, {}, "are [100, 100] steps; make them differ"),
        ({"tokens": [100 * STEP, 0]}, {}, "tokens: a budget is not positive"),
        ({"tokens": []}, {}, "tokens: empty"),
        (
            {"architectures": ["early"], "widths": [32, 32]},
            {},
            "early-w0032-default: in the grid or in baselines twice",
        ),
        (
            {"baselines": [{"architecture": "text", "width": 32, "tokens": 9, "mixture": "m"}]},
            {},
            "baselines.0.mixture: 'm'",
        ),
        ({}, {"train": {"steps": 5, "batch_rows": 4}}, "train.steps: set by the study"),
        ({}, {"schedule": {"cooldown": "none"}}, "schedule.cooldown: branches are the cool-downs of a trunk"),
        ({}, {"schedule": {"warmup_steps": 81}}, "schedule.warmup_steps: 81 reach beyond step 80"),
    ],
)
def test_each_problem_is_named_once(changes, base, expected):
    values = study(**changes)
    values["base"] |= base
    with pytest.raises(InputError) as error:
        expand(values, Path("out"), where="x.yaml")
    assert str(error.value).count(expected) == 1
    assert str(error.value).startswith("x.yaml: ") and "\n" not in str(error.value)


@pytest.fixture
def study_file(tmp_path):
    for name, kind in (("a", "caption"), ("b", "text")):
        make_dataset(tmp_path / "data" / name, kind=kind, num_documents=50)
    values = study()
    for name, source in values["base"]["data"]["sources"].items():
        source["path"] = str(tmp_path / "data" / name)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_tool(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_dry_run_prints_what_training_would_cost(study_file, tmp_path):
    done = run_tool(study_file, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    found = expand(yaml.safe_load(study_file.read_text()), tmp_path / "out")
    shares = resolve_study(found)
    total = sum(run.flops(shares[run.name], own=True) for run in found.runs)
    assert f"16 runs, {total:.4g} FLOPs" in done.stdout
    assert "ladders cost 1.15x their longest runs; training each run apart would cost 1.75x" in done.stdout
    for run in found.runs:
        assert run.name in done.stdout


def test_vision_tower_counts_at_patches_only(study_file):
    found = expand(yaml.safe_load(study_file.read_text()), Path("out"))
    shares = resolve_study(found)
    run = next(run for run in found.runs if run.architecture == "late")
    assert 0 < shares[run.name] < 1
    without, with_images = run.flops(0.0, own=False), run.flops(shares[run.name], own=False)
    assert without < with_images < run.flops(1.0, own=False)


def test_bad_input_exits_2(study_file, tmp_path):
    values = yaml.safe_load(study_file.read_text())
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(values | {"widthss": [1]}))
    values["base"]["data"]["sources"]["a"]["path"] = str(tmp_path / "nowhere")
    no_data = tmp_path / "no_data.yaml"
    no_data.write_text(yaml.safe_dump(values))
    for file, expected in (
        (broken, "widthss: unknown key"),
        (no_data, "dataset.json"),
        (tmp_path / "none", "cannot be read"),
    ):
        done = run_tool(file, "--out", tmp_path / "out")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and expected in done.stderr
    done = run_tool(study_file, "--out", tmp_path / "out", "--launcher", "slurm", "--slurm-param", "partition")
    assert done.returncode == 2 and "expected KEY=VALUE" in done.stderr
    assert not (tmp_path / "out").exists()


def wait(job) -> int:
    for _ in range(600):
        code = job.poll()
        if code is not None:
            return code
        time.sleep(0.1)
    raise AssertionError("the job does not end")


def test_launchers_append_to_the_log_and_return_the_exit_code(tmp_path):
    pytest.importorskip("submitit")
    missing = tmp_path / "missing.yaml"
    for launcher in (LocalLauncher(1), SlurmLauncher(tmp_path / "jobs", {"timeout_min": 5}, cluster="local")):
        log = tmp_path / "log.txt"
        log.write_text("before\n")
        assert wait(launcher.start([missing], log)) == 2
        assert log.read_text() == f"before\nerror: {missing}: cannot be read (No such file or directory)\n"


def test_slurm_without_submitit_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'megamm\[slurm\]'"):
        SlurmLauncher(tmp_path, {})


def test_slurm_names_an_unknown_parameter(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=r"--launcher slurm: .*gpu_per_node"):
        SlurmLauncher(tmp_path, {"gpu_per_node": 1}, cluster="local")


def test_demo_study_is_valid():
    values = yaml.safe_load((TOOL.parents[1] / "examples" / "studies" / "demo.yaml").read_text())
    values["base"]["model"] |= {"vocab_size": 2048, "image_size": 32, "patch_size": 4}
    for source in values["base"]["data"]["sources"].values():
        source.pop("path")
    values["base"]["data"]["sources"] = {}
    found = expand(values, Path("out"))
    for run in found.runs:
        resolve_config(run.config)
    early, late = ({r.width for r in found.runs if r.architecture == a} for a in ("early", "late"))
    assert early == late and len(early) >= 3
