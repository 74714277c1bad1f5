"""From a table of runs and a budget to the runs to make next (see megamm.scaling.design), as a table and JSON."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm.errors import InputError
from megamm.files import write_json, write_text
from megamm.scaling import laws
from megamm.scaling.design import (
    Decision,
    Ladder,
    Proposal,
    allocation_exponent,
    candidate_grid,
    log_params_at,
    loss_at,
    noise_of,
    propose,
)
from megamm.scaling.diagnostics import bootstrap, bounds, identification
from megamm.scaling.fit import Fit, fit_group
from megamm.scaling.runs import RunTable

DECISIONS = {
    "params": "N*, the compute-optimal parameters",
    "loss": "L*, the lowest loss",
    "exponent": "a in N* ~ C^a",
    "difference": "which of two groups has the lower loss",
}
DRAWS = 100
"""Bootstrap draws that the expectation runs over."""
REACH = 10.0
"""By default a decision is about this multiple of the largest compute measured."""


@dataclass(kw_only=True)
class Request:
    """What to propose runs for; FLOPs are counted as those of the runs."""

    budget: float
    decision: str = "params"
    at: float | None = None
    """FLOPs that the decision is about; by default 10 times the largest run."""
    groups: list[str] | None = None
    """One group, or two for `difference`; by default all there are."""
    group_by: str | None = None
    loss_column: str = "loss"
    max_run_flops: float | None = None
    max_params: float | None = None
    max_tokens: float | None = None
    ratios: tuple[float, float] | None = None
    """Lowest and highest tokens per parameter; by default those of the runs so far."""
    max_runs: int = 20
    resamples: int = 1000
    seed: int = 0

    def check(self) -> None:
        """Raises InputError where a value makes no sense."""
        if self.decision not in DECISIONS:
            raise InputError(f"--decision: {self.decision!r} is unknown; known: {', '.join(DECISIONS)}")
        for name in ("budget", "at", "max_run_flops", "max_params", "max_tokens", "max_runs"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"--{name.replace('_', '-')}: {value:g} is not a finite number above zero")
        if self.ratios and not 0 < self.ratios[0] < self.ratios[1]:
            raise InputError(f"--ratios: {self.ratios[0]:g} to {self.ratios[1]:g} is empty; give the lower one first")


def plan_runs(table: RunTable, request: Request, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Fit the groups and propose runs: what next_runs.json holds.

    Raises:
        InputError: an unknown group or decision, too few runs, or a budget below the cheapest candidate.
    """
    request.check()
    tables = _groups(table, request)
    fits = []
    for name, runs in tables.items():
        progress(f"fitting {name}")
        fits.append(
            fit_group(runs, group=name, loss_column=request.loss_column, resamples=request.resamples, seed=request.seed)
        )
    at = request.at or REACH * max(fit.flops_range[1] for fit in fits)
    progress("choosing runs")
    ladders = [_ladder(fit, _decision(request.decision, at, fit), request) for fit in fits]
    runs = propose(ladders, request.budget, request.max_runs)
    if not runs:
        raise InputError("--budget: no run within it shrinks the interval by 0.1%; raise it or the largest run")
    return {
        "decision": request.decision,
        "meaning": DECISIONS[request.decision],
        "at_flops": at,
        "budget": request.budget,
        "spent": sum(run.flops for run in runs),
        "groups": {fit.group: {"n_runs": len(fit.table), "noise": noise_of(fit.residuals)} for fit in fits},
        "now": _interval(ladders, fits, 1.0),
        "predicted": _interval(ladders, fits, runs[-1].width),
        "interval_width_ratio": runs[-1].width,
        "runs": [vars(run) for run in runs],
        "warnings": [f"from the fit of {fit.group}: {text}" for fit in fits for text in _warnings(fit)],
    }


def _warnings(fit: Fit) -> list[str]:
    """What makes the law at hand a poor guide; diagnostics.examine would refit it many times for the rest."""
    return [*fit.warnings, *identification(fit), *bounds(fit), *bootstrap(fit)]


def _groups(table: RunTable, request: Request) -> dict[str, RunTable]:
    column = request.group_by
    if column is None and any(row.get("architecture") for row in table.rows):
        column = "architecture"
    tables = table.groups(column)
    unknown = [name for name in request.groups or [] if name not in tables]
    if unknown:
        raise InputError(f"--group: {', '.join(unknown)} has no runs; known: {', '.join(tables)}")
    chosen = {name: tables[name] for name in request.groups or tables}
    wanted = 2 if request.decision == "difference" else 1
    if len(chosen) != wanted:
        raise InputError(
            f"--group: decision {request.decision} is about {wanted} group{'s' * (wanted > 1)}, there are "
            f"{len(chosen)} ({', '.join(chosen)}); name {'two' if wanted > 1 else 'one'}"
        )
    return chosen


def _decision(name: str, at: float, fit: Fit) -> Decision:
    if name == "params":
        return log_params_at(at, fit.kappa)
    return allocation_exponent() if name == "exponent" else loss_at(at, fit.kappa)


def _ladder(fit: Fit, decision: Decision, request: Request) -> Ladder:
    """The group's runs and what may be added: from its smallest size and length to what one run may cost."""
    params, tokens = fit.table.numbers("params"), fit.table.numbers("tokens")
    largest = min(request.max_run_flops or np.inf, request.budget)
    best = laws.optimum(fit.parameters, np.array([largest]), fit.kappa)
    top_n = request.max_params or max(params.max(), min(best[0][0], 10 * params.max()))
    top_d = request.max_tokens or max(tokens.max(), min(best[1][0], 10 * tokens.max()))
    ends = [(float(min(x.min(), top)), float(top)) for x, top in ((params, top_n), (tokens, top_d))]
    ratios = request.ratios or ((tokens / params).min() * 0.99, (tokens / params).max() * 1.01)
    candidates = candidate_grid(*ends, largest, fit.kappa, ratios)
    return Ladder(
        name=fit.group,
        decision=decision,
        params=params,
        tokens=tokens,
        draws=fit.draws[:DRAWS],
        noise=noise_of(fit.residuals),
        candidate_params=candidates[0],
        candidate_tokens=candidates[1],
        kappa=fit.kappa,
    )


def _interval(ladders: list[Ladder], fits: list[Fit], width: float) -> dict[str, Any]:
    """The decision's value and 95% bootstrap interval, drawn in around the value by ``width``."""
    values = [float(ladder.decision(fit.parameters)) for ladder, fit in zip(ladders, fits)]
    draws = [ladder.decision(fit.draws) for ladder, fit in zip(ladders, fits)]
    value, spread = values[0], draws[0]
    if len(ladders) == 2:
        value, spread = values[0] - values[1], draws[0] - np.random.default_rng(0).permutation(draws[1])
    ends = value + width * (np.percentile(spread, [2.5, 97.5]) - value)
    return {"value": value, "interval": ends.tolist()}


def to_markdown(plan: dict[str, Any]) -> str:
    """The proposal as a table for people."""
    logarithmic = plan["decision"] == "params"
    show = (lambda x: f"{np.exp(x):.3g}") if logarithmic else (lambda x: f"{x:.4f}")
    now, later = plan["now"], plan["predicted"]
    lines = [
        f"# Runs to make next, for {plan['meaning']}",
        "",
        f"At {plan['at_flops']:.3g} FLOPs: {show(now['value'])}, 95% [{show(now['interval'][0])}, "
        f"{show(now['interval'][1])}] now; predicted [{show(later['interval'][0])}, {show(later['interval'][1])}] "
        f"after {plan['spent']:.3g} FLOPs ({plan['interval_width_ratio']:.0%} of the width"
        + (" in log N)." if logarithmic else ")."),
        "",
        "| run | group | params | tokens | FLOPs | width left |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for i, run in enumerate(plan["runs"], 1):
        lines.append(
            f"| {i} | {run['group']} | {run['params']:.3g} | {run['tokens']:.3g} | {run['flops']:.3g} "
            f"| {run['width']:.0%} |"
        )
    if plan["warnings"]:
        lines += ["", *(f"- Warning {text}".replace("|", "\\|") for text in plan["warnings"])]
    lines += ["", "Make a part of them, fit again, and propose anew: the law at hand chose them.", ""]
    return "\n".join(lines)


def write_next_runs(folder: Path | str, plan: dict[str, Any]) -> list[Path]:
    """Write next_runs.json, next_runs.csv and next_runs.md, each whole or not at all.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    out = io.StringIO()
    names = list(Proposal.__dataclass_fields__)
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plan["runs"])
    write_text(folder / "next_runs.csv", out.getvalue())
    write_text(folder / "next_runs.md", to_markdown(plan))
    write_json(folder / "next_runs.json", plan)
    return [folder / name for name in ("next_runs.json", "next_runs.csv", "next_runs.md")]
