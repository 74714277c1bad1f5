"""The error of the form: bends are found and sized, other disturbances are not taken for one."""

from dataclasses import replace

import numpy as np
import pytest

from megamm.scaling import minimise
from megamm.scaling.calibration import SCENARIOS, Scenario, simulate
from megamm.scaling.fit import cluster_labels, fit_group, fit_problem, optima
from megamm.scaling.fits_page import to_markdown
from megamm.scaling.model_error import ModelError, follow, widen

GRID = {"sizes": 10, "lengths": 6}


def probabilities(scenario: Scenario, ladders: int = 12) -> np.ndarray:
    """Of a bend, for some ladders of a scenario."""
    fits = [fit_group(simulate(scenario, np.random.default_rng([3, i])), resamples=50) for i in range(ladders)]
    return np.array([fit.model_error.probability for fit in fits])


def test_a_bend_is_found_and_noise_is_none():
    assert np.median(probabilities(Scenario(name="x", noise=0.002, bend=0.004, **GRID))) > 0.95
    assert np.median(probabilities(Scenario(name="x", noise=0.002, **GRID))) < 0.2


@pytest.mark.parametrize("changes", [{"mistuned": 0.1}, {"tail_degrees": 3.0}, {"size_offset": 0.004, "trunks": True}])
def test_other_disturbances_are_not_taken_for_a_bend(changes):
    """A few runs that are far off, and offsets of trunks that the bootstrap holds already."""
    assert np.median(probabilities(Scenario(name="x", noise=0.002, **GRID, **changes))) < 0.3


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
    error = fit_group(replace(table, rows=rows), resamples=300).model_error
    assert error.probability == 1.0
    assert error.interval[0] < np.sqrt(2) * 0.003 < error.interval[1] * 1.05


def test_a_draw_follows_its_bend_as_a_fit_does():
    """Offsets far below delta leave the Huber loss of a refit quadratic."""
    table = simulate(Scenario(name="x", noise=0.0, **GRID), np.random.default_rng(0))
    problem = fit_problem(table, "loss")
    theta = optima(problem)[0][0]
    offset = 1e-5 * np.sin(6 * problem.u) + 1e-5 * np.cos(4 * problem.v)
    moved = minimise.minimise(replace(problem, y=problem.y + offset), theta[None], np.ones((1, len(table))))[0]
    followed = follow(problem, np.stack([theta, theta]), np.stack([offset, 0 * offset]))
    assert followed[0] - theta == pytest.approx(moved[0] - theta, rel=0.02, abs=1e-7)
    assert followed[1] == pytest.approx(theta, abs=1e-9)


def test_too_few_runs_say_nothing():
    table = simulate(SCENARIOS[0], np.random.default_rng(0)).select(np.isin(np.arange(30), [0, 4, 9, 13, 20, 24, 29]))
    problem = fit_problem(table, "loss")
    theta = optima(problem)[0][0]
    draws = np.tile(theta, (20, 1))
    found, error = widen(problem, theta, draws, cluster_labels(table), np.random.default_rng(0))
    assert found is draws and error == ModelError()


def test_a_bend_widens_intervals_but_not_standard_errors():
    fit = fit_group(simulate(Scenario(name="x", noise=0.002, bend=0.004, **GRID), np.random.default_rng(1)))
    entry = fit.to_json()
    spread = dict(zip(entry["parameters"], fit.resampled.std(axis=0, ddof=1)))
    assert entry["standard_errors"] == pytest.approx(spread)
    low, high = entry["intervals"]["E"]
    assert high - low > 2 * 3.92 * entry["standard_errors"]["E"]
    assert set(entry["model_error"]) == {"probability", "sd", "interval"}
    assert "error of the form: a smooth bend of the surface has probability" in to_markdown([fit])


def test_draws_stay_with_the_data_where_a_parameter_is_at_its_bound():
    """Where E = 0 a bend cannot lower it; moved as if it could, the others would leave the data behind."""
    truth = np.array([0.0, 300.0, 0.65, 60.0, 0.33])
    changes = {"sizes": 4, "lengths": 4, "noise": 0.04}
    for seed in range(4):
        table = simulate(Scenario(name="x", **changes), np.random.default_rng(seed), truth)
        problem = fit_problem(table, "loss")
        theta = optima(problem)[0][0]
        if theta[0] == 0:
            break
    assert theta[0] == 0
    draws, error = widen(problem, theta, np.tile(theta, (500, 1)), np.arange(16), np.random.default_rng(0))
    assert error.probability > 0 and (draws[:, 0] >= 0).all() and len(np.unique(draws[:, 2])) > 1

    def log_loss(theta):
        return np.log(
            theta[:, :1]
            + np.exp(theta[:, 1:2] - theta[:, 2:3] * problem.u)
            + np.exp(theta[:, 3:4] - theta[:, 4:5] * problem.v)
        )

    assert np.abs(log_loss(draws) - log_loss(theta[None])).max() < 1.0
