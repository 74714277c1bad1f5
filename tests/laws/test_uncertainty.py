"""Joint and profile intervals, drop-k tables, hold-out drift and the three approaches."""

import json
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.fitting.approaches import disagreement, envelope, side_by_side
from megamm_laws.fitting.diagnostics import examine, extrapolation, hold_outs, shared_errors, warnings_of
from megamm_laws.fitting.fit import Fit, fit_group
from megamm_laws.fitting.page import to_markdown
from megamm_laws.fitting.stability import drop_table, drop_warnings
from megamm_laws.law import power_law
from megamm_laws.runs.table import RunTable, check_rows, read_runs
from megamm_laws.uncertainty.intervals import (
    deviance_scale,
    joint_intervals,
    optimum_intervals,
    profile_intervals,
    simultaneous,
)
from megamm_laws.uncertainty.model_error import Component, ModelError
from scipy.optimize import curve_fit, minimize
from scipy.stats import t as student

ROOT = Path(__file__).parents[2]
LAW = np.array([1.9, 420.0, 0.33, 1500.0, 0.36])


def table_of(params, tokens, loss, **columns) -> RunTable:
    rows = [{"params": n, "tokens": d, "loss": y} for n, d, y in zip(params, tokens, loss)]
    for name, values in columns.items():
        for row, value in zip(rows, values):
            row[name] = value
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


def isoflop_table(noise: float, seed: int = 0) -> RunTable:
    """Profiles of equal compute around the optimum."""
    flops = np.repeat(np.geomspace(1e18, 1e22, 7), 7)
    params = power_law.optimum(LAW, flops)[0] * np.tile(np.geomspace(0.25, 4, 7), 7)
    tokens = flops / (6 * params)
    rng = np.random.default_rng(seed)
    return table_of(params, tokens, power_law.predict(LAW, params, tokens) * np.exp(noise * rng.standard_normal(49)))


@pytest.fixture(scope="module")
def everything() -> Fit:
    """All 245 runs of the Chinchilla data."""
    return fit_group(read_runs(ROOT / "tests" / "data" / "chinchilla_runs.csv"), resamples=400)


# ----------------------------------------------------------------------------------------------------- drop-k


def test_drop_table_of_the_chinchilla_runs(everything):
    """alpha and beta move from .3493 / .4531 at k = 0 to .3461 / .3582 without the 10 runs of highest loss."""
    rows = {(row["dropped"], row["k"]): row for row in drop_table(everything)}
    whole, ten = rows["nothing", 0], rows["highest loss", 10]
    assert (whole["alpha"], whole["beta"]) == pytest.approx((0.3493, 0.4531), abs=2e-4)
    assert (ten["alpha"], ten["beta"]) == pytest.approx((0.3461, 0.3582), abs=1e-4)
    five = rows["highest loss", 5]
    assert five["objective"] == pytest.approx(1.0182740e-3, rel=1e-6) and five["n_runs"] == 240
    assert whole["objective"] == pytest.approx(everything.objective, rel=1e-9) and whole["outside"] == []
    assert {k for kind, k in rows if kind == "largest FLOPs"} == {1, 2, 3, 5, 10, 20}
    loss = everything.table.numbers("loss")
    highest = [name for _, name in sorted(zip(-loss, everything.table.names))[:10]]
    assert sorted(ten["runs"]) == sorted(highest)


def test_a_row_is_the_fit_of_the_remaining_runs(everything):
    table = everything.table
    row = next(r for r in drop_table(everything) if r["dropped"] == "largest FLOPs" and r["k"] == 5)
    kept = table.select(name not in row["runs"] for name in table.names)
    alone = fit_group(kept, resamples=10)
    assert row["objective"] == pytest.approx(alone.objective, rel=1e-8)
    assert (row["E"], row["alpha"], row["beta"]) == pytest.approx(tuple(alone.parameters[[0, 2, 4]]), rel=1e-5)


def test_moving_exponents_are_told_once(everything):
    rows = drop_table(everything)
    for row in rows[1:]:
        row["outside"] = ["beta"] if row["beta"] < 0.36 else []
    found = drop_warnings(rows, {"beta": [0.36, 0.6]})
    assert len([text for text in found if "highest loss, beta" in text]) == 1
    assert any("10 runs of highest loss, beta moves from 0.4530 to 0.3582" in text for text in found)


def test_small_tables_drop_few_runs():
    rows = drop_table(fit_group(isoflop_table(0.001).select(np.arange(49) % 5 == 0), resamples=20))
    assert {row["k"] for row in rows} == {0, 1, 2}


# ------------------------------------------------------------------------------------------- joint and optimum


def test_simultaneous_intervals_hold_the_draws_together():
    rng = np.random.default_rng(0)
    draws = np.exp(rng.standard_normal((4000, 6)) * [1, 2, 0.1, 1, 1, 0.5])  # skewed, independent
    low, high = simultaneous(np.ones(6), draws)
    assert ((draws >= low) & (draws <= high)).all(axis=1).mean() == pytest.approx(0.95, abs=0.002)
    point = np.percentile(draws, [2.5, 97.5], axis=0)
    assert (low <= point[0]).all() and (high >= point[1]).all()
    one = simultaneous(np.ones(1), draws[:, :1])
    np.testing.assert_allclose(one[:, 0], point[:, 0], rtol=0.02)


def test_joint_intervals_and_correlation(everything):
    joint = joint_intervals(everything)
    for name, (low, high) in joint["intervals"].items():
        assert low < everything.intervals[name][0] and high > everything.intervals[name][1]
    matrix = np.array(joint["correlation"]["matrix"])
    assert matrix[1, 2] > 0.99 and matrix[3, 4] > 0.99  # log A with alpha, log B with beta
    np.testing.assert_allclose(matrix, matrix.T)
    assert set(joint["intervals"]) == {"E", "alpha", "beta", "a"}  # never A or B alone


def test_optimum_intervals(everything):
    flops = np.array([1e21, 5e22])
    for entry, c in zip(optimum_intervals(everything, flops), flops):
        assert 6 * entry["params"] * entry["tokens"] == pytest.approx(c, rel=1e-6)
        assert entry["loss"] == pytest.approx(
            power_law.frontier_loss(everything.parameters, np.array([c]))[0], rel=1e-9
        )
        for name in ("params", "tokens", "loss"):
            (low, high), (lower, higher) = entry[f"{name}_interval"], entry[f"{name}_joint_interval"]
            assert lower <= low < entry[name] < high <= higher
    default = optimum_intervals(everything)
    assert [entry["times_largest"] for entry in default] == [1.0, 10.0]


# --------------------------------------------------------------------------------------------- profile likelihood


def test_profile_intervals_of_small_noise_are_those_of_least_squares():
    """With residuals far below delta the objective is half the sum of squares: scipy's standard errors must do."""
    table = isoflop_table(1e-4)
    fit = fit_group(table, resamples=200)
    n, d, y = (table.numbers(c) for c in ("params", "tokens", "loss"))

    def log_loss(_, E, a, alpha, b, beta):
        return np.log(E + np.exp(a - alpha * np.log(n / 1e9)) + np.exp(b - beta * np.log(d / 1e10)))

    start = [1.9, np.log(420 * 1e9**-0.33), 0.33, np.log(1500 * 1e10**-0.36), 0.36]
    values, covariance = curve_fit(log_loss, n, np.log(y), start)
    half = student.ppf(0.975, len(y) - 5) * np.sqrt(np.diag(covariance))
    found = profile_intervals(fit)
    for name, i in (("E", 0), ("alpha", 2), ("beta", 4)):
        assert found[name] == pytest.approx([values[i] - half[i], values[i] + half[i]], abs=0.08 * half[i])


def test_profile_ends_are_where_the_objective_has_risen(everything):
    """The ends of alpha and of a, by scipy on the objective with that quantity forced."""
    table = everything.table
    n, d, y = (table.numbers(c) for c in ("params", "tokens", "loss"))
    found = profile_intervals(everything)

    def lowest(alpha_of, beta_of, start) -> float:
        def objective(x):
            alpha, beta = alpha_of(x[3]), beta_of(x[3])
            p = np.exp(x[0]) + np.exp(x[1] - alpha * np.log(n / 1e9)) + np.exp(x[2] - beta * np.log(d / 1e10))
            size = np.abs(np.log(p) - np.log(y))
            return np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum() * 1e3

        for _ in range(3):
            result = minimize(objective, start, method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-9})
            start = result.x
        return result.fun / 1e3

    E, A, alpha, B, beta = everything.parameters
    start = [np.log(E), np.log(A * 1e9**-alpha), np.log(B * 1e10**-beta), beta]
    rises = [lowest(lambda x, v=v: v, lambda x: x, start) - everything.objective for v in found["alpha"]]
    start[3] = alpha + beta
    for v in found["a"]:
        rises.append(lowest(lambda x, v=v: (1 - v) * x, lambda x, v=v: v * x, start) - everything.objective)
    assert rises == pytest.approx([np.mean(rises)] * 4, rel=0.1)


def test_deviance_scale_of_known_noise():
    """Residuals all below delta: their variance. Laplace residuals of scale b far above delta: delta * b."""
    rng = np.random.default_rng(0)
    small = 1e-4 * rng.standard_normal(5000)
    assert deviance_scale(small, 0) == pytest.approx(1e-8, rel=0.05)
    wide = rng.laplace(scale=0.05, size=20000)
    assert deviance_scale(wide, 0) == pytest.approx(1e-3 * 0.05, rel=0.25)


# ------------------------------------------------------------------------------------- hold-out and approaches


def test_held_out_exponent_drifts_while_the_loss_is_predicted(everything):
    """Loss to about 1% while a moves by .04 to .06: the Chinchilla data, with and without the 5 highest losses."""
    assert everything.holdout["relative_error_loss"] < 0.015
    assert everything.holdout["a_drift"] == pytest.approx(0.044, abs=0.003)
    loss = everything.table.numbers("loss")
    fit = fit_group(everything.table.select(loss < np.sort(loss)[-5]), resamples=200)
    assert fit.holdout["relative_error_loss"] == pytest.approx(0.0105, abs=5e-4)
    assert (fit.holdout["a_without"], fit.holdout["a_with"]) == pytest.approx((0.574, 0.514), abs=1e-3)
    assert fit.holdout["a_drift_in_half_widths"] > 1
    rows = hold_outs(fit)
    assert [row["n"] for row in rows] == [24, 48, 96] and rows[1]["a_without"] == fit.holdout["a_without"]
    assert rows[2]["a_without"] == pytest.approx(0.598, abs=1e-3) and rows[2]["relative_error_loss"] < 0.01
    found = warnings_of(fit)
    assert any("held out: a is 0.574" in text for text in found)
    # Noise alone does not explain the drift; the bend that the residuals show does.
    low, high = fit.intervals["a"]
    assert low < 0.574 < high and any("neighbouring runs err together" in text for text in found)


def test_envelope():
    flops, loss = np.array([1.0, 2, 3, 4, 5, 5]), np.array([3.0, 3.5, 2.0, 2.5, 1.5, 1.0])
    assert envelope(flops, loss).tolist() == [0, 2, 5]


def test_three_approaches_agree_on_a_planted_law():
    fit = fit_group(isoflop_table(0.0005), resamples=100)
    entries = side_by_side(fit)
    assert [entry["approach"] for entry in entries] == [1, 2, 3]
    truth = 0.36 / 0.69
    assert entries[0]["a"] == pytest.approx(truth, abs=0.05)
    assert entries[1]["a"] == pytest.approx(truth, abs=0.01)
    assert entries[2]["a"] == pytest.approx(truth, abs=0.01)
    assert disagreement(entries) == []
    entries[1]["interval"] = [0.8, 0.9]
    assert "a = 0." in disagreement(entries)[0] and len(disagreement(entries)) == 2


def test_approaches_that_cannot_be_used_say_why():
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e9, 3), np.geomspace(2e9, 9e10, 4)))
    entries = side_by_side(fit_group(table_of(n, d, power_law.predict(LAW, n, d)), resamples=20))
    assert "budgets" in entries[1]["skipped"] and "a" in entries[2]


# ----------------------------------------------------------------------------------------------------- warnings


def test_few_ratios_and_far_predictions_are_told():
    n = np.geomspace(1e8, 1e10, 12)
    rng = np.random.default_rng(0)
    d = 20 * n
    fit = fit_group(
        table_of(n, d, power_law.predict(LAW, n, d) * np.exp(0.002 * rng.standard_normal(12))), resamples=50
    )
    assert any("only 1 distinct tokens per parameter" in text for text in warnings_of(fit))
    assert extrapolation(9e22, (1e18, 1e22)) is None
    assert "20 times the largest run" in extrapolation(2e23, (1e18, 1e22))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["one size", "constant loss", "random loss", "no noise"])
def test_tables_that_determine_nothing_still_give_finite_json(kind):
    rng = np.random.default_rng(1)
    for n_runs in (5, 8, 11):
        n, d = 10 ** rng.uniform(7, 9, n_runs), 10 ** rng.uniform(8, 10, n_runs)
        if kind == "one size":
            n = np.full(n_runs, 1e8)
        loss = power_law.predict(LAW, n, d)
        if kind == "constant loss":
            loss = np.full(n_runs, 3.0)
        if kind == "random loss":
            loss = rng.uniform(2, 5, n_runs)
        fit = fit_group(table_of(n, d, loss), resamples=20)
        examine(fit)
        json.dumps(fit.to_json(), allow_nan=False)
        assert kind == "no noise" or fit.warnings


def test_everything_is_on_the_page(everything):
    fit = fit_group(everything.table, resamples=100)
    examine(fit)
    page, entry = to_markdown([fit]), fit.to_json()
    assert {"drop_k", "joint", "optimum", "profile_intervals", "approaches", "condition_number"} <= set(entry)
    for part in ("| 10 | highest loss | 1.8070 | 0.3461 | 0.3582", "profile likelihood", "1, envelope", "2, isoFLOP"):
        assert part in page, part
    assert "A and B must not be read alone" in page and "half-widths of its interval" in page
    assert 1 <= fit.condition_number < 1e6


@pytest.mark.parametrize(("number", "word"), [(4, "cannot tell whether"), (5, "is each tuned alike")])
def test_few_sizes_are_not_told_to_be_mistuned(number, word):
    """Of four sizes the law takes up three; what is left says nothing of how each was tuned."""
    offsets = Component(probability=0.9, sd=0.003, interval=[0.0, 0.01])
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e10, number), np.geomspace(2e9, 2e11, 5)))
    loss = power_law.predict(LAW, n, d) * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    fit = fit_group(table_of(n, d, loss), resamples=20)
    none = Component(probability=0.0, sd=0.0, interval=[0.0, 0.0])
    fit.model_error = ModelError(bend=none, offsets=offsets)
    (text,) = shared_errors(fit)
    assert word in text and ("err together, by" in text) == (number > 4)
