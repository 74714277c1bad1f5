"""The error of the form: bends are found and sized, other disturbances are not taken for one."""

from dataclasses import replace

import numpy as np
import pytest
from megamm_laws.fitting.fit import fit_group, fit_problem, optima
from megamm_laws.fitting.page import to_markdown
from megamm_laws.uncertainty.model_error import LENGTHS, _smooth, refit_losses, simulated_fits
from simulated.ladders import SCENARIOS, Scenario, simulate

GRID = {"sizes": 10, "lengths": 6}


def probabilities(scenario: Scenario, ladders: int = 12) -> tuple[float, float]:
    """Of a bend and of offsets: medians over some ladders of a scenario."""
    fits = [fit_group(simulate(scenario, np.random.default_rng([3, i])), resamples=50) for i in range(ladders)]
    found = [(fit.model_error.bend.probability, fit.model_error.offsets.probability) for fit in fits]
    return tuple(np.median(found, axis=0))


def test_a_bend_is_found_and_noise_is_none():
    assert probabilities(Scenario(name="x", noise=0.002, bend=0.004, **GRID))[0] > 0.95
    assert max(probabilities(Scenario(name="x", noise=0.002, **GRID))) < 0.2


@pytest.mark.parametrize("trunks", [True, False])
def test_offsets_of_sizes_are_found_whether_the_runs_name_a_trunk_or_not(trunks):
    bend, offsets = probabilities(Scenario(name="x", noise=0.002, size_offset=0.004, trunks=trunks, **GRID))
    assert bend < 0.4 and offsets > 0.8


@pytest.mark.parametrize("changes", [{"mistuned": 0.1}, {"tail_degrees": 3.0}])
def test_runs_that_are_far_off_are_taken_for_neither(changes):
    assert max(probabilities(Scenario(name="x", noise=0.002, **GRID, **changes))) < 0.3


def test_its_size_is_that_of_a_planted_bend():
    """A draw of the process itself along both axes, of 0.3% each, on a grid fine enough to see it."""
    table = simulate(Scenario(name="x", sizes=20, lengths=12, noise=0.001), np.random.default_rng(0))
    rng, offset = np.random.default_rng(1), np.zeros(len(table))
    for column in ("params", "tokens"):
        x = np.log(table.numbers(column))
        u = (x - x.min()) / np.ptp(x)
        covariance = np.exp(-0.5 * ((u[:, None] - u) / 0.2) ** 2) + 1e-9 * np.eye(len(u))
        offset += 0.003 * np.linalg.cholesky(covariance) @ rng.standard_normal(len(u))
    rows = [row | {"loss": row["loss"] * np.exp(o)} for row, o in zip(table.rows, offset)]
    bend = fit_group(replace(table, rows=rows), resamples=300).model_error.bend
    assert bend.probability == 1.0
    assert np.sqrt(2) * 0.003 / 2 < bend.sd < np.sqrt(2) * 0.003 * 2  # ratios are a factor of two apart


@pytest.mark.parametrize("length", LENGTHS)
def test_bends_have_neither_mean_nor_slope_and_variance_1_over_the_runs(length):
    """Against the covariance they come from, written out: freed of straight lines over the runs, then scaled."""
    x = np.random.default_rng(0).uniform(18, 23, 40)
    covariance = np.exp(-0.5 * ((x[:, None] - x) / np.ptp(x) / length) ** 2)
    line = np.linalg.qr(np.stack([np.ones(40), x], axis=1))[0]
    free = np.eye(40) - line @ line.T
    expected = free @ covariance @ free
    factor = _smooth(x, length)
    assert factor.T @ line == pytest.approx(0, abs=1e-9)
    assert factor @ factor.T == pytest.approx(40 * expected / np.trace(expected), abs=1e-2)


@pytest.mark.parametrize("x", [[20.0] * 9, [20.0] * 5 + [21.0] * 4])
def test_runs_of_one_or_two_lengths_allow_no_bend_along_them(x):
    factor = _smooth(np.array(x), 0.3)
    assert np.isfinite(factor).all() and np.abs(factor).max() < 1e-2


def test_a_refit_is_the_fit_of_its_own_losses():
    """Each row against a table that holds these losses, fitted by itself from all starts."""
    table = simulate(Scenario(name="x", **GRID), np.random.default_rng(0))
    problem = fit_problem(table, "loss")
    theta = optima(problem)[0][0]
    rows = [problem.y + 0.01 * np.sin(6 * problem.u), problem.y + 0.01 * np.cos(4 * problem.v)]
    found = refit_losses(problem, np.stack([theta, theta]), np.stack(rows))
    for fitted, y in zip(found, rows):
        assert fitted == pytest.approx(optima(replace(problem, y=y))[0][0], rel=1e-5)


def test_too_few_runs_say_nothing():
    table = simulate(SCENARIOS[0], np.random.default_rng(0)).select(np.isin(np.arange(30), [0, 4, 9, 13, 20, 24, 29]))
    fit = fit_group(table, resamples=20)
    assert fit.model_error is None and fit.draws == pytest.approx(fit.resampled)
    assert "model_error" not in fit.to_json() and "error of the form: not in the intervals" in to_markdown([fit])


def test_runs_of_sizes_of_their_own_share_no_offset():
    table = simulate(Scenario(name="x", sizes=12, lengths=1), np.random.default_rng(0))
    assert fit_group(table, resamples=20).model_error.offsets is None


def test_a_bend_widens_intervals_but_not_standard_errors():
    fit = fit_group(simulate(Scenario(name="x", noise=0.002, bend=0.004, **GRID), np.random.default_rng(1)))
    entry = fit.to_json()
    spread = dict(zip(entry["parameters"], fit.resampled.std(axis=0, ddof=1)))
    assert entry["standard_errors"] == pytest.approx(spread)
    low, high = entry["intervals"]["E"]
    assert high - low > 1.5 * 3.92 * entry["standard_errors"]["E"]
    assert set(entry["model_error"]) == {"bend", "offsets"}
    assert set(entry["model_error"]["bend"]) == {"probability", "sd", "interval"}
    assert "- a smooth bend of the surface: probability" in to_markdown([fit])


def test_draws_stay_with_the_data_where_a_parameter_is_at_its_bound():
    """Where E = 0 a bend cannot lower it; moved as if it could, the others would leave the data behind."""
    truth = np.array([0.0, 300.0, 0.65, 60.0, 0.33])
    changes = {"sizes": 4, "lengths": 4, "noise": 0.01}
    for seed in range(20):
        table = simulate(Scenario(name="x", **changes), np.random.default_rng(seed), truth)
        problem = fit_problem(table, "loss")
        theta = optima(problem)[0][0]
        if theta[0] == 0:
            break
    assert theta[0] == 0
    draws, error = simulated_fits(problem, theta, np.tile(theta, (500, 1)), np.arange(16), np.random.default_rng(0))
    assert error.bend.probability > 0 and (draws[:, 0] >= 0).all() and len(np.unique(draws[:, 2])) > 1

    def log_loss(theta):
        return np.log(
            theta[:, :1]
            + np.exp(theta[:, 1:2] - theta[:, 2:3] * problem.u)
            + np.exp(theta[:, 3:4] - theta[:, 4:5] * problem.v)
        )

    assert np.abs(log_loss(draws) - log_loss(theta[None])).max() < 1.0
