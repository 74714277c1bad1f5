"""The training plan: its numbers against closed forms and published ones, the trade-offs, the files, the errors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.optimize import minimize_scalar

from megamm.config import Config, ModelConfig, build
from megamm.dry_run import describe
from megamm.errors import InputError
from megamm.scaling import laws
from megamm.scaling.compare import Law
from megamm.scaling.fit_outputs import fit_table, write_fits
from megamm.scaling.flops import count_parameters
from megamm.scaling.plan.hardware import GPUS, bill, find_gpu, read_mfu, stated_mfu
from megamm.scaling.plan.inputs import Request, read_fits
from megamm.scaling.plan.outputs import to_markdown, train_values, write_plan
from megamm.scaling.plan.proposal import budget_flops, make_plan
from megamm.scaling.plan.sizes import nearest_model, peak_lr
from megamm.scaling.plan.tradeoffs import repeated_loss, repeated_optimum, serving_optimum
from megamm.scaling.plan.transfer import NOT_FITTED, Transfer, break_even, fit_transfer
from megamm.scaling.runs import RunTable, check_rows

ROOT = Path(__file__).parents[2]
EARLY = np.array([1.904, 420.0, 0.301, 1500.0, 0.335])
LATE = np.array([1.891, 420.0, 0.2903, 1500.0, 0.3383])
MUENNIGHOFF = np.array([np.exp(0.6254804), np.exp(6.255414), 0.3526596, np.exp(7.3049974), 0.3526596])
SHAPE = ModelConfig(vocab_size=50432, image_size=224, patch_size=14)


def make_table(laws_by_name: dict, noise: float = 0.003) -> RunTable:
    rows = []
    for k, (name, law) in enumerate(laws_by_name.items()):
        n, d = (x.ravel() for x in np.meshgrid(np.geomspace(3e8, 4e9, 5), np.geomspace(1e10, 4e11, 5), indexing="ij"))
        losses = laws.predict(law, n, d) * np.exp(noise * np.random.default_rng(k).standard_normal(len(n)))
        rows += [
            {"run": f"{name}-{i}", "architecture": name, "params": p, "tokens": t, "loss": y}
            for i, (p, t, y) in enumerate(zip(n, d, losses))
        ]
    return check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


@pytest.fixture(scope="module")
def table() -> RunTable:
    return make_table({"early": EARLY, "late": LATE})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, table) -> Path:
    out = tmp_path_factory.mktemp("fits")
    write_fits(out, fit_table(table, resamples=200))
    return out


@pytest.fixture(scope="module")
def fits(folder):
    return read_fits(folder)[0]


# ------------------------------------------------------------------------------------------------- the optimum


def test_plan_is_the_optimum_of_the_fit(fits):
    early = next(fit for fit in fits if fit.law.name == "early")
    plan = make_plan(Request(flops=1e23, group="early"), fits)
    _, A, alpha, B, beta = early.law.parameters
    found = minimize_scalar(
        lambda x: A * np.exp(-alpha * x) + B * (1e23 / 6 / np.exp(x)) ** -beta,
        bounds=(18, 30),
        method="bounded",
        options={"xatol": 1e-10},
    )
    best = plan["optimum"]
    assert best["params"]["value"] == pytest.approx(np.exp(found.x), rel=1e-4)
    assert 6 * best["params"]["value"] * best["tokens"]["value"] == pytest.approx(1e23)
    assert 6 * plan["model"]["params"] * plan["model"]["tokens"] == pytest.approx(1e23)
    for name in ("params", "tokens", "loss"):
        low, high = best[name]["interval"]
        assert low < best[name]["value"] < high
    truth = laws.optimum(EARLY, np.array([1e23]))[0][0]
    assert best["params"]["interval"][0] < truth < best["params"]["interval"][1]
    narrow, wide = (np.ptp(plan["model"][key]["interval"]) for key in ("loss", "loss_of_one_run"))
    assert narrow < wide
    assert early.noise == pytest.approx(0.003, rel=0.35)


def test_the_fits_that_lose_are_distrusted_too(fits):
    """Which group is best rests on the others' fits as much."""
    chosen = make_plan(Request(flops=1e21), fits)["group"]
    told = [replace(f, entry=f.entry | {"warnings": [f"w-{f.law.name}"]}) for f in fits]
    found = make_plan(Request(flops=1e21), told)["warnings"]
    other = next(f.law.name for f in fits if f.law.name != chosen)
    assert found[-2:] == [f"from the fit: w-{chosen}", f"from the fit of {other}, compared: w-{other}"]


def test_groups_are_compared_and_the_best_is_taken(fits):
    plan = make_plan(Request(flops=1e22), fits)
    assert plan["group"] == "early"  # its losses are lower by construction: the same A with a higher alpha
    other = next(choice for choice in plan["choices"] if choice["group"] == "late")
    assert "early is ahead of late" in other["verdict"]


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_nearest_model_is_the_nearest(architecture, tensor):
    template = ModelConfig(architecture=architecture, vocab_size=50432, image_size=224, patch_size=14)
    model = nearest_model(3e9, template, tensor)
    assert (model.config.width // model.config.head_dim) % tensor == 0
    assert model.config.width % (model.config.head_dim * tensor) == 0
    assert model.params == count_parameters(model.config).total
    near = [nearest_model(3e9 * f, template, tensor).params for f in np.geomspace(0.5, 2, 41)]
    assert min(abs(np.log(np.array(near) / 3e9))) == pytest.approx(abs(np.log(model.params / 3e9)))
    if architecture == "late":
        assert model.config.vision.width % (64 * tensor) == 0


def test_sizes_of_the_paper():
    """Width 5120 at depth 24 has 8.13B parameters and a peak rate of 2.4e-4 (arXiv 2504.07951)."""
    model = nearest_model(8.13e9, SHAPE, 8)
    assert model.config.width == 5120 and model.params == pytest.approx(8.13e9, rel=2e-3)
    assert peak_lr(5120) == 2.4e-4 and peak_lr(800) == 1.5e-3 and 3.5e-4 < peak_lr(3000) < 4e-4
    with pytest.raises(InputError, match="--tensor-parallel: 3"):
        nearest_model(1e9, SHAPE, 3)


# ------------------------------------------------------------------------------------------------- the budget


def test_budgets_are_one_another(fits):
    h100 = find_gpu("H100")
    law = fits[0].law
    common = {"gpus": [h100], "prices": [2.0], "efficiency": stated_mfu(0.4)}
    assert budget_flops(Request(gpu_hours=1000, **common), law) == pytest.approx(1000 * 3600 * 989e12 * 0.4)
    assert budget_flops(Request(money=2000, **common), law) == pytest.approx(1000 * 3600 * 989e12 * 0.4)
    priced = Request(money=1e5, prep_rate=1e6, cpu_price=0.05, **common)
    flops = budget_flops(priced, law)
    tokens = laws.optimum(law.parameters, np.array([flops]), law.kappa)[1][0]
    assert flops / (3600 * 989e12 * 0.4) * 2 + tokens / 1e6 * 0.05 == pytest.approx(1e5, rel=1e-6)


def test_bill():
    found = bill(GPUS["a100"], stated_mfu(0.5), 312e12 * 0.5 * 3600 * 100, 1e9, num_gpus=4, price=3.0, pue=1.5)
    assert found.gpu_hours == pytest.approx(100) and found.days == pytest.approx(100 / 4 / 24)
    assert found.money == pytest.approx(300) and found.money_interval is None
    assert found.megawatt_hours == pytest.approx(100 * 400 * 1.5 / 1e6)
    assert found.state_bytes_per_gpu == 4e9


def test_mfu_from_a_log(tmp_path):
    records = [{"step": i, "mfu": 0.01 if i < 4 else 0.4, "flops": 3e15, "flops_exact": 2e15} for i in range(40)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read_mfu(tmp_path)
    assert found.mfu == pytest.approx(0.6)  # by 6ND, which counts 1.5 times the exact operations; warm-up left out
    assert found.interval == pytest.approx((0.6, 0.6))
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="no usable mfu"):
        read_mfu(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_mfu(tmp_path / "none")


# ---------------------------------------------------------------------------------------------- the trade-offs


@pytest.mark.parametrize(
    ("params", "tokens", "loss"), [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)]
)
def test_repeated_data_as_published(params, tokens, loss):
    """Muennighoff et al. 2023, their constants and two points of their code."""
    assert repeated_loss(MUENNIGHOFF, params, tokens, 25e9) == pytest.approx(loss, rel=1e-12)


def test_repeated_data_limits():
    fresh = laws.predict(MUENNIGHOFF, np.array([1e9]), np.array([2e10]))[0]
    assert repeated_loss(MUENNIGHOFF, 1e9, 2e10, 2e10) == pytest.approx(fresh)
    assert repeated_loss(MUENNIGHOFF, 1e9, 2e10, 1e12) == pytest.approx(fresh)
    losses = [repeated_loss(MUENNIGHOFF, 1e9, 2e10, unique) for unique in (1e9, 5e9, 1e10, 2e10)]
    assert losses == sorted(losses, reverse=True)
    best = repeated_optimum(MUENNIGHOFF, 1e22, 25e9)
    grid = np.geomspace(1e9, 1e11, 20001)
    assert best["loss"] == pytest.approx(repeated_loss(MUENNIGHOFF, grid, 1e22 / 6 / grid, 25e9).min(), abs=2e-5)
    assert best["params"] < laws.optimum(MUENNIGHOFF, np.array([1e22]))[0][0]  # more epochs, fewer parameters


def test_serving_optimum_by_the_condition_of_lagrange():
    """At the optimum a step along the curve of equal loss costs as much in training as it saves in serving."""
    served = 3e12
    best = serving_optimum(EARLY, 1e23, served)
    E, A, alpha, B, beta = EARLY
    target = laws.frontier_loss(EARLY, np.array([1e23]))[0]
    n, d = float(best["params"]), float(best["tokens"])
    assert E + A * n**-alpha + B * d**-beta == pytest.approx(target)
    slope = -(alpha * A * n ** (-alpha - 1)) / (beta * B * d ** (-beta - 1))  # dD/dN at equal loss
    assert 6 * d + 2 * served == pytest.approx(-6 * n * slope, rel=0.03)
    assert 0 < best["saved"] < 1 and best["training"] > 1e23
    assert serving_optimum(EARLY, 1e23, 1.0)["saved"] == pytest.approx(0, abs=1e-3)


def test_short_data_moves_the_model(fits):
    free = make_plan(Request(flops=1e23, group="early"), fits)
    short = make_plan(Request(flops=1e23, group="early", unique_tokens=2e10, served_tokens=1e12), fits)
    assert short["model"]["params"] < free["model"]["params"]
    assert short["model"]["loss"]["value"] > free["model"]["loss"]["value"]
    assert short["repeated_data"]["short"] and short["repeated_data"]["epochs"] > 4
    assert short["repeated_data"]["loss_to_repetition"]["interval"][0] > 0
    assert not make_plan(Request(flops=1e21, unique_tokens=1e13), fits)["repeated_data"]["short"]


# ------------------------------------------------------------------------------------------------ the transfer


def transfer_runs(a: float, b: float, worth: float) -> RunTable:
    n, d = (x.ravel() for x in np.meshgrid([5e8, 1e9, 2e9], np.geomspace(1e10, 3e11, 6), indexing="ij"))
    effective = d + worth * (d / 5e10) ** a * (n / 1e9) ** b
    rows = [
        {"run": f"llm-{i}", "params": p, "tokens": t, "loss": y, "init": "llm"}
        for i, (p, t, y) in enumerate(zip(n, d, laws.predict(EARLY, n, effective)))
    ]
    return check_rows(RunTable(path="llm.csv", rows=rows, lines=list(range(2, len(rows) + 2))))


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
        helped = laws.predict(EARLY, [1e9], [tokens + 6e10 * (tokens / 5e10) ** 0.3])[0]
        return 1 - helped / laws.predict(EARLY, [1e9], [tokens])[0]

    at = found["llm_for_nothing"]["tokens"]
    assert gain(at / 1.1) > 0.01 > gain(at * 1.1)


def test_without_llm_runs_nothing_is_fitted(fits, table):
    assert make_plan(Request(flops=1e22), fits)["transfer"]["status"] == NOT_FITTED
    assert make_plan(Request(flops=1e22, runs=table), fits)["transfer"]["status"] == NOT_FITTED
    rows = [*({**row, "init": "native"} for row in table.rows), *transfer_runs(0.3, 0.4, 6e10).rows]
    both = RunTable(path="both.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    found = make_plan(Request(flops=1e22, group="early", runs=both), fits)["transfer"]
    assert found["status"].startswith("fitted to 18") and found["break_even_tokens"]["llm_for_nothing"]["tokens"]
    rows[0]["init"] = "perhaps"
    with pytest.raises(InputError, match=r"line 2 .*'perhaps'"):
        make_plan(Request(flops=1e22, runs=both), fits)


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
    plan = make_plan(Request(flops=1e22, group="early", loss_column="loss_text", runs=runs), fits)
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
    found = make_plan(Request(flops=1e22, group="early", runs=runs), fits)["transfer"]
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
    plan = make_plan(Request(flops=1e22), fits)
    plan["transfer"] = {"status": "fitted", "negligible_gain": 1e-4, "break_even_tokens": {key: entry}}
    words = {"everywhere": "no worse anywhere", "nowhere": "worse everywhere"}[status]
    end = {"below": "below 1e+08", "above": "above 1e+15"}[side]
    assert f"Native is {words} from 1e+08 to 1e+15 tokens, break-even [{end}, {end}]" in to_markdown(plan)


# -------------------------------------------------------------------------------------------- stages and files


def test_stages_lead_up_to_the_full_run(fits):
    plan = make_plan(Request(flops=1e24, gpus=[GPUS["h100"]], prices=[2.0], efficiency=stated_mfu(0.4)), fits)
    pilot, mid, full = plan["stages"]
    assert pilot["flops"] < mid["flops"] < full["flops"] and mid["flops"] == pytest.approx(1e23)
    assert 0 < pilot["interval_width_ratio"] < 1
    assert all(stage["money"] == pytest.approx(2 * stage["gpu_hours"]) for stage in plan["stages"])
    assert all(stage["decides"] and stage["stop_rule"] for stage in plan["stages"])
    ends = [check["loss_of_one_run"][0] for check in full["checks"]]
    assert ends[0] > ends[1] > plan["model"]["loss_of_one_run"]["interval"][0]
    assert any("extrapolation" in text for text in plan["warnings"])
    assert [s["stage"] for s in make_plan(Request(flops=1e21, pilot_share=0.0), fits)["stages"]] == ["full run"]


def pilot_of(fits, **options) -> tuple[dict, list[str]]:
    """The pilot ladder of a plan and what the plan assumes of it."""
    plan = make_plan(Request(flops=1e24, group="early", **options), fits)
    return plan["stages"][0], [text for text in plan["assumptions"] if text.startswith("pilot ladder: ")]


def test_the_pilot_narrows_noise_alone(fits):
    """An error of the form that leaves noise a fifth of the width stays as it is."""
    early = next(fit for fit in fits if fit.law.name == "early")
    low, high = early.entry["intervals"]["a"]
    middle, half = (low + high) / 2, (high - low) / 2
    found = {}
    for share in (1.0, 0.2):
        entry = early.entry | {"noise_intervals": {"a": [middle - share * half, middle + share * half]}}
        found[share] = pilot_of([replace(early, entry=entry)])[0]
    noise, bent = found[1.0], found[0.2]
    assert noise["interval_width_ratio"] == noise["noise_width_ratio"] == bent["noise_width_ratio"] < 0.8
    assert bent["interval_width_ratio"] == pytest.approx((0.96 + 0.04 * noise["noise_width_ratio"] ** 2) ** 0.5)
    assert "by noise alone from a factor of" in bent["prediction"]
    assert "more runs among those so far will not narrow it" in bent["prediction"]
    assert "will not narrow" not in noise["prediction"]


def test_the_pilot_stays_within_the_ratios_so_far(fits, table):
    rows = [row for row in table.rows if 9 < row["tokens"] / row["params"] < 130]
    few = RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    for runs in (None, few):
        pilot, assumed = pilot_of(fits, runs=runs)
        source = table if runs is None else few
        measured = source.numbers("tokens") / source.numbers("params")
        ratios = [run["tokens"] / run["params"] for run in pilot["runs"]]
        assert measured.min() / 1.2 < min(ratios) and max(ratios) < measured.max() * 1.2  # widths are rounded
        assert len(assumed) == 1 and f"within {measured.min():.2g}"[:9] in assumed[0]


def test_the_pilot_repeats_no_token_much(fits):
    unlimited, _ = pilot_of(fits)
    assert max(run["tokens"] for run in unlimited["runs"]) > 8e10
    pilot, assumed = pilot_of(fits, unique_tokens=2e10)
    assert max(run["tokens"] for run in pilot["runs"]) <= 8e10 and "at most 4 epochs" in assumed[1]
    pilot, assumed = pilot_of(fits, unique_tokens=1e9)  # the shortest run so far has ten epochs
    assert pilot["runs"] == unlimited["runs"] and "no run fits into 4 epochs" in assumed[1]


def test_llm_runs_are_no_runs_so_far(fits, table):
    llm = [{**row, "architecture": "early"} for row in transfer_runs(0.3, 0.4, 6e10).rows]
    both = [*({**row, "init": "native"} for row in table.rows), *llm]
    pilots = [
        pilot_of(fits, runs=RunTable(path="runs.csv", rows=rows, lines=list(range(2, len(rows) + 2))))[0]
        for rows in (table.rows, both)
    ]
    assert pilots[0]["runs"] == pilots[1]["runs"]
    assert pilots[0]["noise_width_ratio"] == pilots[1]["noise_width_ratio"]
    alone = RunTable(path="llm.csv", rows=llm, lines=list(range(2, len(llm) + 2)))
    assert pilot_of(fits, runs=alone)[0]["runs"] == pilot_of(fits)[0]["runs"]


@pytest.mark.parametrize("group", ["early", "late"])
def test_the_config_trains(fits, tmp_path, group):
    request = Request(flops=1e22, group=group)
    base = {"data": {"row_length": 2048}, "train": {"steps": 5}, "checkpoint": {"every": 77}}
    write_plan(tmp_path, make_plan(request, fits), request, base)
    values = yaml.safe_load((tmp_path / "train.yaml").read_text())
    plan = json.loads((tmp_path / "plan.json").read_text())
    config = build(Config, values)
    assert config.checkpoint.every == 77 and config.data.row_length == 2048 and base["train"] == {"steps": 5}
    assert config.train.tokens == pytest.approx(plan["model"]["tokens"], rel=1e-5)
    assert f"{plan['model']['params']:,}" in describe(config)
    page = (tmp_path / "plan.md").read_text()
    assert page.count("\n") < 70
    for heading in ("## Trade-offs", "## Stages", "## Assumptions", "## Warnings"):
        assert (heading in page) == (heading != "## Warnings" or bool(plan["warnings"]))


def test_no_config_for_a_model_that_is_not_the_plan(table, tmp_path):
    """Runs of experts count a fifth of their parameters as active: a dense model would cost five times the budget."""
    rows = [{**r, "architecture": "moe", "flops": r["flops"] / 5} for r in table.rows if r["architecture"] == "early"]
    runs = RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2)))
    write_fits(tmp_path, fit_table(runs, resamples=20))
    fits, out = read_fits(tmp_path)[0], tmp_path / "plan"
    out.mkdir()
    (out / "train.yaml").write_text("of an earlier plan")
    for model, expected in ((None, ["none of the architectures", "5 times the budget"]), (SHAPE, ["5 times the"])):
        request = Request(flops=1e21, model=model)
        plan = make_plan(request, fits)
        assert [path.name for path in write_plan(out, plan, request, {})] == ["plan.json", "plan.md"]
        assert not (out / "train.yaml").exists()
        told = [text for text in plan["warnings"] if text.startswith("no train.yaml: ")]
        assert len(told) == len(expected) and all(part in text for part, text in zip(expected, told))
        assert expected[-1] in (out / "plan.md").read_text()


def test_a_group_that_is_no_architecture_needs_a_shape(table, tmp_path):
    rows = [{k: v for k, v in r.items() if k != "architecture"} for r in table.rows if r["architecture"] == "early"]
    write_fits(tmp_path, fit_table(RunTable(path="made.csv", rows=rows, lines=table.lines[:25]), resamples=20))
    fits = read_fits(tmp_path)[0]
    assert len(make_plan(Request(flops=1e21), fits)["no_train_config"]) == 1
    assert make_plan(Request(flops=1e21, model=SHAPE), fits)["no_train_config"] == []


def test_late_fusion_counted_with_its_encoder_is_built(table, tmp_path):
    """Patches are fewer than tokens, so that a tower's FLOPs are below 6 N_v D."""
    rows = [{**r, "flops": r["flops"] * 0.9} for r in table.rows if r["architecture"] == "late"]
    write_fits(tmp_path, fit_table(RunTable(path="made.csv", rows=rows, lines=table.lines[:25]), resamples=20))
    plan = make_plan(Request(flops=1e22), read_fits(tmp_path)[0])
    assert plan["model"]["architecture"] == "late" and plan["no_train_config"] == []


def test_small_budgets_get_small_batches(fits):
    request = Request(flops=1e19)
    plan = make_plan(request, fits)
    train = train_values(plan, plan["build"], request, {})["train"]
    assert train["batch_rows"] < 2048 and train["tokens"] / (train["batch_rows"] * 1024) >= 2000


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_plan_from_poor_fits_is_whole(tmp_path):
    """Five runs of two lengths: parameters at their bounds, infinite draws; the files hold no NaN and warn."""
    n, d = np.array([1e6, 1e6, 2e6, 2e6, 4e6]), np.array([1e7, 4e7, 1e7, 4e7, 4e7])
    noise = 0.02 * np.random.default_rng(0).standard_normal(5)
    rows = [{"params": p, "tokens": t, "loss": y} for p, t, y in zip(n, d, laws.predict(EARLY, n, d) * np.exp(noise))]
    poor = check_rows(RunTable(path="poor.csv", rows=rows, lines=list(range(2, 7))))
    write_fits(tmp_path, fit_table(poor, resamples=50))
    for flops in (1e15, 1e22):
        request = Request(flops=flops, served_tokens=1e12, unique_tokens=1e7, pilot_share=0.1)
        write_plan(tmp_path / "plan", make_plan(request, read_fits(tmp_path)[0]), request, {})
        plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
        assert any("not identified" in text for text in plan["warnings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "exactly one budget"),
        ({"flops": 1e20, "money": 3.0}, "exactly one budget"),
        ({"flops": -1.0}, "--flops"),
        ({"gpu_hours": 10.0}, "needs --gpu"),
        ({"money": 10.0, "gpus": [GPUS["h100"]], "efficiency": stated_mfu(0.4)}, "--price"),
        ({"flops": 1e20, "gpus": [GPUS["h100"]]}, "--mfu"),
        ({"flops": 1e20, "group": "moe"}, "--group: 'moe'"),
        ({"flops": 1e20, "tensor_parallel": 3}, "--num-gpus"),
        ({"flops": 1e20, "pilot_share": 2.0}, "--pilot-share"),
        ({"flops": 1e20, "unique_tokens": float("nan")}, "--unique-tokens"),
    ],
)
def test_bad_requests(fits, changes, message):
    with pytest.raises(InputError, match=message):
        make_plan(Request(**changes), fits)
    with pytest.raises(InputError, match="--mfu"):
        stated_mfu(1.5)
    with pytest.raises(InputError, match="--gpu: 'tpu'"):
        find_gpu("tpu")


def test_fits_of_another_form(tmp_path, table):
    """The law of data that are not repeated stands for the form of repeated data; a form without one is left out."""
    rows = [{**row, "unique_tokens": row["tokens"] / 4} for row in table.rows if row["architecture"] == "early"]
    runs = check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))
    write_fits(tmp_path, fit_table(runs, form="repeated", resamples=20))
    plan = make_plan(Request(flops=1e22), read_fits(tmp_path)[0])
    assert any("law repeated at repetition none" in text for text in plan["assumptions"])
    document = json.loads((tmp_path / "fits.json").read_text())
    del document["fits"][0]["law"]
    (tmp_path / "fits.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="form repeated"):
        read_fits(tmp_path)


def test_unreadable_fits(tmp_path, folder):
    with pytest.raises(InputError, match="no readable fits"):
        read_fits(tmp_path)
    (tmp_path / "fits.json").write_text((folder / "fits.json").read_text())
    with pytest.raises(InputError, match="no readable fits"):
        read_fits(tmp_path)  # bootstrap.npz is missing
    with pytest.raises(InputError, match="loss_text"):
        read_fits(folder, "loss_text")


def test_the_script(folder, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plan_training.py"), str(folder / "fits.json")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    good = ["--money", "1e6", "--gpu", "h100", "mi300x", "--price", "2", "2.5", "--mfu", "0.4"]
    good += ["--inference-tokens", "1e12", "--unique-tokens", "1e11"]
    done = subprocess.run([*command, *good, "--out", str(tmp_path / "plan")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "plan.md", "train.yaml"}
    dry = [sys.executable, "-m", "megamm.train", "--config", str(tmp_path / "plan" / "train.yaml"), "--dry-run"]
    assert "parameters" in subprocess.run(dry, capture_output=True, text=True, env=env, check=True).stdout
    bad = subprocess.run(
        [*command, "--flops", "0", "--out", str(tmp_path / "x")], capture_output=True, text=True, env=env
    )
    assert bad.returncode == 2 and bad.stderr.strip().count("\n") == 0 and not (tmp_path / "x").exists()


def test_mfu_from_an_estimate(folder, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plan_training.py"), str(folder / "fits.json"), "--gpu-hours=1e5"]
    command += ["--mfu-from-estimate", str(ROOT / "examples" / "configs" / "early_275m.yaml"), "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    good = subprocess.run([*command, "--gpu", "h100"], capture_output=True, text=True, env=env)
    assert good.returncode == 0, good.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    low, high = plan["efficiency"]["interval"]
    assert low < plan["efficiency"]["mfu"] < high and "estimated" in plan["efficiency"]["source"]
    assert plan["budget"]["flops"]["interval"] == pytest.approx([x * 989e12 * 3600 * 1e5 for x in (low, high)])
    assert "estimated for 2.75e+08 parameters on 64 ranks of h100" in (tmp_path / "plan.md").read_text()
    for more, match in (([], "--mfu-from-estimate: needs --gpu"), (["--gpu=h100", "--num-gpus=7"], "of the 7 ranks")):
        bad = subprocess.run([*command, *more], capture_output=True, text=True, env=env)
        assert bad.returncode == 2 and match in bad.stderr and bad.stderr.strip().count("\n") == 0


def test_figures_of_the_gpus():
    """Ratios that the makers' families share; a slip in the table breaks them."""
    a100, h100, h200, b200 = (GPUS[name] for name in ("a100", "h100", "h200", "b200"))
    assert h200.peak_flops == h100.peak_flops and GPUS["mi325x"].peak_flops == GPUS["mi300x"].peak_flops
    assert (h200.link, b200.link, a100.link) == (h100.link, 2 * h100.link, h100.link * 2 / 3)
    assert GPUS["mi250x"].peak_flops / GPUS["mi250x"].dies == 191.5e12  # of one die, as torch sees it
    # FLOPs that must follow each byte for memory not to be the limit: 100 to 500 on all of them.
    assert all(100 < gpu.peak_flops / gpu.bandwidth < 500 and gpu.link < gpu.bandwidth for gpu in GPUS.values())


def test_an_estimate_for_something_else_is_warned_of(fits):
    crowded = replace(stated_mfu(0.4), params=10**7, warnings=("90.0 GB do not fit",))
    request = Request(flops=1e22, gpus=[GPUS["h100"]], efficiency=crowded, tensor_parallel=8)
    text = "\n".join(make_plan(request, fits)["warnings"])
    for part in ("90.0 GB do not fit", "estimated for a model of 1e+07 parameters", "layout has 8"):
        assert part in text
    like = replace(crowded, params=make_plan(request, fits)["model"]["params"], warnings=())
    plan = make_plan(replace(request, efficiency=like, tensor_parallel=1), fits)
    assert not [text for text in plan["warnings"] if text.startswith("efficiency")]
