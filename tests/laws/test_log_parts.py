"""Several runs in one log, several logs of one run, and which folders and files are read."""

import csv
import json

import pytest
from megamm_laws.runs.collect import CollectOptions, collect
from megamm_laws.runs.readers.names import key_of_tag
from test_logs import megatron_log, titan_log, write_events
from test_runs import run_dir

from megamm.errors import InputError

PARAMS = CollectOptions(facts={"*": {"params": 1e6}})


def losses(paths, options=None) -> dict[str, float]:
    return {row["run"]: row["loss"] for row in collect(paths, options)[0]}


def append(path, *others) -> None:
    path.write_text(path.read_text() + "".join(other.read_text() for other in others))


def test_two_runs_in_one_torchtitan_file(tmp_path):
    first, second = titan_log(tmp_path / "a.log"), titan_log(tmp_path / "b.log")
    second.write_text(second.read_text().replace("6,139,136", "12,000,000").replace("loss:  4.00000", "loss:  3.50000"))
    append(first, second)
    rows, _ = collect([first])
    assert [(r["run"], r["params"], r["loss"]) for r in rows] == [("a", 6_139_136, 4.0), ("a-2", 12_000_000, 3.5)]


def test_two_runs_in_one_megatron_file(tmp_path):
    """Of two sizes; and of two seeds, both run to the end."""
    first = megatron_log(tmp_path / "a.log", validations={100: 3.2})
    sizes = {"0, 0": 400_000, "1, 0": 400_000}
    append(first, megatron_log(tmp_path / "b.log", arguments={"hidden_size": 128}, ranks=sizes, validations={100: 3.0}))
    rows, _ = collect([first])
    assert [(r["run"], r["params"], r["loss"]) for r in rows] == [("a", 300_000, 3.2), ("a-2", 800_000, 3.0)]
    first = megatron_log(tmp_path / "c.log", validations={100: 3.2}, arguments={"seed": 1})
    append(first, megatron_log(tmp_path / "b.log", validations={100: 3.1}, arguments={"seed": 2}))
    assert losses([first]) == {"c": 3.2, "c-2": 3.1}


def test_an_unlike_run_does_not_finish_one_that_was_stopped(tmp_path):
    """Stopped at 80 of 100; the next one has another learning rate."""
    first = megatron_log(tmp_path / "a.log", steps=80, arguments={"lr": 1e-3})
    append(first, megatron_log(tmp_path / "b.log", arguments={"lr": 3e-4}, validations={100: 3.0}))
    rows, left_out = collect([first])
    assert [r["run"] for r in rows] == ["a-2"] and any("run a: unfinished, step 80" in line for line in left_out)


def test_the_same_log_twice_is_one_run(tmp_path):
    """Every rank may print the steps."""
    first = titan_log(tmp_path / "a.log")
    append(first, first)
    assert losses([first]) == {"a": 4.0}


def test_folders_of_two_models_below_one_root(tmp_path):
    """Named by their time alone, each from its first step on."""
    for start, size, loss in (("20260821-1200", 1e6, 4.0), ("20260821-1830", 2e6, 3.5)):
        scalars = {"train/loss": [(s, loss) for s in range(1, 101)], "tokens": [(s, s * 8.0) for s in range(1, 101)]}
        write_events(tmp_path / "sweep" / start, scalars | {"n_params": [(1, size)]})
    rows, _ = collect([tmp_path])
    assert [(r["run"], r["params"], r["loss"]) for r in rows] == [("sweep", 1e6, 4.0), ("sweep-2", 2e6, 3.5)]


def test_scalars_of_the_newer_form(tmp_path):
    import tensorboard.compat.proto.event_pb2 as event_pb2
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(tmp_path / "a"))
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    for tag, number in (("val/loss", 3.25), ("tokens", 1e6), ("epoch_note", 1.0)):
        value = Summary.Value(tag=tag, metadata=plugin, tensor=make_tensor_proto(number, dtype="float32"))
        writer.add_event(event_pb2.Event(step=7, wall_time=1.0, summary=Summary(value=[value])))
    writer.close()
    (file,) = (tmp_path / "a").iterdir()
    file.write_bytes(file.read_bytes() + b"\x40\0\0\0\0\0\0\0cut")  # by a kill
    (row,) = collect([tmp_path / "a"], PARAMS)[0]
    assert (row["loss"], row["tokens"]) == (3.25, 1e6)


def test_a_folder_is_ours_by_its_content(tmp_path):
    """Another program's config.yaml hides nothing, nor does its result.json."""
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.yaml").write_text("model: llama\n")
    titan_log(tmp_path / "lm" / "small.log")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "result.json").write_text('{"accuracy": 0.5}')
    titan_log(tmp_path / "eval" / "large.log")
    run_dir(tmp_path / "ours", "ours", loss=3.25)
    (tmp_path / "begun").mkdir()
    for file in ("config.yaml", "run.json"):
        (tmp_path / "begun" / file).write_text("{}")
    rows, left_out = collect([tmp_path], CollectOptions(loss="auto", facts={"ours": {"measured_on": "training"}}))
    assert sorted(r["run"] for r in rows) == ["large", "ours", "small"]
    assert f"{tmp_path / 'begun'}: unfinished (config.yaml but no result.json)" in left_out
    assert any("2 files not looked at" in line and "1 .yaml" in line for line in left_out)


def test_logs_of_batch_systems_and_rotated_ones(tmp_path):
    """train.log.1 was written before train.log, which has no head."""
    whole = titan_log(tmp_path / "x").read_text().splitlines(keepends=True)
    (tmp_path / "x").unlink()
    for name, text in (("train.log.1", whole[:12]), ("train.log", whole[12:])):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_text("".join(text))
    for name in ("p/job.err", "q/job.o1234", "r/stdout"):
        (tmp_path / name).parent.mkdir()
        titan_log(tmp_path / name)
    rows, _ = collect([tmp_path])
    assert sorted(r["run"] for r in rows) == ["old", "p", "q", "r"]
    assert {(r["params"], r["tokens"], r["loss"]) for r in rows} == {(6_139_136, 100 * 64 * 2048, 4.0)}


def test_each_file_is_read_or_named(tmp_path):
    titan_log(tmp_path / "a.log")
    (tmp_path / "empty.out").write_text("")
    (tmp_path / "damaged.jsonl").write_text('{"_step": 0}\n{"_st')
    (tmp_path / "model.pt").write_bytes(b"\0")
    (tmp_path / "nan").mkdir()
    run_dir(tmp_path / "nan" / "b", "b", loss=float("nan"))
    rows, left_out = collect([tmp_path])
    assert [r["run"] for r in rows] == ["a"]
    for expected in ("empty.out: empty", "damaged.jsonl: line 2: not JSON", "result.json: diverged: column loss: nan"):
        assert any(expected in line for line in left_out)
    assert any("1 files not looked at" in line and "model.pt" in line for line in left_out)
    with pytest.raises(InputError, match=r"empty\.out: empty; give run directories"):
        collect([tmp_path / "empty.out"])


def test_wandb_runs_are_told_apart_by_id(tmp_path):
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        rows = [["Name", "ID", "State", "val/loss", "tokens", "params"]]
        rows += [["x", "a1", "finished", 3.5, 1e7, 1e6], ["x", "b2", "finished", 3.4, 2e7, 1e6]]
        csv.writer(file).writerows(rows)
    again = {"name": "x", "id": "a1", "state": "finished", "config": {"params": 1e6}}
    (tmp_path / "again.jsonl").write_text(json.dumps(again | {"summary": {"val/loss": 3.5, "tokens": 1e7}}) + "\n")
    assert losses([path, tmp_path / "again.jsonl"]) == {"x-a1": 3.5, "x-b2": 3.4}
    lines = [
        {"run_id": run, "_step": step, "val/loss": loss, "tokens": step * 10.0, "params": 1e6}
        for run, loss in (("a", 3.0), ("b", 2.0))
        for step in (50, 100)
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert losses([tmp_path / "history.jsonl"]) == {"a": 3.0, "b": 2.0}
    (tmp_path / "chart.csv").write_text("Step,x - val/loss,x - val/loss\n1,3,4\n")
    with pytest.raises(InputError, match="column x - val/loss appears twice: two runs of one name"):
        collect([tmp_path / "chart.csv"])


def test_a_history_that_begins_anew_is_another_run(tmp_path):
    lines = [{"_step": s, "val/loss": v, "tokens": s * 10.0} for v in (3.0, 2.0) for s in (0, 50, 100)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert losses([tmp_path / "h.jsonl"], PARAMS) == {"h": 3.0, "h-2": 2.0}


@pytest.mark.parametrize(
    ("tag", "key"),
    [
        ("train.loss", "train_loss"),
        ("val.loss", "loss"),
        ("eval.c4_en.loss", "loss_c4_en"),
        ("model.num_params", "params"),
    ],
)
def test_names_parted_by_dots(tag, key):
    assert key_of_tag(tag) == key


def test_unlike_validation_sets_do_not_enter_one_table(tmp_path):
    prints = {"text": {"tokenizer": "t", "preprocessing": "p", "train": "x", "val": "v1"}}
    run_dir(tmp_path / "a", "a", fingerprints=prints)
    run_dir(tmp_path / "b", "b", fingerprints={"text": prints["text"] | {"train": "y"}})
    assert len({row["validation_set"] for row in collect([tmp_path])[0]}) == 1
    run_dir(tmp_path / "c", "c", fingerprints={"text": prints["text"] | {"val": "v2"}})
    with pytest.raises(InputError, match=r"run c: column validation_set: source text is .*unlike.*--allow"):
        collect([tmp_path])
    assert len(collect([tmp_path], CollectOptions(allow_unlike=True))[0]) == 3
