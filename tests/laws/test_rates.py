"""Swept rates: optima with intervals that hold the truth, the law through them, and what it warns of."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.errors import InputError
from megamm_laws.runs.table import RunTable, check_rows, read_runs, write_runs
from megamm_laws.sweeps.cells import Noise, cells_of
from megamm_laws.sweeps.rates import fit_rates

ROOT = Path(__file__).parents[2]
FACTORS = (0.25, 0.5, 1, 2, 4)
SIZES, BUDGETS = (1e7, 4e7, 1.6e8), (1e9, 8e9)
STEEP = 0.02
"""Nats per squared unit of log rate."""


def best(n: float, d: float) -> float:
    return 2.0 * n**-0.3 * d**-0.1


def rows(sizes=SIZES, budgets=BUDGETS, noise=0.0, seed=0, at=best, factors=FACTORS, grid=2e-3) -> list[dict]:
    """Runs whose loss is a quadratic about ``at(N, D)``, swept about the rate ``grid`` times a power of N."""
    rng, found = np.random.default_rng(seed), []
    for n in sizes:
        for d in budgets:
            for f in factors:
                lr = f * grid * (n / 1e7) ** -0.3
                loss = 2 + 400 / n**0.34 + 400 / d**0.28 + STEEP * np.log(lr / at(n, d)) ** 2
                run = {"run": f"n{n:g}-d{d:g}-x{f:g}", "architecture": "early", "params": n, "tokens": d}
                kept = {"loss": loss + noise * rng.standard_normal(), "lr": lr}
                found.append({**run, **kept, "sweep": None if f == 1 else f"lr {f:g}"})
    return found


def table(found: list[dict]) -> RunTable:
    return check_rows(RunTable(path="runs.csv", rows=found, lines=list(range(2, 2 + len(found)))))


def test_a_law_without_noise_is_found():
    (fit,) = fit_rates(table(rows()), planned=(1e9, 2e10))
    law = fit.law.to_json()
    assert law["exponents"] == pytest.approx({"params": -0.3, "tokens": -0.1}, abs=1e-9)
    assert law["coefficient"] == pytest.approx(2.0, rel=1e-9)
    assert fit.prediction()[0] == pytest.approx(best(1e9, 2e10), rel=1e-9)
    assert [cell["optimum"] for cell in fit.to_json()["cells"]] == pytest.approx(
        [best(n, d) for n in SIZES for d in BUDGETS]
    )
    low, high = law["intervals"]["params"]
    assert low < -0.3 < high


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside, cells, planned = [], [], []
    for seed in range(60):
        (fit,) = fit_rates(table(rows(noise=0.004, seed=seed)), planned=(1e9, 2e10), draws=200)
        ends = fit.law.to_json()["intervals"]
        inside += [ends[name][0] < truth < ends[name][1] for name, truth in (("params", -0.3), ("tokens", -0.1))]
        cells += [
            low < np.log(best(c.params, c.tokens)) < high for c in fit.used for low, high in [c.interval(fit.noise)]
        ]
        _, low, high = fit.prediction()
        planned.append(low < best(1e9, 2e10) < high)
    assert 0.91 < np.mean(inside) < 1 and 0.92 < np.mean(cells) < 0.98 and np.mean(planned) > 0.9


def test_the_interval_of_an_optimum_is_where_the_slope_is_not_told_from_zero():
    """Against the slope and its variance computed point by point."""
    (cell,), _ = cells_of(table(rows(SIZES[:1], BUDGETS[:1], noise=0.003)), "lr", "loss", None)
    noise = Noise(nats=0.003, degrees=np.inf)
    grid = np.linspace(-1.5, 1.5, 30001)
    x = np.log(cell.rates[cell.near]) - cell.centre
    weights = np.linalg.pinv(np.stack([np.ones_like(x), x, x * x], axis=1))
    slopes = np.stack([np.zeros_like(grid), np.ones_like(grid), 2 * grid], axis=1)
    slope = slopes @ weights @ cell.losses[cell.near]
    deviation = 0.003 * np.linalg.norm(slopes @ weights, axis=1)
    flat = grid[np.abs(slope) < noise.quantile * deviation]
    assert cell.interval(noise) == pytest.approx(cell.centre + np.array([flat[0], flat[-1]]), abs=3e-4)
    assert cell.interval(Noise(nats=1.0, degrees=np.inf)) == (-np.inf, np.inf)


def test_scatter_between_cells_widens_the_interval():
    def scattered(n: float, d: float) -> float:
        return best(n, d) * np.exp(0.3 * np.sin(7 * np.log(n) + 3 * np.log(d)))

    (even,), (uneven,) = fit_rates(table(rows())), fit_rates(table(rows(at=scattered)))
    widths = [np.ptp(fit.law.to_json()["intervals"]["params"]) for fit in (even, uneven)]
    assert even.law.scatter == 0 and uneven.law.scatter > 0.1 and widths[1] > 2 * widths[0]


def test_a_best_rate_at_the_edge_is_no_optimum():
    found = rows()
    (fit,) = fit_rates(table([r for r in found if r["params"] != 1.6e8 or r["lr"] > 0.9 * best(1.6e8, r["tokens"])]))
    assert len(fit.used) == 4 and fit.warnings[0].startswith("1.6e+08 parameters, 1e+09 tokens: the best value")
    assert "is the smallest one: add smaller ones" in fit.warnings[0]
    high = rows(SIZES[:1], BUDGETS[:1], grid=best(1e7, 1e9) * 8)
    (fit,) = fit_rates(table(high))
    # At the factors 1 and .25 of a rate 8 times too high: .02 (log(8)^2 - log(2)^2) nats.
    assert "was trained at lr 0.016, the best run had 0.004: this costs 0.0769 nats" in fit.warnings[1]
    assert fit.to_json()["cells"][0]["excess"] == pytest.approx(0.02 * (np.log(8) ** 2 - np.log(2) ** 2))
    (none,) = fit_rates(table([r for r in found if r["lr"] > best(r["params"], r["tokens"])]))
    assert none.law is None and none.to_json()["law"] is None and "there is no law of lr" in none.warnings[-1]


def test_a_rate_off_its_optimum_is_told_of_swept_or_not():
    grid = best(1e7, 1e9) * 2
    found = rows(grid=grid)
    # One cell with its own run alone: the law through the others judges it.
    found = [r for r in found if (r["params"], r["tokens"]) != (1.6e8, 8e9) or r["sweep"] is None]
    (fit,) = fit_rates(table(found))
    off = [text for text in fit.warnings if "was trained at lr" in text]
    assert len(off) == 6 and sum("the law gives" in text for text in off) == 1
    # 2 to 2 * 8^.1 times too large a rate: .02 log(2)^2 = .0096 nats.
    assert "costs 0.00961 nats" in off[0]
    (fine,) = fit_rates(table(rows(budgets=BUDGETS[:1], grid=best(1e7, 1e9))))
    assert not any("was trained" in text for text in fine.warnings)
    (given,) = fit_rates(table([{k: v for k, v in r.items() if k != "sweep"} for r in rows()]), used=1e-4)
    assert any("was trained at lr 0.0001" in text for text in given.warnings)


@pytest.mark.parametrize(
    ("sizes", "budgets", "terms", "warning"),
    [
        (SIZES, BUDGETS[:1], ("params",), "no exponent of tokens"),
        (SIZES[:1], BUDGETS, ("tokens",), "no exponent of params"),
        (SIZES[:1], BUDGETS[:1], (), "1 cells with an optimum for a law of 1 constants: too few"),
    ],
)
def test_an_exponent_needs_a_range(sizes, budgets, terms, warning):
    (fit,) = fit_rates(table(rows(sizes, budgets)), planned=(1e9, 1e11))
    assert fit.law.terms == terms and any(warning in text for text in fit.warnings), fit.warnings


def test_sizes_and_budgets_that_grow_together_share_an_exponent():
    along = [r for r in rows(budgets=[20 * n for n in SIZES]) if r["tokens"] == 20 * r["params"]]
    (fit,) = fit_rates(table(along), planned=(1e9, 2e10))
    assert fit.law.terms == ("params",) and any("grow together" in text for text in fit.warnings)
    assert fit.law.to_json()["exponents"]["params"] == pytest.approx(-0.4)
    assert fit.prediction()[0] == pytest.approx(best(1e9, 2e10)) and not any("no exponent" in t for t in fit.warnings)
    (fit,) = fit_rates(table(along), planned=(1e9, 2e11))
    assert any("no exponent of tokens" in text for text in fit.warnings)


def test_of_two_batches_each_rate_keeps_its_better_one_and_tokens_may_differ_by_a_step():
    small = [{**r, "batch_tokens": 2**14, "tokens": r["tokens"] * 1.004, "run": r["run"] + "b"} for r in rows()]
    large = [{**r, "batch_tokens": 2**16, "loss": r["loss"] + 0.01} for r in rows()]
    (fit,) = fit_rates(table(small + large))
    assert len(fit.cells) == 6 and fit.law.to_json()["exponents"]["params"] == pytest.approx(-0.3, abs=1e-6)
    assert any("batch_tokens differs" in text for text in fit.warnings)


def test_a_swept_batch():
    found = [{k: v for k, v in r.items() if k != "lr"} | {"batch_tokens": r["lr"] * 1e8} for r in rows()]
    (fit,) = fit_rates(table(found), column="batch_tokens")
    assert fit.law.to_json()["coefficient"] == pytest.approx(2e8)
    with pytest.raises(InputError, match=r"runs.csv: no column lr; has run"):
        fit_rates(table(found))


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no size and length has 3 values"):
        fit_rates(table([r for r in rows() if r["sweep"] is None]))
    with pytest.raises(InputError, match=r"line 3 \(run .*column lr: fast is not a number|column lr: 'fast'"):
        fit_rates(table([r | {"lr": "fast"} if i == 1 else r for i, r in enumerate(rows())]))


def test_the_command(tmp_path):
    write_runs(tmp_path / "runs.csv", rows(noise=0.003))
    tool = [sys.executable, ROOT / "tools" / "fit_rates.py", tmp_path / "runs.csv", "--out", tmp_path / "o"]
    done = subprocess.run([*tool, "--params", "1e9", "--tokens", "2e10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["rates.json", "rates.md", "rates.pdf", "rates.png"]
    (entry,) = json.loads((tmp_path / "o" / "rates.json").read_text())["fits"]
    (fit,) = fit_rates(read_runs(tmp_path / "runs.csv"), planned=(1e9, 2e10))
    assert entry == fit.to_json() and entry["planned"]["interval"][0] < entry["planned"]["value"]
    page = (tmp_path / "o" / "rates.md").read_text()
    assert "1B parameters, 20B tokens: lr" in done.stdout and "| 10M | 1B | 5 |" in page
    done = subprocess.run([*tool, "--params", "1e9"], capture_output=True, text=True)
    assert done.returncode == 2 and "give both --params and --tokens" in done.stderr
