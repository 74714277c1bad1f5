"""Trade-offs of a plan against closed forms and published figures, and the transfer law against planted ones."""

import numpy as np
import pytest
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law
from megamm_laws.runs.table import RunTable
from plan_factory import EARLY, transfer_runs

from megamm.errors import InputError
from megamm.planning.inputs import PlanRequest, read_fits
from megamm.planning.outputs import to_markdown
from megamm.planning.proposal import make_plan
from megamm.planning.tradeoffs import repeated_loss, repeated_optimum, serving_optimum
from megamm.planning.transfer import NOT_FITTED, Transfer, break_even, fit_transfer

MUENNIGHOFF = np.array([np.exp(0.6254804), np.exp(6.255414), 0.3526596, np.exp(7.3049974), 0.3526596])


# ---------------------------------------------------------------------------------------------- the trade-offs


@pytest.mark.parametrize(
    ("params", "tokens", "loss"), [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)]
)
def test_repeated_data_as_published(params, tokens, loss):
    """Muennighoff et al. 2023, their constants and two points of their code."""
    assert repeated_loss(MUENNIGHOFF, params, tokens, 25e9) == pytest.approx(loss, rel=1e-12)


def test_repeated_data_limits():
    fresh = power_law.predict(MUENNIGHOFF, np.array([1e9]), np.array([2e10]))[0]
    assert repeated_loss(MUENNIGHOFF, 1e9, 2e10, 2e10) == pytest.approx(fresh)
    assert repeated_loss(MUENNIGHOFF, 1e9, 2e10, 1e12) == pytest.approx(fresh)
    losses = [repeated_loss(MUENNIGHOFF, 1e9, 2e10, unique) for unique in (1e9, 5e9, 1e10, 2e10)]
    assert losses == sorted(losses, reverse=True)
    best = repeated_optimum(MUENNIGHOFF, 1e22, 25e9)
    grid = np.geomspace(1e9, 1e11, 20001)
    assert best["loss"] == pytest.approx(repeated_loss(MUENNIGHOFF, grid, 1e22 / 6 / grid, 25e9).min(), abs=2e-5)
    assert best["params"] < power_law.optimum(MUENNIGHOFF, np.array([1e22]))[0][0]  # more epochs, fewer parameters


def test_serving_optimum_by_the_condition_of_lagrange():
    """At the optimum a step along the curve of equal loss costs as much in training as it saves in serving."""
    served = 3e12
    best = serving_optimum(EARLY, 1e23, served)
    E, A, alpha, B, beta = EARLY
    target = power_law.frontier_loss(EARLY, np.array([1e23]))[0]
    n, d = float(best["params"]), float(best["tokens"])
    assert E + A * n**-alpha + B * d**-beta == pytest.approx(target)
    slope = -(alpha * A * n ** (-alpha - 1)) / (beta * B * d ** (-beta - 1))  # dD/dN at equal loss
    assert 6 * d + 2 * served == pytest.approx(-6 * n * slope, rel=0.03)
    assert 0 < best["saved"] < 1 and best["training"] > 1e23
    assert serving_optimum(EARLY, 1e23, 1.0)["saved"] == pytest.approx(0, abs=1e-3)


def test_short_data_moves_the_model(fits):
    free = make_plan(PlanRequest(flops=1e23, group="early"), fits)
    short = make_plan(PlanRequest(flops=1e23, group="early", unique_tokens=2e10, served_tokens=1e12), fits)
    assert short["model"]["params"] < free["model"]["params"]
    assert short["model"]["loss"]["value"] > free["model"]["loss"]["value"]
    assert short["repeated_data"]["short"] and short["repeated_data"]["epochs"] > 4
    assert short["repeated_data"]["loss_to_repetition"]["interval"][0] > 0
    assert not make_plan(PlanRequest(flops=1e21, unique_tokens=1e13), fits)["repeated_data"]["short"]


# ------------------------------------------------------------------------------------------------ the transfer


def native_law() -> Law:
    draws = np.tile(EARLY, (20, 1)) * (1 + 1e-4 * np.random.default_rng(0).standard_normal((20, 5)))
    return Law(name="early", parameters=EARLY, draws=draws, kappa=1.0, flops_range=(1e19, 1e22))


def test_a_planted_transfer_law_is_found():
    transfer = fit_transfer(transfer_runs(0.3, 0.4, 6e10), native_law(), resamples=20)
    assert transfer.parameters[1:] == pytest.approx((0.3, 0.4), abs=1e-3)
    assert transfer.worth(transfer.parameters, 1e9, np.array([5e10]))[0] == pytest.approx(6e10, rel=1e-3)
    found = break_even(transfer, native_law(), 1e9, llm_tokens=1e11, negligible=0.01)
    # D_T = 6e10 (D/5e10)^0.3 rises past 1e11: below that the LLM is not worth its own tokens
    exact = 5e10 * (1 / 0.6) ** (1 / 0.3)
    assert found["pretraining_counted"]["tokens"] == pytest.approx(exact, rel=0.01)
    assert found["pretraining_counted"]["native_ahead"] == "below" and found["pretraining_counted"]["draws_agree"] == 1
    low, high = found["llm_for_nothing"]["interval"]
    assert low <= found["llm_for_nothing"]["tokens"] <= high

    def gain(tokens):
        helped = power_law.predict(EARLY, [1e9], [tokens + 6e10 * (tokens / 5e10) ** 0.3])[0]
        return 1 - helped / power_law.predict(EARLY, [1e9], [tokens])[0]

    at = found["llm_for_nothing"]["tokens"]
    assert gain(at / 1.1) > 0.01 > gain(at * 1.1)


def test_without_llm_runs_nothing_is_fitted(fits, table):
    assert make_plan(PlanRequest(flops=1e22), fits)["transfer"]["status"] == NOT_FITTED
    assert make_plan(PlanRequest(flops=1e22, runs=table), fits)["transfer"]["status"] == NOT_FITTED
    rows = [*({**row, "init": "native"} for row in table.rows), *transfer_runs(0.3, 0.4, 6e10).rows]
    both = RunTable(path="both.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    found = make_plan(PlanRequest(flops=1e22, group="early", runs=both), fits)["transfer"]
    assert found["status"].startswith("fitted to 18") and found["break_even_tokens"]["llm_for_nothing"]["tokens"]
    rows[0]["init"] = "perhaps"
    with pytest.raises(InputError, match=r"line 2 .*'perhaps'"):
        make_plan(PlanRequest(flops=1e22, runs=both), fits)


def test_the_transfer_law_is_of_the_planned_loss_and_group(table, tmp_path):
    """Another loss column and another group hold runs of another law: neither may enter."""
    rows = [{**row, "loss_text": row["loss"], "loss": 2 * row["loss"], "init": "native"} for row in table.rows]
    llm = [{**row, "architecture": "early"} for row in transfer_runs(0.3, 0.4, 6e10).rows]
    rows += [{**row, "loss_text": row["loss"], "loss": 2 * row["loss"]} for row in llm]
    rows += [{**row, "architecture": "late", "loss_text": 3.0, "run": f"late-{row['run']}"} for row in llm]
    rows.append({**llm[0], "run": "unmeasured", "loss_text": None})
    runs = RunTable(path="both.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    native = RunTable(path="made.csv", rows=rows[: len(table)], lines=table.lines)
    write_fits(tmp_path, fit_table(native, losses="loss_text", resamples=20))
    fits = read_fits(tmp_path, "loss_text")[0]
    plan = make_plan(PlanRequest(flops=1e22, group="early", loss_column="loss_text", runs=runs), fits)
    found = plan["transfer"]
    assert found["status"].startswith("fitted to 18")
    early = next(fit.law for fit in fits if fit.law.name == "early")
    expected = fit_transfer(transfer_runs(0.3, 0.4, 6e10), early).parameters
    assert [found["exponents"][name]["value"] for name in "ab"] == pytest.approx(expected[1:], abs=1e-6)
    told = "\n".join(text for text in plan["warnings"] if text.startswith("transfer law: "))
    assert "18 LLM-initialised runs of another architecture than early" in told
    assert "without loss_text were left out: " in told and "(run unmeasured)" in told


def test_llm_runs_of_another_group_alone_fit_nothing(fits, table):
    rows = [{**row, "architecture": "late"} for row in transfer_runs(0.3, 0.4, 6e10).rows]
    runs = RunTable(path="llm.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    found = make_plan(PlanRequest(flops=1e22, group="early", runs=runs), fits)["transfer"]
    assert found["status"].startswith("not fitted: 0 LLM-initialised runs of group early with loss")


@pytest.mark.parametrize(
    ("worth", "a", "llm_tokens", "expected"),
    [
        (1.0, 0.2, None, ("llm_for_nothing", "everywhere", "below")),  # no gain at all
        (1e13, 0.9, None, ("llm_for_nothing", "nowhere", "above")),  # a gain that outlasts the range
        (1e13, 0.1, 1e9, ("pretraining_counted", "nowhere", "below")),  # worth more than its own tokens at once
        (1e4, 0.1, 1e11, ("pretraining_counted", "everywhere", "above")),
        (1e4, -0.1, 1e11, ("pretraining_counted", "everywhere", "below")),
    ],
)
def test_a_break_even_out_of_range_says_on_which_side(fits, worth, a, llm_tokens, expected):
    key, status, side = expected
    parameters = np.array([np.log(worth), a, 0.0])
    draws = {"draws": np.tile(parameters, (20, 1)), "native_draws": native_law().draws}
    transfer = Transfer(parameters=parameters, mean_log_n=np.log(1e9), mean_log_d=np.log(5e10), n_runs=9, **draws)
    found = break_even(transfer, native_law(), 1e9, llm_tokens=llm_tokens, negligible=1e-4)
    entry = found[key]
    assert entry["tokens"] is None and entry["interval"] == [None, None]
    assert (entry["status"], entry["tokens_range"], entry["interval_range"]) == (status, side, [side, side])
    plan = make_plan(PlanRequest(flops=1e22), fits)
    plan["transfer"] = {"status": "fitted", "negligible_gain": 1e-4, "break_even_tokens": {key: entry}}
    words = {"everywhere": "no worse anywhere", "nowhere": "worse everywhere"}[status]
    end = {"below": "below 10K", "above": "above 1000T"}[side]
    assert f"Native is {words} from 10K to 1000T tokens, break-even [{end}, {end}]" in to_markdown(plan)


def test_a_break_even_that_may_lie_out_of_range_is_not_called_everywhere(fits):
    """Its interval reaches into the range, where native is then behind."""
    entry = {
        "tokens": None,
        "tokens_range": "above",
        "interval": [4.08e13, None],
        "interval_range": ["within", "above"],
    }
    entry |= {"native_ahead": "below", "status": "everywhere", "draws_agree": 1.0}
    plan = make_plan(PlanRequest(flops=1e22), fits)
    plan["transfer"] = {
        "status": "fitted",
        "negligible_gain": 1e-4,
        "break_even_tokens": {"pretraining_counted": entry},
    }
    told = "Native is no worse below the break-even, above 1000T tokens [40.8T, above 1000T]"
    assert told in to_markdown(plan) and "anywhere" not in to_markdown(plan)
