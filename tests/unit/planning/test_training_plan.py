"""The training plan: its numbers against closed forms and published ones, the trade-offs, the files, the errors."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law import power_law
from megamm_laws.law.solver import DELTA
from megamm_laws.runs.table import RunTable, check_rows
from plan_factory import EARLY
from scipy.optimize import minimize_scalar

from megamm.config import Config, ModelConfig
from megamm.dry_run import describe_run
from megamm.errors import InputError
from megamm.estimate.hardware import GPUS, bill, find_gpu, read_mfu, stated_mfu
from megamm.model.counts import count_parameters
from megamm.planning.inputs import PlanRequest, default_model, losses_at, read_fits
from megamm.planning.outputs import to_markdown, train_values, write_plan
from megamm.planning.proposal import budget_flops, make_plan
from megamm.planning.sizes import nearest_model, peak_lr
from megamm.settings import build

ROOT = Path(__file__).parents[3]
SHAPE = ModelConfig(vocab_size=50432, image_size=224, patch_size=14)


# ------------------------------------------------------------------------------------------------- the optimum


def test_plan_is_the_optimum_of_the_fit(fits):
    early = next(fit for fit in fits if fit.law.name == "early")
    plan = make_plan(PlanRequest(flops=1e23, group="early"), fits)
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
    truth = power_law.optimum(EARLY, np.array([1e23]))[0][0]
    assert best["params"]["interval"][0] < truth < best["params"]["interval"][1]
    law, run = (plan["model"][key]["interval"] for key in ("loss", "loss_of_one_run"))
    assert run[0] < law[0] and law[1] < run[1]
    assert early.noise == pytest.approx(0.003, rel=0.35)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_noise_widens_at_both_ends_whatever_the_draws(fits, noise):
    """Draws with gaps between them, over which percentiles jump; with no spread of the law it is the normal's own."""
    objective = fits[0].entry["n_runs"] * DELTA * (0.798 * noise * np.sqrt(20 / 25) - DELTA / 2)
    for spread in (0.0, 0.05):
        steps = np.round(np.random.default_rng(0).standard_normal(200))
        draws = EARLY * np.exp(np.outer(spread * steps, [1, 0, 0, 0, 0]))
        fitted = replace(fits[0], law=replace(fits[0].law, parameters=EARLY, draws=draws))
        fitted.entry = fitted.entry | {"objective": max(0.0, objective)}
        found = losses_at(fitted, 1e9, 2e10)
        law, run = found["loss"], found["loss_of_one_run"]
        assert run["interval"][0] < law["interval"][0] <= law["interval"][1] < run["interval"][1]
    flat = losses_at(replace(fitted, law=replace(fitted.law, draws=np.tile(EARLY, (20, 1)))), 1e9, 2e10)
    ends = np.log(np.array(flat["loss_of_one_run"]["interval"]) / flat["loss"]["value"])
    assert ends == pytest.approx([-1.96 * fitted.noise, 1.96 * fitted.noise])


def test_the_fits_that_lose_are_distrusted_too(fits):
    """Which group is best rests on the others' fits as much."""
    chosen = make_plan(PlanRequest(flops=1e21), fits)["group"]
    told = [replace(f, entry=f.entry | {"warnings": [f"w-{f.law.name}"]}) for f in fits]
    found = make_plan(PlanRequest(flops=1e21), told)["warnings"]
    other = next(f.law.name for f in fits if f.law.name != chosen)
    assert found[-2:] == [f"from the fit: w-{chosen}", f"from the fit of {other}, compared: w-{other}"]


def test_groups_are_compared_and_the_best_is_taken(fits):
    plan = make_plan(PlanRequest(flops=1e22), fits)
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
    h100_hour = 3600 * 989e12 * 0.4
    # Pilot and branched cool-downs are paid for too: 3% and 0.2 x (10% + 25%) of the full run.
    assert budget_flops(PlanRequest(gpu_hours=1000, **common), law) == pytest.approx(1000 * h100_hour / 1.1)
    assert budget_flops(PlanRequest(money=2000, **common), law) == pytest.approx(1000 * h100_hour / 1.1)
    priced = PlanRequest(money=1e5, prep_rate=1e6, cpu_price=0.05, pilot_share=0.0, **common)
    flops = budget_flops(priced, law)
    tokens = power_law.optimum(law.parameters, np.array([flops]), law.kappa)[1][0]
    assert 1.07 * flops / h100_hour * 2 + tokens / 1e6 * 0.05 == pytest.approx(1e5, rel=1e-6)


@pytest.mark.parametrize("amount", np.geomspace(1e2, 1e7, 26))
def test_all_stages_are_paid_from_the_budget(fits, amount):
    """Also where the mid run becomes due, which is a step in what a plan costs."""
    common = {"gpus": [GPUS["h100"]], "efficiency": stated_mfu(0.4), "group": "early"}
    for more, spent in (
        ({"gpu_hours": amount}, lambda plan: sum(stage["gpu_hours"] for stage in plan["stages"])),
        (
            {"money": amount, "prices": [2.0], "prep_rate": 1e9, "cpu_price": 0.05},
            lambda plan: sum(stage["money"] for stage in plan["stages"]) + plan["data_preparation"]["money"],
        ),
    ):
        plan = make_plan(PlanRequest(**common, **more), fits)
        assert 0.85 < spent(plan) / amount < 1.001
        assert plan["total"]["share_of_budget"] == pytest.approx(spent(plan) / amount)


def test_what_comes_on_top_of_the_flops_of_a_run_is_told(fits):
    """--flops is the run's own compute, so that N* and D* are those at C; the page says what else is spent."""
    plan = make_plan(PlanRequest(flops=1e23), fits)
    assert plan["optimum"]["flops"] == 1e23 and plan["total"]["flops"] > 1.1e23
    assert "come on top of the budget" in to_markdown(plan)
    assert not any(text.startswith("over the budget") for text in plan["warnings"])


def test_bill():
    found = bill(GPUS["a100"], stated_mfu(0.5), 312e12 * 0.5 * 3600 * 100, 1e9, num_gpus=4, price=3.0, pue=1.5)
    assert found.gpu_hours == pytest.approx(100) and found.days == pytest.approx(100 / 4 / 24)
    assert found.money == pytest.approx(300) and found.money_interval is None
    assert found.megawatt_hours == pytest.approx(100 * 400 * 1.5 / 1e6)
    assert found.state_bytes_per_gpu == 4e9
    assert found.days_interval is None and found.megawatt_hours_interval is None
    measured = replace(stated_mfu(0.5), interval=(0.4, 0.6))
    ranged = bill(GPUS["a100"], measured, 312e12 * 0.5 * 3600 * 100, 1e9, num_gpus=4, price=3.0, pue=1.5)
    for name in ("gpu_hours", "days", "money", "megawatt_hours"):
        value = getattr(ranged, name)
        assert value == getattr(found, name)
        assert getattr(ranged, f"{name}_interval") == pytest.approx((value / 1.2, value / 0.8))


def test_every_cost_on_the_page_has_an_interval_or_says_why_not(fits):
    request = PlanRequest(flops=1e24, gpus=[GPUS["h100"]], prices=[2.0], efficiency=stated_mfu(0.4))
    page = to_markdown(make_plan(request, fits))
    assert "(exact by assumption)" in page and "taken as exact: hours, days, money, MWh have no interval" in page
    ranged = replace(request, efficiency=replace(request.efficiency, interval=(0.3, 0.5)))
    plan = make_plan(ranged, fits)
    page = to_markdown(plan)
    row = next(line for line in page.splitlines() if line.startswith("| h100 |"))
    assert row.count("[") == 4 and "as exact" not in page and "exact by" not in page
    assert all(stage["money_interval"][0] < stage["money"] < stage["money_interval"][1] for stage in plan["stages"])
    assert page.count("] money") == len(plan["stages"]) + 1


def test_a_rate_beyond_those_known_is_warned_of(fits):
    """Rates are known for widths of 800 to 5120."""
    wide = make_plan(PlanRequest(flops=1e25, tensor_parallel=8), fits)
    assert any(text.startswith("learning rate: 0.00024 is that of") for text in wide["warnings"])
    assert any("grows as in Llama 3" in text and "flat beyond" in text for text in wide["assumptions"])
    narrow = make_plan(PlanRequest(flops=1e21), fits)
    assert not any(text.startswith("learning rate") for text in narrow["warnings"])
    assert narrow["model"]["depth"] == 24 and any("depth 24 at every size" in text for text in narrow["assumptions"])


def test_shapes_beyond_the_paper_are_those_that_exist(fits):
    """At depth 24 a model of 400B would be 32,000 wide; Llama 3's 405B are 16,384 wide and 126 deep."""
    found = {size: nearest_model(size, default_model("early"), grow_depth=True) for size in (8.13e9, 7e10, 4.05e11)}
    assert found[8.13e9].config.depth == 24 and 40 < found[7e10].config.depth < 80
    largest = found[4.05e11].config
    assert largest.width == pytest.approx(16384, rel=0.05) and largest.depth == pytest.approx(126, rel=0.08)
    assert all(model.params == pytest.approx(size, rel=0.05) for size, model in found.items())
    # A shape of the user's own keeps its depth.
    assert nearest_model(7e10, default_model("early")).config.depth == 24


def test_a_plan_that_is_a_guess_is_refused(fits, tmp_path):
    """Beyond a hundred times the compute measured, or from exponents that the runs do not determine."""
    early = next(fit for fit in fits if fit.law.name == "early")
    top = early.law.flops_range[1]
    unsure = replace(early, entry=early.entry | {"warnings": ["exponents are not identified: with 2 distinct params"]})
    for factor, fit, reason in (
        (101, early, "101 times the largest"),
        (5, unsure, "with 2 distinct params"),
    ):
        request = PlanRequest(flops=factor * top, group="early", model=SHAPE)
        (tmp_path / "train.yaml").write_text("of an earlier plan")
        plan = make_plan(request, [fit])
        written = write_plan(tmp_path, plan, request, {})
        assert [path.name for path in written] == ["plan.json", "plan.md"] and not (tmp_path / "train.yaml").exists()
        page = (tmp_path / "plan.md").read_text()
        assert page.splitlines()[2].startswith("**Do not train by this plan.**") and page.count(reason) == 1
        assert any(reason in text for text in json.loads((tmp_path / "plan.json").read_text())["refused"])
    assert make_plan(PlanRequest(flops=99 * top, group="early", model=SHAPE), [early])["refused"] == []


def test_a_wrong_size_has_its_price(fits):
    """Against the law written out: half and twice N* at the same budget."""
    early = next(fit for fit in fits if fit.law.name == "early")
    plan = make_plan(PlanRequest(flops=1e21, group="early"), [early])
    E, A, alpha, B, beta = early.law.parameters
    best = plan["optimum"]["params"]["value"]

    def loss(n: float) -> float:
        return E + A / n**alpha + B / (1e21 / (6 * early.law.kappa * n)) ** beta

    for entry in plan["wrong_size"]:
        expected = loss(entry["share_of_optimum"] * best) / loss(best) - 1
        assert entry["excess_loss"]["value"] == pytest.approx(expected, rel=1e-6) and expected > 0


def test_the_page_stays_a_page(fits):
    """With everything asked for and ten warnings of the fit; plan.json keeps each in full."""
    told = [f"unstable: without the {k} runs of highest loss, beta moves from 0.36 to 0.32" for k in range(9)]
    told = [replace(f, entry=f.entry | {"warnings": [*told, "held out: a is 0.574"]}) for f in fits]
    gpus = [GPUS[name] for name in ("h100", "b200", "mi300x")]
    asked = {"served_tokens": 1e13, "unique_tokens": 5e11, "prep_rate": 1e9, "cpu_price": 0.05, "tensor_parallel": 8}
    request = PlanRequest(money=3e6, gpus=gpus, prices=[2.5, 5.0, 2.0], efficiency=stated_mfu(0.4), **asked)
    plan = make_plan(request, told)
    page = to_markdown(plan)
    assert sum(any(letter.isalnum() for letter in word) for word in page.split()) <= 720
    assert "- from the fit (in full in fits.md): unstable (9); held out" in page
    assert sum(text.startswith("from the fit: unstable") for text in plan["warnings"]) == 9


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


# -------------------------------------------------------------------------------------------- stages and files


@pytest.mark.parametrize("group", ["early", "late"])
def test_the_config_trains(fits, tmp_path, group):
    request = PlanRequest(flops=1e22, group=group)
    base = {"data": {"row_length": 2048}, "train": {"steps": 5}, "checkpoint": {"every": 77}}
    write_plan(tmp_path, make_plan(request, fits), request, base)
    values = yaml.safe_load((tmp_path / "train.yaml").read_text())
    plan = json.loads((tmp_path / "plan.json").read_text())
    config = build(Config, values)
    assert config.checkpoint.every == 77 and config.data.row_length == 2048 and base["train"] == {"steps": 5}
    assert config.train.tokens == pytest.approx(plan["model"]["tokens"], rel=1e-5)
    assert f"{plan['model']['params']:,}" in describe_run(config)
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
        request = PlanRequest(flops=1e21, model=model)
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
    assert len(make_plan(PlanRequest(flops=1e21), fits)["no_train_config"]) == 1
    assert make_plan(PlanRequest(flops=1e21, model=SHAPE), fits)["no_train_config"] == []


def test_late_fusion_counted_with_its_encoder_is_built(table, tmp_path):
    """Patches are fewer than tokens, so that a tower's FLOPs are below 6 N_v D."""
    rows = [{**r, "flops": r["flops"] * 0.9} for r in table.rows if r["architecture"] == "late"]
    write_fits(tmp_path, fit_table(RunTable(path="made.csv", rows=rows, lines=table.lines[:25]), resamples=20))
    plan = make_plan(PlanRequest(flops=1e22), read_fits(tmp_path)[0])
    assert plan["model"]["architecture"] == "late" and plan["no_train_config"] == []


def test_small_budgets_get_small_batches(fits):
    request = PlanRequest(flops=1e19)
    plan = make_plan(request, fits)
    train = train_values(plan, plan["build"], request, {})["train"]
    assert train["batch_rows"] < 2048 and train["tokens"] / (train["batch_rows"] * 1024) >= 2000


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_plan_from_poor_fits_is_whole(tmp_path):
    """Five runs of two lengths: parameters at their bounds, infinite draws; the files hold no NaN and warn."""
    n, d = np.array([1e6, 1e6, 2e6, 2e6, 4e6]), np.array([1e7, 4e7, 1e7, 4e7, 4e7])
    noise = 0.02 * np.random.default_rng(0).standard_normal(5)
    rows = [
        {"params": p, "tokens": t, "loss": y} for p, t, y in zip(n, d, power_law.predict(EARLY, n, d) * np.exp(noise))
    ]
    poor = check_rows(RunTable(path="poor.csv", rows=rows, lines=list(range(2, 7))))
    write_fits(tmp_path, fit_table(poor, resamples=50))
    for flops in (1e15, 1e22):
        request = PlanRequest(flops=flops, served_tokens=1e12, unique_tokens=1e7, pilot_share=0.1)
        write_plan(tmp_path / "plan", make_plan(request, read_fits(tmp_path)[0]), request, {})
        plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
        assert any("not identified" in text for text in plan["warnings"])


CHEAP = {"gpus": [GPUS["h100"]], "prices": [2.0], "efficiency": stated_mfu(0.4)}


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
        ({"flops": 1e20, "served_tokens": -1.0}, "--inference-tokens: -1"),
        ({"flops": 1e20, "pue": 0.5}, "--pue: 0.5 is below 1"),
        ({"flops": 1e20, "cpu_price": 0.05}, "--cpu-price: needs --prep-rate"),
        ({"flops": 1.0}, "--flops: 1 FLOPs are not those of a training run, 1e09 to 1e32"),
        ({"flops": 1e60}, "--flops: 1e[+]60 FLOPs"),
        (CHEAP | {"money": 1e-9}, "--money: .* FLOPs are not those"),
        (CHEAP | {"money": 10.0, "prep_rate": 1.0, "cpu_price": 1e9}, "--money: 10 is used up by the preparation"),
        (CHEAP | {"money": 10.0, "prep_rate": 1e-9, "cpu_price": 1.0}, "--money: 10 is used up by the preparation"),
    ],
)
def test_bad_requests(fits, changes, message):
    with pytest.raises(InputError, match=message):
        make_plan(PlanRequest(**changes), fits)
    with pytest.raises(InputError, match="--mfu"):
        stated_mfu(1.5)
    with pytest.raises(InputError, match="--gpu: 'tpu'"):
        find_gpu("tpu")


def test_fits_of_another_form(tmp_path, table):
    """The law of data that are not repeated stands for the form of repeated data; a form without one is left out."""
    rows = [{**row, "unique_tokens": row["tokens"] / 4} for row in table.rows if row["architecture"] == "early"]
    runs = check_rows(RunTable(path="made.csv", rows=rows, lines=list(range(2, len(rows) + 2))))
    write_fits(tmp_path, fit_table(runs, form="repeated", resamples=20))
    plan = make_plan(PlanRequest(flops=1e22), read_fits(tmp_path)[0])
    assert any("law repeated at repetition none" in text for text in plan["assumptions"])
    document = json.loads((tmp_path / "fits.json").read_text())
    del document["fits"][0]["law"]
    (tmp_path / "fits.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="form repeated"):
        read_fits(tmp_path)


def test_unreadable_fits(tmp_path, folder):
    with pytest.raises(InputError, match=r"fits\.json: not found"):
        read_fits(tmp_path)
    (tmp_path / "fits.json").write_text((folder / "fits.json").read_text())
    with pytest.raises(InputError, match=r"bootstrap\.npz: not found"):
        read_fits(tmp_path)  # bootstrap.npz is missing
    with pytest.raises(InputError, match="loss_text"):
        read_fits(folder, "loss_text")


def test_the_script(folder, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plan_training.py"), str(folder / "fits.json")]
    good = ["--money", "1e6", "--gpu", "h100", "mi300x", "--price", "2", "2.5", "--mfu", "0.4"]
    good += ["--inference-tokens", "1e12", "--unique-tokens", "1e11"]
    done = subprocess.run([*command, *good, "--out", str(tmp_path / "plan")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "plan.md", "train.yaml"}
    dry = [sys.executable, "-m", "megamm.train", "--config", str(tmp_path / "plan" / "train.yaml"), "--dry-run"]
    assert "parameters" in subprocess.run(dry, capture_output=True, text=True, check=True).stdout
    bad = subprocess.run([*command, "--flops", "0", "--out", str(tmp_path / "x")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.strip().count("\n") == 0 and not (tmp_path / "x").exists()


def test_mfu_from_an_estimate(folder, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plan_training.py"), str(folder / "fits.json"), "--gpu-hours=1e5"]
    command += ["--mfu-from-estimate", str(ROOT / "examples" / "nmm" / "early-275m.yaml"), "--out", str(tmp_path)]
    good = subprocess.run([*command, "--gpu", "h100"], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    low, high = plan["efficiency"]["interval"]
    assert low < plan["efficiency"]["mfu"] < high and "estimated" in plan["efficiency"]["source"]
    assert plan["budget"]["flops"]["interval"] == pytest.approx([x * 989e12 * 3600 * 1e5 / 1.2 for x in (low, high)])
    assert "estimated for 2.75e+08 parameters on 64 ranks of h100" in (tmp_path / "plan.md").read_text()
    for more, match in (
        ([], "--mfu-from-estimate: needs --gpu"),
        (["--gpu=h100", "--num-gpus=7"], "the 7 data-parallel ranks"),
    ):
        bad = subprocess.run([*command, *more], capture_output=True, text=True)
        # Below the misfit of a layout stand the nearest ones that fit.
        assert bad.returncode == 2 and match in bad.stderr.splitlines()[0] and "Traceback" not in bad.stderr


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
    request = PlanRequest(flops=1e22, gpus=[GPUS["h100"]], efficiency=crowded, tensor_parallel=8)
    text = "\n".join(make_plan(request, fits)["warnings"])
    for part in ("90.0 GB do not fit", "estimated for a model of 1e+07 parameters", "layout has 8"):
        assert part in text
    like = replace(crowded, params=make_plan(request, fits)["model"]["params"], warnings=())
    plan = make_plan(replace(request, efficiency=like, tensor_parallel=1), fits)
    assert not [text for text in plan["warnings"] if text.startswith("efficiency")]
