"""Forecasts: what they say, that they cannot be changed, and how they are scored."""

import json
import math
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.errors import InputError
from megamm_laws.files import write_json
from megamm_laws.fitting.fits_file import read_laws
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.forecasts.forecast import PlannedRun, make_forecast, read_forecast, score_forecast
from megamm_laws.forecasts.record import read_forecasts, summary
from megamm_laws.law import power_law
from megamm_laws.runs.table import read_runs
from scipy import integrate, stats

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "data" / "chinchilla_runs.csv"
RUN = PlannedRun(group="all", params=1e10, tokens=2e11)


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fits")
    write_fits(folder, fit_table(read_runs(RUNS), resamples=200))
    return folder


@pytest.fixture(scope="module")
def forecast(fits) -> dict:
    return make_forecast(fits, RUN, by="me")


def row(**changes) -> dict:
    return {"run": "x", "params": 1e10, "tokens": 2e11, "loss": 2.1} | changes


def test_the_value_is_the_laws_and_the_intervals_nest(fits, forecast):
    law = read_laws(fits, "loss")["all"]
    said, at = forecast["losses"]["loss"], (np.array([1e10]), np.array([2e11]))
    assert said["value"] == pytest.approx(power_law.predict(law.parameters, *at)[0], rel=1e-12)
    draws = power_law.predict(law.draws, *at)[:, 0]
    assert said["law"]["80"] == pytest.approx(np.quantile(draws, [0.1, 0.9]))
    assert said["deviation"] == pytest.approx(math.hypot(np.log(draws).std(), said["noise"]))
    ends = [said["run"]["95"][0], said["law"]["95"][0], said["law"]["80"][0], said["value"]]
    ends += [said["law"]["80"][1], said["law"]["95"][1], said["run"]["95"][1]]
    assert ends == sorted(ends)
    assert forecast["run"]["flops"] == pytest.approx(6 * law.kappa * 1e10 * 2e11)


def test_far_beyond_the_runs_comes_first_among_the_cautions(fits, forecast):
    assert not any("extrapolation" in text for text in forecast["cautions"])
    far = make_forecast(fits, PlannedRun(group="all", params=1e12, tokens=2e13), by="me")
    assert far["cautions"][0].startswith("extrapolation")


@pytest.mark.parametrize("actual", [1.9, 2.1, 2.6])
def test_the_score_against_its_definition(forecast, actual):
    said = forecast["losses"]["loss"]
    found = score_forecast(forecast, row(loss=actual))["losses"]["loss"]
    assert found["error"] == pytest.approx(math.log(actual / said["value"]))
    normal = stats.norm(0.0, said["deviation"])
    wide = 30 * said["deviation"] + abs(found["error"])
    below = integrate.quad(lambda x: normal.cdf(x) ** 2, -wide, found["error"], limit=500)[0]
    above = integrate.quad(lambda x: (1 - normal.cdf(x)) ** 2, found["error"], wide, limit=500)[0]
    assert found["crps"] == pytest.approx(below + above, rel=1e-5)
    low, high = said["run"]["95"]
    assert found["inside"]["95"] is (low <= actual <= high)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": 1.1e10}, "params 1.1e\\+10, forecast for 1e\\+10"),
        ({"tokens": 1e11}, "tokens 1e\\+11"),
        ({"architecture": "late"}, "architecture late, forecast for early"),
        ({"mixture": "other"}, "mixture other, forecast for 45-45-10"),
        ({"validation_set": "a:2"}, "validation_set a:2, forecast for a:1"),
    ],
)
def test_another_run_is_refused_or_told(fits, changes, message):
    planned = PlannedRun(**vars(RUN) | {"architecture": "early", "mixture": "45-45-10", "validation_set": "a:1"})
    made = make_forecast(fits, planned, by="me")
    score_forecast(made, row(params=1.001e10, architecture="early"))  # what the row does not say cannot differ
    with pytest.raises(InputError, match=message):
        score_forecast(made, row(**changes))
    assert len(score_forecast(made, row(**changes), allow=True)["remarks"]) == 1


def test_a_result_from_before_the_forecast_is_told(forecast):
    now = datetime.fromisoformat(forecast["date"])
    before = score_forecast(forecast, row(), written=now - timedelta(days=1))
    assert "before the forecast" in before["remarks"][0]
    assert not score_forecast(forecast, row(), written=datetime.now(UTC) + timedelta(days=1))["remarks"]


@pytest.mark.parametrize("change", ["by", "value", "sha256"])
def test_a_forecast_that_was_changed_is_refused(tmp_path, forecast, change):
    content = json.loads(json.dumps(forecast))
    write_json(tmp_path / "good.json", content)
    assert read_forecast(tmp_path / "good.json") == forecast
    if change == "value":
        content["losses"]["loss"]["value"] *= 1.001
    else:
        content[change] = "0" * 64
    write_json(tmp_path / "bad.json", content)
    with pytest.raises(InputError, match="not what was signed"):
        read_forecast(tmp_path / "bad.json")
    with pytest.raises(InputError, match="not what was signed"):
        read_forecasts(tmp_path)


def test_the_record_counts_what_lay_inside(tmp_path, fits, forecast):
    low, high = forecast["losses"]["loss"]["run"]["80"]
    for i, actual in enumerate((low * 1.001, high * 0.999, high * 2, None)):
        made = make_forecast(fits, RUN, by=f"number {i}")
        write_json(tmp_path / f"{i}.json", made)
        if actual is not None:
            write_json(tmp_path / f"{i}.score.json", score_forecast(made, row(loss=actual)))
    lines = read_forecasts(tmp_path)
    assert [line.cells()[-1] for line in lines] == ["inside 80%", "inside 80%", "outside 95%", "not trained yet"]
    assert summary(lines).startswith("Losses forecast: 4, scored: 3; 2 inside 80%, 2 inside 95%")


def tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "forecast.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_three_commands(tmp_path, fits):
    out, table = tmp_path / "forecasts" / "big.json", tmp_path / "runs.csv"
    size = ("--params", 1e10, "--tokens", 2e11)
    done = tool("write", fits, *size, "--by", "me", "--out", out)
    assert done.returncode == 0 and "10B parameters, 200B tokens" in done.stdout, done.stderr
    again = tool("write", fits, *size, "--by", "me", "--out", out)
    assert again.returncode == 2 and "never replaced" in again.stderr
    table.write_text("run,params,tokens,loss\nbig,1e10,2e11,2.1\nsmall,1e9,2e11,2.4\n")
    several = tool("score", out, table)
    assert several.returncode == 2 and "2 runs; pick one with --run" in several.stderr
    scored = tool("score", out, table, "--run", "big")
    assert scored.returncode == 0 and "standard deviations" in scored.stdout, scored.stderr
    assert (tmp_path / "forecasts" / "big.score.json").exists()
    record = tool("record", out.parent)
    assert record.returncode == 0 and "scored: 1" in record.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--by", "me"), "give the run"),
        (("--by", "me", "--params", "1e9"), "give the run"),
        (("--by", " ", "--params", "1e9", "--tokens", "1e9"), "--by: no name"),
        (("--by", "me", "--params", "-1", "--tokens", "1e9"), "--params: -1 is not"),
        (("--by", "me", "--params", "1e9", "--tokens", "1e9", "--group", "late"), "no law of group 'late'"),
    ],
)
def test_a_run_that_cannot_be_forecast(tmp_path, fits, arguments, message):
    done = tool("write", fits, "--out", tmp_path / "x.json", *arguments)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())
