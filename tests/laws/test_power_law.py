"""The closed forms of megamm_laws.law.power_law against direct minimisation and the published exponents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megamm_laws.law import power_law
from scipy.optimize import minimize_scalar

positive = st.floats(0.15, 1.2)
law_values = st.tuples(st.floats(0.0, 3.0), st.floats(50, 5000), positive, st.floats(50, 5000), positive)


def lowest_loss(parameters: np.ndarray, flops: float, kappa: float) -> tuple[float, float]:
    """N* and L* by numerical search over log N."""

    def loss(log_n: float) -> float:
        n = np.exp(log_n)
        return power_law.predict(parameters, [n], [flops / (6 * kappa * n)])[0]

    found = minimize_scalar(loss, bounds=(0, np.log(flops)), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x)), float(found.fun)


@given(law_values, st.floats(14, 24), st.floats(0.5, 2.0))
def test_frontier_is_the_minimum_over_params(values, log_flops, kappa):
    parameters, flops = np.array(values), 10.0**log_flops
    best = power_law.frontier_loss(parameters, np.array([flops]), kappa)[0]
    params, tokens = (x[0] for x in power_law.optimum(parameters, np.array([flops]), kappa))
    assert 6 * kappa * params * tokens == pytest.approx(flops, rel=1e-9)
    assert power_law.predict(parameters, [params], [tokens])[0] == pytest.approx(best, rel=1e-9)
    _, searched = lowest_loss(parameters, flops, kappa)
    assert best <= searched * (1 + 1e-12)
    if 1 < params < flops:
        assert best == pytest.approx(searched, rel=1e-7)


@given(law_values, st.floats(16, 24), st.floats(0.5, 2.0))
def test_frontier_flops_inverts_frontier_loss(values, log_flops, kappa):
    parameters, flops = np.array(values), 10.0**log_flops
    E, K, g = power_law.frontier_power_law(parameters, kappa)
    if K * flops**-g > 1e-3 * E:  # else the subtraction of E loses the digits
        loss = power_law.frontier_loss(parameters, np.array([flops]), kappa)
        assert power_law.frontier_flops(parameters, loss, kappa)[0] == pytest.approx(flops, rel=1e-6)
    assert power_law.frontier_flops(parameters, np.array([E * 0.5]), kappa)[0] == np.inf


def test_exponents_of_the_paper():
    """Section 3 of arXiv 2504.07951: early fusion, average loss; a .5262, b .473, d .8987, c -.0492."""
    alpha, beta = 0.301, 0.335
    parameters = np.array([1.904, 300.0, alpha, 600.0, beta])
    found = power_law.exponents(parameters, (1e19, 1e22))
    assert found["a"] == pytest.approx(0.5262, abs=1e-3)
    assert found["b"] == pytest.approx(0.473, abs=1e-3)
    assert found["d"] == pytest.approx(0.8987, abs=1e-3)
    grid = np.geomspace(1e19, 1e22, 500)
    slope = np.polyfit(np.log(grid), np.log(power_law.frontier_loss(parameters, grid)), 1)[0]
    assert found["c"] == pytest.approx(slope, rel=2e-2)


def test_exponents_take_leading_axes_and_one_compute():
    draws = np.tile([1.8, 400.0, 0.34, 2000.0, 0.36], (3, 2, 1))
    found = power_law.exponents(draws, (1e20, 1e20))
    assert all(found[name].shape == (3, 2) for name in power_law.EXPONENTS)
    E, K, g = power_law.frontier_power_law(draws[0, 0])
    excess = K * 1e20**-g
    assert found["c"][0, 0] == pytest.approx(-g * excess / (E + excess), rel=1e-4)


def test_flops_factor_is_the_median_ratio():
    params, tokens = np.array([1e6, 2e6, 4e6]), np.array([1e8, 1e8, 1e8])
    assert power_law.flops_factor(params, tokens, 6 * params * tokens * [1.0, 1.2, 9.0]) == pytest.approx(1.2)
