"""Lines of the log for people, where no terminal shows a bar."""

from run_factory import make_sources, trainer

from megamm.training.metrics import read_metrics


def test_a_line_for_each_record(tmp_path, capfd):
    run = trainer(make_sources(tmp_path / "data"), tmp_path / "run", **{"eval.every": 8})
    run.run()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("run: step ")]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == len(records) == 5  # losses at 4, 8, 12 and validations at 8, 12
    for line, record in zip(lines, records, strict=True):
        assert line.startswith(f"run: step {record['step']} of 12, ")
        if "loss" in record:
            assert f"loss {record['loss']:.4f}, rate {record['lr']:.3g}, " in line
            assert f"{record['tokens_per_second']:,.0f} tokens/s, MFU {record['mfu']:.1%}" in line
            assert line.endswith(" left") == (record["step"] < 12)
        else:
            assert f"val/caption {record['val/caption/loss']:.4f}" in line
