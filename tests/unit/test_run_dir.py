"""What a run directory holds to: settings, data, its trunk; and how a run is lengthened."""

import json
import shutil
from pathlib import Path

import pytest
from dataset_factory import make_dataset
from run_factory import make_sources, run_until, trainer

from megamm.errors import InputError, RunError
from megamm.training import run_dir
from megamm.training.metrics import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trunk(data, tmp_path_factory) -> Path:
    """A trunk of 12 steps with branch points at 4 and 8."""
    folder = tmp_path_factory.mktemp("trunk") / "trunk"
    trainer(data, folder, **TRUNK).run()
    return folder


CONSTANT = {"schedule.cooldown": "none"}
TRUNK = CONSTANT | {"checkpoint.every": 0, "checkpoint.steps": "[4, 8]"}
BRANCH = {"train.steps": 10}  # cools down from step 8
COOLED = {"schedule.cooldown": "linear", "schedule.cooldown_fraction": 0.5}


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def compare(folder: Path, other: Path) -> None:
    """Both runs ended with the same numbers."""
    results = [json.loads((f / "result.json").read_text()) for f in (folder, other)]
    for result in results:
        del result["name"], result["branch_from"]
    assert results[0] == results[1]
    assert losses(folder) == losses(other)


# ---- data ------------------------------------------------------------------------------------------------


def test_run_and_result_hold_fingerprints_of_the_data(data, trunk):
    recorded = json.loads((trunk / "run.json").read_text())["fingerprints"]
    assert recorded == json.loads((trunk / "result.json").read_text())["fingerprints"]
    assert set(recorded) == {"caption", "text"}
    assert set(recorded["text"]) == {"tokenizer", "preprocessing", "train", "val"}
    assert recorded["text"]["train"] != recorded["caption"]["train"]


def claim_other(path: Path, part: str) -> None:
    """Let dataset.json say that a part of the content is another one."""
    info = json.loads((path / "dataset.json").read_text())
    found = info["fingerprints"]
    (found["splits"] if part in found["splits"] else found)[part] = "1" * 64
    info["tokenizer_sha256"] = found["tokenizer"]
    (path / "dataset.json").write_text(json.dumps(info))


CHANGES = {
    "training split": lambda p: make_dataset(p / "text", kind="text", num_documents=120, seed=7),
    "validation split": lambda p: claim_other(p / "caption", "val"),
    "preparation of images": lambda p: claim_other(p / "caption", "preprocessing"),
    "tokenizer": lambda p: [claim_other(p / kind, "tokenizer") for kind in ("caption", "text")],
}


@pytest.mark.parametrize(("part", "change"), CHANGES.items(), ids=CHANGES)
def test_a_run_whose_data_changed_does_not_go_on(data, tmp_path, part, change):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    run_until(trainer(copy, tmp_path / "run"), 7)
    change(copy)
    with pytest.raises(InputError, match=rf"run\.json: .*other data \(data\.sources\..*: another {part} \(.* -> .*\)"):
        trainer(copy, tmp_path / "run").run()


def test_data_may_be_moved(data, tmp_path):
    shutil.copytree(data, tmp_path / "there")
    run_until(trainer(data, tmp_path / "run"), 7)
    trainer(tmp_path / "there", tmp_path / "run").run()
    trainer(data, tmp_path / "unbroken").run()
    compare(tmp_path / "run", tmp_path / "unbroken")


def test_the_order_of_sources_is_a_setting(data, tmp_path):
    run_until(trainer(data, tmp_path / "run"), 7)
    swapped = f"{{text: {{path: {data}/text}}, caption: {{path: {data}/caption}}}}"
    with pytest.raises(InputError, match=r"data\.sources: caption, text -> text, caption"):
        trainer(data, tmp_path / "run", **{"data.sources": swapped}).run()


# ---- what a start leaves ---------------------------------------------------------------------------------


def test_a_failed_start_does_not_block_the_mended_config(data, tmp_path):
    run = trainer(data, tmp_path / "run", **{"optimizer.lr": 0.5})
    run._loop = lambda log: (_ for _ in ()).throw(RunError("out of memory"))
    with pytest.raises(RunError):
        run.run()
    assert (tmp_path / "run" / "config.yaml").exists()
    trainer(data, tmp_path / "run").run()
    assert "lr: 0.003" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_begun_run_is_not_started_over_with_other_settings(data, tmp_path):
    run_until(trainer(data, tmp_path / "run"), 7)
    with pytest.raises(InputError, match=r"data\.augment\.flip: False -> True; train\.steps: 12 -> 9"):
        trainer(data, tmp_path / "run", **{"data.augment.flip": True, "train.steps": 9}).run()
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml: missing"):
        trainer(data, tmp_path / "run").run()


def test_starting_over_without_a_checkpoint_is_told(data, tmp_path, capfd):
    run_until(trainer(data, tmp_path / "run", **{"train.log_every": 1}), 3)
    capfd.readouterr()
    trainer(data, tmp_path / "run").run()
    assert "no checkpoint was written before the run ended; it starts again at step 0" in capfd.readouterr().err


def test_garbage_in_the_log_is_left_out_and_counted(data, tmp_path, capfd):
    run_until(trainer(data, tmp_path / "run", **{"train.log_every": 1}), 7)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"\x00\xff\n", b'{"loss": 1}\n', b"[]\n", *lines[2:], b'{"step": 8, "lo']))
    trainer(data, tmp_path / "run", **{"train.log_every": 1}).run()
    assert f"{log}: 3 of 10 lines were not records of a step and are left out" in capfd.readouterr().err
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


def test_a_result_that_is_none_is_named(data, tmp_path):
    trainer(data, tmp_path / "run").run()
    (tmp_path / "run" / "result.json").write_text("[]")
    with pytest.raises(InputError, match=r"result\.json: not the result of a run .*; delete it"):
        trainer(data, tmp_path / "run").run()


# ---- lengthening -----------------------------------------------------------------------------------------


def test_a_finished_constant_run_goes_on(data, tmp_path):
    trainer(data, tmp_path / "run", **CONSTANT).run()
    trainer(data, tmp_path / "run", **CONSTANT, **{"train.steps": 16}).run()
    trainer(data, tmp_path / "whole", **CONSTANT, **{"train.steps": 16}).run()
    compare(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "result-00000012.json").read_text())["steps"] == 12
    assert trainer(data, tmp_path / "run", **CONSTANT, **{"train.steps": 16}).run()["steps"] == 16


def test_a_cooled_run_goes_on_from_where_its_cool_down_began(data, tmp_path):
    options = COOLED | {"checkpoint.every": 3, "checkpoint.keep": 9}
    trainer(data, tmp_path / "run", **options).run()
    trainer(data, tmp_path / "run", **options, **{"train.steps": 20}).run()
    trainer(data, tmp_path / "whole", **options, **{"train.steps": 20}).run()
    compare(tmp_path / "run", tmp_path / "whole")
    kept = read_metrics(tmp_path / "run" / "metrics-00000012.jsonl")
    assert [r["step"] for r in kept] == [4, 8, 12, 12]
    assert (tmp_path / "run" / "checkpoints" / "aside-step-00000009-1").exists()


def test_a_cooled_run_without_that_checkpoint_says_how(data, tmp_path):
    trainer(data, tmp_path / "run", **COOLED).run()
    with pytest.raises(InputError, match=r"began at step 6, .*new train\.run_dir; with checkpoint\.steps \[10\]"):
        trainer(data, tmp_path / "run", **COOLED, **{"train.steps": 20}).run()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12


# ---- branches --------------------------------------------------------------------------------------------


def test_a_branch_equals_a_run_from_the_start(data, trunk, tmp_path):
    trainer(data, tmp_path / "branch", **BRANCH, **{"train.branch_from": trunk}).run()
    trainer(data, tmp_path / "whole", **BRANCH).run()
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("branch", "whole")]
    assert results[0]["losses"] == results[1]["losses"] and results[0]["tokens"] == results[1]["tokens"]


def test_a_branch_may_differ_in_cool_down_length_evaluation_and_place(data, trunk, tmp_path):
    options = BRANCH | COOLED | {"eval.rows": 3, "train.branch_from": trunk, "train.micro_rows": 2}
    assert trainer(data, tmp_path / "branch", **options).run()["steps"] == 10


OTHERS = {
    "data.seed": (3, r"data\.seed: 0 -> 3"),
    "train.seed": (3, r"train\.seed: 0 -> 3"),
    "optimizer.weight_decay": (0.1, r"optimizer\.weight_decay: 0\.0001 -> 0\.1"),
    "schedule.warmup_steps": (2, r"schedule\.warmup_steps: 3 -> 2"),
    "data.window_tokens": (3000, r"data\.window_tokens"),
    "model.rope_theta": (5.0, r"model\.rope_theta"),
    "train.dtype": ("bfloat16", r"train\.dtype"),
}


@pytest.mark.parametrize(("name", "change"), OTHERS.items(), ids=OTHERS)
def test_a_branch_of_other_settings_is_refused(data, trunk, tmp_path, name, change):
    value, said = change
    with pytest.raises(InputError, match=rf"train\.branch_from: .*is not the trunk of this run \({said}"):
        trainer(data, tmp_path / "branch", **BRANCH, **{"train.branch_from": trunk, name: value}).run()
    assert not (tmp_path / "branch" / "config.yaml").exists()


def test_a_branch_on_other_data_is_refused(data, trunk, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    claim_other(copy / "text", "train")
    with pytest.raises(InputError, match=r"not the trunk of this run \(data\.sources\.text: another training split"):
        trainer(copy, tmp_path / "branch", **BRANCH, **{"train.branch_from": trunk}).run()


def test_a_branch_leaves_its_trunk_before_that_cools_down(data, tmp_path):
    trainer(data, tmp_path / "cooled", **COOLED, **{"checkpoint.every": 2, "checkpoint.keep": 9}).run()
    options = BRANCH | {"train.branch_from": tmp_path / "cooled"}
    with pytest.raises(InputError, match="it cools down from step 6, before the branch leaves it at step 8"):
        trainer(data, tmp_path / "branch", **options).run()


def test_what_was_never_a_run_is_no_trunk(data, tmp_path):
    with pytest.raises(InputError, match=r"train\.branch_from: .*holds no run"):
        trainer(data, tmp_path / "branch", **BRANCH, **{"train.branch_from": tmp_path}).run()


def test_a_token_that_is_not_seen_names_the_setting(tmp_path):
    with (
        run_dir.lock(tmp_path / "here"),
        pytest.raises(InputError, match=r"train\.run_dir: .*there of rank 3 .* absolute path on a disk that all nodes"),
    ):
        run_dir._find_token(tmp_path / "there", "token", rank=3, patience=0.1)


def test_a_run_killed_after_its_last_validation_logs_it_once(data, tmp_path):
    trainer(data, tmp_path / "run").run()
    log, result = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "result.json"
    lines = log.read_text()
    assert "val/caption/loss" in lines.splitlines()[-1]
    before = result.read_text()
    result.unlink()
    trainer(data, tmp_path / "run").run()
    assert (log.read_text(), result.read_text()) == (lines, before)
