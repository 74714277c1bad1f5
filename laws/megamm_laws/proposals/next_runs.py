"""From a table of runs and a budget to the runs to make next (see design.py), as a table and JSON."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.files import write_json, write_text
from megamm_laws.fitting.diagnostics import bootstrap, bounds, coverage, extrapolation, identification, shared_errors
from megamm_laws.fitting.fit import Fit, fit_group
from megamm_laws.law import power_law
from megamm_laws.proposals.design import (
    FORM_DOMINATES,
    Decision,
    Ladder,
    Proposal,
    allocation_exponent,
    candidate_grid,
    form_dominates,
    log_params_at,
    loss_at,
    narrowed,
    noise_of,
    propose,
    ratio_range,
)
from megamm_laws.runs.groups import native_groups
from megamm_laws.runs.table import RunTable

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
class RunsRequest:
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


def choose_runs(
    table: RunTable, request: RunsRequest, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Fit the groups and propose runs: what next_runs.json holds.

    Raises:
        InputError: an unknown group or decision, too few runs, or a budget below the cheapest candidate.
    """
    request.check()
    tables, initialised = _groups(table, request)
    fits = []
    for name, runs in tables.items():
        progress(f"fitting {name}")
        fit = fit_group(
            runs, group=name, loss_column=request.loss_column, resamples=request.resamples, seed=request.seed
        )
        fit.warnings[:0] = initialised[name]
        fits.append(fit)
    at = request.at or REACH * max(fit.flops_range[1] for fit in fits)
    progress("choosing runs")
    ladders = [_ladder(fit, _decision(request.decision, at, fit), request) for fit in fits]
    proposed = propose(ladders, request.budget, request.max_runs)
    if not proposed:
        raise InputError("--budget: no run within it shrinks the interval by 0.1%; raise it or the largest run")
    return {
        "decision": request.decision,
        "meaning": DECISIONS[request.decision],
        "at_flops": at,
        "budget": request.budget,
        "spent": sum(run.flops for run in proposed),
        "groups": {fit.group: {"n_runs": len(fit.table), "noise": noise_of(fit.residuals)} for fit in fits},
        **_narrowing(ladders, fits, proposed[-1].width),
        "runs": [vars(run) for run in proposed],
        "warnings": [
            f"from the fit of {fit.group}: {text}"
            for fit in fits
            for text in _warnings(fit, None if request.decision == "exponent" else at)
        ],
    }


def _warnings(fit: Fit, at: float | None) -> list[str]:
    """What makes the law at hand a poor guide, to the compute ``at`` if the decision is about one.

    diagnostics.examine would refit it many times for the rest.
    """
    far = extrapolation(at, fit.flops_range) if at else None
    found = [*identification(fit), *bounds(fit), *shared_errors(fit), *coverage(fit), *bootstrap(fit)]
    return [*fit.warnings, *([far] if far else []), *found]


def _groups(table: RunTable, request: RunsRequest) -> tuple[dict[str, RunTable], dict[str, list[str]]]:
    """The groups asked for, by name, and what was left out of each."""
    tables, initialised = native_groups(table, request.group_by)
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
    return chosen, initialised


def _decision(name: str, at: float, fit: Fit) -> Decision:
    if name == "params":
        return log_params_at(at, fit.kappa)
    return allocation_exponent() if name == "exponent" else loss_at(at, fit.kappa)


def _ladder(fit: Fit, decision: Decision, request: RunsRequest) -> Ladder:
    """The group's runs and what may be added: from its smallest size and length to what one run may cost."""
    params, tokens = fit.table.numbers("params"), fit.table.numbers("tokens")
    largest = min(request.max_run_flops or np.inf, request.budget)
    best = power_law.optimum(fit.parameters, np.array([largest]), fit.kappa)
    top_n = request.max_params or max(params.max(), min(best[0][0], 10 * params.max()))
    top_d = request.max_tokens or max(tokens.max(), min(best[1][0], 10 * tokens.max()))
    sizes, lengths = ((float(min(x.min(), top)), float(top)) for x, top in ((params, top_n), (tokens, top_d)))
    candidates = candidate_grid(sizes, lengths, largest, fit.kappa, request.ratios or ratio_range(params, tokens))
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


def _narrowing(ladders: list[Ladder], fits: list[Fit], noise_left: float) -> dict[str, Any]:
    """The decision's value and 95% intervals now and predicted, of the law and by noise alone.

    ``noise_left`` is what the runs leave of the width by noise; intervals are drawn in around the value.
    """
    values = [float(ladder.decision(fit.parameters)) for ladder, fit in zip(ladders, fits)]
    # The difference where there are two groups, else the one value.
    value = values[0] - sum(values[1:])
    whole = _spread(ladders, [fit.draws for fit in fits])
    noise = _spread(ladders, [fit.resampled for fit in fits])
    share = float(np.ptp(noise) / np.ptp(whole)) if np.ptp(whole) > 0 else 1.0
    left = narrowed(noise_left, share)
    later = value + left * (whole - value), value + noise_left * (noise - value)
    return {
        "now": {"value": value, "interval": whole.tolist(), "noise_interval": noise.tolist()},
        "predicted": {"value": value, "interval": later[0].tolist(), "noise_interval": later[1].tolist()},
        "interval_width_ratio": left,
        "noise_width_ratio": noise_left,
        "form_dominates": form_dominates(share),
    }


def _spread(ladders: list[Ladder], draws: list[np.ndarray]) -> np.ndarray:
    """Ends (2,) of the 95% interval of the decision over ``draws`` (R, 5) of one law or of two independent ones."""
    found = [ladder.decision(of_law) for ladder, of_law in zip(ladders, draws)]
    if len(found) == 2:
        found = [found[0] - np.random.default_rng(0).permutation(found[1])]
    return np.percentile(found[0], [2.5, 97.5])


def to_markdown(plan: dict[str, Any]) -> str:
    """The proposal as a table for people."""
    logarithmic = plan["decision"] == "params"
    # N* is decided on as a logarithm, and read as a number.
    show = (lambda x: f"{np.exp(x):.3g}") if logarithmic else (lambda x: f"{x:.4f}")
    width = "width left, in log N" if logarithmic else "width left"
    lines = [
        f"# Runs to make next, for {plan['meaning']}",
        "",
        f"At {plan['at_flops']:.3g} FLOPs: {show(plan['now']['value'])}.",
        "",
        f"| 95% interval | now | predicted after {plan['spent']:.3g} FLOPs | {width} |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind, left in (
        ("with the error of the form", "interval", "interval_width_ratio"),
        ("by noise alone", "noise_interval", "noise_width_ratio"),
    ):
        now, later = (f"[{show(x[kind][0])}, {show(x[kind][1])}]" for x in (plan["now"], plan["predicted"]))
        lines.append(f"| {name} | {now} | {later} | {plan[left]:.0%} |")
    if plan["form_dominates"]:
        lines += ["", f"{FORM_DOMINATES[0].upper()}{FORM_DOMINATES[1:]}."]
    lines += [
        "",
        "| run | group | params | tokens | FLOPs | width left by noise |",
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
    # By the fields of Proposal: columns that stay the same whatever a plan holds.
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plan["runs"])
    write_text(folder / "next_runs.csv", out.getvalue())
    write_text(folder / "next_runs.md", to_markdown(plan))
    write_json(folder / "next_runs.json", plan)
    return [folder / name for name in ("next_runs.json", "next_runs.csv", "next_runs.md")]
