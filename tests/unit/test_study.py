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

from megamm.config import Config
from megamm.errors import InputError
from megamm.estimate.hardware import find_gpu
from megamm.resolve import resolve_config
from megamm.settings import build
from megamm.study.cost import ladder_costs, resolve_without_data
from megamm.study.ladders import expand, read_study
from megamm.study.launchers import LocalLauncher, NodeCall, SlurmLauncher
from megamm.study.runner import resolve_study
from megamm.study.tables import grid_table
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
        (80, 100, 100 * STEP),
        (160, 200, 200 * STEP),
        (320, 400, 400 * STEP),
    ]
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
        ({"mixtures": {"m": {"a": 0}}}, {}, "mixtures.m.a: expected a number from 1e-09 to 1e+09, found 0"),
        ({"tokens": [STEP - 1, 400 * STEP]}, {}, f"a budget of {STEP - 1} is less than one batch, {STEP} positions"),
        ({"tokens": [100 * STEP, 100 * STEP - 1]}, {}, "are [100, 100] steps; make them differ"),
        ({"tokens": [100 * STEP, 0]}, {}, "tokens.1: expected a number from 1 to 1e+18, found 0"),
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
        make_dataset(tmp_path / "data" / name, kind=kind, num_documents=50, max_text=20)
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


def test_dry_run_refuses_what_every_run_would_and_says_the_rest(study_file, tmp_path):
    values = yaml.safe_load(study_file.read_text())
    changed = tmp_path / "changed.yaml"
    values["base"]["schedule"]["warmup_steps"] = 60  # of the shortest run's 100
    changed.write_text(yaml.safe_dump(values))
    done = run_tool(changed, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and "warning: schedule.warmup_steps: " in done.stdout
    values["base"]["data"]["row_length"] = 12
    changed.write_text(yaml.safe_dump(values))
    done = run_tool(changed, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 2 and "more than data.row_length 12" in done.stderr and "Traceback" not in done.stderr


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
    with pytest.raises(InputError, match=r"pip install submitit, or pip install '\.\[slurm\]'"):
        SlurmLauncher(tmp_path, {})


def test_slurm_names_an_unknown_parameter(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=r"--launcher slurm: .*gpu_per_node"):
        SlurmLauncher(tmp_path, {"gpu_per_node": 1}, cluster="local")


def test_slurm_jobs_span_nodes_and_get_their_cpus(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    call = NodeCall(["a.yaml", "b.yaml"], tmp_path / "log.txt", ranks=8)
    command = " ".join(call.command(2, "node3", "123456"))
    assert "megamm.launch --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node3:23456 --rdzv-id=123456" in command
    assert command.endswith("--nproc-per-node=8 --max-restarts=3 -m megamm.train --config a.yaml b.yaml")
    assert "--standalone" in call.command(1, "node3", "7")
    assert call.command(2, "node3", "123457") != call.command(2, "node3", "123456"), "another port"
    assert "megamm.launch" not in NodeCall(["a.yaml"], tmp_path / "log.txt", ranks=1).command(1, "node3", "7")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    launcher = SlurmLauncher(tmp_path, {"nodes": 2, "gpus_per_node": 8, "cpus_per_task": 64})
    script = launcher._executor._executor._make_submission_file_text("command", "uid")
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=64", "@300"):
        assert line in script, script
    assert script.index("export SRUN_CPUS_PER_TASK=") < script.index("\nsrun ")


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


def test_a_size_is_merged_over_what_all_sizes_share(tmp_path):
    sizes = {"small": {"widths": [32]}, "large": {"widths": [64], "base": {"model": {"depth": 4}}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(sizes=sizes), sort_keys=False))
    assert read_study(path, "small") == study(widths=[32])
    large = expand(read_study(path, "large"), Path("out"))
    assert {run.width for run in large.runs} == {64} and {run.config.model.depth for run in large.runs} == {4}
    for size, message in ((None, "not given; sizes here: small, large"), ("medium", "'medium' is none of them")):
        with pytest.raises(InputError, match=message):
            read_study(path, size)
    path.write_text(yaml.safe_dump(study()))
    assert read_study(path) == study()
    with pytest.raises(InputError, match="the study has no sizes"):
        read_study(path, "small")


STUDIES = sorted(
    path.name for path in (TOOL.parents[1] / "examples" / "studies").glob("*.yaml") if "demo" not in path.name
)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", ["smoke", "paper"])
def test_studies_of_examples_expand_and_cost_something(name, size, monkeypatch, tmp_path):
    """Without data; the smoke size within what two cores train in minutes, the paper's on a cluster."""
    monkeypatch.chdir(tmp_path)  # where no demo has left its data
    found = expand(read_study(TOOL.parents[1] / "examples" / "studies" / name, size), Path("out"))
    shares, origin = resolve_without_data(found)
    assert origin.startswith("stated: 54.4% image patches")
    flops = sum(run.flops(shares[run.name], own=True) for run in found.runs)
    assert 1e12 < flops < 1e13 if size == "smoke" else 1e21 < flops < 1e23
    if size == "paper":
        ladders = dict(list(found.ladders.items())[:1])
        (cost,) = ladder_costs(type(found)(name="one", ladders=ladders), find_gpu("h100"), 64).values()
        own = sum(run.flops(shares[run.name], own=True) for run in next(iter(ladders.values())))
        one = cost.found.estimate
        assert cost.gpu_hours == pytest.approx(own / (one.mfu_6nd * one.peak_flops) * 64 / 3600, rel=0.02)


def test_dry_run_prints_the_cost_on_a_cluster():
    path = TOOL.parents[1] / "examples" / "studies" / "early_vs_late.yaml"
    command = [sys.executable, str(TOOL), str(path), "--size", "paper", "--out", "out", "--dry-run"]
    done = subprocess.run([*command, "--gpu", "H100", "--gpus", "64", "--price", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total = done.stdout.splitlines()[-1]
    hours, money = (float(word.replace(",", "")) for word in (total.split()[0], total.split()[2]))
    assert money == pytest.approx(2 * hours, rel=0.01) and hours > 100
    for wrong in (["--gpu", "H100"], ["--price", "2"], ["--gpu", "H100", "--gpus", "0"]):
        assert subprocess.run([*command, *wrong], capture_output=True).returncode == 2


def test_each_width_starts_from_weights_of_its_own():
    start = {"start": {"weights": "llm-{width}/hf", "vision_weights": "tower{}"}}
    native = {"model": {"architecture": "early"}}
    found = expand(study(architectures={"native": native, "continual": native | start}, widths=[32, 64]), Path("out"))
    starts = {(run.architecture, run.width): run.config.start for run in found.runs}
    assert {key: (one.weights, one.vision_weights) for key, one in starts.items()} == {
        ("native", 32): (None, None),
        ("native", 64): (None, None),
        ("continual", 32): ("llm-32/hf", "tower{}"),
        ("continual", 64): ("llm-64/hf", "tower{}"),
    }


def test_variants_of_one_architecture_are_told_apart():
    experts = {"model": {"architecture": "early", "experts": {"num": 4}}}
    found = expand(
        study(architectures={"early": {}, "fine": experts, "moe": experts}, tokens=[STEP * 100]), Path("out")
    )
    assert {run.architecture: run.config.variant for run in found.runs} == {n: n for n in ("early", "fine", "moe")}
    assert build(Config, {"model": experts["model"], "train": {"steps": 1}}).variant == "early-moe"


def test_a_sweep_adds_runs_at_other_rates_of_the_cells_that_are_asked_for():
    values = study(widths={32: {"optimizer": {"lr": 3e-3}}, 64: {}}, mixtures={"m": {"a": 1}}, architectures=["early"])
    plain = expand(values, Path("out"))
    found = expand(values | {"sweep": {"lr": [0.5, 2]}}, Path("out"))
    assert found.runs[: len(plain.runs)] == plain.runs
    swept = found.runs[len(plain.runs) :]
    assert [run.name for run in swept] == [f"early-w{w}-m-lr{f}-t12800" for w in ("0032", "0064") for f in ("0.5", "2")]
    own = Config().optimizer.lr
    assert [run.config.optimizer.lr for run in swept] == pytest.approx([1.5e-3, 6e-3, own / 2, own * 2])
    assert [run.config.train.sweep for run in swept] == ["lr 0.5", "lr 2"] * 2
    assert not any(run.config.train.sweep for run in plain.runs)
    some = {"lr": [4], "at": {"widths": [64], "tokens": [100 * STEP, 400 * STEP]}}
    swept = expand(values | {"sweep": some}, Path("out")).runs[len(plain.runs) :]
    assert [run.name.removeprefix("early-w0064-m-lr4-") for run in swept] == ["trunk", "t12800", "t51200"]
    assert {run.config.optimizer.lr for run in swept} == {own * 4} and swept[1].config.train.branch_from


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"lr": [1, 2]}, "sweep.lr: 1 is the grid's own run; leave it out"),
        ({"at": {"widths": [32]}}, "sweep.lr: empty; give factors"),
        ({"lr": [2], "at": {"widths": [48]}}, "sweep.at.widths: 48: not in the study's widths: 32, 64"),
        ({"lr": [2], "at": {"tokens": [7]}}, "sweep.at.tokens: 7: not in the study's tokens: 12800"),
        ({"lr": [2, 2]}, "early-w0032-default-lr2: in the grid or in baselines twice"),
        ({"lr": [0]}, "sweep.lr"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep, message):
    with pytest.raises(InputError) as caught:
        expand(study(sweep=sweep), Path("out"))
    assert message in str(caught.value)


def test_the_grid_says_what_the_sweep_costs():
    found = expand(study(architectures=["early"], tokens=[100 * STEP], sweep={"lr": [0.5, 2, 4]}), Path("out"))
    shares, _ = resolve_without_data(found)
    line = grid_table(found, shares).splitlines()[-1]
    assert line.startswith("6 of them are of the sweep, ") and line.endswith(" FLOPs, 75.0% of all")
