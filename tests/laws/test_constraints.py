"""Given constants and tied exponents: the optimum against scipy, what stays fixed in draws, and bad input."""

import numpy as np
import pytest
from form_factory import table_of
from megamm_laws.fitting.diagnostics import examine
from megamm_laws.fitting.fit import fit_group, huber_log
from megamm_laws.fitting.outputs import fit_table
from megamm_laws.law import power_law
from megamm_laws.law.constraints import Constraints
from scipy.optimize import minimize

from megamm.errors import InputError

TRUTH = np.array([1.9, 420.0, 0.33, 1500.0, 0.36])


@pytest.fixture(scope="module")
def table():
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5)))
    noise = np.exp(0.004 * np.random.default_rng(1).standard_normal(len(n)))
    loss = power_law.predict(TRUTH, n, d) * noise
    return table_of([{"params": a, "tokens": b, "loss": y} for a, b, y in zip(n, d, loss)])


def by_scipy(table, fixed: dict[str, float], tied: bool) -> float:
    """The lowest objective by Nelder and Mead, started near the truth again and again."""
    free = [i for i, name in enumerate(power_law.PARAMETERS) if name not in fixed and not (tied and name == "beta")]

    def whole(x):
        values = np.array([np.log(fixed[n]) if n in "AB" and n in fixed else fixed.get(n, 0.0) for n in names])
        values[free] = x
        values[4] = values[2] if tied else values[4]
        values[[1, 3]] = np.exp(values[[1, 3]])
        return values

    names = power_law.PARAMETERS
    start = TRUTH.copy()
    start[[1, 3]] = np.log(start[[1, 3]])
    x = start[free]
    for _ in range(12):
        options = {"maxiter": 4000, "xatol": 1e-12, "fatol": 1e-16, "adaptive": True}
        x = minimize(lambda x: huber_log(whole(x), table), x, method="Nelder-Mead", options=options).x
    return huber_log(whole(x), table)


@pytest.mark.parametrize(
    ("fix", "tie"),
    [
        (["E=1.85"], []),
        ([], ["alpha=beta"]),
        (["E=1.9"], ["beta=alpha"]),
        (["A=420", "B=1500"], []),
        (["beta=0.36"], []),
    ],
)
def test_optimum_is_that_of_scipy(table, fix, tie):
    constraints = Constraints.of(fix, tie)
    fit = fit_group(table, resamples=30, constraints=constraints)
    values = dict(zip(power_law.PARAMETERS, fit.parameters))
    reference = by_scipy(table, constraints.fixed, constraints.tied)
    assert fit.objective == pytest.approx(huber_log(fit.parameters, table), rel=1e-9)
    assert reference * (1 - 1e-4) < fit.objective < reference * (1 + 1e-6)
    assert fit.gradient_norm < 1e-6
    for draws in (fit.draws, fit.resampled):
        for name, value in constraints.fixed.items():
            assert values[name] == pytest.approx(value, rel=1e-9)
            np.testing.assert_allclose(draws[:, power_law.PARAMETERS.index(name)], value, rtol=1e-9)
        if constraints.tied:
            np.testing.assert_array_equal(draws[:, 2], draws[:, 4])
    free = set(power_law.PARAMETERS) - set(constraints.fixed)
    assert all(fit.intervals[name][0] < fit.intervals[name][1] for name in free)
    examine(fit)
    assert fit.to_json()["constraints"] == {"fixed": constraints.fixed, "tied": constraints.tied}


def test_what_is_given_narrows_what_is_not(table):
    free, given = (fit_group(table, resamples=200, constraints=c) for c in (None, Constraints.of(["E=1.9"])))
    assert np.ptp(given.noise_intervals["alpha"]) < np.ptp(free.noise_intervals["alpha"])
    assert "constraints" not in free.to_json()


@pytest.mark.parametrize(
    ("fix", "tie", "text"),
    [
        (["F=1"], [], "'F' is unknown"),
        (["E=x"], [], "expected E=NUMBER"),
        (["alpha=9"], [], "from 0.01 to 3"),
        (["E=nan"], [], "finite number"),
        (["E=1", "E=2"], [], "twice"),
        ([], ["A=B"], "only alpha=beta"),
        (["beta=0.3"], ["alpha=beta"], "one of the two"),
        (["E=1", "A=2", "alpha=.3", "B=2", "beta=.3"], [], "nothing is left"),
    ],
)
def test_bad_constraints(fix, tie, text):
    with pytest.raises(InputError, match=text):
        Constraints.of(fix, tie)


def test_constraints_that_no_fit_can_keep(table):
    with pytest.raises(InputError, match="lowest loss"):
        fit_group(table, resamples=20, constraints=Constraints.of(["E=50"]))
    with pytest.raises(InputError, match="only with --form chinchilla"):
        fit_table(table, form="repeated", constraints=Constraints.of(["E=1"]))
