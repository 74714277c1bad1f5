"""The road to the big run in stages: pilot ladder, mid run, full run; what each decides and when to stop."""

from typing import Any

import numpy as np

from megamm.errors import InputError
from megamm.scaling import laws
from megamm.scaling.compare import Law
from megamm.scaling.design import Ladder, candidate_grid, log_params_at, propose
from megamm.scaling.plan.hardware import bill
from megamm.scaling.plan.inputs import Fitted, Request, default_model, losses_at
from megamm.scaling.plan.sizes import Buildable, nearest_model
from megamm.scaling.plan.tradeoffs import repeated_optimum

MID_SHARE = 0.1
"""FLOPs of the mid run over those of the full one: the usual step of a ladder, a factor of ten."""
CHECKS = (0.1, 0.25)
"""Shares of the full run's tokens after which a cool-down is branched off and judged."""
COOLDOWN = 0.2
PILOT_RUNS = 10
RATIOS = (1.0, 500.0)
"""Tokens per parameter of the pilot's runs: those usual in ladders, where laws were seen to hold."""


def stages_share(law: Law, flops: float, pilot_share: float) -> float:
    """FLOPs of all stages, at most, over the ``flops`` of the full run: pilot, mid run, branched cool-downs with it."""
    mid = MID_SHARE if MID_SHARE * flops > law.flops_range[1] else 0.0
    return 1 + pilot_share + mid + COOLDOWN * sum(CHECKS)


def propose_stages(
    request: Request, chosen: Fitted, flops: float, model: Buildable, tokens: float
) -> list[dict[str, Any]]:
    """The stages, each with runs, FLOPs, GPU-hours and money, a prediction, what it decides and its stop rule."""
    stages = [stage for stage in (_pilot(request, chosen, flops), _mid(request, chosen, flops)) if stage]
    stages.append(_full(request, chosen, flops, model, tokens))
    for stage in stages:
        stage |= price(request, stage["flops"])
    return stages


def price(request: Request, flops: float) -> dict[str, Any]:
    """GPU-hours and money of ``flops`` on the first GPU, with the intervals of the MFU; None without GPU or price."""
    names = ("gpu_hours", "gpu_hours_interval", "money", "money_interval")
    if not request.gpus:
        return dict.fromkeys(names)
    per_hour = request.prices[0] if request.prices else None
    found = bill(request.gpus[0], request.efficiency, flops, 0.0, num_gpus=1, price=per_hour, pue=request.pue)
    return {name: getattr(found, name) for name in names}


def _runs_so_far(request: Request, chosen: Fitted) -> tuple[np.ndarray, np.ndarray, str]:
    """Sizes and lengths of the fit's runs: from the table if given, else a regular grid over their ranges."""
    if request.runs is not None:
        table = request.runs
        for column in ("architecture", "mixture"):
            if column in table.columns and any(row.get(column) == chosen.law.name for row in table.rows):
                table = table.select(row.get(column) == chosen.law.name for row in table.rows)
        if len(table) >= 5:
            return table.numbers("params"), table.numbers("tokens"), "the runs given"
    ranges, side = chosen.entry["ranges"], max(3, round(chosen.entry["n_runs"] ** 0.5))
    axes = (np.geomspace(*ranges[name], side) for name in ("params", "tokens"))
    n, d = (x.ravel() for x in np.meshgrid(*axes, indexing="ij"))
    return n, d, f"the runs so far taken as a regular grid of {side} x {side} over their ranges"


def _pilot(request: Request, chosen: Fitted, flops: float) -> dict[str, Any] | None:
    """Runs that shrink the interval of N* most for a small share of the budget; None if nothing affordable helps."""
    law, budget = chosen.law, request.pilot_share * flops
    if budget <= 0:
        return None
    params, tokens, basis = _runs_so_far(request, chosen)
    best = laws.optimum(law.parameters, np.array([budget]), law.kappa)
    ends = [(float(x.min()), float(max(x.max(), y[0]))) for x, y in ((params, best[0]), (tokens, best[1]))]
    decision = log_params_at(flops, law.kappa)
    ladder = Ladder(
        name=law.name,
        decision=decision,
        params=params,
        tokens=tokens,
        draws=law.draws[:100],
        noise=chosen.noise,
        candidate_params=(grid := candidate_grid(*ends, budget / 2, law.kappa, RATIOS))[0],
        candidate_tokens=grid[1],
        kappa=law.kappa,
    )
    try:
        runs = propose([ladder], budget, PILOT_RUNS)
    except InputError:  # not even the smallest run fits in the share
        return None
    if not runs:
        return None
    template = request.model or default_model(law.name)
    spread = np.percentile(decision(law.draws), [2.5, 97.5])
    factor, width = float(np.exp(spread[1] - spread[0])), runs[-1].width
    # Each run keeps its FLOPs where its model is rounded to one that can be built: the pilot keeps to its share.
    models = [nearest_model(run.params, template) for run in runs]
    built = [(m, run.params * run.tokens / m.params) for m, run in zip(models, runs)]
    return {
        "stage": "pilot ladder",
        "runs": [{"width": m.config.width, "params": m.params, "tokens": d} for m, d in built],
        "flops": float(sum(6 * law.kappa * m.params * d for m, d in built)),
        "prediction": f"the 95% interval of N* shrinks from a factor of {factor:.3g} to {factor**width:.3g} ({basis})",
        "interval_width_ratio": width,
        "decides": "the size of the model, by a refit, and the group where several compete",
        "stop_rule": "stop if the refit's N* leaves the interval above, or its law is not identified",
    }


def _mid(request: Request, chosen: Fitted, flops: float) -> dict[str, Any] | None:
    """One compute-optimal run with a tenth of the FLOPs; None where as much was measured already."""
    law, budget = chosen.law, MID_SHARE * flops
    if budget <= law.flops_range[1]:
        return None
    best = float(laws.optimum(law.parameters, np.array([budget]), law.kappa)[0][0])
    if request.unique_tokens:
        best = float(repeated_optimum(law.parameters, budget, request.unique_tokens, law.kappa)["params"])
    model = nearest_model(best, request.model or default_model(law.name), request.tensor_parallel)
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


def _full(request: Request, chosen: Fitted, flops: float, model: Buildable, tokens: float) -> dict[str, Any]:
    final = losses_at(chosen, model.params, tokens, request.unique_tokens)["loss_of_one_run"]
    checks = []
    for share in CHECKS:
        interval = losses_at(chosen, model.params, share * tokens, request.unique_tokens)["loss_of_one_run"]["interval"]
        checks.append({"tokens": share * tokens, "loss_of_one_run": interval})
    extra = COOLDOWN * sum(CHECKS) * flops
    rule = "; ".join(
        f"at {c['tokens']:.3g} [{c['loss_of_one_run'][0]:.4f}, {c['loss_of_one_run'][1]:.4f}]" for c in checks
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
