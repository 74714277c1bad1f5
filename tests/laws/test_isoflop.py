"""IsoFLOP optima: the published exponents, closed forms, and what is said about bad profiles."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.fitting.isoflop import FLOOR, NOISE, fit_isoflop_table, fit_isoflops
from megamm_laws.fitting.isoflop_budgets import at_budget, budgets, noise_of_curves
from megamm_laws.fitting.pictures import isoflop_chart
from megamm_laws.law import power_law
from megamm_laws.runs.table import RunTable, check_rows, read_runs

from megamm.errors import InputError

ROOT = Path(__file__).parents[2]
LAW = np.array([1.8, 480.0, 0.35, 2100.0, 0.37])


def made(budget_flops, factors, law=LAW, shift=1.0, **columns) -> RunTable:
    rows = []
    for flops in budget_flops:
        for factor in factors:
            n = float(power_law.optimum(law, np.array([flops]))[0][0] * shift * factor)
            d = flops / (6 * n)
            row = {"params": n, "tokens": d, "loss": float(power_law.predict(law, [n], [d])[0])}
            rows.append(row | columns)
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


@pytest.mark.parametrize(
    ("name", "exponent", "interval"),
    [("tuned", 0.4969, (0.490, 0.505)), ("cosine", 0.5715, (0.560, 0.589))],
)
def test_exponents_of_porian(name, exponent, interval):
    """Porian et al. 2024, RefinedWeb: exponents and 95% intervals of the authors' method."""
    fit = fit_isoflops(read_runs(ROOT / "tests" / "data" / f"isoflop_refinedweb_{name}.csv"), noise=NOISE)
    assert fit.exponents["a"] == pytest.approx(exponent, abs=0.003)
    assert fit.intervals["a"] == pytest.approx(interval, abs=0.003)
    assert fit.exponents["a"] + fit.exponents["b"] == pytest.approx(1.0, abs=0.01)
    assert len(fit.used) == 12 and len(fit.exponent_draws) == 1000


def test_planted_law_gives_its_closed_form():
    """On the law itself a = beta / (alpha + beta), N* and L* are known."""
    flops = np.geomspace(1e18, 1e21, 7)
    fit = fit_isoflops(made(flops, np.geomspace(0.1, 10, 21)), noise=1e-5, draws=50)
    assert fit.exponents["a"] == pytest.approx(0.37 / 0.72, abs=2e-3)
    assert fit.exponents["b"] == pytest.approx(0.35 / 0.72, abs=2e-3)
    assert fit.parabola_a == pytest.approx(0.37 / 0.72, abs=2e-3)
    best = np.exp([profile.optimum for profile in fit.profiles])
    np.testing.assert_allclose(best[:, 0], power_law.optimum(LAW, flops)[0], rtol=0.05)
    np.testing.assert_allclose(best[:, 2], power_law.frontier_loss(LAW, flops), rtol=1e-4)
    slope = np.polyfit(np.log(flops), np.log(power_law.frontier_loss(LAW, flops)), 1)[0]
    assert fit.exponents["c"] == pytest.approx(slope, rel=0.05)  # other weights
    assert fit.warnings == []


def test_no_interval_is_narrower_than_the_sizes_can_tell():
    """On the cosine runs the minimum of the smallest budget sits at a kink that hardly a draw leaves."""
    fit = fit_isoflops(read_runs(ROOT / "tests" / "data" / "isoflop_refinedweb_cosine.csv"), noise=NOISE)
    bars = [series.y for series in isoflop_chart(fit, "isoflops").panels[1].series if series.name == "95%"]
    for profile, budget, bar in zip(fit.profiles, fit.to_json()["budgets"], bars, strict=True):
        low, high = budget["params_interval"]
        assert [low, high] == pytest.approx(bar)
        step = np.ptp(np.log(profile.params)) / (len(profile.params) - 1)
        assert np.log(high / low) >= 2 * 1.95 * FLOOR * step
    low, high = np.percentile(fit.profiles[0].draws[:, 0], [2.5, 97.5])
    assert low == high


def test_uncooled_and_intermediate_runs_are_told():
    factors = np.geomspace(0.1, 10, 9)
    for columns, expected in (({"cooled": "false"}, "not cooled down"), ({"checkpoint": "intermediate"}, "intermed")):
        found = fit_isoflops(made(np.geomspace(1e18, 1e21, 4), factors, **columns), draws=50).warnings
        assert any("36 of 36 runs" in text and expected in text for text in found)


def test_noise_widens_the_interval():
    table = made(np.geomspace(1e18, 1e21, 6), np.geomspace(0.1, 10, 9))
    widths = [np.ptp(fit_isoflops(table, noise=noise).intervals["a"]) for noise in (0.001, 0.004)]
    assert widths[1] > 1.5 * widths[0]


def test_draws_follow_seed_and_group():
    table = made([1e19, 1e20], np.geomspace(0.2, 5, 7))
    one, same, other, group = (
        fit_isoflops(table, draws=20, seed=seed, group=name).exponent_draws
        for seed, name in ((1, "x"), (1, "x"), (2, "x"), (1, "y"))
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one != group).any()


def test_budgets_are_told_apart():
    table = made([1e18, 1.02e18, 2e18, 8e18], [0.5, 1.0, 2.0])
    assert [len(part) for part in budgets(table)] == [6, 3, 3]


def jittered(jitter: float, noise: float, seed: int = 0) -> RunTable:
    """8 budgets of 9 sizes; the FLOPs of each run are off by ``jitter``, spent on tokens."""
    rng = np.random.default_rng(seed)
    rows = made(np.geomspace(1e18, 1e21, 8), 1.5 ** (np.arange(-4, 5) + 0.3)).rows
    for row in rows:
        row["tokens"] *= np.exp(jitter * rng.standard_normal())
        row["flops"] = 6 * row["params"] * row["tokens"]
        row["loss"] = float(power_law.predict(LAW, [row["params"]], [row["tokens"]])[0] + noise * rng.standard_normal())
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


@pytest.mark.parametrize("jitter", [0.02, 0.04])
def test_budgets_that_jitter_stay_whole(jitter):
    for seed in range(5):
        assert [len(part) for part in budgets(jittered(jitter, 0.0, seed))] == [9] * 8


def test_dense_budgets_are_not_joined():
    """A tenth apart, without jitter."""
    assert [len(part) for part in budgets(made(1e19 * 1.1 ** np.arange(6), [0.5, 1.0, 2.0]))] == [3] * 6


def test_losses_are_moved_to_the_budget():
    """By the law itself the runs are where they would be at equal FLOPs, and a is that of the law."""
    table = jittered(0.04, 0.0)
    level = at_budget(budgets(table)[3], "loss", LAW)
    flops = 6 * level.numbers("params") * level.numbers("tokens")
    np.testing.assert_allclose(flops, np.median(flops), rtol=1e-12)
    np.testing.assert_allclose(
        level.numbers("loss"), power_law.predict(LAW, level.numbers("params"), level.numbers("tokens")), rtol=1e-12
    )
    even = fit_isoflops(jittered(0.0, 0.0), noise=1e-5, draws=20).exponents["a"]
    assert fit_isoflops(table, noise=1e-5, draws=20).exponents["a"] == pytest.approx(even, abs=0.01)
    assert even == pytest.approx(0.37 / 0.72, abs=0.01)


def test_noise_is_taken_from_the_curves():
    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(0, 4, (200, 9)), axis=1) + np.arange(9)
    smooth = 3 + 0.1 * (x - 6) ** 2 - 0.01 * (x - 6) ** 3
    assert noise_of_curves(list(zip(x, smooth))) < 1e-10
    assert noise_of_curves(list(zip(x, smooth + 0.01 * rng.standard_normal(x.shape)))) == pytest.approx(0.01, rel=0.05)
    assert noise_of_curves([(x[0, :3], smooth[0, :3])]) is None
    assert fit_isoflops(jittered(0.0, 0.01), draws=20).noise == pytest.approx(0.01, rel=0.3)
    assert fit_isoflops(jittered(0.0, 0.0), draws=20).noise == NOISE
    rough = fit_isoflops(read_runs(ROOT / "tests" / "data" / "isoflop_refinedweb_tuned.csv"))
    assert 0.005 < rough.noise < 0.015 and rough.intervals["a"][0] < 0.4969 < rough.intervals["a"][1]


def test_a_chain_of_small_gaps_is_not_one_budget():
    """Each run has 4% more FLOPs than the one before, 32% in all: joined, they would shift N* unseen."""
    table = made(1e19 * 1.04 ** np.arange(8), [1.0])
    assert [len(part) for part in budgets(table)] == [2, 2, 2, 2]


def test_uneven_flops_within_a_budget_are_told():
    table = made([1e18, 1e19, 1e20, 1e21], np.geomspace(0.2, 5, 7))
    assert fit_isoflops(table, draws=20).warnings == []
    for row, more in zip(table.rows, np.linspace(1, 1.04, 7)):
        row["flops"] *= more
    fit = fit_isoflops(table, draws=20)
    (text,) = fit.warnings
    assert "1 of 4 budgets have runs that differ in FLOPs, by up to 4.0%" in text
    assert fit.to_json()["budgets"][0]["flops_range"] == pytest.approx([1e18, 1.04e18])


def test_minimum_at_the_edge_is_not_used_and_told():
    rows = made([1e18, 1e19, 1e20], np.geomspace(0.2, 5, 7)).rows
    rows += made([1e21], [1.5, 2, 3, 4]).rows + made([1e22], [0.1, 0.2, 0.3, 0.4]).rows
    fit = fit_isoflops(check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2)))))
    text = "\n".join(fit.warnings)
    assert len(fit.used) == 3 and len(fit.profiles) == 5
    assert "1e+21 FLOPs: the minimum lies at the edge, the smallest size: add smaller ones; not used" in text
    assert "1e+22 FLOPs: the minimum lies at the edge, the largest size: add larger ones; not used" in text
    assert "only 3 budgets" in text
    assert fit.to_json()["budgets"][3]["left_out"].startswith("the minimum lies at the edge")


def test_spoilt_and_repeated_runs_are_told():
    table = made([1e18, 1e19, 1e20, 1e21], np.geomspace(0.2, 5, 9))
    table.rows[4]["loss"] *= 1.05  # the lowest run of the first budget
    table.rows.append(dict(table.rows[12], loss=table.rows[12]["loss"] + 0.01, run="again"))
    table.lines.append(38)
    text = "\n".join(fit_isoflops(table).warnings)
    assert "1e+18 FLOPs: more than one minimum" in text and "not convex" not in text
    assert "line 38 (run again) was left out" in text


def test_concave_profile_is_told():
    table = made([1e18, 1e19, 1e20, 1e21], np.geomspace(0.2, 5, 5))
    for row, loss in zip(table.rows, (3.01, 3.5, 3.0, 3.5, 3.01)):
        row["loss"] = loss
    assert "1e+18 FLOPs: the profile is not convex" in "\n".join(fit_isoflops(table).warnings)


def test_small_budgets_and_missing_losses_are_told():
    table = made([1e18, 1e19, 1e20, 1e21], np.geomspace(0.2, 5, 7))
    table.rows[0]["loss_text"] = None
    for row in table.rows[1:]:
        row["loss_text"] = row["loss"]
    extra = made([1e23], [0.5, 1.0])
    table.rows += extra.rows
    table.lines += [30, 31]
    text = "\n".join(fit_isoflops(table).warnings)
    assert "line 30, line 31: fewer than 3 sizes at 1e+23 FLOPs" in text
    assert "line 2 has no loss_text" in "\n".join(fit_isoflops(table, loss_column="loss_text").warnings)


def test_groups_and_columns():
    rows = [r for g in ("early", "late") for r in made([1e18, 1e19], np.geomspace(0.2, 5, 7), architecture=g).rows]
    for row, number in zip(rows, range(99)):
        row["run"], row["loss_text"] = f"r{number}", row["loss"] + 0.1
    table = check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))
    fits = fit_isoflop_table(table, losses="all", draws=20)
    assert [(f.group, f.loss_column) for f in fits] == [
        (group, column) for group in ("early", "late") for column in ("loss", "loss_text")
    ]


@pytest.mark.parametrize(
    ("flops", "factors", "options", "expected"),
    [
        ([1e18], [0.5, 1, 2], {}, "1 budgets with a minimum"),
        ([1e18, 1e19], [2, 3, 4], {}, "the smallest size"),
        ([1e18, 1e19], [1, 2], {}, "at least 3 sizes"),
        ([1e18, 1e19], [0.5, 1, 2], {"draws": 3}, "--draws"),
        ([1e18, 1e19], [0.5, 1, 2], {"draws": 100_000_000}, "--draws: 100000000 draws cannot give"),
        ([1e18, 1e19], [0.5, 1, 2], {"noise": -1}, "--noise"),
        ([1e18, 1e19], [0.5, 1, 2], {"loss_column": "loss_x"}, "no loss column 'loss_x'"),
    ],
)
def test_bad_input(flops, factors, options, expected):
    with pytest.raises(InputError, match=expected):
        fit_isoflops(made(flops, factors), **options)


def test_tool_writes_whole_folders(tmp_path):
    source, out = ROOT / "tests" / "data" / "isoflop_refinedweb_tuned.csv", tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "fit_isoflops.py"), str(source), "--out"]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((out / "isoflops.json").read_text())["fits"]
    assert set(entry["exponents"]) == set(entry["intervals"]) == {"a", "b", "c"}
    assert len(entry["budgets"]) == 12 and entry["n_runs"] == 121
    assert all(b["params_interval"][0] <= b["params"] <= b["params_interval"][1] for b in entry["budgets"])
    assert "a (N* ~ C^a) | 0.49" in (out / "isoflops.md").read_text()
    assert (out / "isoflops.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "isoflops.pdf").read_bytes().startswith(b"%PDF")
    bad = subprocess.run([*command, str(tmp_path / "bad"), "--draws", "2"], capture_output=True, text=True)
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1 and not (tmp_path / "bad").exists()
