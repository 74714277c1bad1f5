"""Scores in training do not depend on ranks: each gathers the whole model, in every layout, and answers its share."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from run_factory import trainer
from task_factory import make_choices, make_words, prompts, write_lines

from megamm.generation.answers import Answerer
from megamm.generation.questions import answer, read_questions
from megamm.parallel.whole import gather_model

SHORT = 4
LATE = {"model.architecture": "late", "model.depth": 2, "model.width": 32}
EXPERTS = {"model.experts": "{num: 4, hidden: 8, bias_rate: 0.01}", "model.depth": 2}
LAYOUTS = {
    "late": [{"dp_shard": 2}, {"tensor": 2}, {"pipeline": 2, "micro_batches": 2}],
    "experts": [{"expert": 2}],
}
MODELS = {"late": LATE, "experts": EXPERTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_words(tmp_path_factory.mktemp("tasks"))
    make_choices(folder)
    return folder


def make_run(folder: Path, run_dir: Path, name: str, layout: dict):
    """A run whose right answers are those of the model as it is drawn, each to its own prompt."""
    kinds = {"choice": "choices", "vqa": f"answers-{name}", "caption": f"answers-{name}"}
    tasks = {
        kind: {"path": f"{folder}/{file}.jsonl", "kind": kind, "max_new_tokens": SHORT, "batch_size": 3}
        for kind, file in kinds.items()
    }
    settings = MODELS[name] | {f"parallel.{axis}": size for axis, size in layout.items()}
    length = {"train.steps": 2, "eval.every": 1, "eval.rows": 2, "checkpoint.every": 0, "checkpoint.final": "false"}
    return trainer(folder, run_dir, **settings, **length, **{"eval.tasks": json.dumps(tasks)})


def train(folder: Path, run_dir: Path, name: str, layout: dict) -> tuple[dict, dict, dict]:
    """Scores of the model as it is drawn, and after two steps; its parameters then."""
    run = make_run(folder, run_dir, name, layout)
    first = run.score_tasks()
    last = run.run()["tasks"]
    whole = gather_model(run.model, run.config.model, run.world)
    return first, last, {key: value.clone() for key, value in whole.state_dict().items()}


def write_answers(folder: Path, run_dir: Path, name: str) -> None:
    path, answers = prompts(folder), folder / f"answers-{name}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(answers, [record | {"answer": "none yet"} for record in records])
    run = make_run(folder, run_dir, name, {})
    task = run.tasks["vqa"]
    given = answer(Answerer(run.model.eval(), task.maker, task.options), read_questions(path))
    assert len(set(given)) > 3  # so that answers at wrong places would show
    write_lines(answers, [record | {"answer": text} for record, text in zip(records, given, strict=True)])


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_changes_the_scores(folder, tmp_path, name):
    write_answers(folder, tmp_path / "drawn", name)
    first, last, values = train(folder, tmp_path / "alone", name, {})
    assert first["vqa"] == 1 and first["caption"] > 1 and 0 < first["choice"] < 1
    for layout in LAYOUTS[name]:
        found = run_ranks(train, 2, folder, tmp_path / "-".join(layout), name, layout)
        for one_first, one_last, one_values in found:
            assert one_first == first and one_last == pytest.approx(last, abs=1e-6), layout
            assert one_values.keys() == values.keys()
            for key, value in values.items():
                torch.testing.assert_close(one_values[key], value, rtol=1e-4, atol=1e-5, msg=f"{layout} {key}")
