"""Exponents shared by several groups, and the test of whether the runs allow it."""

from dataclasses import replace

import numpy as np
import pytest
from form_factory import table_of, two_groups
from megamm_laws.fitting.fit import Fit
from megamm_laws.fitting.form_fit import descend_all
from megamm_laws.fitting.outputs import fit_table
from megamm_laws.fitting.shared import SharedExponents, examine_shared, fit_shared
from megamm_laws.law import solver
from megamm_laws.law.forms.base import FormProblem
from megamm_laws.runs.table import RunTable


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
    plain = solver.Problem.of(*(table.numbers(c) for c in ("params", "tokens", "loss")))
    expected = solver.minimise(plain, solver.starts(plain), np.ones((1, len(table))))[1].min()
    assert best == pytest.approx(expected, rel=1e-6)


def examined(groups: dict[str, RunTable], resamples: int = 20) -> list[Fit]:
    """As the tool gives them."""
    rows = [row | {"side": name} for name, table in groups.items() for row in table.rows]
    return fit_table(table_of(rows), form="shared", group_by="side", resamples=resamples)


def test_shared_fit_tells_what_the_plain_one_tells():
    """Runs of both groups share three trunks, leave the kappa apart, and one run is far off."""
    groups = two_groups(0.33)
    for table in groups.values():
        for i, row in enumerate(table.rows):
            row |= {"trunk": f"t{i % 3}", "cooled": i > 0, "flops": row["flops"] * (1 + i % 2)}
        table.rows[7]["loss"] *= 1.1
    for fit in examined(groups, resamples=50):
        found = "\n".join(fit.warnings)
        for text in ("only 3 trunks", "not cooled down", "flops/(6*params*tokens) varies", "outlier: "):
            assert found.count(text) == 1, text


def test_shared_exponent_that_one_group_determines():
    """Two sizes do where another group has five, one does not; alone, three are needed."""
    groups = two_groups(0.33)
    sizes = groups["late"].numbers("params")
    for n, expected in ((2, []), (1, ["constants are not identified: with 1 distinct params, A and E"])):
        part = {"early": groups["early"], "late": groups["late"].select(sizes < np.unique(sizes)[n])}
        found = [text for text in examined(part)[1].warnings if "not identified: with" in text]
        assert len(found) == len(expected) and all(map(str.startswith, found, expected))
    few = {name: table.select(table.numbers("params") < np.unique(sizes)[2]) for name, table in groups.items()}
    assert "with 2 distinct params, A, alpha and E" in "\n".join(examined(few)[0].warnings)


def test_shared_starts_are_those_of_the_whole():
    fits = [replace(fit, starts_at_optimum=1) for fit in fit_shared(two_groups(0.33), resamples=20)]
    examine_shared(fits)
    line = f"only 1 of {fits[0].starts_total} starts ended at the optimum of all groups together"
    assert all(line in fit.warnings for fit in fits)
