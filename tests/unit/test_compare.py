"""Frontiers of two groups against each other."""

import numpy as np
import pytest
from scipy.optimize import brentq

from megamm.errors import InputError
from megamm.scaling import laws
from megamm.scaling.compare import Law, compare, read_laws, verdict

BASE = np.array([1.9, 420.0, 0.33, 1500.0, 0.36])


def law(name: str, parameters=BASE, spread: float = 0.0, seed: int = 0, kappa: float = 1.0, flops=(1e18, 1e22)) -> Law:
    """A law whose draws differ in E and in the size of the terms by ``spread``, relatively."""
    draws = np.tile(np.asarray(parameters, float), (400, 1))
    noise = np.random.default_rng(seed).standard_normal((400, 2))
    draws[:, 0] *= 1 + spread * noise[:, 0]
    draws[:, 1] *= 1 + spread * noise[:, 1]
    return Law(name=name, parameters=np.asarray(parameters, float), draws=draws, kappa=kappa, flops_range=flops)


CROSSING = np.array([2.0, 300.0, 0.33, 1100.0, 0.36])  # lower at small compute, higher at large


def crossing_point() -> float:
    def difference(log_c):
        c = np.array([np.exp(log_c)])
        return (laws.frontier_loss(BASE, c) - laws.frontier_loss(CROSSING, c))[0]

    return float(np.exp(brentq(difference, np.log(1e17), np.log(1e24))))


def test_equal_laws_are_not_separable():
    result = compare(law("early", spread=0.01, seed=1), law("late", spread=0.01, seed=2))
    assert "not separable at 95%" in verdict(result)
    assert result.crossover is None
    np.testing.assert_allclose(result.gain, 1.0, rtol=1e-9)
    assert (result.gain_interval[0] < 1).all() and (result.gain_interval[1] > 1).all()


def test_simultaneous_band_holds_whole_curves():
    first, second = law("early", spread=0.01, seed=1), law("late", CROSSING, spread=0.01, seed=2)
    result = compare(first, second)
    assert (result.simultaneous[0] <= result.pointwise[0]).all()
    assert (result.simultaneous[1] >= result.pointwise[1]).all()
    fresh = law("early", spread=0.01, seed=11).draws, law("late", CROSSING, spread=0.01, seed=12).draws
    curves = laws.frontier_loss(fresh[0], result.flops) - laws.frontier_loss(fresh[1], result.flops)
    inside = ((curves >= result.simultaneous[0]) & (curves <= result.simultaneous[1])).all(axis=1).mean()
    assert 0.90 < inside < 0.99
    pointwise = ((curves >= result.pointwise[0]) & (curves <= result.pointwise[1])).all(axis=1).mean()
    assert pointwise < inside


def test_a_clear_lead_is_named_with_its_range():
    worse = BASE * [1.05, 1, 1, 1, 1]
    result = compare(law("late", worse, spread=1e-3), law("early", spread=1e-3, seed=3))
    assert verdict(result) == "early is ahead of late from 1e+18 to 1e+22 FLOPs at 95% (simultaneous band)."
    assert (result.difference > 0).all() and (result.gain < 1).all()


def test_crossover_and_its_interval():
    true = crossing_point()
    assert 1e18 < true < 1e22
    result = compare(law("early", spread=5e-4, seed=1), law("late", CROSSING, spread=5e-4, seed=2))
    assert result.crossover.flops == pytest.approx(true, rel=1e-2)
    low, high = result.crossover.interval
    assert low < true < high
    text = verdict(result)
    assert text.index("late is ahead of early from 1e+18") < text.index("early is ahead of late from")
    assert text.count("not separable at 95%") == 1


def test_crossover_interval_is_open_where_the_range_ends():
    true = crossing_point()
    near = (true / 1.5, true * 1e3)
    result = compare(law("early", spread=5e-3, seed=1), law("late", CROSSING, spread=5e-3, seed=2), near)
    assert result.crossover.interval[0] is None and result.crossover.interval[1] > true


def test_gain_is_the_ratio_of_flops_at_equal_loss():
    result = compare(law("a"), law("b", kappa=1.25))
    np.testing.assert_allclose(result.gain, 1.25, rtol=1e-9)  # b counts 25% more FLOPs for the same training
    better = compare(law("a"), law("b", BASE * [1.5, 1, 1, 1, 1]))
    index = np.flatnonzero(np.isfinite(better.gain))[0]
    assert law("a").frontier(better.flops)[index] == pytest.approx(
        laws.frontier_loss(BASE * [1.5, 1, 1, 1, 1], better.flops[index : index + 1] * better.gain[index])[0]
    )
    assert np.isinf(better.gain[-1])  # below the other's E: no compute suffices


def test_ranges():
    left, right = law("a", flops=(1e18, 1e20)), law("b", flops=(1e19, 1e22))
    result = compare(left, right)
    assert result.flops[[0, -1]] == pytest.approx([1e19, 1e20]) and not result.extrapolated
    wide = compare(left, right, (1e18, 1e23))
    assert wide.extrapolated and "extrapolated beyond the runs" in verdict(wide)
    apart = compare(law("a", flops=(1e18, 1e19)), law("b", flops=(1e21, 1e22)))
    assert apart.flops[[0, -1]] == pytest.approx([1e18, 1e22]) and apart.extrapolated
    with pytest.raises(InputError, match="empty"):
        compare(left, right, (1e20, 1e19))


def test_read_laws_names_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"run tools/fit_scaling_laws\.py again"):
        read_laws(tmp_path)
