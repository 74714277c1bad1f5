"""Readers of foreign logs, on small samples written in the formats of the programs that print them."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megamm_laws.runs.collect import CollectOptions, collect
from megamm_laws.runs.readers.curve import Curve, curve_rows
from megamm_laws.runs.readers.names import key_of_tag

from megamm.errors import InputError

# ---------------------------------------------------------------------------------------------- Megatron-LM

ARGUMENTS = {
    "global_batch_size": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 256,
    "num_layers": 4,
    "seq_length": 128,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "untie_embeddings_and_output_weights": True,
    "train_iters": 100,
    "add_bias_linear": False,
    "swiglu": True,
    "rampup_batch_size": None,
    "world_size": 16,
}


def megatron_log(
    path: Path,
    steps: int = 100,
    *,
    arguments: dict | None = None,
    ranks: dict[str, int] | None = None,
    validations: dict[int, float] | None = None,
    suffix: str = "",
    loss=lambda step: 4.0 + 100 / (step + 10),
) -> Path:
    """What ``pretrain_gpt.py`` prints, as training.py formats it."""
    arguments = ARGUMENTS | (arguments or {})
    lines = ["------------------------ arguments ------------------------"]
    lines += [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in sorted(arguments.items())]
    lines += ["-------------------- end of arguments ---------------------"]
    lines += [" > padded vocab (size: 500) with 12 dummy tokens (new size: 512)"]
    for rank, count in (ranks or {"0, 0": 150_000, "1, 0": 150_000}).items():
        lines.append(f" > number of parameters on (tensor, pipeline) model parallel rank ({rank}): {count}")
    for step in range(10, steps + 1, 10):
        rate = 3e-4 * (1 - step / 110)
        lines.append(
            f" [2026-08-22 15:22:{step % 60:02d}.000000] iteration {step:8d}/{100:8d} |"
            f" consumed samples: {step * 8:12d} |"
            f" elapsed time per iteration (ms): 812.3 | throughput per GPU (TFLOP/s/GPU): 310.2 |"
            f" learning rate: {rate:.6E} | global batch size: {8:5d} | lm loss: {loss(step):.6E} | loss scale: 1.0 |"
            f" grad norm: 0.811 | number of skipped iterations: {0:3d} | number of nan iterations: {0:3d} |"
        )
        if step in (validations or {}):
            value = validations[step]
            at = f"iteration {step} on validation set" if step == 100 else f"iteration {step}"
            lines += ["-" * 90]
            lines += [f" validation{suffix} loss at {at} | lm loss value: {value:.6E} | lm loss PPL: 2.0E+01 | "]
            lines += [f" validation loss at {at.split(' on')[0]} on test set | lm loss value: 9.0E+00 | "]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_megatron_counts_tokens_params_and_takes_the_last_validation(tmp_path):
    log = megatron_log(tmp_path / "gpt-a.log", validations={50: 3.4, 100: 3.2})
    rows, left_out = collect([log])
    (row,) = rows
    assert row["run"] == "gpt-a" and row["loss"] == 3.2 and row["tokens"] == 100 * 8 * 128
    assert row["params"] == 300_000 and row["params_embedding"] == 2 * 512 * 64 and row["params_head"] == 512 * 64
    assert row["flops"] == 6 * 300_000 * 100 * 8 * 128 and row["flops_convention"] == "paper"
    assert row["flops_exact"] == pytest.approx(310.2e12 * 16 * 0.8123 * 100)  # TFLOP/s/GPU, GPUs, seconds, steps
    assert row["cooled"] is True and row["checkpoint"] == "final" and row["measured_on"] == "validation"
    assert any("1 intermediate checkpoints" in line for line in left_out)


def test_megatron_intermediate_checkpoints_are_marked(tmp_path):
    log = megatron_log(tmp_path / "a.log", validations={50: 3.4, 100: 3.2})
    rows, _ = collect([log], CollectOptions(include_intermediate=True, include_uncooled=True))
    assert [(r["run"], r["loss"], r["checkpoint"], r["cooled"]) for r in rows] == [
        ("a@50", 3.4, "intermediate", False),
        ("a", 3.2, "final", True),
    ]
    assert rows[0]["tokens"] * 2 == rows[1]["tokens"] and {r["trunk"] for r in rows} == {"a"}


def test_megatron_without_validation_gives_the_mean_of_the_last_steps(tmp_path):
    row = collect([megatron_log(tmp_path / "a.log")])[0][0]
    assert row["measured_on"] == "training" and row["loss"] == pytest.approx(4 + 100 / 110, rel=1e-6)
    other = megatron_log(tmp_path / "b.log", validations={100: 3.2})
    with pytest.raises(InputError, match=r"b\.log: run b: column measured_on: validation, but .*a\.log.* --loss"):
        collect([tmp_path / "a.log", other])
    rows, _ = collect([tmp_path / "a.log", other], CollectOptions(loss="training"))
    assert [r["measured_on"] for r in rows] == ["training"] * 2


def test_megatron_named_validation_sets(tmp_path):
    log = megatron_log(tmp_path / "a.log", validations={100: 3.0}, suffix="-caption")
    log.write_text(log.read_text() + " validation-Text loss at iteration 100 | lm loss value: 4.0E+00 | \n")
    row = collect([log])[0][0]
    assert row["loss_caption"] == 3.0 and row["loss_text"] == 4.0 and row["loss"] == 3.5


def test_megatron_pipeline_with_tied_tables_counts_them_once(tmp_path):
    arguments = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "untie_embeddings_and_output_weights": False,
    }
    log = megatron_log(tmp_path / "a.log", arguments=arguments, ranks={"0, 0": 160_000, "0, 1": 170_000})
    row = collect([log])[0][0]
    assert row["params"] == 330_000 - 512 * 64 and row["params_embedding"] == row["params_head"] == 512 * 64


def test_megatron_experts(tmp_path):
    arguments = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 96, "expert_model_parallel_size": 4}
    arguments |= {"tensor_model_parallel_size": 1, "moe_layer_freq": "[0, 1, 1, 1]"}
    dense, expert = 100_000, 3 * 64 * 96
    log = megatron_log(tmp_path / "a.log", arguments=arguments, ranks={"0, 0": dense + 3 * 2 * expert})
    row = collect([log])[0][0]
    assert row["params"] == dense + 3 * 8 * expert and row["params_active"] == dense + 3 * 2 * expert
    assert row["flops"] == 6 * row["params_active"] * row["tokens"] and row["architecture"] == "moe"


def test_megatron_says_why_params_are_missing_and_takes_them_from_facts(tmp_path):
    log = megatron_log(tmp_path / "a.log", ranks={"0, 0": 150_000})
    with pytest.raises(InputError, match=r"run a: column params is not in the log \(.*1 of 2 model-parallel ranks\)"):
        collect([log])
    row = collect([log], CollectOptions(facts={"a": {"params": 3e5, "mixture": "x"}}))[0][0]
    assert row["params"] == 3e5 and row["mixture"] == "x"
    with pytest.raises(InputError, match="none of these runs was found: b"):
        collect([log], CollectOptions(facts={"*": {"params": 3e5}, "b": {"mixture": "x"}}))


def test_unfinished_and_not_finite_runs(tmp_path):
    megatron_log(tmp_path / "short.log", steps=60)
    megatron_log(tmp_path / "done.log")
    rows, left_out = collect([tmp_path])
    assert [r["run"] for r in rows] == ["done"]
    assert any("run short: unfinished, step 60 of 100" in line for line in left_out)
    megatron_log(tmp_path / "nan.log", loss=lambda step: float("nan"))
    megatron_log(tmp_path / "up.log", loss=lambda step: 4.0 + (step > 90) * 8)
    rows, left_out = collect([tmp_path])
    assert [r["run"] for r in rows] == ["done"]
    assert any("nan.log: run nan: diverged: its last training loss is nan" in line for line in left_out)
    assert any("run up: diverged: its last training loss is 12, after 4 before" in line for line in left_out)
    with pytest.raises(InputError, match=r"no finished run in .*left out 1: .*run nan: diverged"):
        collect([tmp_path / "nan.log"])


def test_a_restart_overwrites_the_steps_it_repeats(tmp_path):
    log = megatron_log(tmp_path / "a.log", steps=80, validations={50: 9.0})
    again = megatron_log(tmp_path / "b.log", validations={50: 3.4, 100: 3.2})
    log.write_text(log.read_text() + again.read_text())
    rows, _ = collect([log], CollectOptions(include_intermediate=True, include_uncooled=True))
    assert [r["loss"] for r in rows] == [3.4, 3.2]


# ----------------------------------------------------------------------------------------------- torchtitan


def titan_log(path: Path, steps: int = 100, *, colour: bool = False, validate: bool = False, extra: str = "") -> Path:
    """What torchtitan's trainer and metrics.py print."""
    red, green, reset = ("\033[31m", "\033[32m", "\033[39m") if colour else ("", "", "")
    head = "[rank0]:[titan] 2026-08-21 21:30:21,511 - root - INFO - "
    lines = [f'{head}Running with configs: {{\n  "lr_scheduler": {{\n    "decay_ratio": null,\n']
    lines += ['    "min_lr_factor": 0.0\n  }\n}', f"{head}Building llama3 debug"]
    lines += [f"{head}Model llama3 debug {red}size: 6,139,136 total parameters{reset}{extra}"]
    lines += [
        f"{head}Trainer is initialized with local batch size 8, global batch size 64, gradient accumulation steps 1, "
        "sequence length 2048, total steps 100 (warmup 2)"
    ]
    for step in [1, *range(10, steps + 1, 10)]:
        lines.append(
            f"{head}{red}step: {step:2}  {green}loss: {8 - step / 25:8.5f}  grad_norm:  0.8319"
            f"  memory:  9.46GiB(64.99%)  tps: 7,282  tflops: 0.52  mfu: 0.17%{reset}"
        )
        if validate and step % 50 == 0:
            lines.append(
                f"{head}validate step: {step:2}  {green}loss: {8.1 - step / 25:7.4f}  memory: 9GiB(1%)  tps: 1"
            )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("colour", [False, True])
def test_torchtitan(tmp_path, colour):
    row = collect([titan_log(tmp_path / "llama.log", colour=colour)])[0][0]
    assert row["params"] == 6_139_136 and row["tokens"] == 100 * 64 * 2048 and row["loss"] == 4.0
    assert row["cooled"] is True and row["measured_on"] == "training"
    assert row["flops_exact"] == pytest.approx(0.52e12 / 7282 * row["tokens"])
    row = collect([titan_log(tmp_path / "v.log", colour=colour, validate=True)])[0][0]
    assert row["loss"] == 4.1 and row["measured_on"] == "validation"


def test_torchtitan_experts_and_encoder(tmp_path):
    extra = "\n[titan] - Total parameter count: dense 1,000,000, sparse 4,000,000, vision 500,000, active 2,000,000"
    log = titan_log(tmp_path / "a.log", extra=extra)
    row = collect([log], CollectOptions(facts={"*": {"tokens_vision": 1e6, "params": 5.5e6}}))[0][0]
    assert row["params_active"] == 2_500_000 and row["params_vision"] == 500_000
    assert row["flops"] == 6 * (2e6 * row["tokens"] + 5e5 * 1e6)
    with pytest.raises(InputError, match="column tokens_vision is missing"):
        collect([log])


def test_torchtitan_new_wording_of_the_batch(tmp_path):
    log = titan_log(tmp_path / "a.log")
    old = "local batch size 8, global batch size 64, gradient accumulation steps 1, sequence length 2048"
    new = "16384 tokens per DP rank, 131072 tokens per train step, gradient accumulation steps 1"
    log.write_text(log.read_text().replace(old, new))
    assert collect([log])[0][0]["tokens"] == 100 * 131072


# ---------------------------------------------------------------------------------------------- TensorBoard


def write_events(
    folder: Path, scalars: dict[str, list[tuple[int, float]]], texts: dict[str, str] | None = None
) -> None:
    """Event files as torch's SummaryWriter leaves them, without torch."""
    import tensorboard.compat.proto.event_pb2 as event_pb2
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder))
    for tag, text in (texts or {}).items():
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=plugin, tensor=make_tensor_proto([text.encode()]))
        writer.add_event(event_pb2.Event(step=0, wall_time=1.0, summary=Summary(value=[value])))
    for tag, points in scalars.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(event_pb2.Event(step=step, wall_time=float(step), summary=summary))
    writer.close()


def test_tensorboard_of_megatron(tmp_path):
    scalars = {
        "lm loss": [(s, 5 - s / 50) for s in range(10, 101, 10)],
        "lm loss vs samples": [(s * 8, 5 - s / 50) for s in range(10, 101, 10)],
        "lm loss validation": [(50, 4.25), (100, 3.25)],
        "learning-rate": [(s, 1e-3 if s < 80 else 1e-5) for s in range(10, 101, 10)],
    }
    texts = {"global_batch_size": "8", "seq_length": "128", "train_iters": "100", "hidden_size": "64"}
    write_events(tmp_path / "big-run" / "tensorboard", scalars, texts | {"padded_vocab_size": "512"})
    rows, _ = collect([tmp_path], CollectOptions(facts={"big-run": {"params": 3e5}}))
    (row,) = rows
    assert (row["run"], row["loss"], row["tokens"], row["cooled"]) == ("big-run", 3.25, 100 * 8 * 128, True)
    assert row["params_head"] == 512 * 64


def test_tensorboard_of_a_run_that_was_started_twice(tmp_path):
    for start, steps, loss in (("20260821-1200", range(1, 61), 5.0), ("20260821-1830", range(51, 101), 4.0)):
        folder = tmp_path / "llama" / "tb" / start
        write_events(folder, {"train/loss": [(s, loss) for s in steps], "n_tokens_seen": [(s, s * 8.0) for s in steps]})
    rows, _ = collect([tmp_path], CollectOptions(facts={"llama": {"params": 1e6}}))
    assert [(r["run"], r["loss"], r["tokens"]) for r in rows] == [("llama", 4.0, 800)]


def test_tensorboard_of_torchtitan_and_unknown_tags(tmp_path):
    scalars = {
        "loss_metrics/global_avg_loss": [(s, 4.0) for s in range(1, 101)],
        "n_tokens_seen": [(s, s * 1024.0) for s in range(1, 101)],
    }
    write_events(tmp_path / "a", scalars)
    row = collect([tmp_path / "a"], CollectOptions(facts={"*": {"params": 1e6}}))[0][0]
    assert row["loss"] == 4.0 and row["tokens"] == 102400 and row["cooled"] is None
    write_events(tmp_path / "b", {"my/ce": [(5, 3.5)], "my/seen": [(5, 64.0)]})
    with pytest.raises(InputError, match=r"has my/ce, my/seen; name them with --map"):
        collect([tmp_path / "b"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "events.out.tfevents.1.host").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(InputError, match=r"no scalar can be read from its event files: empty or damaged"):
        collect([tmp_path / "c"])
    mapping = {"my/ce": "loss", "my/seen": "tokens"}
    row = collect([tmp_path / "b"], CollectOptions(mapping=mapping, facts={"*": {"params": 1e6}}))[0][0]
    assert (row["loss"], row["tokens"]) == (3.5, 64)


# ------------------------------------------------------------------------------------------------------ W&B


def test_wandb_runs_table(tmp_path):
    path = tmp_path / "wandb_export_2026.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Name", "State", "Notes", "architecture", "n_params", "tokens_seen", "eval/loss", "loss"])
        writer.writerow(["r1", "finished", "-", "early", 1e6, 2e7, 3.5, 3.4])
        writer.writerow(["r2", "crashed", "-", "early", 1e6, 4e7, 3.4, 3.3])
    rows, left_out = collect([path])
    assert [(r["run"], r["params"], r["tokens"], r["loss"], r["flops"]) for r in rows] == [
        ("r1", 1e6, 2e7, 3.5, 1.2e14)
    ]
    assert any("run r2: unfinished" in line for line in left_out)
    text = path.read_text()
    path.write_text(text.replace("1000000.0,20000000.0", "nan,20000000.0"))
    with pytest.raises(InputError, match=r"csv line 2: run r1, step 1: column params: nan is not a finite number"):
        collect([path])
    path.write_text(text.replace("3.5,", "many,"))
    with pytest.raises(InputError, match=r"line 2: column eval/loss: 'many' is not a number"):
        collect([path])


def test_wandb_chart_of_several_runs(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text(
        '"Step","wide - eval/loss","wide - eval/loss__MIN","wide - eval/loss__MAX","thin - eval/loss"\n'
        '"50","3.5","3.4","3.6",""\n"100","3.2","3.1","3.3","3.9"\n'
    )
    facts = {"*": {"tokens_per_step": 1000.0}, "wide": {"params": 2e6}, "thin": {"params": 1e6}}
    rows, _ = collect([path], CollectOptions(facts=facts))
    assert [(r["run"], r["loss"], r["tokens"]) for r in rows] == [("wide", 3.2, 1e5), ("thin", 3.9, 1e5)]


def test_wandb_history_as_json_lines_and_csv(tmp_path):
    records = [
        {"_step": 0, "_runtime": 1.0, "train/loss": 9.0, "train/tokens": 0, "lr": 1e-3, "eval/loss": None},
        {"_step": 9, "_runtime": 2.0, "train/loss": 4.0, "train/tokens": 9000, "lr": 1e-5, "eval/loss": 3.75},
    ]
    (tmp_path / "run-a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with (tmp_path / "run-b.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *records[0]])
        writer.writerows([i, *("nan" if v is None else v for v in r.values())] for i, r in enumerate(records))
    facts = {"*": {"params": 1e6}}
    for name in ("run-a.jsonl", "run-b.csv"):
        row = collect([tmp_path / name], CollectOptions(facts=facts))[0][0]
        assert (row["run"], row["loss"], row["tokens"], row["cooled"]) == (name[:5], 3.75, 9000, True)
    (tmp_path / "run-a.jsonl").write_text('{"_step": 0}\n{"_st')
    with pytest.raises(InputError, match=r"run-a\.jsonl: line 2: not JSON"):
        collect([tmp_path / "run-a.jsonl"], CollectOptions(facts=facts))


def test_wandb_runs_as_json_lines(tmp_path):
    config = {"model": {"value": {"num_params": 5e6}}, "architecture": {"desc": None, "value": "late"}}
    record = {"name": "x", "state": "finished", "config": config}
    summary = {
        "_step": 7,
        "validation_metrics/loss": 3.25,
        "n_tokens_seen": 1e8,
        "vision_params": 1e6,
        "vision_tokens": 2e7,
    }
    (tmp_path / "runs.jsonl").write_text(json.dumps(record | {"summary_metrics": json.dumps(summary)}) + "\n")
    row = collect([tmp_path / "runs.jsonl"])[0][0]
    assert (row["run"], row["architecture"], row["loss"]) == ("x", "late", 3.25)
    assert row["flops"] == 6 * (4e6 * 1e8 + 1e6 * 2e7)


@pytest.mark.parametrize(
    ("config", "summary", "cooled"),
    [
        ({"learning_rate": 1e-3}, {"train/lr": 1e-5}, True),
        ({"learning_rate": 1e-3}, {"train/lr": 9e-4}, False),
        ({"learning_rate": 1e-3}, {}, None),
        ({}, {"lr": 1e-5}, None),
    ],
)
def test_wandb_runs_are_cooled_if_the_last_rate_is_far_below_that_of_the_config(tmp_path, config, summary, cooled):
    counts, losses = {"params": 1e6, "tokens": 3e7}, {"tokens": 2e7, "val/loss": 3.1}
    run = {"name": "a", "state": "finished", "config": counts | config, "summary": losses | summary}
    (tmp_path / "a.jsonl").write_text(json.dumps(run) + "\n")
    tags = counts | losses | config | summary
    (tmp_path / "b.csv").write_text(f"Name,State,{','.join(tags)}\nb,finished,{','.join(map(str, tags.values()))}\n")
    for file in ("a.jsonl", "b.csv"):
        rows, _ = collect([tmp_path / file], CollectOptions(include_uncooled=True))
        assert [(r["run"], r["tokens"], r["loss"], r["cooled"]) for r in rows] == [(file[0], 2e7, 3.1, cooled)]


# -------------------------------------------------------------------------------------------------- general


PIECES = st.sampled_from(
    [
        " iteration 10/ 20 |",
        " iteration 9999999999999999999/0 |",
        " lm loss: 1.0 |",
        " lm loss: nan |",
        " : |",
        "||",
        " consumed samples: -3 |",
        " validation loss at iteration 5 |",
        " lm loss value: x |",
        "  seq_length .... 128",
        "  moe_layer_freq ....... 0",
        "  num_experts ..... 0",
        "  num_layers ...... 4",
        "[titan] step: 3  loss: 1.2.3",
        "[titan] step: 4  loss: 3.5  tps: 0  tflops: .",
        "validate step: 4 loss: 2.0 root - INFO",
        "\033[31m",
        '"min_lr_factor": -',
        '"decay_ratio": 1e',
        "size: , total parameters",
        " step: 1 loss: 2 tps: 1,",
        '{"_step": null}',
        '{"_step": NaN, "loss": 3}',
        '{"_step": 1, "loss": "a"}',
        '{"summary": "{", "name": 3}',
        '{"summary": {"_step": -1, "loss": 2.5, "params": 1e400}}',
        "[]",
        "Step,a - eval/loss",
        "nan,3",
        "1,inf",
        "_step,loss",
        "Name,State,loss",
        "a,finished",
        "a,finished,3,4",
        "run,params,tokens,loss",
        "\n",
        "\x00",
        "\ufeff",
        "x,1,2,3",
    ]
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(PIECES, max_size=6), suffix=st.sampled_from([".log", ".csv", ".jsonl"]))
def test_no_log_however_damaged_ends_in_another_error(tmp_path_factory, lines, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_text("\n".join(lines), encoding="utf-8")
    options = CollectOptions(facts={"*": {"params": 1e6, "tokens_per_step": 10.0}}, include_intermediate=True)
    try:
        rows, _ = collect([path], options)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(row["loss"] > 0 and row["tokens"] > 0 and row["flops"] > 0 for row in rows)


def test_every_file_of_a_folder_that_is_not_read_is_named(tmp_path):
    """An export of W&B in a folder is read; a table is not, as it may hold the runs beside it."""
    (tmp_path / "runs.csv").write_text("run,params,tokens,loss\na,1e6,1e7,3\n")
    (tmp_path / "noise.log").write_bytes(bytes(range(256)))
    (tmp_path / "export.csv").write_text("Name,State,val/loss,tokens,params\nb,finished,3.1,1e7,1e6\n")
    rows, left_out = collect([tmp_path])
    assert [row["run"] for row in rows] == ["b"]
    assert len(left_out) == 2 and "noise.log: not a kind of log that is known" in left_out[0]
    assert "runs.csv: not a kind" in left_out[1] and "a table is read where its own path is given" in left_out[1]


def test_a_tag_that_no_log_has(tmp_path):
    (tmp_path / "export.csv").write_text("Name,State,my loss,tokens,params\nb,finished,3.1,1e7,1e6\n")
    assert collect([tmp_path], CollectOptions(mapping={"my loss": "loss"}))[0][0]["loss"] == 3.1
    with pytest.raises(InputError, match="--map: no log has the tag lr/x; correct or remove it"):
        collect([tmp_path], CollectOptions(mapping={"my loss": "loss", "lr/x": "lr"}))


def test_all_reasons_are_named_where_nothing_is_left(tmp_path):
    """An uncooled run with earlier validations: what leaves it out comes before what does not."""
    lines = [{"_step": s, "val/loss": 3.0, "tokens": 1e5 * s, "params": 1e6, "lr": 1e-3} for s in (50, 100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"left out 2: .*--include-uncooled takes it in; .*--include-intermediate"):
        collect([tmp_path / "a.jsonl"])


def test_a_file_of_no_known_kind(tmp_path):
    (tmp_path / "a.log").write_text("hello\n")
    with pytest.raises(InputError, match=r"a\.log: not a kind of log that is known"):
        collect([tmp_path / "a.log"])
    with pytest.raises(InputError, match=r"left out 1: .*a\.log: not a kind of log that is known"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("tag", "key"),
    [
        ("val/loss", "loss"),
        ("Eval/Loss", "loss"),
        ("val/caption/loss", "loss_caption"),
        ("eval/lm/c4_en/CE loss", "loss_c4_en"),
        ("lm loss validation-Text", "loss_text"),
        ("train/CE loss", "train_loss"),
        ("val/caption/text_after_image", None),
        ("lm loss vs samples", None),
        ("grad_norm", None),
    ],
)
def test_names_of_tags(tag, key):
    assert key_of_tag(tag) == key


def test_patches_of_an_intermediate_checkpoint_are_its_share():
    facts = {"params": 1e6, "tokens_per_step": 10.0, "tokens_vision": 400.0}
    curve = Curve(name="a", origin="a.log", facts=facts, total_steps=100)
    for step in (25, 100):
        curve.add(step, {"loss": 3.9})
    rows, _ = curve_rows(curve, intermediate=True)
    assert [r["tokens_vision"] for r in rows] == [100, 400]


def test_a_validation_short_of_the_end_is_intermediate():
    curve = Curve(name="a", origin="a.log", facts={"params": 1e6, "tokens_per_step": 10.0}, total_steps=100)
    for step in range(1, 101):
        curve.add(step, {"train_loss": 4.0, "lr": 1.0})
    curve.add(80, {"loss": 3.9})
    rows, left_out = curve_rows(curve)
    assert not rows and "no validation at the end (last at step 80 of 100)" in left_out[0]
    rows, _ = curve_rows(curve, intermediate=True)
    assert [(r["run"], r["cooled"]) for r in rows] == [("a@80", False)]
