"""Fits of the scaling law: the optimum, the bootstrap, the warnings and the written folder."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megamm_laws.fitting import fit as fitting
from megamm_laws.fitting.diagnostics import warnings_of
from megamm_laws.fitting.fits_file import read_laws
from megamm_laws.fitting.outputs import fit_table
from megamm_laws.law import power_law, solver
from megamm_laws.runs.table import RunTable, check_rows, read_runs
from scipy.optimize import approx_fprime, minimize, nnls

from megamm.errors import InputError

ROOT = Path(__file__).parents[2]
PLANTED = np.array([1.9, 420.0, 0.33, 1500.0, 0.36])
PUBLISHED_ERRORS = {"E": 0.0257, "alpha": 0.0154, "beta": 0.0206}


def make_table(params, tokens, loss, **columns) -> RunTable:
    rows = [{"params": n, "tokens": d, "loss": y} for n, d, y in zip(params, tokens, loss)]
    for name, values in columns.items():
        for row, value in zip(rows, values):
            row[name] = value
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


def planted(noise: float = 0.0, seed: int = 0, sizes: int = 6, lengths: int = 6, law=PLANTED, **columns) -> RunTable:
    params, tokens = (
        x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, sizes), np.geomspace(1e9, 1e12, lengths), indexing="ij")
    )
    loss = power_law.predict(law, params, tokens)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return make_table(params, tokens, loss, **columns)


@pytest.fixture(scope="module")
def chinchilla() -> RunTable:
    """The 240 runs left when the 5 highest losses are dropped."""
    runs = read_runs(ROOT / "tests" / "data" / "chinchilla_runs.csv")
    return runs.select(runs.numbers("loss") < np.sort(runs.numbers("loss"))[-5])


@pytest.fixture(scope="module")
def chinchilla_fit(chinchilla) -> fitting.Fit:
    return fitting.fit_group(chinchilla, resamples=4000)


# ------------------------------------------------------------------------------------------- the reference fit


def test_chinchilla_optimum(chinchilla, chinchilla_fit):
    assert len(chinchilla) == 240
    assert chinchilla_fit.objective <= 1.0182741e-3
    assert chinchilla_fit.starts_at_optimum >= 0.9 * chinchilla_fit.starts_total
    assert chinchilla_fit.gradient_norm < 1e-10
    E, A, alpha, B, beta = chinchilla_fit.parameters
    assert (E, A, alpha, B, beta) == pytest.approx((1.81722, 477.8, 0.34731, 2143.4, 0.36717), rel=1e-4)


def test_chinchilla_bootstrap(chinchilla_fit):
    errors = chinchilla_fit.to_json()["standard_errors"]
    for name, published in PUBLISHED_ERRORS.items():
        assert errors[name] == pytest.approx(published, rel=0.03), name
    assert chinchilla_fit.noise_intervals["a"] == pytest.approx((0.4805, 0.5562), abs=0.004)


def test_no_other_minimiser_improves_on_the_optimum(chinchilla, chinchilla_fit):
    """The objective written once more, plainly, and descended by scipy from the optimum found."""
    n, d, y = (chinchilla.numbers(c) for c in ("params", "tokens", "loss"))

    def objective(x: np.ndarray) -> float:
        size = abs(np.log(x[0] + np.exp(x[1] - x[2] * np.log(n)) + np.exp(x[3] - x[4] * np.log(d))) - np.log(y))
        return float(np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum())

    start = chinchilla_fit.parameters.copy()
    start[[1, 3]] = np.log(start[[1, 3]])
    value = objective(start)
    assert value == pytest.approx(chinchilla_fit.objective, rel=1e-12)
    assert fitting.huber_log(chinchilla_fit.parameters, chinchilla) == pytest.approx(value, rel=1e-12)
    for method in ("Nelder-Mead", "L-BFGS-B", "Powell"):
        for factor in (1.0, 1.001):
            found = minimize(objective, start * factor, method=method, options={"maxiter": 2000})
            assert found.fun > value - 1e-12, method


def test_every_start_of_a_resample_agrees(chinchilla, chinchilla_fit):
    """The bootstrap starts at the full optimum; the whole grid of starts finds nothing better."""
    problem = fitting.fit_problem(chinchilla, "loss")
    rng = np.random.default_rng(3)
    weights, _ = fitting.resample(chinchilla, fitting.cluster_labels(chinchilla), 20, rng)
    one = problem.to_theta(chinchilla_fit.parameters)
    _, quick = solver.minimise(problem, np.tile(one, (20, 1)), weights)
    grid = solver.starts(problem)
    _, thorough = solver.minimise(problem, np.tile(grid, (20, 1)), np.repeat(weights, len(grid), axis=0))
    assert (quick <= thorough.reshape(20, -1).min(axis=1) * (1 + 1e-7)).all()


# ------------------------------------------------------------------------------------------------ the pieces

thetas = st.tuples(st.floats(0.1, 3), st.floats(-3, 1), st.floats(0.1, 1), st.floats(-3, 1), st.floats(0.1, 1))


@given(thetas, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_derivatives_by_finite_differences(theta, seed):
    table = planted(noise=0.3, seed=seed, sizes=4, lengths=3)
    problem = fitting.fit_problem(table, "loss")
    weights = np.random.default_rng(seed).integers(0, 4, (1, len(table))).astype(float)
    theta, delta = np.array(theta), 0.2
    residual = np.log(power_law.predict(problem.to_parameters(theta), table.numbers("params"), table.numbers("tokens")))
    if (np.abs(np.abs(residual - problem.y) - delta) < 1e-3).any():
        return  # the second derivative jumps at delta

    def at(x):
        return solver.evaluate(problem, x[None], weights, delta)

    _, gradient, hessian, reweighted = at(theta)
    numeric = [(at(theta + h)[0][0] - at(theta - h)[0][0]) / 2e-6 for h in 1e-6 * np.eye(5)]
    np.testing.assert_allclose(gradient[0], numeric, rtol=1e-5, atol=1e-7)
    second = approx_fprime(theta, lambda x: at(x)[1][0], 1e-7)
    np.testing.assert_allclose(hessian[0], second, rtol=1e-3, atol=1e-4)
    assert (np.linalg.eigvalsh(reweighted[0]) >= -1e-9).all()


def test_starts_solve_the_non_negative_least_squares():
    table = planted(noise=0.05, sizes=4, lengths=4)
    problem = fitting.fit_problem(table, "loss")
    scale = np.exp(-problem.y)
    floor = 1e-2 * np.exp(np.median(problem.y))
    for E, a, alpha, b, beta in solver.starts(problem):
        X = np.stack([scale, scale * np.exp(-alpha * problem.u), scale * np.exp(-beta * problem.v)], axis=1)
        expected = np.maximum(nnls(X, np.ones(len(scale)))[0], floor)
        np.testing.assert_allclose([E, np.exp(a), np.exp(b)], expected, rtol=1e-5)


def test_weights_count_runs():
    table = planted(noise=0.01)
    problem = fitting.fit_problem(table, "loss")
    theta = solver.starts(problem)[:3]
    twice = table.select(np.ones(len(table), bool))
    twice.rows, twice.lines = table.rows + table.rows[:5], table.lines + table.lines[:5]
    weights = np.ones((1, len(table)))
    weights[0, :5] = 2
    weighted = solver.minimise(problem, theta, weights)[1].min()
    repeated = fitting.fit_problem(twice, "loss")
    expected = solver.minimise(repeated, repeated.to_theta(problem.to_parameters(theta)), np.ones((1, 41)))[1]
    assert weighted == pytest.approx(expected.min(), rel=1e-9)


@given(st.tuples(st.floats(0.3, 3), st.floats(0.2, 0.6), st.floats(0.2, 0.6), st.floats(0.05, 1), st.floats(0.05, 1)))
@settings(max_examples=20, deadline=None)
def test_planted_law_is_recovered_exactly(values):
    E, alpha, beta, term_n, term_d = values
    law = np.array([E, term_n * 3e8**alpha, alpha, term_d * 3e10**beta, beta])
    fit = fitting.fit_group(planted(law=law), resamples=10)
    np.testing.assert_allclose(fit.parameters, law, rtol=1e-3)
    assert fit.objective < 1e-12


def test_noisy_planted_law_lies_in_the_intervals():
    """Of 20 noisy tables, about 19 should hold each true value in its 95% interval; 15 at the least."""
    truth = dict(zip(power_law.PARAMETERS, PLANTED))
    inside = dict.fromkeys(truth, 0)
    for seed in range(20):
        intervals = fitting.fit_group(planted(noise=0.005, seed=seed), resamples=200, seed=seed).intervals
        for name, value in truth.items():
            inside[name] += intervals[name][0] <= value <= intervals[name][1]
    assert min(inside.values()) >= 15, inside


def test_no_irreducible_loss_is_found_and_told():
    fit = fitting.fit_group(planted(noise=0.001, law=np.array([0.0, 40.0, 0.15, 60.0, 0.15])), resamples=50)
    assert fit.parameters[0] < 0.05
    assert np.isfinite(fit.draws).all()
    low = fitting.fit_group(planted(law=np.array([0.0, 40.0, 0.15, 60.0, 0.15])), resamples=10)
    assert any("close to 0" in text for text in warnings_of(low))


# --------------------------------------------------------------------------------------- bootstrap and holdout


def test_runs_of_one_trunk_are_resampled_together():
    trunks = [f"trunk{i // 6}" for i in range(36)]
    table = planted(noise=0.002, trunk=trunks)
    labels = fitting.cluster_labels(table)
    assert labels.tolist() == [i // 6 for i in range(36)]
    weights, redrawn = fitting.resample(table, labels, 500, np.random.default_rng(0))
    assert (weights.reshape(500, 6, 6) == weights.reshape(500, 6, 6)[:, :, :1]).all()
    assert (weights.sum(axis=1) == 36).all() and redrawn > 0
    assert ((weights.reshape(500, 6, 6)[:, :, 0] > 0).sum(axis=1) >= 3).all()


def test_too_few_trunks_never_give_intervals_without_width():
    """Of three trunks every resample with three sizes is the table itself."""
    table = planted(noise=0.01, trunk=[f"trunk{i // 12}" for i in range(36)])
    fit = fitting.fit_group(table, resamples=100)
    assert fit.clusters == 36 and (fit.draws.std(axis=0) > 0).all()
    assert any("only 3 trunks" in text for text in warnings_of(fit))


def test_shared_trunk_noise_widens_the_intervals():
    """Noise common to a trunk counts as one draw of it, not as many."""
    rng = np.random.default_rng(0)
    params = np.repeat(np.geomspace(1e7, 1e10, 12), 4)
    tokens = np.tile(np.geomspace(1e9, 1e12, 4), 12)
    noise = np.repeat(rng.normal(0, 0.01, 12), 4)
    loss = power_law.predict(PLANTED, params, tokens) * np.exp(noise)
    trunks = [f"t{i // 4}" for i in range(48)]
    apart = fitting.fit_group(make_table(params, tokens, loss), resamples=400)
    together = fitting.fit_group(make_table(params, tokens, loss, trunk=trunks), resamples=400)
    assert apart.clusters == 48 and together.clusters == 12
    np.testing.assert_allclose(apart.parameters, together.parameters)
    assert together.resampled[:, 0].std() > 1.2 * apart.resampled[:, 0].std()


def test_seed_and_group_decide_the_draws():
    table = planted(noise=0.01)
    one, same = (fitting.fit_group(table, group="x", resamples=20, seed=1).draws for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert (one != fitting.fit_group(table, group="x", resamples=20, seed=2).draws).any()
    assert (one != fitting.fit_group(table, group="y", resamples=20, seed=1).draws).any()


def test_holdout_predicts_a_planted_law():
    table = planted(noise=0.001)
    fit = fitting.fit_group(table, resamples=20)
    flops = table.numbers("flops")
    assert fit.holdout["n"] == len(fit.holdout["runs"]) == len(fit.holdout["relative_errors"]) >= 7
    names = [name for name, held in zip(table.names, flops >= np.sort(flops)[-7] * (1 - 1e-9)) if held]
    assert fit.holdout["runs"] == names
    assert fit.holdout["relative_error_loss"] < 0.005
    assert fit.holdout["a_with"] == fit.exponents["a"] != fit.holdout["a_without"]
    few = fitting.fit_group(planted(sizes=3, lengths=3), resamples=20)
    assert "at least 8" in few.holdout["skipped"]


# ---------------------------------------------------------------------------------------------------- warnings


def told(table: RunTable, **options) -> str:
    return "\n".join(fit_table(table, resamples=100, **options)[0].warnings)


def test_a_good_table_has_no_warnings():
    """Profiles of equal compute around the optimum."""
    flops = np.repeat(np.geomspace(1e18, 1e22, 7), 7)
    params = power_law.optimum(PLANTED, flops)[0] * np.tile(np.geomspace(0.25, 4, 7), 7)
    tokens = flops / (6 * params)
    noise = 0.001 * np.random.default_rng(0).standard_normal(49)
    assert told(make_table(params, tokens, power_law.predict(PLANTED, params, tokens) * np.exp(noise))) == ""


def test_warnings_name_what_is_wrong():
    table = planted(noise=0.001, sizes=8, lengths=8)
    table.rows[10]["loss"] *= 1.2
    table.rows[10]["run"] = "spoilt"
    assert "outlier: line 12 (run spoilt) has a loss" in told(table)
    table = planted(noise=0.001, sizes=8, lengths=8)
    for row in table.rows[::2]:
        row["mixture"], row["cooled"], row["flops"] = "40-20-40", False, 1.5 * row["flops"]
    for row in table.rows[1::2]:
        row["mixture"] = "45-45-10"
    text = told(table)
    assert "mixtures 40-20-40, 45-45-10 are fitted together" in text
    assert "not cooled down" in text and "frontiers use its median" in text


@pytest.mark.parametrize(
    ("sizes", "lengths", "part"),
    [(2, 8, "not identified: with 2 distinct params"), (8, 1, "not identified: with 1 distinct tokens")],
)
def test_few_distinct_sizes_are_told(sizes, lengths, part):
    assert part in told(planted(noise=0.002, sizes=sizes, lengths=lengths))


def test_unidentified_exponents_are_told():
    params = np.geomspace(1e8, 4e8, 7)
    tokens = 20 * params
    loss = power_law.predict(PLANTED, params, tokens) * np.exp(0.01 * np.random.default_rng(0).standard_normal(7))
    text = told(make_table(params, tokens, loss))
    assert "exponents are not identified" in text
    assert "7 runs for 5 parameters" in text
    assert "params and tokens vary together" in text


def test_extrapolated_optimum_is_told():
    params, tokens = np.meshgrid(np.geomspace(1e7, 1e8, 5), np.geomspace(1e11, 1e12, 5))
    params, tokens = params.ravel(), tokens.ravel()
    assert "extrapolation: the optimal params" in told(
        make_table(params, tokens, power_law.predict(PLANTED, params, tokens))
    )


# -------------------------------------------------------------------------------------------------------- tool


def tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "fit_scaling_laws.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(k for row in rows for k in row))
        writer.writeheader()
        writer.writerows(rows)
    return path


def study_rows() -> list[dict]:
    rows = []
    for architecture, factor in (("early", 1.0), ("late", 1.03)):
        for i, row in enumerate(planted(noise=0.002, seed=len(rows), sizes=4, lengths=4).rows):
            loss = row["loss"] * factor
            rows.append(row | {"run": f"{architecture}-{i}", "architecture": architecture, "loss": loss})
            rows[-1]["loss_caption"] = 1.1 * loss if i or architecture == "early" else ""
            rows[-1]["loss_text"] = 0.9 * loss if i < 3 else ""
    return rows


def test_written_folder_keeps_the_contract(tmp_path):
    out = tmp_path / "fits"
    done = tool(write_csv(tmp_path / "runs.csv", study_rows()), "--out", out, "--bootstrap", 50, "--losses", "all")
    assert done.returncode == 0, done.stderr
    fits = json.loads((out / "fits.json").read_text())["fits"]
    assert [(f["group"], f["loss_column"], f["n_runs"]) for f in fits] == [
        ("early", "loss", 16),
        ("early", "loss_caption", 16),
        ("late", "loss", 16),
        ("late", "loss_caption", 15),
    ]
    for fit in fits:
        assert set(fit["parameters"]) == {"E", "A", "alpha", "B", "beta"}
        assert set(fit["exponents"]) == {"a", "b", "c", "d"}
        assert set(fit["intervals"]) == {*fit["parameters"], *fit["exponents"]}
        assert all(low <= high for low, high in fit["intervals"].values())
        assert fit["form"] == "chinchilla" and fit["objective_name"] == "huber_log"
        assert set(fit["starts"]) == {"total", "at_optimum"}
        assert isinstance(fit["objective"], float) and isinstance(fit["gradient_norm"], float)
        assert {"n", "runs", "relative_error_loss", "a_without", "a_with"} <= set(fit["holdout"])
        assert isinstance(fit["warnings"], list)
    assert any("1 runs have no loss_caption" in text for text in fits[3]["warnings"])
    with np.load(out / "bootstrap.npz", allow_pickle=False) as draws:
        assert set(draws) == {"early", "early/loss_caption", "late", "late/loss_caption"}
        assert draws["early"].shape == (50, 5) and draws["early"].dtype == np.float64
    assert list(read_laws(out)) == ["early", "late"] and list(read_laws(out, "loss_caption")) == ["early", "late"]
    assert "## late, loss_caption: E + A/N^alpha" in (out / "fits.md").read_text()
    for stem in ("frontiers", "residuals", "frontiers-loss_caption", "residuals-loss_caption"):
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (2, [], "2 runs (line 2, 3)"),
        (4, [], "at least 5"),
        (9, ["--form", "kaplan"], "'kaplan' is unknown; known: chinchilla"),
        (9, ["--bootstrap", "3"], "at least 10"),
        (9, ["--group-by", "colour"], "no column 'colour'"),
        (9, ["--losses", "loss_video"], "no loss column 'loss_video'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, count, options, expected):
    rows = [row for row in study_rows() if row["architecture"] == "early"][:count]
    done = tool(write_csv(tmp_path / "runs.csv", rows), "--out", tmp_path / "fits", *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and expected in done.stderr
    assert not (tmp_path / "fits").exists()


def test_a_small_group_is_left_out_beside_a_large_one(tmp_path):
    rows = study_rows()[:18]
    done = tool(write_csv(tmp_path / "runs.csv", rows), "--out", tmp_path / "fits", "--bootstrap", 10)
    assert done.returncode == 0 and "left out: group late has 2 runs" in done.stderr
    assert [fit["group"] for fit in json.loads((tmp_path / "fits" / "fits.json").read_text())["fits"]] == ["early"]


def test_group_by_and_unknown_groups(tmp_path):
    rows = study_rows()
    for row in rows:
        del row["architecture"]
    table = read_runs(write_csv(tmp_path / "runs.csv", rows))
    assert [fit.group for fit in fit_table(table, resamples=10)] == ["all"]
    with pytest.raises(InputError, match="no column"):
        fit_table(table, group_by="architecture", resamples=10)
