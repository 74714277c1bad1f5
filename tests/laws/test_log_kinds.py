"""Readers of lingua, nanotron, OLMo-core, transformers, nanoGPT and Composer, on logs as these programs write them."""

import json

import pytest
from megamm_laws.runs.collect import CollectOptions, collect

STEPS = range(10, 101, 10)


def one(path, **facts) -> dict:
    (row,) = collect([path], CollectOptions(facts={"*": facts}))[0]
    return row


def test_lingua(tmp_path):
    """The folder of a run, with its own config.yaml; the size is in train.log."""
    folder = tmp_path / "llama-1b"
    folder.mkdir()
    records = [
        {
            "global_step": step,
            "acc_step": 0,
            "speed/wps": 5e4,
            "speed/FLOPS": 4e14,
            "optim/grad_norm": 0.3,
            "optim/lr": 3e-3 * (101 - step) / 100,
            "optim/total_tokens": step * 4096,
            "loss/out": 8 - step / 25,
            "created_at": "2026-01-01T00:00:00",
        }
        for step in STEPS
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"global_step": 110, "loss/o')  # cut short by a kill
    (folder / "config.yaml").write_text("name: llama-1b\nsteps: 100\nmodel:\n  dim: 64\n")
    (folder / "train.log").write_text("0: INFO 26-01-01 - Model size: 1,234,567 total parameters\n")
    row = one(tmp_path)
    assert (row["run"], row["params"], row["tokens"], row["loss"]) == ("llama-1b", 1_234_567, 409_600, 4.0)
    assert row["flops_exact"] == pytest.approx(8e9 * 409_600) and row["cooled"] is True
    assert row["measured_on"] == "training"
    entry = {"global_step": 100, "c4": {"nll_per_token": -3.0}, "wiki": {"nll_per_token": -4.0}}
    (folder / "metrics.validation.jsonl").write_text(json.dumps(entry) + "\n")
    row = one(tmp_path)
    assert (row["loss"], row["loss_c4"], row["loss_wiki"]) == (3.5, 3.0, 4.0)
    (folder / "config.yaml").write_text("steps: 500\n")
    assert any("unfinished, step 100 of 500" in line for line in collect([tmp_path, *_finished(tmp_path)])[1])


def _finished(tmp_path):
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    table.write_text("run,params,tokens,loss\nz,1e6,1e7,3\n")
    return [table]


def nanotron_log(size: str = "1.04M (1.98MiB)", loss: float = 4.01) -> str:
    head = "[default0]:01/02/2026 10:00:00 [INFO|DP=0|PP=0|TP=0|host]: "
    lines = [head + "Config:", head + "Config(general=GeneralArgs(project='debug',", head + "  seed=42,"]
    lines += [head + "  parallelism=ParallelismArgs(dp=2,", head + "  tokens=TokensArgs(sequence_length=256,"]
    lines += [
        head + f"  {text}," for text in ("train_steps=100", "micro_batch_size=2", "batch_accumulation_per_replica=4")
    ]
    lines += [head + f"Total number of parameters: {size}"]
    for step in STEPS:
        lines.append(
            f"{head}iteration: {step} / 100 | consumed_tokens: {step * 4096 / 1e3:.3g}K | time_per_iteration_ms: 1.2K"
            f" | tokens_per_sec: 40.5K | tokens_per_sec_per_gpu: 5.06K | global_batch_size: 4.1K | grad_norm: 1.2 | "
            f"lm_loss: {loss if step == 100 else 8} | lr: {3e-4 * (101 - step) / 100:.3g} | model_tflops_per_gpu: 12"
        )
    return "\n".join(lines) + "\n"


def test_nanotron(tmp_path):
    (tmp_path / "a.log").write_text(nanotron_log())
    row = one(tmp_path / "a.log")
    assert (row["run"], row["tokens"], row["loss"], row["cooled"]) == ("a", 100 * 2 * 256 * 2 * 4, 4.01, True)
    assert row["params"] == 1.98 * 2**20 / 2  # two bytes each
    (tmp_path / "a.log").write_text(nanotron_log() + nanotron_log(size="2.1M (8MiB)", loss=3.5))
    rows, _ = collect([tmp_path])
    assert [(r["run"], r["params"], r["loss"]) for r in rows] == [("a", 1.98 * 2**19, 4.01), ("a-2", 2**21, 3.5)]


def test_olmo_core(tmp_path):
    head = "2026-01-02 10:00:00.000 host:0 olmo_core.train.callbacks.console_logger:60 INFO "
    lines = ["olmo_core.train INFO Total model params: 1,484,916"]
    for step in STEPS:
        lines.append(f"{head}[step={step}/100,epoch=1,eta=0:01:00]")
        lines += [f"    optim/LR (group 0)={3e-4 * (101 - step) / 100:.3E}", "    optim/total grad norm=0.5"]
        lines += [
            f"    throughput/total tokens={step * 4096:,}",
            f"    train/CE loss={8 - step / 25:.3f}",
            "    train/PPL=55.1",
        ]
    (tmp_path / "olmo.log").write_text("\n".join(lines) + "\n")
    row = one(tmp_path)
    assert (row["run"], row["params"], row["tokens"], row["loss"]) == ("olmo", 1_484_916, 409_600, 4.0)
    assert row["cooled"] is True
    lines += [f"{head}Running lm evals...", f"{head}[eval=lm,step=5/5]"]
    lines += [
        f"{head}Finished lm evals in 3.0 seconds. Metrics:",
        "    c4_en-validation/CE loss=3.450",
        "    c4_en-validation/PPL=31",
    ]
    (tmp_path / "olmo.log").write_text("\n".join(lines) + "\n")
    row = one(tmp_path)
    assert (row["loss"], row["loss_c4_en-validation"]) == (3.45, 3.45) and row["measured_on"] == "validation"


def trainer_state(folder, until: int) -> None:
    history = []
    for step in range(10, until + 1, 10):
        rate = 5e-5 * (101 - step) / 100
        entry = {"epoch": step / 100, "grad_norm": 1.0, "learning_rate": rate, "loss": 8 - step / 25, "step": step}
        history += [entry | {"num_input_tokens_seen": step * 4096}]
        if step % 50 == 0:
            history.append({"epoch": step / 100, "eval_loss": 4.5 - step / 100, "eval_runtime": 1.0, "step": step})
    state = {"best_metric": None, "epoch": until / 100, "global_step": until, "log_history": history, "max_steps": 100}
    folder.mkdir(parents=True, exist_ok=True)
    state |= {"num_input_tokens_seen": until * 4096, "total_flos": 1e15, "train_batch_size": 8}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_transformers(tmp_path):
    """The folder of a run and its checkpoints are one run, whichever is read first."""
    trainer_state(tmp_path / "gpt" / "checkpoint-50", 50)
    trainer_state(tmp_path / "gpt" / "checkpoint-100", 100)
    row = one(tmp_path, params=1e6)
    assert (row["run"], row["tokens"], row["loss"], row["cooled"]) == ("gpt", 409_600, 3.5, True)
    trainer_state(tmp_path / "gpt", 100)
    assert one(tmp_path, params=1e6) == row
    (tmp_path / "gpt" / "trainer_state.json").write_text("{")
    rows, left_out = collect([tmp_path], CollectOptions(facts={"*": {"params": 1e6}}))
    assert rows == [row] and any("no log_history can be read" in line for line in left_out)


def nanogpt_log(embd: int = 64, loss: float = 3.5) -> str:
    lines = [f"Overriding: n_embd = {embd}", "Overriding: max_iters = 100", "tokens per iteration will be: 4,096"]
    lines += ["number of parameters: 0.80M", f"num decayed parameter tensors: 9, with {embd * 10_000:,} parameters"]
    lines += ["num non-decayed parameter tensors: 5, with 1,024 parameters", "using fused AdamW: True"]
    for step in range(0, 101, 10):
        if step % 50 == 0:
            lines.append(f"step {step}: train loss {8 - step / 25:.4f}, val loss {loss + (100 - step) / 50:.4f}")
        lines.append(f"iter {step}: loss {8 - step / 25:.4f}, time 120.00ms, mfu 30.00%")
    return "\n".join(lines) + "\n"


def test_nanogpt(tmp_path):
    (tmp_path / "a.out").write_text(nanogpt_log())
    row = one(tmp_path)
    assert (row["run"], row["params"], row["tokens"], row["loss"]) == ("a", 641_024, 409_600, 3.5)
    assert row["cooled"] is None and row["measured_on"] == "validation"
    (tmp_path / "a.out").write_text(nanogpt_log() + nanogpt_log(embd=128, loss=3.25))
    rows, _ = collect([tmp_path])
    assert [(r["run"], r["params"], r["loss"]) for r in rows] == [("a", 641_024, 3.5), ("a-2", 1_281_024, 3.25)]


def test_composer(tmp_path):
    lines = ["*" * 30, "Config:", "global_train_batch_size: 16", "max_duration: 100ba", "max_seq_len: 256"]
    lines += ["n_params: 1234567", "*" * 30]
    for step in STEPS:
        lines += [
            f"[batch={step}/100]:",
            f"\t Train time/batch: {step - 1}",
            f"\t Train time/token: {(step - 1) * 4096}",
        ]
        lines += [
            "\t Train loss/train/total: 9.9000",
            f"\t Train metrics/train/LanguageCrossEntropy: {8 - step / 25:.4f}",
        ]
        lines += [f"\t Train lr-DecoupledAdamW/group0: {3e-4 * (101 - step) / 100:.6f}"]
    (tmp_path / "mpt.err").write_text("\n".join(lines) + "\n")
    row = one(tmp_path)
    assert (row["run"], row["params"], row["tokens"], row["loss"]) == ("mpt", 1_234_567, 409_600, 4.0)
    assert row["cooled"] is True
    whole = (
        "\n".join([*lines, "[Eval batch=5/5] Eval on c4 data:", "\t Eval metrics/eval/LanguageCrossEntropy: 3.5000"])
        + "\n"
    )
    (tmp_path / "mpt.err").write_text(whole)
    assert one(tmp_path)["loss"] == 3.5
    no_sizes = whole.replace("max_seq_len: 256\n", "")
    (tmp_path / "mpt.err").write_text(no_sizes)
    assert one(tmp_path)["tokens"] == pytest.approx(409_600)
    (tmp_path / "mpt.err").write_text(whole + whole.replace("1234567", "2345678").replace(": 3.5000", ": 3.2500"))
    assert [(r["params"], r["loss"]) for r in collect([tmp_path])[0]] == [(1_234_567, 3.5), (2_345_678, 3.25)]


def test_composer_file_logger(tmp_path):
    lines = ["[hyperparameter]: n_params: 1000000 ", "[hyperparameter]: max_duration: 100ba "]
    for step in STEPS:
        lines += [f"[metric][batch={step}]: loss/train/total: {8 - step / 25:.4f} "]
    (tmp_path / "mpt").mkdir()
    (tmp_path / "mpt" / "logs-rank0.txt").write_text("\n".join(lines) + "\n")
    row = one(tmp_path, tokens_per_step=4096.0)
    assert (row["run"], row["params"], row["tokens"], row["loss"]) == ("mpt", 1e6, 409_600, 4.0)
