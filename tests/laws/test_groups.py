"""Runs that started from a trained model: no tool may count them among the native ones, nor drop them silently."""

import numpy as np
import pytest
from megamm_laws.comparison.recounted import runs_of
from megamm_laws.fitting.isoflop import fit_isoflop_table
from megamm_laws.fitting.outputs import fit_table
from megamm_laws.law import power_law
from megamm_laws.proposals.next_runs import RunsRequest, choose_runs
from megamm_laws.runs.groups import law_runs, native_groups, native_runs
from megamm_laws.runs.table import RunTable, check_rows

LAW = np.array([1.9, 420.0, 0.30, 1500.0, 0.335])
LINE = "9 runs with init llm were left out of the law of native runs: line 2 (run llm-0), "


def rows_of(name: str, gain: float, sizes: int, **columns) -> list[dict]:
    """Budgets of four sizes around the optimum, losses lower by the share ``gain``."""
    flops = np.repeat(np.geomspace(1e18, 1e21, sizes), sizes)
    n = power_law.optimum(LAW, flops)[0] * np.tile(np.geomspace(0.3, 3, sizes), sizes)
    losses = power_law.predict(LAW, n, flops / (6 * n)) * (1 - gain)
    losses *= np.exp(0.002 * np.random.default_rng(0).standard_normal(len(n)))
    return [
        {"run": f"{name}-{i}", "params": p, "tokens": c / (6 * p), "loss": y} | columns
        for i, (p, c, y) in enumerate(zip(n, flops, losses))
    ]


def made(*parts: list[dict]) -> RunTable:
    rows = [row for part in parts for row in part]
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


@pytest.fixture
def table() -> RunTable:
    """16 native runs, of which half say so, after 9 that started from an LLM."""
    native = rows_of("native", 0.0, 4)
    for row in native[::2]:
        row["init"] = "native"
    return made(rows_of("llm", 0.1, 3, init="llm"), native)


def test_only_native_runs_are_kept_and_the_others_named(table):
    native, lines = native_runs(table)
    assert all(name.startswith("native") for name in native.names) and len(native) == 16
    assert len(lines) == 1 and lines[0].startswith(LINE)
    assert native_runs(native) == (native, [])


def test_a_group_without_native_runs_is_kept_and_told(table):
    """Grouped by init, or named apart, they have a law of their own."""
    for row in table.rows:
        row["init"] = row.get("init") or "native"
    groups, lines = native_groups(table, "init")
    assert {name: len(runs) for name, runs in groups.items()} == {"llm": 9, "native": 16}
    assert lines == {"llm": ["all 9 runs have init llm: this is no law of native runs"], "native": []}


def test_fits_and_profiles_leave_them_out(table):
    native = native_runs(table)[0]
    for form in ("chinchilla", "mixture-exponential"):
        options = {"form": form, "resamples": 10}
        if form != "chinchilla":
            for row, share in zip(table.rows, np.linspace(0.2, 0.8, len(table))):
                row["share_text"], row["share_code"] = share, 1 - share
        both, alone = fit_table(table, **options)[0], fit_table(native, **options)[0]
        assert len(both.table) == 16 and both.warnings[0].startswith(LINE)
        np.testing.assert_array_equal(both.parameters, alone.parameters)
    profiles = fit_isoflop_table(table, draws=20)[0]
    assert len(profiles.table) == 16 and profiles.warnings[0].startswith(LINE)


def test_a_group_left_small_says_why(table):
    for row in table.rows:
        row["architecture"] = "late" if row["run"] in ("llm-0", "native-0") else "early"
    told = []
    fits = fit_table(table, resamples=10, left_out=told.append)
    assert [fit.group for fit in fits] == ["early"]
    assert len(told) == 1 and "late has 1 runs" in told[0] and "1 runs with init llm" in told[0]


def test_comparisons_and_proposals_leave_them_out(table):
    assert len(runs_of(table, None, "all")) == 16
    plan = choose_runs(table, RunsRequest(budget=1e21, resamples=20, max_runs=2))
    assert plan["groups"]["all"]["n_runs"] == 16
    assert any(text.startswith(f"from the fit of all: {LINE}") for text in plan["warnings"])


def test_runs_of_a_sweep_are_in_no_law_but_named(table):
    plain = table.select(row.get("init") != "llm" for row in table.rows)
    swept = rows_of("swept", -0.05, 3, sweep="lr 2")
    both = made(plain.rows, swept)
    (alone,), (fit,) = fit_table(plain, resamples=20), fit_table(both, resamples=20)
    assert fit.warnings[0].startswith("9 runs of a sweep were left out of the law (the first: line 18 (run swept-0)")
    assert fit.law.parameters == pytest.approx(alone.law.parameters)
    assert len(runs_of(both, None, "all")) == len(plain)
    kept, lines = law_runs(made(swept))
    assert len(kept) == 9 and lines == ["all 9 runs are of a sweep: this is no law of one ladder"]
