"""Frontiers of two groups against each other."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.comparison.compare import compare, crossover_sentence, gain_at, verdict
from megamm_laws.comparison.outputs import compare_fits, to_json, to_markdown
from megamm_laws.comparison.recounted import cost_of
from megamm_laws.fitting.fits_file import read_laws
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law
from megamm_laws.runs import conventions
from megamm_laws.runs.table import RunTable, check_rows, read_runs, write_runs
from scipy.optimize import brentq, minimize_scalar

from megamm.errors import InputError

ROOT = Path(__file__).parents[2]

BASE = np.array([1.9, 420.0, 0.33, 1500.0, 0.36])


def law(name: str, parameters=BASE, spread: float = 0.0, seed: int = 0, kappa: float = 1.0, flops=(1e18, 1e22)) -> Law:
    """A law whose draws differ in E and in the size of the terms by ``spread``, relatively."""
    draws = np.tile(np.asarray(parameters, float), (400, 1))
    noise = np.random.default_rng(seed).standard_normal((400, 2))
    draws[:, 0] *= 1 + spread * noise[:, 0]
    draws[:, 1] *= 1 + spread * noise[:, 1]
    return Law(name=name, parameters=np.asarray(parameters, float), draws=draws, kappa=kappa, flops_range=flops)


CROSSING = np.array([2.0, 300.0, 0.33, 1100.0, 0.36])  # lower at small compute, higher at large


def crossing_point() -> float:
    def difference(log_c):
        c = np.array([np.exp(log_c)])
        return (power_law.frontier_loss(BASE, c) - power_law.frontier_loss(CROSSING, c))[0]

    return float(np.exp(brentq(difference, np.log(1e17), np.log(1e24))))


def test_equal_laws_are_not_separable():
    result = compare(law("early", spread=0.01, seed=1), law("late", spread=0.01, seed=2))
    assert "not separable at 95%" in verdict(result)
    assert result.crossover is None
    np.testing.assert_allclose(result.gain, 1.0, rtol=1e-9)
    assert (result.gain_interval[0] < 1).all() and (result.gain_interval[1] > 1).all()


def test_simultaneous_band_holds_whole_curves():
    first, second = law("early", spread=0.01, seed=1), law("late", CROSSING, spread=0.01, seed=2)
    result = compare(first, second)
    assert (result.simultaneous[0] <= result.pointwise[0]).all()
    assert (result.simultaneous[1] >= result.pointwise[1]).all()
    fresh = law("early", spread=0.01, seed=11).draws, law("late", CROSSING, spread=0.01, seed=12).draws
    curves = power_law.frontier_loss(fresh[0], result.flops) - power_law.frontier_loss(fresh[1], result.flops)
    inside = ((curves >= result.simultaneous[0]) & (curves <= result.simultaneous[1])).all(axis=1).mean()
    assert 0.90 < inside < 0.99
    pointwise = ((curves >= result.pointwise[0]) & (curves <= result.pointwise[1])).all(axis=1).mean()
    assert pointwise < inside


def test_a_clear_lead_is_named_with_its_range():
    worse = BASE * [1.05, 1, 1, 1, 1]
    result = compare(law("late", worse, spread=1e-3), law("early", spread=1e-3, seed=3))
    assert verdict(result) == "early is ahead of late from 1e+18 to 1e+22 FLOPs at 95% (simultaneous band)."
    assert (result.difference > 0).all() and (result.gain < 1).all()


def test_crossover_and_its_interval():
    true = crossing_point()
    assert 1e18 < true < 1e22
    result = compare(law("early", spread=5e-4, seed=1), law("late", CROSSING, spread=5e-4, seed=2))
    assert result.crossover.flops == pytest.approx(true, rel=1e-2)
    low, high = result.crossover.interval
    assert low < true < high
    text = verdict(result)
    assert text.index("late is ahead of early from 1e+18") < text.index("early is ahead of late from")
    assert text.count("not separable at 95%") == 1


def test_crossover_interval_is_open_where_the_range_ends():
    true = crossing_point()
    near = (true / 1.5, true * 1e3)
    result = compare(law("early", spread=5e-3, seed=1), law("late", CROSSING, spread=5e-3, seed=2), near)
    assert result.crossover.interval[0] is None and result.crossover.interval[1] > true


def test_gain_is_the_ratio_of_flops_at_equal_loss():
    result = compare(law("a"), law("b", kappa=1.25))
    np.testing.assert_allclose(result.gain, 1.25, rtol=1e-9)  # b counts 25% more FLOPs for the same training
    better = compare(law("a"), law("b", BASE * [1.5, 1, 1, 1, 1]))
    index = np.flatnonzero(np.isfinite(better.gain))[0]
    assert law("a").frontier(better.flops)[index] == pytest.approx(
        power_law.frontier_loss(BASE * [1.5, 1, 1, 1, 1], better.flops[index : index + 1] * better.gain[index])[0]
    )
    assert np.isinf(better.gain[-1])  # below the other's E: no compute suffices


def test_ranges():
    left, right = law("a", flops=(1e18, 1e20)), law("b", flops=(1e19, 1e22))
    result = compare(left, right)
    assert result.flops[[0, -1]] == pytest.approx([1e19, 1e20]) and not result.extrapolated
    wide = compare(left, right, (1e18, 1e23))
    assert wide.extrapolated and "extrapolated beyond the runs" in verdict(wide)
    apart = compare(law("a", flops=(1e18, 1e19)), law("b", flops=(1e21, 1e22)))
    assert apart.flops[[0, -1]] == pytest.approx([1e18, 1e22]) and apart.extrapolated
    with pytest.raises(InputError, match="empty"):
        compare(left, right, (1e20, 1e19))


def test_draws_of_shared_fits_stay_together():
    """Where both move alike from resample to resample, their difference does not."""
    first, second = law("early", spread=0.01), law("late", BASE * [1.02, 1, 1, 1, 1], spread=0.01)
    apart = compare(first, second)
    together = compare(replace(first, form="shared"), replace(second, form="shared"))
    assert np.ptp(together.pointwise, axis=0).max() < 0.1 * np.ptp(apart.pointwise, axis=0).min()
    one_of_them = compare(replace(first, form="shared"), second)
    np.testing.assert_array_equal(one_of_them.pointwise, apart.pointwise)


def test_shared_form_is_read_back(tmp_path):
    table = check_rows(RunTable(path="made.csv", rows=ladder("early", BASE) + ladder("late", BASE), lines=range(2, 72)))
    fits = fit_table(table, form="shared", resamples=10)
    write_fits(tmp_path, fits)
    assert [one.form for one in read_laws(tmp_path).values()] == ["shared", "shared"]
    assert fits[0].law.form == "shared"


def test_read_laws_names_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"run tools/fit_scaling_laws\.py again"):
        read_laws(tmp_path)


# ------------------------------------------------------------------------------------------ counts of FLOPs


def cheapest(parameters: np.ndarray, flops: float, kappa: float, growth: float, reference: float) -> float:
    """The lowest loss at C = 6 kappa (N/N0)^growth N D, by search over N."""

    def loss(log_n: float) -> float:
        n = np.exp(log_n)
        d = flops / (6 * kappa * (n / reference) ** growth * n)
        return parameters[0] + parameters[1] * n ** -parameters[2] + parameters[3] * d ** -parameters[4]

    return minimize_scalar(loss, bounds=(np.log(1e6), np.log(1e13)), method="bounded", options={"xatol": 1e-10}).fun


@pytest.mark.parametrize("growth", [0.0, 0.15, -0.2])
def test_frontier_where_cost_changes_with_size(growth):
    priced = replace(law("late", kappa=1.3), growth=growth, reference=3e9)
    flops = np.array([1e18, 1e20, 3e22])
    expected = [cheapest(BASE, c, 1.3, growth, 3e9) for c in flops]
    np.testing.assert_allclose(priced.frontier(flops), expected, rtol=1e-9)
    np.testing.assert_allclose(priced.flops_for(np.array(expected)), flops, rtol=1e-6)


def test_cost_is_read_off_the_runs():
    params, tokens = np.repeat(np.geomspace(1e8, 1e10, 5), 3), np.tile([1e9, 1e10, 1e11], 5)
    cost = cost_of(params, tokens, 6 * 1.2 * (params / 1e9) ** -0.1 * params * tokens)
    assert (cost.kappa, cost.growth, cost.reference) == pytest.approx((1.2, -0.1, 1e9)) and cost.misfit < 1e-9
    one_size = cost_of(np.full(3, 1e9), np.array([1e9, 1e10, 1e11]), 6e9 * np.array([1.1e9, 1.2e10, 1.3e11]))
    assert one_size.growth == 0 and one_size.misfit > 0.05


def ladder(architecture: str, parameters: np.ndarray, encoder: float = 0.0, noise: float = 5e-4) -> list[dict]:
    """Runs on a grid; the encoder is a share of the parameters and sees half of the positions."""
    rng = np.random.default_rng(len(architecture))
    rows = []
    for i, (n, d) in enumerate((n, d) for n in np.geomspace(2e8, 8e9, 7) for d in np.geomspace(4e9, 4e11, 5)):
        loss = float(power_law.predict(parameters, np.array([n]), np.array([d]))[0]) * np.exp(rng.normal(0, noise))
        vision = encoder * n
        row = {"run": f"{architecture}-{i}", "architecture": architecture, "params": n, "tokens": d, "loss": loss}
        row |= {"params_active": n, "params_vision": vision, "tokens_vision": d / 2}
        rows.append(conventions.convert_row(row, "paper"))
    return rows


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Folder of fits and table of two ladders whose laws are equal, one with an encoder."""
    folder = tmp_path_factory.mktemp("compare")
    write_runs(folder / "runs.csv", ladder("early", BASE) + ladder("late", BASE, encoder=0.2))
    write_fits(folder / "fits", fit_table(read_runs(folder / "runs.csv"), resamples=200))
    return folder


def test_counting_the_encoder_decides(fitted):
    report = compare_fits(fitted / "fits", read_runs(fitted / "runs.csv"), at=[1e20])
    assert [one.counting for one in report.accounted] == ["counted", "decoder"]
    assert report.notes == ["every matrix product counted: some runs have no flops_exact; collect them again"]
    # Equal laws: the cost of a model is all the difference. 0.8 N D + 0.2 N D/2 and 0.8 N D, against N D.
    counted, decoder = (report.gains[name][0] for name in ("counted", "decoder"))
    assert counted.ratio == pytest.approx(0.9, rel=0.02) and decoder.ratio == pytest.approx(0.8, rel=0.02)
    assert counted.interval[0] < 0.9 < counted.interval[1] and decoder.interval[0] < 0.8 < decoder.interval[1]
    assert re.match(r"late needs 0\.8\d*x \[.*\] the FLOPs of early for the same loss at 1e\+20", decoder.sentence)
    assert decoder.beyond < 1 and "beyond" not in decoder.sentence
    costs = {law.name: law.kappa for law in report.accounted[0].laws}
    assert costs == pytest.approx({"early": 1.0, "late": 0.9})


def test_what_the_fits_warn_of_stands_beside_the_verdict(fitted, tmp_path):
    fits = json.loads((fitted / "fits" / "fits.json").read_text())
    assert [fit["group"] for fit in fits["fits"]] == ["early", "late"]
    fits["fits"][0]["warnings"] = []
    fits["fits"][1]["warnings"] = ["only 3 trunks"]
    (tmp_path / "fits.json").write_text(json.dumps(fits))
    shutil.copy(fitted / "fits" / "bootstrap.npz", tmp_path)
    report = compare_fits(tmp_path, read_runs(fitted / "runs.csv"))
    assert report.warnings == ["from the fit of late: only 3 trunks"] == to_json(report)["warnings"]
    assert "- Warning from the fit of late: only 3 trunks" in to_markdown(report)
    command = (tmp_path, "--runs", fitted / "runs.csv", "--out", tmp_path / "out")
    assert "warning from the fit of late: only 3 trunks" in tool(*command).stderr


def test_gain_beyond_the_runs_and_beyond_the_law():
    first, second = law("early", spread=1e-3), law("late", BASE * [1.05, 1, 1, 1, 1], spread=1e-3, seed=2)
    gain = gain_at(first, second, 1e23)
    assert gain.beyond == pytest.approx(10) and gain.sentence.endswith("at 1e+23, 10x beyond the runs")
    assert gain.interval[0] < gain.ratio < gain.interval[1]
    hopeless = gain_at(first, law("late", BASE * [2, 1, 1, 1, 1]), 1e22)
    assert hopeless.sentence == "late never reaches the loss of early at 1e+22 FLOPs"


def test_published_frontiers_of_early_and_late_fusion():
    """L = 29.574 C^-.0492 (early) and 29.923 C^-.0494 (late), arXiv 2504.07951: 1.04x at 1e21, no crossing near."""

    def published(name: str, K: float, g: float) -> Law:
        # With E = 0, alpha = beta = 2g and A = B the frontier is 2 A (C/6)^-g.
        parameters = np.array([0.0, K / 2 / 6**g, 2 * g, K / 2 / 6**g, 2 * g])
        return Law(name=name, parameters=parameters, draws=parameters[None], kappa=1.0, flops_range=(1e19, 1e22))

    early, late = published("early", 29.574, 0.0492), published("late", 29.923, 0.0494)
    np.testing.assert_allclose(early.frontier(np.array([1e21])), 29.574 * 1e21**-0.0492, rtol=1e-12)
    equal = (29.923 / (29.574 * 1e21**-0.0492)) ** (1 / 0.0494)
    assert gain_at(early, late, 1e21).ratio == pytest.approx(equal / 1e21) == pytest.approx(1.043, abs=1e-3)
    result = compare(early, late, (1e19, 1e28))
    assert result.crossover.flops == pytest.approx((29.923 / 29.574) ** (1 / 0.0002), rel=0.02)
    assert crossover_sentence(compare(early, late)).startswith("crossover: none within range")


def test_crossover_sentences():
    crossing = compare(law("early", spread=5e-4, seed=1), law("late", CROSSING, spread=5e-4, seed=2))
    found = re.fullmatch(r"crossover: (\S+) FLOPs \[(\S+), (\S+)\]", crossover_sentence(crossing))
    low, high = float(found[2]), float(found[3])
    assert low < crossing_point() < high and crossing.crossing_share > 0.9
    apart = compare(law("early", spread=1e-4), law("late", BASE * [1.05, 1, 1, 1, 1], spread=1e-4, seed=3))
    assert crossover_sentence(apart) == "crossover: none within range, 1e+18 to 1e+22 FLOPs"
    unsure = compare(law("early", spread=1e-2, seed=1), law("late", spread=1e-2, seed=2))
    assert re.search(r"none within range.*\(\d+% of the resamples cross in it\)", crossover_sentence(unsure))


def tool(*arguments, name: str = "compare_groups") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_tool_writes_the_comparison(fitted, tmp_path):
    out = tmp_path / "out"
    done = tool(fitted / "fits", "--runs", fitted / "runs.csv", "--out", out, "--at", "1e20,1e23")
    assert done.returncode == 0, done.stderr
    assert "front end not counted:" in done.stdout and "late needs" in done.stdout
    document = json.loads((out / "comparison.json").read_text())
    entry = document["accountings"][1]
    assert entry["counting"] == "decoder" and len(entry["gains"]) == 2 and entry["gains"][1]["beyond_runs"] > 1
    assert len(entry["simultaneous"][0]) == len(entry["flops"]) == 256
    page = (out / "comparison.md").read_text()
    assert entry["gains"][0]["sentence"] in page and "## front end counted" in page
    assert (out / "lead_counted.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "lead_decoder.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groups", "early,mid"], "--groups: early,mid: give two different ones of early, late"),
        (["--at", "lots"], "--at: 'lots' is not a number of FLOPs above zero"),
        (["--range", "1e20", "1e19"], "is empty"),
        (["--range", "1e20", "inf"], "--range: inf FLOPs are not those of a training run"),
        (["--range", "1e-300", "1e300"], "--range: 1e-300 FLOPs are not those of a training run, 1e09 to 1e32"),
        (["--at", "1e300"], "--at: 1e+300 FLOPs are not those of a training run"),
        (["--loss", "loss_text"], "fits of loss_text for no group"),
    ],
)
def test_tool_refuses(fitted, tmp_path, options, message):
    done = tool(fitted / "fits", "--runs", fitted / "runs.csv", "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_runs_must_be_those_of_the_fits(fitted, tmp_path):
    write_runs(tmp_path / "runs.csv", ladder("early", BASE) + ladder("late", BASE, encoder=0.3))
    with pytest.raises(InputError, match=r"the runs of late are not those that .*: column flops: "):
        compare_fits(fitted / "fits", read_runs(tmp_path / "runs.csv"))


@pytest.mark.parametrize("tool_name", ["compare_groups", "plot_fits"])
def test_a_fitted_run_must_not_be_missing(fitted, tmp_path, tool_name):
    """One from the middle of the ladder, so that the ranges stay."""
    early, late = ladder("early", BASE), ladder("late", BASE, encoder=0.2)
    write_runs(tmp_path / "runs.csv", [*early[:17], *early[18:], *late])
    done = tool(fitted / "fits", "--runs", tmp_path / "runs.csv", "--out", tmp_path / "out", name=tool_name)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "the runs of early are not those that" in done.stderr and "34 with loss, expected 35" in done.stderr
