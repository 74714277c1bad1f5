"""Declared forms of law: published values, derivatives, planted laws, optima by search, bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from form_factory import (
    LENGTHS,
    MUENNIGHOFF,
    PLAIN,
    SIZES,
    VALUES,
    columns_of,
    conditions,
    planted,
    table_of,
    two_groups,
)
from megamm_laws.fitting.form_fit import descend_all, fit_form
from megamm_laws.fitting.form_warnings import form_warnings
from megamm_laws.fitting.shared import fit_shared
from megamm_laws.law import power_law
from megamm_laws.law.forms import FORMS
from megamm_laws.law.forms.base import Form, FormProblem, amplitude, exponent
from megamm_laws.law.forms.optimum import compute_optimum
from megamm_laws.runs.table import write_runs

from megamm.errors import InputError

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------- published values


def test_repeated_data_of_muennighoff():
    """The authors' fitted constants; figures from their released notebook."""
    found = FORMS["repeated"].predict(MUENNIGHOFF, [6.34e9, 8.67e9], [242e9, 178e9], unique_tokens=[25e9, 25e9])
    np.testing.assert_allclose(found, [2.2256440889984477, 2.2269634075087867], rtol=1e-12)


def test_fresh_data_and_small_models_are_not_discounted():
    n, d = np.array([1e8, 1e9]), np.array([1e12, 1e11])
    plain = np.array([MUENNIGHOFF[p] for p in power_law.PARAMETERS])
    found = FORMS["repeated"].predict(MUENNIGHOFF, n, d, unique_tokens=[1e13, 1e13])
    np.testing.assert_allclose(found, power_law.predict(plain, n, d), rtol=1e-12)
    assert FORMS["repeated"].predict(MUENNIGHOFF, n, d, unique_tokens=[1e10, 1e10]).min() > found.min()


def test_moe_formula():
    v, S, n, d = VALUES["moe"], np.array([0.0, 0.875]), np.array([1e9, 8e9]), np.array([1e11, 1e11])
    expected = v["E"] + v["A"] / n ** v["alpha"] + v["B"] / d ** v["beta"] + v["C"] / (1 - S) ** v["lambda"]
    expected += v["F"] / ((1 - S) ** v["delta"] * n ** v["gamma"])
    np.testing.assert_allclose(FORMS["moe"].predict(v, n, d, sparsity=S), expected, rtol=1e-12)


def test_mixture_formulas():
    h = {"share_caption": [0.3], "share_interleaved": [0.5], "share_text": [0.2]}
    shares = dict(zip(("caption", "interleaved", "text"), (0.3, 0.5, 0.2)))
    n, d = 1e9, 1e11

    def found(name: str) -> float:
        return FORMS[name].predict(VALUES[name], n, d, **h)[0]

    def scale(v: dict, letter: str, power: str) -> float:
        return sum(v[f"{letter}_{k}"] * s for k, s in shares.items()) ** v[power]

    v = VALUES["mixture-joint"]
    floor = v["E"] + 1 / sum(v[f"C_{k}"] * s ** v[f"gamma_{k}"] for k, s in shares.items())
    plain = PLAIN["A"] / n**0.33 + PLAIN["B"] / d**0.36
    assert found("mixture-additive") == pytest.approx(floor + plain, rel=1e-12)
    joint = floor + scale(v, "F", "phi") / n**0.33 + scale(v, "G", "psi") / d**0.36
    assert found("mixture-joint") == pytest.approx(joint, rel=1e-12)
    t = VALUES["mixture-exponential"]
    mixed = np.exp(sum(t[f"t_{k}"] * s for k, s in shares.items()))
    assert found("mixture-exponential") == pytest.approx(1.2 + plain + mixed, rel=1e-12)


# ---------------------------------------------------------------------------------------------- the machinery


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_by_finite_differences(name):
    """Gradient and Hessian of the objective, against differences of values that predict alone gives."""
    table = planted(name, noise=0.05)
    problem = FormProblem.of(FORMS[name], table)
    rng = np.random.default_rng(1)
    theta = problem.starts()[5] + 0.05 * rng.standard_normal(len(problem.declared))
    weights = rng.integers(1, 4, (1, len(table))).astype(float)
    delta = 10.0  # quadratic everywhere: no kink spoils a difference

    def objective(x: np.ndarray) -> float:
        values = dict(zip(problem.names, problem.to_parameters(x)))
        columns = {key: table.numbers(key) for key in conditions(name)[0]}
        prediction = FORMS[name].predict(values, table.numbers("params"), table.numbers("tokens"), **columns)
        return float(weights[0] @ (0.5 * np.log(prediction / table.numbers("loss")) ** 2))

    value, gradient, hessian, reweighted = (x[0] for x in problem.evaluate(theta[None], weights, delta))
    assert value == pytest.approx(objective(theta), rel=1e-9)
    steps = 1e-5 * np.eye(len(theta))
    numeric = np.array([(objective(theta + h) - objective(theta - h)) / 2e-5 for h in steps])
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())
    second = [
        (
            problem.evaluate((theta + h)[None], weights, delta)[1]
            - problem.evaluate((theta - h)[None], weights, delta)[1]
        )
        for h in steps
    ]
    np.testing.assert_allclose(hessian, np.concatenate(second) / 2e-5, rtol=1e-3, atol=1e-5 * np.abs(hessian).max())
    assert np.linalg.eigvalsh(reweighted).min() > -1e-9 * np.linalg.eigvalsh(reweighted).max()


@pytest.mark.parametrize("name", FORMS)
def test_units_go_there_and_back(name):
    problem = FormProblem.of(FORMS[name], planted(name))
    theta = problem.starts()
    np.testing.assert_allclose(problem.to_theta(problem.to_parameters(theta)), theta, rtol=1e-10, atol=1e-10)
    truth = np.array([VALUES[name][p] for p in problem.names])
    assert np.abs(problem.log_prediction(problem.to_theta(truth)[None])[0] - problem.y).max() < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_planted_form_is_found(name):
    """Without noise the optimum is the truth: new runs, ten times as large, are predicted."""
    problem = FormProblem.of(FORMS[name], planted(name))
    ends, objectives = descend_all(problem, problem.starts(12))
    assert objectives[0] < 1e-6  # 0.1% of noise would give 5e-5
    values = dict(zip(problem.names, problem.to_parameters(ends[0])))
    columns = {key: [c[key] for c in conditions(name)] for key in conditions(name)[0]}
    n, d = np.full(len(conditions(name)), 1e11), np.full(len(conditions(name)), 5e12)
    new = [FORMS[name].predict(v, n, d, **columns) for v in (values, VALUES[name])]
    np.testing.assert_allclose(*new, rtol=2e-3)


def test_noisy_fit_beats_the_truth_and_holds_it():
    table = planted("mixture-exponential", noise=0.003)
    fit = fit_form(table, "mixture-exponential", resamples=200)
    residual = np.log(FORMS["mixture-exponential"].predict(VALUES["mixture-exponential"], **columns_of(table)))
    size = np.abs(residual - np.log(table.numbers("loss")))
    truth = np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()
    assert fit.objective < truth and fit.starts_at_optimum > 0.8 * fit.starts_total
    inside = [
        low <= VALUES["mixture-exponential"][p] <= high for p, (low, high) in fit.intervals.items() if p in fit.values
    ]
    assert sum(inside) >= 7  # of 8
    assert fit.holdout["relative_error_loss"] < 0.01 and fit.gradient_norm < 1e-8
    assert fit.exponents["a"] == pytest.approx(0.36 / 0.69, abs=0.02)


def test_a_form_of_ones_own_is_a_page():
    """A law without a floor, declared here, is fitted like any other."""

    class NoFloor(Form):
        name, formula, source = "no-floor", "A/N^alpha + B/D^beta", "this test"

        def parameters(self, columns):
            return [
                amplitude("A", "params", "alpha"),
                exponent("alpha"),
                amplitude("B", "tokens", "beta"),
                exponent("beta"),
            ]

        def terms(self, at, data):
            return [at.linear({"A": 1.0, "alpha": -data.u}), at.linear({"B": 1.0, "beta": -data.v})]

    n, d = (x.ravel() for x in np.meshgrid(SIZES, LENGTHS))
    law = np.array([0.0, 50.0, 0.12, 90.0, 0.2])
    rows = [{"params": a, "tokens": b, "loss": y} for a, b, y in zip(n, d, power_law.predict(law, n, d))]
    fit = fit_form(table_of(rows), NoFloor(), resamples=10)
    np.testing.assert_allclose(fit.parameters, [50.0, 0.12, 90.0, 0.2], rtol=1e-5)


# ----------------------------------------------------------------------------------------- optima by search


def test_optimum_by_search_is_the_closed_form_where_there_is_one():
    """The plain law behind the interface of a form, whose optimum laws.py has in closed form."""
    flops, plain = np.array([1e20, 1e23]), np.array([MUENNIGHOFF[p] for p in power_law.PARAMETERS])
    draws = {name: np.full(3, value) for name, value in MUENNIGHOFF.items()}
    for values, shape in ((MUENNIGHOFF, (2,)), (draws, (3, 2))):
        n, d, loss = compute_optimum(PlainForm(), values, flops, 1.2)
        assert n.shape == d.shape == loss.shape == shape
        np.testing.assert_allclose(n, np.broadcast_to(power_law.optimum(plain, flops, 1.2)[0], shape), rtol=1e-3)
        np.testing.assert_allclose(loss, np.broadcast_to(power_law.frontier_loss(plain, flops, 1.2), shape), rtol=1e-7)
        np.testing.assert_allclose(6 * 1.2 * n * d, np.broadcast_to(flops, shape), rtol=1e-9)


class PlainForm(Form):
    """E, A, alpha, B, beta."""

    def parameters(self, columns):
        return [p for p in FORMS["repeated"].parameters(columns) if not p.name.startswith("R_")]

    def terms(self, at, data):
        return [
            at.linear({"E": 1.0}),
            at.linear({"A": 1.0, "alpha": -data.u}),
            at.linear({"B": 1.0, "beta": -data.v}),
        ]


def test_sparser_experts_are_larger_and_better_at_equal_compute():
    rows = [row | {"flops": 6 * row["params"] * (1 - row["sparsity"]) * row["tokens"]} for row in planted("moe").rows]
    fit = fit_form(table_of(rows), "moe", resamples=20)
    entries = fit.extras["optimum_by_sparsity"]
    assert [e["sparsity"] for e in entries] == [0.0, 0.5, 0.75, 0.938]
    assert (np.diff([e["params"] for e in entries]) > 0).all() and (np.diff([e["loss"] for e in entries]) < 0).all()
    for e in entries:
        assert e["kappa"] == pytest.approx(1 - e["sparsity"], abs=1e-3)
        v, n = VALUES["moe"], np.array([0.99, 1.0, 1.01]) * e["params"]
        d = e["flops"] / (6 * e["kappa"] * n)
        around = FORMS["moe"].predict(v, n, d, sparsity=np.full(3, e["sparsity"]))
        assert around[1] <= around.min() * (1 + 1e-9) and around[1] == pytest.approx(e["loss"], rel=1e-4)


def test_every_form_has_a_drop_table():
    early = fit_shared(two_groups(0.33), resamples=20)[0]
    fit = fit_form(planted("mixture-exponential", noise=0.002), "mixture-exponential", resamples=20)
    for rows, found in ((early.checks["drop_k"], early), (fit.extras["drop_k"], fit)):
        assert [row["k"] for row in rows if row["dropped"] == "largest FLOPs"][:3] == [1, 2, 3]
        assert rows[0]["objective"] == pytest.approx(found.objective, rel=1e-6)
        assert rows[0]["alpha"] == pytest.approx(found.to_json()["parameters"]["alpha"], rel=1e-4)
        assert rows[0]["a"] == pytest.approx(found.exponents["a"], rel=1e-4)
        assert all(row["objective"] <= rows[0]["objective"] * (1 + 1e-9) for row in rows)  # fewer runs, less misfit
        assert all(0.25 < row["alpha"] < 0.45 for row in rows)


# -------------------------------------------------------------------------------------------- input and output


def test_active_parameters_stand_in_for_sparsity():
    rows = [{"params": 8e9, "params_active": a, "tokens": 1e11, "loss": 2.0} for a in (1e9, 4e9, 8e9)]
    columns = FORMS["moe"].read(table_of(rows))
    np.testing.assert_allclose(columns["sparsity"], [0.875, 0.5, 0.0], atol=1e-6)
    assert FORMS["moe"].warnings(columns) == []
    assert "2 distinct sparsities" in FORMS["moe"].warnings({"sparsity": np.array([0.5, 0.5, 0.9])})[0]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("repeated", {"unique_tokens": None}, "line 2: column unique_tokens: None is not a number"),
        ("repeated", {"unique_tokens": -3}, "line 2: column unique_tokens: -3 is not from 1"),
        ("moe", {"sparsity": 1.0}, "line 2: column sparsity: 1 is not from 0 to 1"),
        ("moe", {"sparsity": "half"}, "'half' is not a number"),
        ("mixture-joint", {"share_text": 0.5}, "line 2: shares .* sum to 1.4, not 1"),
    ],
)
def test_bad_columns_are_named(name, change, expected):
    table = planted(name)
    table.rows[0] |= change
    with pytest.raises(InputError, match=expected):
        fit_form(table, name, resamples=10)


def test_missing_columns_and_runs_are_named():
    plain = two_groups(0.33)["early"]
    for name, expected in (("repeated", "no column 'unique_tokens'"), ("moe", "no column 'params_active'")):
        with pytest.raises(InputError, match=expected):
            fit_form(plain, name)
    with pytest.raises(InputError, match="column mixture: None is not three shares"):
        fit_form(plain, "mixture-additive")
    with pytest.raises(InputError, match="7 runs, but form repeated has 7 parameters"):
        fit_form(planted("repeated").select(np.arange(48) < 7), "repeated")
    with pytest.raises(InputError, match="one group only"):
        fit_shared({"early": plain})


def test_tool_fits_a_form(tmp_path):
    table = planted("mixture-exponential", 0.002)
    rows = [row | {"run": f"r{i}"} for i, row in enumerate(table.rows)]
    write_runs(tmp_path / "runs.csv", rows)
    command = [sys.executable, str(ROOT / "tools" / "fit_scaling_laws.py"), str(tmp_path / "runs.csv")]
    command += ["--out", str(tmp_path / "out"), "--form", "mixture-exponential", "--bootstrap", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "out" / "fits.json").read_text())["fits"]
    assert entry["form"] == "mixture-exponential" and entry["objective_name"] == "huber_log"
    assert set(entry["parameters"]) == set(VALUES["mixture-exponential"])
    assert set(entry["intervals"]) == {*entry["parameters"], *power_law.EXPONENTS}
    assert set(entry["law"]["parameters"]) == set(power_law.PARAMETERS)
    assert set(entry["optimal_mixture"]["shares"]) == {"caption", "interleaved", "text"}
    with np.load(tmp_path / "out" / "bootstrap.npz", allow_pickle=False) as draws:
        assert draws["all@mixture-exponential"].shape == (20, 8)
        assert draws["all@mixture-exponential/law"].shape == (20, 5)


def test_forms_tell_of_trunks_and_runs_not_cooled():
    table = planted("repeated", noise=0.003)
    for i, row in enumerate(table.rows):
        row |= {"trunk": f"t{i % 3}", "cooled": i > 0}
    fit = fit_form(table, "repeated", resamples=10)
    found = "\n".join(form_warnings(fit))
    assert "only 3 trunks" in found and "not cooled down" in found
    found = "\n".join(form_warnings(replace(fit, clusters=5, redrawn=2)))
    assert "resamples only 5 trunks" in found and "20% of the resamples" in found
