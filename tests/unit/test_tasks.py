"""Scores during training: those of the tool on the saved checkpoint; the training itself is not changed by them."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from run_factory import run_until, trainer
from task_factory import make_choices, make_words, prompts, write_lines

from megamm.commands import generate as tool
from megamm.config import load
from megamm.errors import InputError
from megamm.study.ladders import expand
from megamm.train import refusal
from megamm.training.metrics import read_metrics

SHORT = 4
TIMES = ("tokens_per_second", "flops_per_second", "loader_wait", "mfu")
STEPS = {"train.steps": 8, "train.log_every": 1, "eval.rows": 2, "eval.every": 4, "checkpoint.every": 4}


def ask(checkpoint: Path, jsonl: Path, *options: object) -> tuple[list[str], str]:
    """Answers and stderr of the tool, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["generate.py", str(checkpoint), "--jsonl", str(jsonl), "--max-new-tokens", str(SHORT)]
    sys.argv += map(str, options)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            tool.main()
    finally:
        sys.argv = before
    return [json.loads(line)["generated"] for line in out.getvalue().splitlines()], err.getvalue()


def lines_of(run_dir: Path, tasks: bool = True) -> list[dict]:
    """The log without what depends on the clock, and with or without scores."""
    return [
        {key: value for key, value in record.items() if key not in TIMES and (tasks or not key.startswith("task/"))}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run without tasks, and tasks whose right answers are in part those that it gives at its end."""
    folder = make_words(tmp_path_factory.mktemp("tasks"))
    trainer(folder, folder / "plain", **STEPS).run()
    answers, _ = ask(folder / "plain", prompts(folder))
    records = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    right = [text if n % 3 else "something else" for n, text in enumerate(answers)]
    pairs = [record | {"answer": answer} for record, answer in zip(records, right, strict=True)]
    write_lines(folder / "answers.jsonl", pairs)
    make_choices(folder)
    return folder


def tasks(folder: Path, **changes) -> dict:
    kinds = {"choice": "choices", "vqa": "answers", "caption": "answers"}
    named = {
        f"my-{kind}": {"path": f"{folder}/{file}.jsonl", "kind": kind, "max_new_tokens": SHORT}
        for kind, file in kinds.items()
    }
    return STEPS | {"eval.tasks": json.dumps(named)} | changes


@pytest.fixture(scope="module")
def unbroken(folder) -> dict:
    return trainer(folder, folder / "scored", **tasks(folder)).run()


def test_scores_are_those_of_the_tool_and_change_nothing_else(folder, unbroken):
    assert lines_of(folder / "scored", tasks=False) == lines_of(folder / "plain")
    logged = {
        record["step"]: record
        for record in read_metrics(folder / "scored" / "metrics.jsonl")
        if "val/text/loss" in record
    }
    assert sorted(logged) == [4, 8]
    for kind, file in (("choice", "choices"), ("vqa", "answers"), ("caption", "answers")):
        for step, record in logged.items():
            checkpoint = folder / "scored" / "checkpoints" / f"step-{step:08d}"
            _, said = ask(checkpoint, folder / f"{file}.jsonl", "--task", kind)
            assert f"{kind}: {record[f'task/my-{kind}']:.4f} over 12 prompts" in said
        assert unbroken["tasks"][f"my-{kind}"] == logged[8][f"task/my-{kind}"]
    # Neither all nor nothing, so that a mistake would show.
    assert 0 < unbroken["tasks"]["my-choice"] < 1 and unbroken["tasks"]["my-caption"] > 0
    assert unbroken["tasks"]["my-vqa"] == pytest.approx(8 / 12)


def test_a_resumed_run_has_the_scores_of_an_unbroken_one(folder, unbroken, tmp_path):
    run_until(trainer(folder, tmp_path, **tasks(folder)), 6)
    result = trainer(folder, tmp_path, **tasks(folder)).run()
    assert result["tasks"] == unbroken["tasks"]
    assert lines_of(tmp_path) == lines_of(folder / "scored")


def test_a_branch_may_have_other_tasks_than_its_trunk(folder, tmp_path):
    constant = {"schedule.cooldown": "none", "checkpoint.steps": [6]}
    trainer(folder, tmp_path / "trunk", **STEPS, **constant).run()
    branch = {"train.branch_from": tmp_path / "trunk", "schedule.cooldown_fraction": 0.25}
    result = trainer(folder, tmp_path / "branch", **tasks(folder), **branch).run()
    assert set(result["tasks"]) == {"my-choice", "my-vqa", "my-caption"}


def test_only_the_branches_of_a_study_are_scored(tmp_path):
    base = {
        "data": {"row_length": 64, "window_tokens": 2000},
        "train": {"batch_rows": 4},
        "schedule": {"warmup_steps": 1},
        "eval": {"tasks": {"words": {"path": "words.jsonl", "kind": "vqa"}}},
    }
    values = {"name": "s", "base": base, "architectures": ["early"], "widths": [16], "tokens": [10_000, 20_000]}
    trunk, *branches = expand(values, tmp_path).runs
    assert trunk.trunk and not trunk.config.eval.tasks
    assert [list(run.config.eval.tasks) for run in branches] == [["words"]] * 2


def settings(folder: Path, run_dir: Path, task: dict) -> list[str]:
    return [
        f"--data={{row_length: 64, window_tokens: 2000, workers: 0, sources: {{text: {{path: {folder}/text}}}}}}",
        "--model={width: 16, depth: 1, head_dim: 8}",
        f"--train={{steps: 2, batch_rows: 4, device: cpu, run_dir: {run_dir}}}",
        f"--eval.tasks.words={json.dumps({'kind': 'vqa', **task})}",
    ]


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        (None, "vqa", r"eval\.tasks\.words\.path: .*task\.jsonl: cannot be read"),
        ([{"prompt": "a"}], "vqa", r"eval\.tasks\.words\.path: .*task\.jsonl:1: answer: expected text"),
        ([{"prompt": "a", "choices": ["b", "c"], "answer": 2}], "choice", r"task\.jsonl:1: answer: expected one of"),
        ([{"prompt": "", "image": "no.png", "answer": "b"}], "vqa", r"task\.jsonl:1: .*no\.png does not exist"),
    ],
)
def test_what_is_missing_refuses_the_run(folder, tmp_path, lines, kind, message):
    """As torchrun's ranks ask before they join; and in Python."""
    if lines is not None:
        write_lines(tmp_path / "task.jsonl", lines)
    options = settings(folder, tmp_path / "run", {"path": str(tmp_path / "task.jsonl"), "kind": kind})
    reason = refusal(load(None, options), 1)
    assert reason and re.search(message, reason) and "\n" not in reason
    with pytest.raises(InputError, match=message):
        trainer(
            folder,
            tmp_path / "run",
            **{"eval.tasks.words": json.dumps({"path": str(tmp_path / "task.jsonl"), "kind": kind})},
        )
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_missing_or_another_one_refuses_the_run(folder, tmp_path):
    shutil.copytree(folder / "text", tmp_path / "text")
    options = settings(tmp_path, tmp_path / "run", {"path": f"{folder}/answers.jsonl"})
    assert refusal(load(None, options), 1) is None
    (tmp_path / "text" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert "tokenizer.json is not that of the prepared data" in refusal(load(None, options), 1)
    (tmp_path / "text" / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in refusal(load(None, options), 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "red " * 80, "answer": "b"}, r"task\.jsonl:1: \d+ positions leave no room in the rows of 64"),
        ({"prompt": "", "image": "bad.png", "answer": "b"}, r"eval\.tasks\.words\.path: .*task\.jsonl:1: .*bad\.png"),
    ],
)
def test_prompts_that_cannot_be_made_end_the_run_before_its_first_step(folder, tmp_path, line, message):
    (tmp_path / "bad.png").write_bytes(b"no image")
    task = {"path": str(write_lines(tmp_path / "task.jsonl", [line])), "kind": "vqa"}
    run = trainer(folder, tmp_path / "run", **{"eval.tasks.words": json.dumps(task)})
    with pytest.raises(InputError, match=message):
        run.run()
    assert run.step == 0 and not (tmp_path / "run" / "metrics.jsonl").read_text()
