"""Coverage on simulated ladders: the simulation has the properties it claims, and intervals hold the truth."""

import numpy as np
import pytest
from megamm_laws.fitting.fit import cluster_labels
from megamm_laws.law import power_law
from simulated.ladders import SCENARIOS, TRUTH, Scenario, cover, decisions, simulate


def errors(scenario: Scenario, ladders: int) -> np.ndarray:
    """Log loss over the truth, (ladders, sizes, lengths)."""
    found = []
    for i in range(ladders):
        table = simulate(scenario, np.random.default_rng(i))
        prediction = power_law.predict(TRUTH, table.numbers("params"), table.numbers("tokens"))
        found.append(np.log(table.numbers("loss") / prediction).reshape(scenario.sizes, scenario.lengths))
    return np.array(found)


@pytest.mark.parametrize("changes", [{}, {"tail_degrees": 4.0}])
def test_noise_has_the_stated_size(changes):
    found = errors(Scenario(name="x", noise=0.003, **changes), 400)
    assert found.std() == pytest.approx(0.003, rel=0.08)
    assert abs(found.mean()) < 1e-4
    tails = (abs(found) > 4 * 0.003).mean()
    assert tails > 1e-3 if changes else tails < 1e-3


def test_offsets_are_shared_by_a_size_and_bends_by_neighbours():
    shared = errors(Scenario(name="x", noise=0.0, size_offset=0.002), 300)
    assert np.ptp(shared, axis=2).max() < 1e-12 and shared.std() == pytest.approx(0.002, rel=0.1)
    bend = errors(Scenario(name="x", noise=0.0, bend=0.002), 400)
    assert bend.std() == pytest.approx(0.002, rel=0.1)
    assert np.corrcoef(bend[:, 2, 2], bend[:, 2, 3])[0, 1] > 0.5
    mistuned = errors(Scenario(name="x", noise=0.0, mistuned=0.1), 200)
    assert (mistuned > 1e-9).mean() == pytest.approx(0.1, abs=0.02) and np.median(mistuned) == pytest.approx(
        0, abs=1e-9
    )


def test_trunks_are_sizes():
    table = simulate(next(s for s in SCENARIOS if s.trunks), np.random.default_rng(0))
    labels, sizes = cluster_labels(table), table.numbers("params")
    assert len(set(labels)) == len(set(sizes)) and all(np.ptp(sizes[labels == k]) == 0 for k in set(labels))


def test_decisions_are_the_closed_forms():
    found = decisions(TRUTH, 1e22)
    alpha, beta = TRUTH[2], TRUTH[4]
    assert found["a"] == pytest.approx(beta / (alpha + beta))
    assert found["N*(10C)"] / found["N*(C)"] == pytest.approx(10 ** (beta / (alpha + beta)))
    assert 6 * found["N*(C)"] * found["D*(C)"] == pytest.approx(1e22)
    assert found["L*(C)"] == pytest.approx(power_law.predict(TRUTH, [found["N*(C)"]], [found["D*(C)"]])[0])


def test_intervals_hold_the_truth_under_noise():
    """60 ladders: a true share of 95% puts the count at or above 51 with probability above 0.998."""
    result = cover(SCENARIOS[0], simulations=60, resamples=60)
    assert min(result.coverage.values()) >= 51 / 60
    assert max(abs(bias) for bias in result.bias.values()) < 0.5
    assert max(result.widening.values()) < 1.4


def test_plain_resampling_misses_a_bend_that_the_intervals_hold():
    bend = next(s for s in SCENARIOS if s.name == "surface bends, 60 runs")
    result = cover(bend, simulations=40, resamples=60)
    assert result.resampling_coverage["L*(10C)"] < 0.8 and result.coverage["L*(10C)"] >= 0.87
    assert result.widening["L*(10C)"] > 2
