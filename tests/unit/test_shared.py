"""Exponents shared by several groups, and the test of whether the runs allow it."""

import numpy as np
import pytest
from form_factory import table_of, two_groups

from megamm.scaling import minimise
from megamm.scaling.fit_outputs import fit_table
from megamm.scaling.forms.base import FormProblem
from megamm.scaling.forms.fitting import descend_all
from megamm.scaling.forms.shared import SharedExponents, fit_shared


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
