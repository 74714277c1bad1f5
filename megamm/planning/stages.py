"""The road to the big run in stages: pilot ladder, mid run, full run; what each decides and when to stop."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law
from megamm_laws.pictures.units import count, power
from megamm_laws.proposals.design import (
    FORM_DOMINATES,
    Ladder,
    candidate_grid,
    form_dominates,
    log_params_at,
    narrowed,
    propose,
    ratio_range,
)
from megamm_laws.runs.groups import are_native, are_own

from megamm.errors import InputError
from megamm.estimate.hardware import bill
from megamm.planning.inputs import Fitted, PlanRequest, losses_at, template_of
from megamm.planning.sizes import Buildable, nearest_model
from megamm.planning.tradeoffs import repeated_optimum
from megamm.resolve import MOST_EPOCHS

MID_SHARE = 0.1
"""FLOPs of the mid run over those of the full one: the usual step of a ladder, a factor of ten."""
CHECKS = (0.1, 0.25)
"""Shares of the full run's tokens after which a cool-down is branched off and judged."""
COOLDOWN = 0.2
PILOT_RUNS = 10
RATIOS = (1.0, 500.0)
"""Tokens per parameter of the pilot's runs where those of the runs so far are not known: those usual in ladders."""
WORTH = 0.9
"""A pilot that leaves more than this share of the (logarithmic) interval of N* changes no decision."""


def stages_share(law: Law, flops: float, pilot_share: float) -> float:
    """FLOPs of all stages, at most, over the ``flops`` of the full run: pilot, mid run, branched cool-downs with it."""
    mid = MID_SHARE if MID_SHARE * flops > law.flops_range[1] else 0.0
    return 1 + pilot_share + mid + COOLDOWN * sum(CHECKS)


def propose_stages(
    request: PlanRequest, chosen: Fitted, flops: float, model: Buildable, tokens: float
) -> tuple[list[dict[str, Any]], str | None]:
    """The stages, each with runs, FLOPs, GPU-hours and money, a prediction, what it decides and its stop rule.

    Where a pilot could not change the size, there is none, and the second value says why.
    """
    pilot, advice = _pilot(request, chosen, flops), None
    if pilot and pilot["interval_width_ratio"] > WORTH:
        why = "what narrows it are other sizes and lengths, or less noise (megamm-next-runs)"
        if form_dominates(_noise_share(chosen)):
            why = FORM_DOMINATES
        advice = (
            f"no pilot: {len(pilot['runs'])} runs for {power(pilot['flops'])} FLOPs would leave "
            f"{pilot['interval_width_ratio']:.0%} of the interval of N*, so that the size would stay as it is; {why}"
        )
        pilot = None
    stages = [stage for stage in (pilot, _mid(request, chosen, flops)) if stage]
    stages.append(_full(request, chosen, flops, model, tokens))
    for stage in stages:
        stage |= price(request, stage["flops"])
    return stages, advice


def price(request: PlanRequest, flops: float) -> dict[str, Any]:
    """GPU-hours and money of ``flops`` on the first GPU, with the intervals of the MFU; None without GPU or price."""
    names = ("gpu_hours", "gpu_hours_interval", "money", "money_interval")
    if not request.gpus:
        return dict.fromkeys(names)
    per_hour = request.prices[0] if request.prices else None
    # Of the bill only hours and money are taken, which depend on neither parameters nor the number of GPUs.
    found = bill(request.gpus[0], request.efficiency, flops, 0.0, num_gpus=1, price=per_hour, pue=request.pue)
    return {name: getattr(found, name) for name in names}


@dataclass(kw_only=True)
class _Runs:
    """The runs of the fit as far as they are known."""

    params: np.ndarray
    """(n,)"""
    tokens: np.ndarray
    ratios: tuple[float, float]
    """Lowest and highest tokens per parameter that further runs may have."""
    assumed: str
    """Where this is from."""


def _runs_so_far(request: PlanRequest, chosen: Fitted) -> _Runs:
    """The native runs of the table if given, else a regular grid over the ranges of the fit's."""
    if request.runs is not None:
        table = request.runs
        for column in ("architecture", "mixture"):
            if column in table.columns and any(row.get(column) == chosen.law.name for row in table.rows):
                table = table.select(row.get(column) == chosen.law.name for row in table.rows)
        table = table.select(are_own(table))
        table = table.select(are_native(table, request.init_column))
        if len(table) >= 5:
            n, d = table.numbers("params"), table.numbers("tokens")
            return _Runs(params=n, tokens=d, ratios=ratio_range(n, d), assumed="the runs so far are those given")
    ranges, side = chosen.entry["ranges"], max(3, round(chosen.entry["n_runs"] ** 0.5))
    axes = (np.geomspace(low, high, side) for low, high in (ranges["params"], ranges["tokens"]))
    n, d = (x.ravel() for x in np.meshgrid(*axes, indexing="ij"))
    measured = ranges.get("tokens_per_param")
    return _Runs(
        params=n,
        tokens=d,
        ratios=tuple(measured or RATIOS),
        assumed=f"the runs so far are a regular grid of {side} x {side} over their ranges"
        + ("" if measured else " (their tokens per parameter are not known; --runs tells them)"),
    )


def _candidates(
    runs: _Runs, request: PlanRequest, chosen: Fitted, budget: float
) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
    """Sizes and lengths (m,) that the pilot may have, and what was assumed."""
    law = chosen.law
    best = power_law.optimum(law.parameters, np.array([budget]), law.kappa)
    sizes, lengths = (
        (float(x.min()), float(max(x.max(), y[0]))) for x, y in ((runs.params, best[0]), (runs.tokens, best[1]))
    )
    low, high = runs.ratios
    assumed = [f"pilot ladder: {runs.assumed}; tokens per parameter stay within {low:.3g} to {high:.3g}"]
    found = candidate_grid(sizes, lengths, budget / 2, law.kappa, runs.ratios)
    longest = MOST_EPOCHS * (request.unique_tokens or np.inf)
    if longest >= lengths[1]:
        return found, assumed
    if longest >= lengths[0]:
        short = candidate_grid(sizes, (lengths[0], longest), budget / 2, law.kappa, runs.ratios)
        if len(short[0]):
            rule = f"pilot ladder: at most {MOST_EPOCHS} epochs of the unique tokens, which count as fresh ones"
            return short, [*assumed, rule]
    rule = f"pilot ladder: no run fits into {MOST_EPOCHS} epochs of the unique tokens; repeated ones count as fresh"
    return found, [*assumed, rule]


def _noise_share(chosen: Fitted) -> float:
    """Width of the interval of N* by noise alone over that of the whole, taken from that of the exponent a.

    Far from the runs N* is as uncertain as its exponent. Forms whose draws are noise alone say nothing of it.
    """
    noise = chosen.entry.get("noise_intervals", {}).get("a")
    whole = chosen.entry.get("intervals", {}).get("a")
    if not (noise and whole) or whole[1] <= whole[0]:
        return 1.0
    return min((noise[1] - noise[0]) / (whole[1] - whole[0]), 1.0)


def _pilot(request: PlanRequest, chosen: Fitted, flops: float) -> dict[str, Any] | None:
    """Runs that shrink the interval of N* most for a small share of the budget; None if nothing affordable helps."""
    law, budget = chosen.law, request.pilot_share * flops
    if budget <= 0:
        return None
    so_far = _runs_so_far(request, chosen)
    grid, assumed = _candidates(so_far, request, chosen, budget)
    decision = log_params_at(flops, law.kappa)
    ladder = Ladder(
        name=law.name,
        decision=decision,
        params=so_far.params,
        tokens=so_far.tokens,
        # Each costs a matrix per candidate.
        draws=law.draws[:100],
        noise=chosen.noise,
        candidate_params=grid[0],
        candidate_tokens=grid[1],
        kappa=law.kappa,
    )
    try:
        runs = propose([ladder], budget, PILOT_RUNS)
    except InputError:  # not even the smallest run fits in the share
        return None
    if not runs:
        return None
    template, grow_depth = template_of(request, law.name)
    share, noise_left = _noise_share(chosen), runs[-1].width
    spread = np.percentile(decision(law.draws), [2.5, 97.5])
    width, left = float(spread[1] - spread[0]), narrowed(noise_left, share)
    # Each run keeps its FLOPs where its model is rounded to one that can be built: the pilot keeps to its share.
    models = [nearest_model(run.params, template, grow_depth=grow_depth) for run in runs]
    built = [(m, run.params * run.tokens / m.params) for m, run in zip(models, runs)]
    return {
        "stage": "pilot ladder",
        "runs": [{"width": m.config.width, "params": m.params, "tokens": d} for m, d in built],
        "flops": float(sum(6 * law.kappa * m.params * d for m, d in built)),
        "prediction": f"the 95% interval of N* shrinks from a factor of {np.exp(width):.3g} to "
        f"{np.exp(left * width):.3g}, by noise alone from a factor of {np.exp(share * width):.3g} to "
        f"{np.exp(noise_left * share * width):.3g}",
        "interval_width_ratio": left,
        "noise_width_ratio": noise_left,
        "assumptions": assumed,
        "decides": "the size of the model, by a refit, and the group where several compete",
        "stop_rule": "stop if the refit's N* leaves the interval above, or its law is not identified",
    }


def _mid(request: PlanRequest, chosen: Fitted, flops: float) -> dict[str, Any] | None:
    """One compute-optimal run with a tenth of the FLOPs; None where as much was measured already."""
    law, budget = chosen.law, MID_SHARE * flops
    if budget <= law.flops_range[1]:
        return None
    best = float(power_law.optimum(law.parameters, np.array([budget]), law.kappa)[0][0])
    if request.unique_tokens:
        best = float(repeated_optimum(law.parameters, budget, request.unique_tokens, law.kappa)["params"])
    template, grow_depth = template_of(request, law.name)
    model = nearest_model(best, template, request.tensor_parallel, grow_depth)
    tokens = budget / (6 * law.kappa * model.params)
    losses = losses_at(chosen, model.params, tokens, request.unique_tokens)
    low, high = losses["loss_of_one_run"]["interval"]
    return {
        "stage": "mid run",
        "runs": [{"width": model.config.width, "params": model.params, "tokens": tokens}],
        "flops": budget,
        "prediction": f"loss {losses['loss']['value']:.4f} [{low:.4f}, {high:.4f}]",
        "loss_of_one_run": losses["loss_of_one_run"],
        "decides": "whether law, layout and MFU hold at a tenth of the full run",
        "stop_rule": f"above {high:.4f}: find the fault in tuning or data first; below {low:.4f}: refit first; "
        "MFU below the one assumed: plan again",
    }


def _full(request: PlanRequest, chosen: Fitted, flops: float, model: Buildable, tokens: float) -> dict[str, Any]:
    final = losses_at(chosen, model.params, tokens, request.unique_tokens)["loss_of_one_run"]
    checks = []
    for share in CHECKS:
        interval = losses_at(chosen, model.params, share * tokens, request.unique_tokens)["loss_of_one_run"]["interval"]
        checks.append({"tokens": share * tokens, "loss_of_one_run": interval})
    extra = COOLDOWN * sum(CHECKS) * flops
    rule = "; ".join(
        f"at {count(c['tokens'])} [{c['loss_of_one_run'][0]:.4f}, {c['loss_of_one_run'][1]:.4f}]" for c in checks
    )
    return {
        "stage": "full run",
        "runs": [{"width": model.config.width, "params": model.params, "tokens": tokens}],
        "flops": flops + extra,
        "checks": checks,
        "prediction": f"loss {final['value']:.4f} [{final['interval'][0]:.4f}, {final['interval'][1]:.4f}]",
        "decides": f"the model; {extra / flops:.0%} of its FLOPs go to cool-downs branched off at "
        f"{' and '.join(f'{share:.0%}' for share in CHECKS)} of the tokens",
        "stop_rule": f"pause where a cool-down ends above its interval, by tokens: {rule}",
    }
