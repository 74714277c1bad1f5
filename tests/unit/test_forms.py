"""Declared forms of law: published values, derivatives, planted laws, mixtures, shared exponents, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megamm.errors import InputError
from megamm.scaling import laws, minimise
from megamm.scaling.fit_outputs import fit_table, write_fits
from megamm.scaling.forms import FORMS
from megamm.scaling.forms.base import Form, FormProblem, amplitude, exponent
from megamm.scaling.forms.fitting import descend_all, fit_form
from megamm.scaling.forms.optimum import compute_optimum
from megamm.scaling.forms.shared import SharedExponents, fit_shared
from megamm.scaling.forms.simplex import mixture_entry, optimal_mixture, optimal_mixture_draws, simplex_grid
from megamm.scaling.forms.warnings import form_warnings
from megamm.scaling.runs import RunTable, check_rows, write_runs

ROOT = Path(__file__).parents[2]
MUENNIGHOFF = {
    "E": np.exp(0.6254804),
    "A": np.exp(6.255414),
    "B": np.exp(7.3049974),
    "alpha": 0.3526596,
    "beta": 0.3526596,
    "R_D": 15.387756,
    "R_N": 5.309743,
}
PLAIN = {"E": 1.2, "A": 300.0, "alpha": 0.33, "B": 1500.0, "beta": 0.36}
FLOOR = {"C_caption": 1.0, "gamma_caption": 0.4, "C_interleaved": 1.5, "gamma_interleaved": 0.6} | {
    "C_text": 0.6,
    "gamma_text": 0.3,
}
VALUES = {
    "repeated": MUENNIGHOFF,
    "moe": {**PLAIN, "C": 0.1, "lambda": -0.4, "F": 120.0, "delta": -0.2, "gamma": 0.28},
    "mixture-additive": {**PLAIN, **FLOOR},
    "mixture-exponential": {**PLAIN, "t_caption": -1.0, "t_interleaved": -3.0, "t_text": 0.2},
    "mixture-joint": {
        **{name: PLAIN[name] for name in ("E", "alpha", "beta")},
        **FLOOR,
        "phi": 0.8,
        "psi": 0.7,
        "F_caption": 1500.0,
        "F_interleaved": 900.0,
        "F_text": 2000.0,
        "G_caption": 30000.0,
        "G_interleaved": 20000.0,
        "G_text": 60000.0,
    },
}
SHARES = np.array(
    [
        [0.45, 0.45, 0.1],
        [0.4, 0.2, 0.4],
        [0.3, 0.3, 0.4],
        [0.2, 0.4, 0.4],
        [0.8, 0.1, 0.1],
        [0, 0.8, 0.2],
        [0.1, 0, 0.9],
    ]
)
SIZES, LENGTHS = np.geomspace(1e8, 1e10, 4), np.geomspace(2e9, 1e12, 4)


def conditions(name: str) -> list[dict[str, float]]:
    if name == "repeated":
        return [{"unique_tokens": u} for u in (2e9, 2e10, 1e12)]
    if name == "moe":
        return [{"sparsity": s} for s in (0.0, 0.5, 0.75, 0.9375)]
    return [dict(zip(("share_caption", "share_interleaved", "share_text"), h)) for h in SHARES]


def planted(name: str, noise: float = 0.0, seed: int = 0, values=None) -> RunTable:
    rows = [{"params": n, "tokens": d, **c} for c in conditions(name) for n in SIZES for d in LENGTHS]
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    loss = FORMS[name].predict(values or VALUES[name], **columns)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(rows)))
    return table_of([row | {"loss": y} for row, y in zip(rows, loss)])


def table_of(rows: list[dict]) -> RunTable:
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


# ------------------------------------------------------------------------------------------- published values


def test_repeated_data_of_muennighoff():
    """The authors' fitted constants; figures from their released notebook."""
    found = FORMS["repeated"].predict(MUENNIGHOFF, [6.34e9, 8.67e9], [242e9, 178e9], unique_tokens=[25e9, 25e9])
    np.testing.assert_allclose(found, [2.2256440889984477, 2.2269634075087867], rtol=1e-12)


def test_fresh_data_and_small_models_are_not_discounted():
    n, d = np.array([1e8, 1e9]), np.array([1e12, 1e11])
    plain = np.array([MUENNIGHOFF[p] for p in laws.PARAMETERS])
    found = FORMS["repeated"].predict(MUENNIGHOFF, n, d, unique_tokens=[1e13, 1e13])
    np.testing.assert_allclose(found, laws.predict(plain, n, d), rtol=1e-12)
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


def columns_of(table: RunTable) -> dict[str, np.ndarray]:
    return {c: table.numbers(c) for c in table.columns if c not in ("loss", "flops")}


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
    rows = [{"params": a, "tokens": b, "loss": y} for a, b, y in zip(n, d, laws.predict(law, n, d))]
    fit = fit_form(table_of(rows), NoFloor(), resamples=10)
    np.testing.assert_allclose(fit.parameters, [50.0, 0.12, 90.0, 0.2], rtol=1e-5)


# --------------------------------------------------------------------------------------------------- mixtures


def test_simplex_grid():
    for parts in (2, 3, 4, 6):
        grid = simplex_grid(parts, 2000)
        np.testing.assert_allclose(grid.sum(axis=1), 1)
        assert len(np.unique(grid.round(9), axis=0)) == len(grid) <= 2000 and (grid >= 0).all()


def test_optimal_mixture_of_the_additive_law_in_closed_form():
    """sum C_i h_i^gamma on the simplex is largest where h_i ~ C_i^(1/(1-gamma))."""
    C, gamma = np.array([1.0, 1.6, 0.7]), 0.5
    names = ["x", "y", "z"]
    values = PLAIN | {f"C_{k}": c for k, c in zip(names, C)} | {f"gamma_{k}": gamma for k in names}
    expected = C ** (1 / (1 - gamma)) / (C ** (1 / (1 - gamma))).sum()
    form = FORMS["mixture-additive"]
    shares, loss = optimal_mixture([(form, values)], names, 1e9, 1e11)
    np.testing.assert_allclose(list(shares.values()), expected, atol=1e-4)
    floor = PLAIN["E"] + 1 / (C @ expected**gamma)
    assert loss == pytest.approx(floor + 300 / 1e9**0.33 + 1500 / 1e11**0.36, rel=1e-8)
    draws = {name: np.full(3, value) for name, value in values.items()}
    assert np.abs(optimal_mixture_draws([(form, draws)], names, 1e9, 1e11) - expected).max() < 0.02


def test_exponential_laws_meet_inside_only_together():
    form, names = FORMS["mixture-exponential"], ["x", "y"]
    one, two = PLAIN | {"t_x": -2.0, "t_y": 0.0}, PLAIN | {"t_x": 0.0, "t_y": -2.0}
    assert optimal_mixture([(form, one)], names, 1e9, 1e11)[0]["x"] == pytest.approx(1, abs=1e-6)
    assert optimal_mixture([(form, one), (form, two)], names, 1e9, 1e11)[0]["x"] == pytest.approx(0.5, abs=1e-4)


def test_joint_law_has_a_best_mixture_that_moves_with_size():
    form, names = FORMS["mixture-joint"], ["caption", "interleaved", "text"]
    best = [optimal_mixture([(form, VALUES["mixture-joint"])], names, n, 20 * n)[0] for n in (1e7, 1e11)]
    assert abs(best[0]["interleaved"] - best[1]["interleaved"]) > 0.05
    additive = FORMS["mixture-additive"]
    same = [optimal_mixture([(additive, VALUES["mixture-additive"])], names, n, 20 * n)[0] for n in (1e7, 1e11)]
    np.testing.assert_allclose(*(list(s.values()) for s in same), atol=1e-3)


def test_mixture_entry_names_what_was_measured():
    fit = fit_form(planted("mixture-exponential", noise=0.002), "mixture-exponential", resamples=20)
    entry = mixture_entry([fit])
    assert entry["shares"]["interleaved"] == pytest.approx(1, abs=1e-6)
    assert entry["measured"]["interleaved"] == [0.0, 0.8]
    assert "the best share of interleaved, 1.00, leaves the measured 0.00 to 0.80" in "\n".join(form_warnings(fit))


@pytest.mark.parametrize("name", ["mixture-additive", "mixture-joint", "mixture-exponential"])
def test_law_at_the_mean_mixture(name):
    table = planted(name)
    columns = FORMS[name].read(table)
    law, at = FORMS[name].law(VALUES[name], columns)
    n, d = np.array([1e8, 1e10]), np.array([1e12, 1e10])
    expected = FORMS[name].predict(VALUES[name], n, d, **{key: [value] * 2 for key, value in at.items()})
    np.testing.assert_allclose(laws.predict(law, n, d), expected, rtol=1e-9)
    assert sum(at.values()) == pytest.approx(1)


def test_mixture_column_of_three_numbers():
    rows = planted("mixture-additive").rows
    texts = ["45-45-10", "40-20-40", "30-30-40", "20-40-40", "80-10-10", "0-80-20", "10-0-90"]
    named = [{"params": r["params"], "tokens": r["tokens"], "loss": r["loss"]} for r in rows]
    for i, row in enumerate(named):
        row["mixture"] = texts[i // 16]
    read, given = (FORMS["mixture-additive"].read(table_of(r)) for r in (named, rows))
    assert list(read) == list(given)
    for key in read:
        np.testing.assert_allclose(read[key], given[key], atol=1e-12)


# ----------------------------------------------------------------------------------------- optima by search


def test_optimum_by_search_is_the_closed_form_where_there_is_one():
    """The plain law behind the interface of a form, whose optimum laws.py has in closed form."""
    flops, plain = np.array([1e20, 1e23]), np.array([MUENNIGHOFF[p] for p in laws.PARAMETERS])
    draws = {name: np.full(3, value) for name, value in MUENNIGHOFF.items()}
    for values, shape in ((MUENNIGHOFF, (2,)), (draws, (3, 2))):
        n, d, loss = compute_optimum(PlainForm(), values, flops, 1.2)
        assert n.shape == d.shape == loss.shape == shape
        np.testing.assert_allclose(n, np.broadcast_to(laws.optimum(plain, flops, 1.2)[0], shape), rtol=1e-3)
        np.testing.assert_allclose(loss, np.broadcast_to(laws.frontier_loss(plain, flops, 1.2), shape), rtol=1e-7)
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


# ------------------------------------------------------------------------------------------- shared exponents


def two_groups(second_alpha: float, seed: int = 0) -> dict[str, RunTable]:
    rng = np.random.default_rng(seed)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(2e9, 1e12, 5)))
    groups = {}
    for name, law in (("early", [1.9, 420, 0.33, 1500, 0.36]), ("late", [1.85, 520, second_alpha, 1400, 0.36])):
        loss = laws.predict(np.array(law), n, d) * np.exp(0.002 * rng.standard_normal(len(n)))
        rows = [
            {"run": f"{name}{i}", "params": a, "tokens": b, "loss": y} for i, (a, b, y) in enumerate(zip(n, d, loss))
        ]
        groups[name] = table_of(rows)
    return groups


def test_shared_exponents():
    groups = two_groups(0.33)
    early, late = fit_shared(groups, resamples=200)
    assert early.parameters[2] == late.parameters[2] and early.parameters[4] == late.parameters[4]
    np.testing.assert_array_equal(early.draws[:, [2, 4]], late.draws[:, [2, 4]])
    assert early.intervals["alpha"][0] <= 0.33 <= early.intervals["alpha"][1]
    assert early.parameters[0] == pytest.approx(1.9, abs=0.03) and late.parameters[0] == pytest.approx(1.85, abs=0.03)
    assert early.checks["sharing"]["p_value"] > 0.05 and not early.warnings
    assert early.objective >= early.checks["sharing"]["objective_free"]
    free = fit_table(
        table_of([r | {"side": g} for g, t in groups.items() for r in t.rows]), group_by="side", resamples=200
    )
    for shared, alone in zip((early, late), free):
        assert np.ptp(shared.intervals["a"]) < np.ptp(alone.intervals["a"])


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


def test_shared_exponents_that_differ_are_rejected():
    fit = fit_shared(two_groups(0.29), resamples=20)[0]
    assert fit.checks["sharing"]["p_value"] < 1e-3 and "rejected" in fit.warnings[-1]


def test_shared_test_keeps_its_level(monkeypatch):
    """Under equal exponents, p-values fall below 5% about 5% of the time (here at most 2 of 10)."""
    original = FormProblem.starts
    monkeypatch.setattr(FormProblem, "starts", lambda self, number=6: original(self, min(number, 6)))  # enough here
    p = [fit_shared(two_groups(0.33, seed), resamples=10)[0].checks["sharing"]["p_value"] for seed in range(10)]
    assert np.mean(np.array(p) < 0.05) <= 2 / 10 and np.std(p) > 0.1


def test_shared_problem_of_one_group_is_the_plain_fit():
    table = two_groups(0.33)["early"]
    problem = FormProblem.of(SharedExponents(), table, columns={"group": np.zeros(len(table))})
    best = descend_all(problem)[1][0]
    plain = minimise.Problem.of(*(table.numbers(c) for c in ("params", "tokens", "loss")))
    expected = minimise.minimise(plain, minimise.starts(plain), np.ones((1, len(table))))[1].min()
    assert best == pytest.approx(expected, rel=1e-6)


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


def test_several_losses_share_one_best_mixture(tmp_path):
    other = VALUES["mixture-exponential"] | {"t_caption": -3.0, "t_interleaved": -1.0}
    table, second = planted("mixture-exponential", 0.002), planted("mixture-exponential", 0.002, 1, other)
    for row, twin in zip(table.rows, second.rows):
        row["loss_text"], row["loss_caption"] = row["loss"], twin["loss"]
    fits = fit_table(table, form="mixture-exponential", losses="loss_text,loss_caption", resamples=20)
    both = fits[0].extras["optimal_mixture_of_losses"]
    assert both["losses"] == ["loss_text", "loss_caption"]
    assert both["shares"]["caption"] == pytest.approx(0.5, abs=0.03)
    write_fits(tmp_path, fits)
    page = (tmp_path / "fits.md").read_text()
    assert "lowest value of the mean of loss_text, loss_caption" in page and "exp(sum_i t_i h_i)" in page


def test_tool_fits_a_form(tmp_path):
    table = planted("mixture-exponential", 0.002)
    rows = [row | {"run": f"r{i}"} for i, row in enumerate(table.rows)]
    write_runs(tmp_path / "runs.csv", rows)
    command = [sys.executable, str(ROOT / "tools" / "fit_scaling_laws.py"), str(tmp_path / "runs.csv")]
    command += ["--out", str(tmp_path / "out"), "--form", "mixture-exponential", "--bootstrap", "20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "out" / "fits.json").read_text())["fits"]
    assert entry["form"] == "mixture-exponential" and entry["objective_name"] == "huber_log"
    assert set(entry["parameters"]) == set(VALUES["mixture-exponential"])
    assert set(entry["intervals"]) == {*entry["parameters"], *laws.EXPONENTS}
    assert set(entry["law"]["parameters"]) == set(laws.PARAMETERS)
    assert set(entry["optimal_mixture"]["shares"]) == {"caption", "interleaved", "text"}
    with np.load(tmp_path / "out" / "bootstrap.npz", allow_pickle=False) as draws:
        assert draws["all@mixture-exponential"].shape == (20, 8)
        assert draws["all@mixture-exponential/law"].shape == (20, 5)
