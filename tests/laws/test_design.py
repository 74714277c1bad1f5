"""Which runs to make next: the information against brute force, the choice against exhaustive search, the tool."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.law import power_law, solver
from megamm_laws.proposals import design
from megamm_laws.proposals.design import Ladder, candidate_grid, form_dominates, loss_at, narrowed, propose
from megamm_laws.proposals.next_runs import RunsRequest, choose_runs, to_markdown
from megamm_laws.runs.table import RunTable, check_rows, read_runs
from simulated.ladders import TRUTH
from simulated.proposals import compute_ratio, regular_grid, widths

from megamm.errors import InputError

ROOT = Path(__file__).parents[2]


def make_ladder(**changes) -> Ladder:
    n, d = regular_grid(1e20, (5, 4))
    candidates = candidate_grid((2e7, 3e9), (1e9, 1e11), 1e21, per_axis=5)
    values = {
        "name": "all",
        "decision": loss_at(1e23),
        "params": n,
        "tokens": d,
        "draws": TRUTH[None] * [[1, 1, 1, 1, 1], [1.01, 1.1, 1.01, 0.95, 0.99]],
        "noise": 0.003,
        "candidate_params": candidates[0],
        "candidate_tokens": candidates[1],
    }
    return Ladder(**{**values, **changes})


def variance(ladder: Ladder, extra: list[int], draw: np.ndarray) -> float:
    """Variance of the decision from a Jacobian by finite differences in (E, log A, alpha, log B, beta), no centring."""
    n = np.concatenate([ladder.params, ladder.candidate_params[extra]])
    d = np.concatenate([ladder.tokens, ladder.candidate_tokens[extra]])

    def law(x):
        return np.array([x[0], np.exp(x[1]), x[2], np.exp(x[3]), x[4]])

    x = np.array([draw[0], np.log(draw[1]), draw[2], np.log(draw[3]), draw[4]])
    steps = 1e-5 * np.eye(5)
    jacobian = np.array(
        [
            (np.log(power_law.predict(law(x + s), n, d)) - np.log(power_law.predict(law(x - s), n, d))) / 2e-5
            for s in steps
        ]
    ).T
    gradient = np.array([(ladder.decision(law(x + s)) - ladder.decision(law(x - s))) / 2e-5 for s in steps])
    covariance = np.linalg.pinv(jacobian.T @ jacobian / ladder.noise**2, rcond=1e-15)
    return float(gradient @ covariance @ gradient)


def test_sensitivities_by_finite_differences():
    n, d = np.array([1e8, 3e9]), np.array([1e10, 4e10])
    problem = solver.Problem.of(n, d, np.ones(2))
    theta = problem.to_theta(TRUTH[None])
    found = design.sensitivities(problem, theta, n, d)[0]
    for k, step in enumerate(1e-6 * np.eye(5)):
        ends = [np.log(power_law.predict(problem.to_parameters(theta[0] + s * step), n, d)) for s in (1, -1)]
        assert found[:, k] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_predicted_width_equals_brute_force():
    """The rank-one updates against the information matrix built anew, in other coordinates."""
    ladder = make_ladder()
    runs = propose([ladder], 2e21)
    assert len(runs) >= 2
    index = [
        int(np.argmin(abs(ladder.candidate_params / r.params - 1) + abs(ladder.candidate_tokens / r.tokens - 1)))
        for r in runs
    ]
    logs = [0.5 * np.log(variance(ladder, index, draw) / variance(ladder, [], draw)) for draw in ladder.draws]
    assert runs[-1].width == pytest.approx(np.exp(np.mean(logs)), rel=0.01)


def test_greedy_is_near_the_best_pair():
    ladder = make_ladder(draws=TRUTH[None])
    cost, budget = ladder.cost, 1e21
    pairs = [p for p in itertools.combinations(range(len(cost)), 2) if cost[list(p)].sum() <= budget]
    best = min(variance(ladder, list(pair), TRUTH) for pair in pairs)
    runs = propose([ladder], budget, max_runs=2)
    assert runs[-1].width <= 1.1 * np.sqrt(best / variance(ladder, [], TRUTH))


def test_budget_and_order_are_kept():
    runs = propose([make_ladder()], 5e20)
    assert sum(run.flops for run in runs) <= 5e20
    assert all(a.width > b.width for a, b in itertools.pairwise(runs)) and runs[0].width < 1
    assert len({(run.params, run.tokens) for run in runs}) == len(runs)
    with pytest.raises(InputError, match="--budget"):
        propose([make_ladder()], 1e10)


def test_a_difference_spends_on_the_poorer_group():
    poor = make_ladder(name="poor", noise=0.05)
    assert {run.group for run in propose([make_ladder(name="rich"), poor], 3e20, max_runs=4)} == {"poor"}


def test_proposals_need_at_most_half_of_the_grid():
    """Small size; benchmarks/design.py has the full figure."""
    budgets = np.array([2e20, 4e20])
    result = widths("log N*(target)", budgets, simulations=3, resamples=40)
    assert result["proposed"][0][0] < result["grid"][0][1]
    assert result["same ratios"][0][1] < result["grid"][0][1]  # at equal compute


def test_runs_narrow_the_noise_and_not_the_bend():
    assert narrowed(0.5, 1.0) == narrowed(0.5, 1.2) == 0.5  # noise is all there is
    assert narrowed(0.0, 0.6) == pytest.approx(0.8)  # without any noise the bend is left
    assert narrowed(1.0, 0.3) == 1.0
    assert form_dominates(0.7) and not form_dominates(0.72)


def test_compute_ratio_reads_off_the_curve():
    budgets = np.array([1.0, 10.0, 100.0])
    proposed = np.array([0.4, 0.2, 0.1])
    ratio = compute_ratio(budgets, np.array([0.8, 0.4, 0.2]), proposed)
    assert ratio == pytest.approx([1.0, 0.1, 0.1])  # the first is bounded by the smallest budget
    assert np.isnan(compute_ratio(budgets, np.array([0.05, 0.05, 0.05]), proposed)).all()


def test_regular_grid_costs_its_budget():
    n, d = regular_grid(3e20, (4, 3))
    assert len(n) == 12 and (6 * n * d).sum() == pytest.approx(3e20, rel=1e-6)
    assert sorted({round(x) for x in d / n}) == [5, 20, 80]


# ---------------------------------------------------------------------------------------------------- the tool


@pytest.fixture
def table() -> RunTable:
    rows = []
    for architecture, shift in (("early", 1.0), ("late", 1.01)):
        n, d = regular_grid(1e20, (5, 4))
        losses = (
            power_law.predict(TRUTH, n, d) * np.exp(0.003 * np.random.default_rng(1).standard_normal(len(n))) * shift
        )
        for i, (p, t, y) in enumerate(zip(n, d, losses)):
            rows.append(
                {"run": f"{architecture}-{i}", "architecture": architecture, "params": p, "tokens": t, "loss": y}
            )
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


@pytest.mark.parametrize("decision", ["params", "loss", "exponent", "difference"])
def test_every_decision(table, decision):
    groups = None if decision == "difference" else ["late"]
    plan = choose_runs(table, RunsRequest(budget=1e21, decision=decision, groups=groups, resamples=60, max_runs=5))
    for kind, ratio in (("interval", "interval_width_ratio"), ("noise_interval", "noise_width_ratio")):
        now, later = plan["now"][kind], plan["predicted"][kind]
        assert now[0] <= later[0] <= later[1] <= now[1]
        assert (later[1] - later[0]) / (now[1] - now[0]) == pytest.approx(plan[ratio])
    assert plan["runs"][-1]["width"] == plan["noise_width_ratio"] < plan["interval_width_ratio"] + 1e-12 < 1
    ratios = [run["tokens"] / run["params"] for run in plan["runs"]]
    assert min(ratios) >= 4.9 and max(ratios) <= 81


def test_what_the_runs_do_not_determine_is_told(table, tmp_path):
    """Two sizes, three trunks and a run without a loss: the proposal rests on a law that is hardly known."""
    rows = [row | {"trunk": f"t{i % 3}"} for i, row in enumerate(table.rows) if row["architecture"] == "late"]
    sizes = sorted({row["params"] for row in rows})[:2]
    rows = [row for row in rows if row["params"] in sizes]
    rows[0]["loss_text"] = float("nan")
    for row in rows[1:]:
        row["loss_text"] = row["loss"]
    few = RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    plan = choose_runs(few, RunsRequest(budget=1e21, loss_column="loss_text", resamples=60, max_runs=2))
    found = "\n".join(plan["warnings"])
    for text in ("1 runs have no loss_text", "with 2 distinct params, A, alpha and E", "only 3 trunks"):
        assert found.count(text) == 1, text
    assert all(
        text.startswith("from the fit of late: ") and f"- Warning {text}" in to_markdown(plan)
        for text in plan["warnings"]
    )
    names = ("run", "architecture", "params", "tokens", "loss", "loss_text", "trunk")
    path = tmp_path / "runs.csv"
    path.write_text(
        "\n".join(
            ",".join("" if row[n] != row[n] else str(row[n]) for n in names) for row in [dict(zip(names, names)), *rows]
        )
    )
    command = [sys.executable, str(ROOT / "tools" / "next_runs.py"), str(path), "--budget", "1e21", "--bootstrap", "60"]
    command += ["--loss-column", "loss_text", "--max-runs", "2", "--out", str(tmp_path / "next")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning from the fit of late: only 3 trunks" in done.stderr
    assert json.loads((tmp_path / "next" / "next_runs.json").read_text())["warnings"] == plan["warnings"]


def test_a_bend_is_not_promised_away():
    """Chinchilla's runs bend: noise is a fifth of the width, and more runs narrow nothing but that fifth."""
    runs = read_runs(ROOT / "tests" / "data" / "chinchilla_runs.csv")
    runs = runs.select(runs.numbers("loss") < np.sort(runs.numbers("loss"))[-5])
    plan = choose_runs(runs, RunsRequest(budget=1e21, resamples=100, max_runs=5))
    assert np.ptp(plan["now"]["noise_interval"]) < 0.5 * np.ptp(plan["now"]["interval"])
    assert plan["noise_width_ratio"] < 0.97 < 0.985 < plan["interval_width_ratio"] < 1
    assert any("neighbouring runs err together" in text for text in plan["warnings"])
    page = to_markdown(plan)
    assert plan["form_dominates"] and "more runs among those so far will not narrow it" in page
    assert "| with the error of the form | [" in page and "| by noise alone | [" in page


def test_extrapolation_is_told(table):
    request = {"budget": 1e21, "groups": ["late"], "resamples": 30, "max_runs": 1}
    far = choose_runs(table, RunsRequest(**request, at=1e27))
    assert any("extrapolation: 1e+27 FLOPs are " in text for text in far["warnings"])
    for decision in ("params", "exponent"):  # ten times by default; an exponent is about no compute
        at = 1e27 if decision == "exponent" else None
        plan = choose_runs(table, RunsRequest(**request, decision=decision, at=at))
        assert not any("extrapolation" in text for text in plan["warnings"])


def test_runs_not_cooled_down_are_told(table):
    for row in table.rows:
        row["cooled"] = False
    plan = choose_runs(table, RunsRequest(budget=1e21, groups=["late"], resamples=30, max_runs=1))
    assert any("not cooled down" in text for text in plan["warnings"])


def test_fits_without_fault_are_not_warned_of(table):
    plan = choose_runs(table, RunsRequest(budget=1e21, decision="difference", resamples=60, max_runs=2))
    assert plan["warnings"] == [] and "Warning" not in to_markdown(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decision": "size"}, "--decision"),
        ({"groups": ["moe"]}, "--group: moe"),
        ({}, "name one"),
        ({"groups": ["late"], "at": -1.0}, "--at"),
        ({"groups": ["late"], "ratios": (9.0, 3.0)}, "--ratios"),
        ({"groups": ["late"], "budget": float("nan")}, "--budget"),
    ],
)
def test_bad_requests(table, changes, message):
    with pytest.raises(InputError, match=message):
        choose_runs(table, RunsRequest(**{"budget": 1e21, "resamples": 60, **changes}))


def test_the_script(tmp_path, table):
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(table.rows[0]))
        writer.writeheader()
        writer.writerows(table.rows)
    command = [sys.executable, str(ROOT / "tools" / "next_runs.py"), str(path), "--budget", "1e21", "--bootstrap", "50"]
    good = [*command, "--group", "early", "--out", str(tmp_path / "next")]
    done = subprocess.run(good, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "next" / "next_runs.json").read_text())
    with (tmp_path / "next" / "next_runs.csv").open() as handle:
        assert [float(r["flops"]) for r in csv.DictReader(handle)] == [r["flops"] for r in plan["runs"]]
    bad = subprocess.run([*command, "--out", str(tmp_path / "none")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.strip().count("\n") == 0 and not (tmp_path / "none").exists()
