"""From fitted laws and a budget to a plan: model, tokens, losses, time, money, stages - each with its interval.

Intervals are 95% percentiles over the bootstrap draws of the fit. Losses come in two kinds: that of the law, and that
of one run, which adds the noise between runs. Intervals of hours and money are those of the MFU, where it was measured
or estimated.
"""

from typing import Any

import numpy as np
from megamm_laws.comparison.compare import check_flops, compare, verdict
from megamm_laws.fitting.diagnostics import FAR, TOO_FAR
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law
from scipy.optimize import brentq

from megamm.errors import InputError
from megamm.estimate.hardware import bill
from megamm.model.sizes import num_heads
from megamm.planning.inputs import BUDGETS, BUILT, Fitted, PlanRequest, losses_at, measured, template_of
from megamm.planning.sizes import PEAK_LR, Buildable, nearest_model, peak_lr
from megamm.planning.stages import MID_SHARE, price, propose_stages, stages_share
from megamm.planning.tradeoffs import repeated_optimum, serving_optimum, serving_table
from megamm.planning.transfer import (
    FORM,
    MIN_RUNS,
    NOT_FITTED,
    Transfer,
    break_even,
    fit_transfer,
    initialised_rows,
    runs_of_group,
)

OFF_BUDGET = 0.1
"""Relative difference between the model's own FLOPs and the budget above which no training config is written."""
UNLIKE = 2.0
"""Factor between the model planned and the one whose MFU was estimated above which that is warned of."""
WRONG = (0.5, 2.0)
"""Sizes, as multiples of N*, whose cost at the same budget is told."""
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Sizes of the over-training table, as shares of N*."""


def make_plan(request: PlanRequest, fits: list[Fitted]) -> dict[str, Any]:
    """The plan as it stands in plan.json, and under ``build`` (removed before writing) the Buildable model.

    Raises:
        InputError: the request contradicts itself or the fits.
    """
    request.check()
    chosen, flops, choices = _choose(request, fits)
    law, noise = chosen.law, chosen.noise
    at = np.array([flops])
    best, best_draws = power_law.optimum(law.parameters, at, law.kappa), power_law.optimum(law.draws, at, law.kappa)
    repeated = _repeated(law, flops, float(best[1][0]), request.unique_tokens)
    # Where unique tokens are short, somewhat fewer parameters and more epochs are better than N*.
    wanted = repeated["best_split"]["params"]["value"] if repeated and repeated["short"] else float(best[0][0])
    template, grow_depth = template_of(request, law.name)
    model = nearest_model(wanted, template, request.tensor_parallel, grow_depth)
    # The model that can be built is not exactly N*; the tokens make up for it, so that the budget holds.
    tokens = flops / (6 * law.kappa * model.params)
    stages, pilot_advice = propose_stages(request, chosen, flops, model, tokens)
    plan: dict[str, Any] = {
        "budget": _budget(request, flops),
        "group": law.name,
        "loss_column": request.loss_column,
        "optimum": {
            "flops": flops,
            "params": measured(best[0][0], best_draws[0][:, 0]),
            "tokens": measured(best[1][0], best_draws[1][:, 0]),
            "loss": measured(law.frontier(at)[0], power_law.frontier_loss(law.draws, at, law.kappa)[:, 0]),
        },
        "model": _model_entry(model, request)
        | {"tokens": tokens}
        | losses_at(chosen, model.params, tokens, request.unique_tokens),
        "choices": choices,
        "wrong_size": _wrong_size(law, flops),
        "serving": _serving(law, flops, request.served_tokens),
        "repeated_data": repeated,
        "data_preparation": _preparation(request, tokens),
        "hardware": _hardware(request, flops, model.params),
        "efficiency": vars(request.efficiency).copy() if request.efficiency else None,
        "transfer": _transfer(request, law, model.params, noise),
        "noise_between_runs": noise,
        "stages": stages,
        "pilot_advice": pilot_advice,
        "refused": _refused(chosen, flops),
    }
    plan["no_train_config"] = plan["refused"] + _not_buildable(request, law, model, flops, tokens)
    plan["total"] = _total(request, plan)
    plan["warnings"] = _warnings(chosen, plan, request) + [
        f"from the fit of {other.law.name}, compared: {text}"
        for other in fits
        if other is not chosen
        for text in other.entry.get("warnings", [])
    ]
    plan["assumptions"] = _assumptions(chosen, request, plan)
    plan["assumptions"] += [text for stage in plan["stages"] for text in stage.get("assumptions", [])]
    plan["build"] = model
    return plan


# ------------------------------------------------------------------------------------------------- the budget


def _choose(request: PlanRequest, fits: list[Fitted]) -> tuple[Fitted, float, list[dict[str, Any]]]:
    """The group to plan with, its FLOPs, and the losses of all groups at these."""
    named = {fitted.law.name: fitted for fitted in fits}
    if request.group is not None and request.group not in named:
        raise InputError(f"--group: {request.group!r} has no fit; known: {', '.join(named)}")
    budgets = {name: budget_flops(request, fitted.law) for name, fitted in named.items()}
    option = next(option for field, option in BUDGETS.items() if getattr(request, field) is not None)
    for flops in budgets.values():
        check_flops(flops, option)
    losses = {name: float(fitted.law.frontier(np.array([budgets[name]]))[0]) for name, fitted in named.items()}
    name = request.group or min(losses, key=losses.get)
    chosen, flops = named[name], budgets[name]
    choices = []
    for other, fitted in named.items():
        at = np.array([budgets[other]])
        best = power_law.optimum(fitted.law.parameters, at, fitted.law.kappa)[0][0]
        draws = power_law.optimum(fitted.law.draws, at, fitted.law.kappa)[0][:, 0]
        entry = {
            "group": other,
            "params": measured(best, draws),
            "loss": measured(losses[other], power_law.frontier_loss(fitted.law.draws, at, fitted.law.kappa)[:, 0]),
        }
        if other != name:
            # Around the budget, and no wider: who leads far from it does not bear on the choice.
            entry["verdict"] = verdict(compare(chosen.law, fitted.law, (flops / 3, flops * 3)))
        choices.append(entry)
    return chosen, flops, choices


def budget_flops(request: PlanRequest, law: Law) -> float:
    """Training FLOPs of the full run: as stated, or what the hours or the money leave for it.

    Hours and money pay for every stage, and money for the preparation of the tokens, where that is priced. At a tenth
    of the compute measured the full run grows so large that a mid run is due (stages.MID_SHARE): where a budget pays
    for the full run without it but not with it, the full run stays at that size.

    Raises:
        InputError: the budget does not pay for the tokens of the smallest run.
    """
    if request.flops is not None:
        return request.flops
    rate = request.gpus[0].peak_flops * request.efficiency.mfu * 3600
    most = request.gpu_hours * rate if request.money is None else request.money / request.prices[0] * rate
    # A hair below, where rounding cannot make a mid run due.
    jump = law.flops_range[1] / MID_SHARE * (1 - 1e-9)
    # Zero and infinity FLOPs: the share of the stages without a mid run, and with one.
    without = _affordable(request, law, most, rate, stages_share(law, 0.0, request.pilot_share))
    if without <= jump:
        return without
    return max(jump, _affordable(request, law, most, rate, stages_share(law, np.inf, request.pilot_share)))


def _affordable(request: PlanRequest, law: Law, most: float, rate: float, share: float) -> float:
    """FLOPs of a full run that, times ``share`` and with its tokens prepared, take all of the budget of ``most``."""
    if request.money is None or not (request.prep_rate and request.cpu_price):
        return most / share

    def left(log_flops: float) -> float:
        flops = np.exp(log_flops)
        tokens = float(power_law.optimum(law.parameters, np.array([flops]), law.kappa)[1][0])
        unique = min(tokens, request.unique_tokens or np.inf)
        prepared = unique / request.prep_rate * request.cpu_price
        return np.log(share * flops / rate * request.prices[0] + prepared) - np.log(request.money)

    top = np.log(most / share)
    # e^-30 of the budget trains nothing: what is used up there is used up by the tokens alone.
    if left(top - 30) > 0:
        raise InputError(
            f"--money: {request.money:g} is used up by the preparation of the tokens at --cpu-price "
            f"{request.cpu_price:g} and --prep-rate {request.prep_rate:g}; give more, or leave --cpu-price out"
        )
    # At the top the run alone takes the whole budget; a little above, or rounding could hide the change of sign.
    return float(np.exp(brentq(left, top - 30, top + 1e-9)))


def _budget(request: PlanRequest, flops: float) -> dict[str, Any]:
    given = next(name for name in BUDGETS if getattr(request, name) is not None)
    entry = {"given": given, "amount": getattr(request, given), "flops": {"value": flops, "interval": None}}
    if given != "flops" and request.efficiency.interval:
        entry["flops"]["interval"] = [flops * end / request.efficiency.mfu for end in request.efficiency.interval]
    return entry


def _model_entry(model: Buildable, request: PlanRequest) -> dict[str, Any]:
    config = model.config
    return {
        "architecture": config.architecture,
        "params": model.params,
        "width": config.width,
        "depth": config.depth,
        "head_dim": config.head_dim,
        "heads": num_heads(config),
        "peak_lr": peak_lr(config.width),
        "vision_width": config.vision.width if config.architecture == "late" else None,
        "layout": {"tensor": request.tensor_parallel, "data": request.num_gpus // request.tensor_parallel},
    }


def _refused(chosen: Fitted, flops: float) -> list[str]:
    """Why nobody should train by this plan, whatever its model; empty where it can be trusted so far."""
    found, top = [], chosen.law.flops_range[1]
    if flops > TOO_FAR * top:
        found.append(
            f"extrapolation: {flops / top:,.0f} times the largest compute measured ({top:.2g} FLOPs), beyond "
            f"{TOO_FAR:.0f} times a plan is a guess; measure larger runs first"
        )
    told = [text for text in chosen.entry.get("warnings", []) if text.startswith("exponents are not identified")]
    if told:
        found.append(f"the runs do not determine how size and data trade ({told[0]})")
    return found


def _wrong_size(law: Law, flops: float) -> list[dict[str, Any]]:
    """What half and twice N* cost at the same budget: loss over L*, as a share."""
    found = []
    for factor in WRONG:
        excess = []
        for parameters in (law.parameters, law.draws):
            at = np.array([flops])
            params = factor * power_law.optimum(parameters, at, law.kappa)[0]
            wrong = power_law.predict(parameters, params, flops / (6 * law.kappa * params))
            excess.append((wrong / power_law.frontier_loss(parameters, at, law.kappa) - 1)[..., 0])
        found.append({"share_of_optimum": factor, "excess_loss": measured(float(excess[0]), excess[1])})
    return found


def _not_buildable(request: PlanRequest, law: Law, model: Buildable, flops: float, tokens: float) -> list[str]:
    """Why training ``model`` would not be the plan; empty where it would.

    Its own count is that of dense 6ND; an encoder's share of it hangs on the patches in the data, which are not known
    here, so that any between none and all is accepted.
    """
    found = []
    if request.model is None and law.name not in BUILT:
        found.append(
            f"group {law.name} is none of the architectures built here ({', '.join(BUILT)}), the model shown an "
            "early-fusion stand-in; give its shape by --base-config"
        )
    least, most = 6 * model.counts.decoder * tokens, 6 * model.params * tokens
    if flops < (1 - OFF_BUDGET) * least or flops > (1 + OFF_BUDGET) * most:
        found.append(
            f"the model on these tokens costs {most / flops:.3g} times the budget by its own count (dense 6ND, "
            f"{most:.3g} FLOPs): the runs were counted as {law.kappa:.3g} x 6ND, by active parameters or otherwise"
        )
    return found


# ----------------------------------------------------------------------------------------------- the sections


def _serving(law: Law, flops: float, served: float | None) -> dict[str, Any] | None:
    if served is None:
        return None
    value, draws = (serving_optimum(p, flops, served, law.kappa) for p in (law.parameters, law.draws))
    names = ("params", "tokens", "training", "total")
    tables = [serving_table(p, flops, served, law.kappa, SHARES) for p in (law.parameters, law.draws)]
    return {
        "served_tokens": served,
        "optimum": {key: measured(float(value[key]), draws[key]) for key in (*names, "saved")},
        "table": [
            {"share_of_optimum": float(v["share"])}
            | {key: measured(float(v[key]), d[key]) for key in (*names, "serving")}
            for v, d in zip(*tables)
        ],
    }


def _repeated(law: Law, flops: float, tokens: float, unique: float | None) -> dict[str, Any] | None:
    """What repeating ``unique`` tokens costs where the optimum wants ``tokens``."""
    if unique is None:
        return None
    entry: dict[str, Any] = {"unique_tokens": unique, "short": bool(tokens > unique), "epochs": tokens / unique}
    if tokens > unique:
        value, draws = (repeated_optimum(p, flops, unique, law.kappa) for p in (law.parameters, law.draws))
        entry["epochs"] = float(value["epochs"])
        entry["best_split"] = {key: measured(float(value[key]), draws[key]) for key in value}
        fresh = [
            law.frontier(np.array([flops]))[0],
            power_law.frontier_loss(law.draws, np.array([flops]), law.kappa)[:, 0],
        ]
        entry["loss_to_repetition"] = measured(float(value["loss"] - fresh[0]), draws["loss"] - fresh[1])
    return entry


def _preparation(request: PlanRequest, tokens: float) -> dict[str, Any]:
    unique = min(tokens, request.unique_tokens or np.inf)
    entry = {"unique_tokens": unique, "cpu_hours": None, "money": None}
    if request.prep_rate:
        entry["cpu_hours"] = unique / request.prep_rate
        if request.cpu_price:
            entry["money"] = entry["cpu_hours"] * request.cpu_price
    return entry


def _total(request: PlanRequest, plan: dict[str, Any]) -> dict[str, Any]:
    """All stages together and, in money, the preparation of the tokens with them; what of the budget that takes."""
    flops = sum(stage["flops"] for stage in plan["stages"])
    entry = {"flops": flops} | price(request, flops)
    prepared = plan["data_preparation"]["money"] or 0.0
    if entry["money"] is not None:
        entry["money"] += prepared
        entry["money_interval"] = entry["money_interval"] and [end + prepared for end in entry["money_interval"]]
    given = plan["budget"]["given"]
    return entry | {"share_of_budget": entry[given] / plan["budget"]["amount"]}


def _hardware(request: PlanRequest, flops: float, params: float) -> list[dict[str, Any]]:
    prices = request.prices or [None] * len(request.gpus)
    return [
        vars(
            bill(gpu, request.efficiency, flops, params, num_gpus=request.num_gpus, price=price, pue=request.pue)
        ).copy()
        | {"source": gpu.source}
        for gpu, price in zip(request.gpus, prices)
    ]


def _transfer(request: PlanRequest, law: Law, params: float, noise: float) -> dict[str, Any]:
    table = request.runs
    picked = np.zeros(0, bool)
    if table is not None and request.init_column in table.columns:
        picked = initialised_rows(table, request.init_column)
    if not picked.any():
        return {"status": NOT_FITTED, "form": FORM}
    runs, warnings = runs_of_group(table.select(picked), law.name, request.loss_column)
    if len(runs) < min(MIN_RUNS, picked.sum()):  # too few in the table at all is the user's mistake, and an error
        status = f"not fitted: {len(runs)} LLM-initialised runs of group {law.name} with {request.loss_column}"
        return {"status": f"{status}, at least {MIN_RUNS} are needed", "form": FORM, "warnings": warnings}
    fitted: Transfer = fit_transfer(runs, law, loss_column=request.loss_column)
    return {
        "status": f"fitted to {fitted.n_runs} LLM-initialised runs",
        "form": FORM,
        "exponents": {name: measured(fitted.parameters[i], fitted.draws[:, i]) for i, name in ((1, "a"), (2, "b"))},
        "break_even_tokens": break_even(fitted, law, params, llm_tokens=request.llm_tokens, negligible=noise),
        "negligible_gain": noise,
        "warnings": warnings + fitted.warnings,
    }


def _warnings(chosen: Fitted, plan: dict[str, Any], request: PlanRequest) -> list[str]:
    top, flops = chosen.law.flops_range[1], plan["optimum"]["flops"]
    found = [f"no train.yaml: {text}" for text in plan["no_train_config"]]
    if flops > FAR * top:
        found.append(f"extrapolation: {flops / top:.0f} times the largest compute measured ({top:.2g} FLOPs)")
    best, built = plan["optimum"]["params"]["value"], plan["model"]["params"]
    repeated = plan["repeated_data"]
    if repeated and repeated["short"]:
        # That is then the size which the model was chosen for.
        best = repeated["best_split"]["params"]["value"]
    if not 0.9 < built / best < 1.1:
        found.append(f"the nearest buildable model has {built / best:.2f} times the optimal parameters")
    total, given = plan["total"], plan["budget"]["given"]
    # A thousandth over is no news: the model is not exactly N*.
    if given != "flops" and total["share_of_budget"] > 1.001:
        found.append(f"over the budget: all stages with the preparation take {total['share_of_budget']:.3g} times it")
    found += _model_warnings(plan["model"])
    for entry in plan["hardware"]:
        if entry["least_gpus"] > request.num_gpus:
            found.append(f"{request.num_gpus} {entry['gpu']} cannot hold the training state; {entry['least_gpus']} can")
    if repeated and repeated["epochs"] > 4:
        found.append(f"{repeated['epochs']:.1f} epochs: beyond about 4 repeated tokens lose worth (arXiv 2305.16264)")
    if request.efficiency:
        found += [f"efficiency: {text}" for text in _efficiency_warnings(request, built)]
    found += [f"transfer law: {text}" for text in plan["transfer"].get("warnings", [])]
    return found + [f"from the fit: {text}" for text in chosen.entry.get("warnings", [])]


def _model_warnings(model: dict[str, Any]) -> list[str]:
    """A learning rate beyond those known."""
    found, widths = [], (min(PEAK_LR), max(PEAK_LR))
    if not widths[0] <= model["width"] <= widths[1]:
        found.append(
            f"learning rate: {model['peak_lr']:g} is that of the nearest width known ({widths[0]} to {widths[1]}): "
            "tune it"
        )
    return found


def _efficiency_warnings(request: PlanRequest, params: float) -> list[str]:
    """What an estimated MFU was estimated for, where that is not the plan."""
    found = list(request.efficiency.warnings)
    estimated = request.efficiency.params
    if estimated and not 1 / UNLIKE < params / estimated < UNLIKE:
        found.append(f"estimated for a model of {estimated:.3g} parameters, the plan's has {params:.3g}")
    if estimated and request.tensor_parallel > 1:
        found.append(f"estimated without tensor parallelism, the plan's layout has {request.tensor_parallel}")
    return found


def _assumptions(chosen: Fitted, request: PlanRequest, plan: dict[str, Any]) -> list[str]:
    entry, model = chosen.entry, plan["model"]
    at = ", ".join(f"{name} {value}" for name, value in entry.get("law", {}).get("at", {}).items())
    found = [
        f"law {entry['form']}{f' at {at}' if at else ''} of group {chosen.law.name}, {entry['n_runs']} runs up to "
        f"{chosen.law.flops_range[1]:.2g} FLOPs; it holds at the budget",
        f"FLOPs as in the runs ({chosen.law.kappa:.3g} x 6ND); the same data mixture, tokenizer and schedule",
        "intervals: 95% percentiles of the law, "
        + ("with the error of its form that residuals show" if "model_error" in entry else "without error of its form")
        + f"; noise between runs {chosen.noise:.2%} of the loss, from residuals",
    ]
    depth = f"depth {model['depth']} at every size"
    if request.model is None and model["width"] > max(PEAK_LR):
        depth = f"depth {model['depth']}, which beyond the paper's widths grows as in Llama 3 (arXiv 2407.21783)"
    found.append(
        f"{depth}; peak learning rate by width as in arXiv 2504.07951 (depth 24, widths {min(PEAK_LR)} to "
        f"{max(PEAK_LR)}, flat beyond)"
    )
    if request.efficiency:
        exact = "" if request.efficiency.interval else "; taken as exact: hours, days, money, MWh have no interval"
        found.append(f"MFU {request.efficiency.mfu:.1%} ({request.efficiency.source}) on every GPU{exact}")
    if request.gpus:
        found.append(f"energy: board power times a PUE of {request.pue:g}")
    if request.served_tokens:
        found.append("serving costs 2N FLOPs a token, each as dear as in training")
    if request.unique_tokens:
        found.append("worth of repeated tokens: constants of arXiv 2305.16264, measured on text")
    return found
