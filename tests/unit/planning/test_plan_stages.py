"""The stages of a training plan: how they lead up to the full run, and what the pilot ladder may propose."""

from dataclasses import replace

import pytest
from megamm_laws.runs.table import RunTable
from plan_factory import transfer_runs

from megamm.estimate.hardware import GPUS, stated_mfu
from megamm.planning.inputs import PlanRequest
from megamm.planning.outputs import to_markdown
from megamm.planning.proposal import make_plan


def test_stages_lead_up_to_the_full_run(fits):
    plan = make_plan(PlanRequest(flops=1e24, gpus=[GPUS["h100"]], prices=[2.0], efficiency=stated_mfu(0.4)), fits)
    pilot, mid, full = plan["stages"]
    assert pilot["flops"] < mid["flops"] < full["flops"] and mid["flops"] == pytest.approx(1e23)
    assert 0 < pilot["interval_width_ratio"] < 1
    assert all(stage["money"] == pytest.approx(2 * stage["gpu_hours"]) for stage in plan["stages"])
    assert all(stage["decides"] and stage["stop_rule"] for stage in plan["stages"])
    ends = [check["loss_of_one_run"][0] for check in full["checks"]]
    assert ends[0] > ends[1] > plan["model"]["loss_of_one_run"]["interval"][0]
    assert any("extrapolation" in text for text in plan["warnings"])
    assert [s["stage"] for s in make_plan(PlanRequest(flops=1e21, pilot_share=0.0), fits)["stages"]] == ["full run"]


def pilot_of(fits, **options) -> tuple[dict, list[str]]:
    """The pilot ladder of a plan and what the plan assumes of it."""
    plan = make_plan(PlanRequest(flops=1e24, group="early", **options), fits)
    return plan["stages"][0], [text for text in plan["assumptions"] if text.startswith("pilot ladder: ")]


def test_the_pilot_narrows_noise_alone(fits):
    """An error of the form that leaves noise a fifth of the width stays as it is."""
    early = next(fit for fit in fits if fit.law.name == "early")
    low, high = early.entry["intervals"]["a"]
    middle, half = (low + high) / 2, (high - low) / 2

    def plan(share: float) -> dict:
        entry = early.entry | {"noise_intervals": {"a": [middle - share * half, middle + share * half]}}
        return make_plan(PlanRequest(flops=1e24, group="early"), [replace(early, entry=entry)])

    noise, bent = plan(1.0), plan(0.2)
    pilot = noise["stages"][0]
    assert pilot["interval_width_ratio"] == pytest.approx(pilot["noise_width_ratio"]) and noise["pilot_advice"] is None
    assert "by noise alone from a factor of" in pilot["prediction"]
    # Such a pilot could change no decision, and is not proposed.
    left = (0.96 + 0.04 * pilot["noise_width_ratio"] ** 2) ** 0.5
    assert [stage["stage"] for stage in bent["stages"]] == ["mid run", "full run"] and left > 0.9
    assert f"would leave {left:.0%} of the interval of N*" in bent["pilot_advice"]
    assert "more runs among those so far will not narrow it" in bent["pilot_advice"]
    assert bent["pilot_advice"][1:] in to_markdown(bent)


def test_the_pilot_stays_within_the_ratios_so_far(fits, table):
    rows = [row for row in table.rows if 9 < row["tokens"] / row["params"] < 130]
    few = RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    for runs in (None, few):
        pilot, assumed = pilot_of(fits, runs=runs)
        source = table if runs is None else few
        measured = source.numbers("tokens") / source.numbers("params")
        ratios = [run["tokens"] / run["params"] for run in pilot["runs"]]
        assert measured.min() / 1.2 < min(ratios) and max(ratios) < measured.max() * 1.2  # widths are rounded
        assert len(assumed) == 1 and f"within {measured.min():.2g}"[:9] in assumed[0]


def test_the_pilot_repeats_no_token_much(fits):
    unlimited, _ = pilot_of(fits)
    assert max(run["tokens"] for run in unlimited["runs"]) > 8e10
    pilot, assumed = pilot_of(fits, unique_tokens=2e10)
    assert max(run["tokens"] for run in pilot["runs"]) <= 8e10 and "at most 4 epochs" in assumed[1]
    pilot, assumed = pilot_of(fits, unique_tokens=1e9)  # the shortest run so far has ten epochs
    assert pilot["runs"] == unlimited["runs"] and "no run fits into 4 epochs" in assumed[1]


def test_llm_runs_are_no_runs_so_far(fits, table):
    llm = [{**row, "architecture": "early"} for row in transfer_runs(0.3, 0.4, 6e10).rows]
    both = [*({**row, "init": "native"} for row in table.rows), *llm]
    pilots = [
        pilot_of(fits, runs=RunTable(path="runs.csv", rows=rows, lines=list(range(2, len(rows) + 2))))[0]
        for rows in (table.rows, both)
    ]
    assert pilots[0]["runs"] == pilots[1]["runs"]
    assert pilots[0]["noise_width_ratio"] == pilots[1]["noise_width_ratio"]
    alone = RunTable(path="llm.csv", rows=llm, lines=list(range(2, len(llm) + 2)))
    assert pilot_of(fits, runs=alone)[0]["runs"] == pilot_of(fits)[0]["runs"]
