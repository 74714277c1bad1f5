"""Checkpoints: what is damaged is found and passed over, and nothing that is needed is ever deleted."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from run_factory import flip_bit, make_sources, run_until, trainer

from megamm.errors import InputError, RunError
from megamm.training import checkpoint
from megamm.training.tensor_files import load_tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run with checkpoints at 5, 10 and 12; tests work on copies."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer(data, folder, **{"checkpoint.keep": 3}).run()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that run, without its result, so that it goes on."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    return folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def go_on(data: Path, folder: Path, **overrides) -> int:
    """Resume and end the run; returns the step at which it began."""
    again = trainer(data, folder, **{"checkpoint.keep": 3, **overrides})
    begin, steps = again._begin, []
    again._begin = lambda: begin() or steps.append(again.step)
    again.run()
    return steps[0]


DAMAGES = {
    "flipped bit of tensors": lambda p: flip_bit(p / "__0_0.distcp"),
    "flipped bit of the index": lambda p: flip_bit(p / ".metadata"),
    "cut tensors": lambda p: os.truncate(p / "__0_0.distcp", 1000),
    "missing tensors": lambda p: (p / "__0_0.distcp").unlink(),
    "changed state": lambda p: (p / "state.json").write_text('{"step": 11}'),
    "missing manifest": lambda p: (p / "manifest.json").unlink(),
    "empty manifest": lambda p: (p / "manifest.json").write_text(""),
    "another manifest": lambda p: (p / "manifest.json").write_text('{"files": {"a": 1}}'),
    "empty folder": lambda p: [file.unlink() for file in p.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_one_before_a_damaged_one_is_used(data, run, finished, damage, capfd):
    damage(run / "checkpoints" / "step-00000012")
    assert go_on(data, run) == 10
    told = capfd.readouterr().err
    assert "step-00000012: " in told and "going on from step-00000010" in told and "Traceback" not in told
    assert result(run) == result(finished)
    assert "aside-step-00000012-1" in names(run)


POINTERS = {"missing": None, "empty": "", "half": "step-0000", "garbage": b"\xff\xfe", "elsewhere": "../../run/x"}


@pytest.mark.parametrize("text", POINTERS.values(), ids=POINTERS)
def test_the_newest_whole_one_is_used_where_latest_is_of_no_use(data, run, text, capfd):
    pointer = run / "checkpoints" / "latest"
    pointer.unlink()
    if text is not None:
        pointer.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert go_on(data, run) == 12
    assert "latest: it" in capfd.readouterr().err
    assert pointer.read_text() == "step-00000012\n"


def test_latest_that_names_a_deleted_folder_is_told_of(data, run, capfd):
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert go_on(data, run) == 10
    assert "it names step-00000012, which is missing" in capfd.readouterr().err


def test_where_none_is_whole_nothing_is_trained(data, run):
    for folder in (run / "checkpoints").glob("step-*"):
        flip_bit(folder / "__0_0.distcp")
    with pytest.raises(InputError, match=r"no checkpoint is whole \(step-00000012: __0_0.distcp is damaged.*put back"):
        trainer(data, run).run()
    assert names(run) == ["latest", "step-00000005", "step-00000010", "step-00000012"]


def test_a_rewound_run_never_takes_up_what_came_later(data, run, finished):
    flip_bit(run / "checkpoints" / "step-00000010" / "__0_0.distcp")
    (run / "checkpoints" / "latest").write_text("step-00000005\n")
    run_until(trainer(data, run, **{"checkpoint.keep": 1, "checkpoint.every": 2}), 7)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert names(run) == ["aside-step-00000010-1", "aside-step-00000012-1", "latest", "step-00000006"]
    assert go_on(data, run) == 6
    assert result(run) == result(finished)


def test_a_step_is_written_anew_over_what_is_there(data, run):
    """A run that starts over meets the folders of its former life."""
    for name in ("step-00000005", "step-00000010"):
        shutil.rmtree(run / "checkpoints" / name)
    flip_bit(run / "checkpoints" / "step-00000012" / "__0_0.distcp")
    os.rename(run / "checkpoints" / "step-00000012", run / "checkpoints" / "aside-step-00000012-1")
    (run / "checkpoints" / "latest").unlink()
    assert go_on(data, run) == 0
    assert names(run)[:2] == ["aside-step-00000012-1", "latest"]
    assert go_on_after_removing_the_result(data, run) == 12


def go_on_after_removing_the_result(data: Path, run: Path) -> int:
    (run / "result.json").unlink()
    return go_on(data, run)


def test_old_ones_are_deleted_but_never_what_latest_names(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4, 5):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    (folder / "latest").write_text("step-00000002\n")
    checkpoint.remove_old(tmp_path, 2, {1})
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002", "step-00000005"]
    checkpoint.remove_old(tmp_path, 9, set())
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002", "step-00000005"]


@pytest.mark.parametrize("saves_again", [True, False])
def test_what_a_kill_left_half_deleted_goes(data, run, saves_again):
    """Also where the run was killed after its last save, and makes no other."""
    begun = 10 if saves_again else 12
    if saves_again:
        checkpoint.set_aside(run / "checkpoints" / "step-00000012")
        (run / "checkpoints" / "latest").write_text("step-00000010\n")
    shutil.copytree(run / "checkpoints" / "step-00000005", run / "checkpoints" / "step-00000004.partial")
    assert go_on(data, run) == begun
    assert not [name for name in names(run) if name.endswith(".partial")]


def test_a_full_disk_is_one_line_and_leaves_the_earlier_ones(data, run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = trainer(data, run, **{"checkpoint.keep": 3, "train.steps": 12})
    (run / "checkpoints" / "latest").write_text("step-00000010\n")
    begin = again._begin
    again._begin = lambda: begin() or resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"step-00000012: checkpoint not written .*too large") as error:
            again.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert names(run) == ["aside-step-00000012-1", "latest", "step-00000005", "step-00000010"]
    assert go_on(data, run) == 10


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def test_a_hostile_index_runs_nothing(data, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run / "checkpoints" / "step-00000012"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    entry = {"size": (folder / ".metadata").stat().st_size, "sha256": checkpoint._sha256(folder / ".metadata")}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][".metadata"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"step-00000012.*asks for (posix|nt)\.system, .*refused"):
        trainer(data, run).run()
    assert not (tmp_path / "hostile").exists()


def test_a_pickle_in_place_of_a_tensor_is_refused(tmp_path, monkeypatch):
    """DCP would load it without asking."""
    import torch.distributed.checkpoint as dcp

    from megamm.parallel.mesh import World

    monkeypatch.chdir(tmp_path)
    dcp.save({"weight": Hostile()}, checkpoint_id=tmp_path / "x", no_dist=True)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    with pytest.raises(InputError, match="weight is a pickle, not a tensor; refused"):
        load_tensors(tmp_path / "x", {"weight": torch.zeros(3)}, world)
    assert not (tmp_path / "hostile").exists()


def test_another_model_is_told_from_a_damaged_one(data, run):
    again = trainer(data, run, **{"model.width": 24})
    path = run / "checkpoints" / "step-00000012"
    with pytest.raises(InputError, match=r"step-00000012: cannot be loaded .*(mismatch|size).*is it of this"):
        checkpoint.load(path, again.model, again.optimizer, again.world)


def test_everything_that_training_changes_comes_back(data, run):
    again, path = trainer(data, run), run / "checkpoints" / "step-00000010"
    torch.rand(3)
    state = checkpoint.load(path, again.model, again.optimizer, again.world)
    assert state["step"] == 10 and state["next_row"] == 80 and state["totals"]["tokens"] > 0
    generator = torch.get_rng_state()
    torch.rand(3)
    checkpoint.load(path, again.model, again.optimizer, again.world)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(int(s["step"]) == 10 for s in again.optimizer.state.values())


def test_interrupting_a_run_while_it_saves_keeps_the_checkpoint(data, tmp_path):
    """Saving goes on in its thread and ends before the process does."""
    run = trainer(data, tmp_path / "run")
    save = run._save

    def interrupted() -> None:
        save()
        raise KeyboardInterrupt

    run._save = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert names(tmp_path / "run") == ["latest", "step-00000005"]
    assert go_on(data, tmp_path / "run") == 5
