"""From the run table of native runs and runs that go on from an LLM to the tokens until native has caught up."""

import csv
import json
import sys

import pytest
from megamm_laws.commands import fit_scaling_laws
from plan_factory import EARLY, make_table, transfer_runs

from megamm.commands import plan_training

WORTH, FADES = 6e10, 0.3
"""Of starting from the LLM, in tokens, at 5e10 of training; as a power of those."""


def test_the_break_even_of_a_study_is_found_from_its_run_table(tmp_path, monkeypatch):
    """Groups are how runs began; architectures have the names that the study gave them."""
    native = make_table({"native": EARLY}, noise=3e-4).rows
    rows = [row | {"init": "native"} for row in native]
    rows += [row | {"architecture": "continual"} for row in transfer_runs(FADES, 0.0, WORTH).rows]
    columns = ["run", "architecture", "params", "tokens", "loss", "init"]
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: row[column] for column in columns} for row in rows)

    def call(main, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        main()

    table, fits = tmp_path / "runs.csv", tmp_path / "fits"
    call(fit_scaling_laws.main, table, "--group-by", "init", "--bootstrap", 20, "--out", fits)
    assert {fit["group"] for fit in json.loads((fits / "fits.json").read_text())["fits"]} == {"native", "llm"}
    options = ["--group", "native", "--flops", 1e21, "--llm-tokens", 9e10, "--out", tmp_path / "plan"]
    call(plan_training.main, fits / "fits.json", "--runs", table, *options)
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())["transfer"]
    assert found["status"] == "fitted to 18 LLM-initialised runs"
    true = 5e10 * (9e10 / WORTH) ** (1 / FADES)
    counted = found["break_even_tokens"]["pretraining_counted"]
    low, high = counted["interval"]
    assert counted["tokens"] == pytest.approx(true, rel=0.35) and low <= true <= high
