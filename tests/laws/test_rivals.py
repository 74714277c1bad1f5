"""Rival forms: their derivatives, optima, which are rejected, and the decision that spans the rest."""

import json
from pathlib import Path

import numpy as np
import pytest
from form_factory import table_of
from megamm_laws.fitting.fit import fit_group
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law.forms.base import FormProblem
from megamm_laws.law.forms.rivals import rival_forms
from megamm_laws.runs.table import read_runs
from megamm_laws.uncertainty.rivals import judge_rivals
from scipy.optimize import minimize_scalar

DATA = Path(__file__).parents[1] / "data" / "chinchilla_runs.csv"
SIZES = np.geomspace(3e7, 1e10, 7)
LENGTHS = np.geomspace(1e9, 3e11, 7)
VALUES = {
    "tied": {"E": 1.8, "A": 500.0, "B": 1700.0, "alpha": 0.35},
    "kaplan": {"A": 17.0, "alpha": 0.076, "B": 30.0, "beta": 0.1},
    "kaplan-floor": {"E": 1.5, "A": 110.0, "alpha": 0.24, "B": 340.0, "beta": 0.25},
    "broken-n": {"E": 1.7, "A": 200.0, "alpha": 0.3, "B": 2000.0, "beta": 0.36, "delta": -0.15, "k": 0.5},
    "broken-d": {"E": 1.7, "A": 500.0, "alpha": 0.35, "B": 1300.0, "beta": 0.33, "delta": -0.15, "k": -0.5},
    "beta-of-n": {"E": 1.8, "A": 600.0, "alpha": 0.36, "B": 0.38, "beta": 0.37, "eta": 0.03},
}


def made(name: str, noise: float = 0.0, seed: int = 0):
    n, d = (x.ravel() for x in np.meshgrid(SIZES, LENGTHS, indexing="ij"))
    form = next(f for f in rival_forms(n, d) if f.name == name)
    loss = form.predict(VALUES[name], n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return form, table_of([{"params": a, "tokens": b, "loss": y} for a, b, y in zip(n, d, loss)])


def reference(name: str, n, d) -> np.ndarray:
    """Each law as its paper writes it, by itself."""
    p = VALUES[name]
    n0, d0 = np.exp(np.log(SIZES).mean()), np.exp(np.log(LENGTHS).mean())
    plain_n = p["A"] / n ** p["alpha"]
    beta = p.get("beta", p["alpha"])
    plain_d = p["B"] / d**beta
    if name.startswith("kaplan"):
        return p.get("E", 0.0) + (plain_n ** (1 / beta) + plain_d ** (1 / beta)) ** beta
    if name == "broken-n":
        plain_n = plain_n * (1 + (n / n0 / np.exp(p["k"])) ** 2) ** (-0.5 * p["delta"])
    if name == "broken-d":
        plain_d = plain_d * (1 + (d / d0 / np.exp(p["k"])) ** 2) ** (-0.5 * p["delta"])
    if name == "beta-of-n":
        plain_d = p["B"] * (d / d0) ** -(p["beta"] + p["eta"] * np.log(n / n0))
    return p["E"] + plain_n + plain_d


@pytest.mark.parametrize("name", VALUES)
def test_a_rival_is_its_formula_with_exact_derivatives(name):
    form, table = made(name)
    n, d = table.numbers("params"), table.numbers("tokens")
    np.testing.assert_allclose(table.numbers("loss"), reference(name, n, d), rtol=1e-10)
    problem = FormProblem.of(form, table)
    theta = problem.to_theta(np.array([VALUES[name][x] for x in problem.names])) + 0.01
    weights, wide = np.ones((1, len(table))), 10.0  # so wide that all residuals are on one branch
    _, gradient, hessian, _ = problem.evaluate(theta[None], weights, wide)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-5
        up, down = (problem.evaluate((theta + s)[None], weights, wide) for s in (step, -step))
        np.testing.assert_allclose(gradient[0, i], (up[0] - down[0])[0] / 2e-5, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(hessian[0, i], (up[1] - down[1])[0] / 2e-5, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def chinchilla():
    runs = read_runs(DATA)
    return runs.select(runs.numbers("loss") < np.sort(runs.numbers("loss"))[-5])


@pytest.fixture(scope="module")
def judged(chinchilla):
    return judge_rivals(fit_group(chinchilla, resamples=100), (5.76e23,))


def test_the_decision_spans_the_forms_that_are_left(judged):
    forms, decision = judged["rivals"]["forms"], judged["decision"]
    assert set(forms) == {"chinchilla", *VALUES}
    assert set(decision["forms"]) == {"chinchilla", *(name for name, form in forms.items() if not form["rejected"])}
    best = decision["optimum"][-1]
    assert best["flops"] == 5.76e23
    for name in decision["forms"]:
        low, high = forms[name]["intervals"]["a"]
        assert decision["exponents"]["a"][0] <= low <= high <= decision["exponents"]["a"][1]
        assert best["params"][0] <= forms[name]["optimum"][-1]["params"] <= best["params"][1]
    low, high = best["params_values"]
    assert low == min(forms[name]["optimum"][-1]["params"] for name in decision["forms"])
    assert high == max(forms[name]["optimum"][-1]["params"] for name in decision["forms"])


def test_chinchilla_rivals(judged):
    """A law without a floor is out; those left agree far better than the interval of one form with all errors."""
    forms = judged["rivals"]["forms"]
    assert forms["kaplan"]["rejected"] and forms["kaplan-floor"]["rejected"]
    assert not forms["chinchilla"]["rejected"]
    low, high = judged["decision"]["exponents"]["a"]
    assert 0.38 < low < 0.46 and 0.51 < high < 0.58
    low, high = judged["decision"]["optimum"][-1]["params"]
    assert high / low < 20


@pytest.mark.parametrize("seed", [0, 3])
def test_a_few_of_the_runs_do_not_look_surer_than_all(judged, chinchilla, seed):
    """Few runs may follow one form by luck, with narrow intervals (seed 3); but then they reject no other form."""
    kept = np.random.default_rng(seed).choice(len(chinchilla), 30, replace=False)
    few = chinchilla.select(np.isin(np.arange(len(chinchilla)), kept))
    part = judge_rivals(fit_group(few, resamples=100), (5.76e23,))["decision"]
    whole = judged["decision"]
    assert np.ptp(part["exponents"]["a"]) > np.ptp(whole["exponents"]["a"])
    assert np.ptp(np.log(part["optimum"][-1]["params"])) > np.ptp(np.log(whole["optimum"][-1]["params"]))


def test_an_optimum_is_the_lowest_loss_of_the_budget(judged, chinchilla):
    forms = {f.name: f for f in rival_forms(chinchilla.numbers("params"), chinchilla.numbers("tokens"))}
    for name, form in forms.items():
        entry = judged["rivals"]["forms"][name]
        for best in entry["optimum"]:
            product = best["params"] * best["tokens"]

            def loss(x, form=form, entry=entry, product=product):
                return float(form.predict(entry["parameters"], np.exp(x), product / np.exp(x))[0])

            around = np.log(best["params"]) + np.array([-1.0, 1.0])
            found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-9})
            assert found.x == pytest.approx(np.log(best["params"]), abs=2e-3)


@pytest.mark.parametrize("name", ["kaplan-floor", "broken-d", "beta-of-n"])
def test_the_form_that_made_the_runs_is_never_rejected(name):
    _, table = made(name, noise=0.002, seed=3)
    forms = judge_rivals(fit_group(table, resamples=50))["rivals"]["forms"]
    assert not forms[name]["rejected"]
    if name == "kaplan-floor":
        assert forms["chinchilla"]["rejected"]


def test_the_page_begins_with_what_is_known(chinchilla, tmp_path):
    few = chinchilla.select(np.arange(len(chinchilla)) % 8 == 0)
    fits = fit_table(few, resamples=50, rivals=True, budgets=(1e23,))
    write_fits(tmp_path, fits)
    entry = json.loads((tmp_path / "fits.json").read_text())["fits"][0]
    assert [best["flops"] for best in entry["decision"]["optimum"]][-1] == 1e23
    page = (tmp_path / "fits.md").read_text().splitlines()
    at = next(i for i, line in enumerate(page) if line.startswith("## "))
    assert page[at + 2].startswith("- **Growth of size**") and page[at + 3].startswith("- **Best size at 10²³ FLOPs**")
    assert "not reject" in page[at + 4]


def test_rivals_are_an_option_of_the_library(chinchilla):
    few = chinchilla.select(np.arange(len(chinchilla)) % 12 == 0)
    assert "rivals" not in fit_table(few, resamples=20)[0].checks
