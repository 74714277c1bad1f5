"""The closed forms of megamm.scaling.laws against direct minimisation and the published exponents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from megamm.scaling import laws

positive = st.floats(0.15, 1.2)
law_values = st.tuples(st.floats(0.0, 3.0), st.floats(50, 5000), positive, st.floats(50, 5000), positive)


def lowest_loss(parameters: np.ndarray, flops: float, kappa: float) -> tuple[float, float]:
    """N* and L* by numerical search over log N."""

    def loss(log_n: float) -> float:
        n = np.exp(log_n)
        return laws.predict(parameters, [n], [flops / (6 * kappa * n)])[0]

    found = minimize_scalar(loss, bounds=(0, np.log(flops)), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x)), float(found.fun)


@given(law_values, st.floats(14, 24), st.floats(0.5, 2.0))
def test_frontier_is_the_minimum_over_params(values, log_flops, kappa):
    parameters, flops = np.array(values), 10.0**log_flops
    best = laws.frontier_loss(parameters, np.array([flops]), kappa)[0]
    params, tokens = (x[0] for x in laws.optimum(parameters, np.array([flops]), kappa))
    assert 6 * kappa * params * tokens == pytest.approx(flops, rel=1e-9)
    assert laws.predict(parameters, [params], [tokens])[0] == pytest.approx(best, rel=1e-9)
    _, searched = lowest_loss(parameters, flops, kappa)
    assert best <= searched * (1 + 1e-12)
    if 1 < params < flops:
        assert best == pytest.approx(searched, rel=1e-7)


@given(law_values, st.floats(16, 24), st.floats(0.5, 2.0))
def test_frontier_flops_inverts_frontier_loss(values, log_flops, kappa):
    parameters, flops = np.array(values), 10.0**log_flops
    E, K, g = laws.frontier_power_law(parameters, kappa)
    if K * flops**-g > 1e-3 * E:  # else the subtraction of E loses the digits
        loss = laws.frontier_loss(parameters, np.array([flops]), kappa)
        assert laws.frontier_flops(parameters, loss, kappa)[0] == pytest.approx(flops, rel=1e-6)
    assert laws.frontier_flops(parameters, np.array([E * 0.5]), kappa)[0] == np.inf


def test_exponents_of_the_paper():
    """Section 3 of arXiv 2504.07951: early fusion, average loss; a .5262, b .473, d .8987, c -.0492."""
    alpha, beta = 0.301, 0.335
    parameters = np.array([1.904, 300.0, alpha, 600.0, beta])
    found = laws.exponents(parameters, (1e19, 1e22))
    assert found["a"] == pytest.approx(0.5262, abs=1e-3)
    assert found["b"] == pytest.approx(0.473, abs=1e-3)
    assert found["d"] == pytest.approx(0.8987, abs=1e-3)
    grid = np.geomspace(1e19, 1e22, 500)
    slope = np.polyfit(np.log(grid), np.log(laws.frontier_loss(parameters, grid)), 1)[0]
    assert found["c"] == pytest.approx(slope, rel=2e-2)


def test_exponents_take_leading_axes_and_one_compute():
    draws = np.tile([1.8, 400.0, 0.34, 2000.0, 0.36], (3, 2, 1))
    found = laws.exponents(draws, (1e20, 1e20))
    assert all(found[name].shape == (3, 2) for name in laws.EXPONENTS)
    E, K, g = laws.frontier_power_law(draws[0, 0])
    excess = K * 1e20**-g
    assert found["c"][0, 0] == pytest.approx(-g * excess / (E + excess), rel=1e-4)


def test_flops_factor_is_the_median_ratio():
    params, tokens = np.array([1e6, 2e6, 4e6]), np.array([1e8, 1e8, 1e8])
    assert laws.flops_factor(params, tokens, 6 * params * tokens * [1.0, 1.2, 9.0]) == pytest.approx(1.2)
