"""`fits.md`: every fit on one page, with what stands against it."""

from typing import Any

import numpy as np

from megamm_laws.fitting.fit import Fit
from megamm_laws.fitting.form_fit import FormFit
from megamm_laws.fitting.known import known
from megamm_laws.law import power_law

MEANINGS = {"a": "a (N* ~ C^a)", "b": "b (D* ~ C^b)", "c": "c (L* ~ C^c)", "d": "d (D* ~ N*^d)"}


def to_markdown(fits: list[Fit | FormFit]) -> str:
    """All fits as a page: constants, exponents, intervals, drop-k tables, held-out error, warnings."""
    lines = ["# Scaling-law fits", "", "Loss in nats; 95% intervals in brackets.", ""]
    for fit in fits:
        entry = fit.to_json()
        formula = entry["formula"] if isinstance(fit, FormFit) else power_law.FORMS[fit.form].formula
        lines += [f"## {title(fit)}: {escape(formula)}", "", *known(fit, entry), "", *_warnings(fit), ""]
        lines += [*_constants(fit, entry), "", *_facts(fit, entry), ""]
        for key, section in SECTIONS.items():
            if key in entry:
                lines += [*section(entry), ""]
    return "\n".join(lines)


def title(fit: Fit | FormFit) -> str:
    """The group, with the loss column if that is not ``loss``, safe in Markdown."""
    return escape(fit.group if fit.loss_column == "loss" else f"{fit.group}, {fit.loss_column}")


def escape(text: str) -> str:
    """Text that neither a Markdown table nor HTML misreads."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown markdown_table."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def interval_text(ends: Any, digits: int = 5) -> str:
    """``[low, high]``; an end that was not found is a question mark, no interval a blank."""
    if ends is None:
        return ""
    return "[" + ", ".join("?" if x is None else f"{x:.{digits}g}" for x in ends) + "]"


def _warnings(fit: Fit | FormFit) -> list[str]:
    return [f"- **Warning**: {escape(text)}" for text in fit.warnings] or ["No warnings."]


def _constants(fit: Fit | FormFit, entry: dict[str, Any]) -> list[str]:
    joint = entry.get("joint", {}).get("intervals", {})
    profile = entry.get("profile_intervals", {})
    rows = []
    for name, value in {**entry["parameters"], **entry["exponents"]}.items():
        others = (entry.get("noise_intervals", {}), joint, profile)
        cells = [MEANINGS.get(name, name), f"{value:.5g}", interval_text(entry["intervals"][name])]
        rows.append([*cells, *(interval_text(ends.get(name)) for ends in others)])
    head = ["quantity", "value", "95% interval", "by noise alone", "joint 95%", "profile likelihood 95%"]
    lines = markdown_table(head, rows)
    if "law" in entry:
        law, at = entry["law"]["parameters"], entry["law"]["at"]
        where = ", ".join(
            f"{name} {value if isinstance(value, str) else format(value, '.3g')}" for name, value in at.items()
        )
        constants = ", ".join(f"{name} {value:.5g}" for name, value in law.items())
        lines += ["", f"As a law of N and D alone ({where}): {constants}. Source of the form: {entry['source']}."]
    matrix = entry.get("joint", {}).get("correlation", {}).get("matrix")
    if matrix:
        _, A, alpha, B, beta = entry["parameters"].values()
        n, d = (float(np.exp(np.log(fit.table.numbers(c)).mean())) for c in ("params", "tokens"))
        lines += [
            "",
            f"A and B must not be read alone: log A and alpha are correlated at {matrix[1][2]:.4f}, log B and beta at "
            f"{matrix[3][4]:.4f}. At the mean size, {n:.3g} parameters, A/N^alpha is {A * n**-alpha:.4f} "
            f"nats; at the mean length, {d:.3g} tokens, B/D^beta is {B * d**-beta:.4f} nats. Joint "
            "intervals hold E, alpha, beta and a at once.",
        ]
    return lines


def _facts(fit: Fit | FormFit, entry: dict[str, Any]) -> list[str]:
    unit = "runs" if fit.clusters == len(fit.table) else "trunks"
    return [
        f"- runs: {entry['n_runs']}; FLOPs {fit.flops_range[0]:.3g} to {fit.flops_range[1]:.3g}; "
        f"FLOPs are {fit.kappa:.4g} times 6ND",
        f"- objective (huber_log: sum over runs of Huber(log prediction - log loss), delta 1e-3): {fit.objective:.8g}; "
        f"{fit.starts_at_optimum} of {fit.starts_total} starts ended there; gradient norm {fit.gradient_norm:.2g}; "
        f"condition number {fit.condition_number:.2g}",
        f"- bootstrap: {len(fit.draws)} resamples of {fit.clusters} {unit}, seed {fit.seed}",
        *_form_error(entry),
        *_pairings(fit),
        f"- held out: {_held_out(fit)}",
    ]


def _form_error(entry: dict[str, Any]) -> list[str]:
    error = entry.get("model_error")
    if error is None:
        return ["- error of the form: not in the intervals"]
    kinds = {"bend": "a smooth bend of the surface", "offsets": "offsets that runs of one size or trunk share"}
    return [
        f"- {name}: probability {part['probability']:.2f}, standard deviation {part['sd']:.2%} of the loss, "
        f"95% [{part['interval'][0]:.2%}, {part['interval'][1]:.2%}]; the intervals hold it"
        for key, name in kinds.items()
        if (part := error[key])
    ]


def _pairings(fit: Fit | FormFit) -> list[str]:
    if not isinstance(fit, Fit):
        return []
    return [
        f"- {pairing.matched} runs match runs of {escape(other)}; correlation of their errors "
        f"{pairing.correlation:.2f}: comparisons draw both fits together"
        for other, pairing in fit.pairings.items()
    ]


def _held_out(fit: Fit | FormFit) -> str:
    result = fit.holdout
    if "skipped" in result:
        return f"skipped, {result['skipped']}"
    if "a_with" not in result:
        return f"{result['rule']}; mean relative error of their loss {result['relative_error_loss']:.2%}"
    return (
        f"{result['rule']}, up to {result['compute_ratio']:.3g} times the compute of the rest; mean relative error of "
        f"their loss {result['relative_error_loss']:.2%}; a {result['a_without']:.4f} without them, "
        f"{result['a_with']:.4f} with them: a drift of {result['a_drift_in_half_widths']:.2g} half-widths of its "
        "interval by noise alone"
    )


def _optimum(entry: dict[str, Any]) -> list[str]:
    rows = []
    for best in entry["optimum"]:
        row = [f"{best['flops']:.3g} ({best['times_largest']:.3g}x the largest run)"]
        for name, digits in (("params", 3), ("tokens", 3), ("loss", 4)):
            row.append(f"{best[name]:.{digits}g} {interval_text(best[f'{name}_interval'], digits)}")
            row.append(interval_text(best[f"{name}_joint_interval"], digits))
        rows.append(row)
    return ["Optimum:", "", *markdown_table(["FLOPs", "N*", "joint", "D*", "joint", "L*", "joint"], rows)]


def _approaches(entry: dict[str, Any]) -> list[str]:
    rows = []
    for found in entry["approaches"]:
        head = [f"{found['approach']}, {found['method']}"]
        if "skipped" in found:
            rows.append([*head, "", "", found["skipped"]])
        else:
            rows.append([*head, f"{found['a']:.4f}", interval_text(found["interval"], 4), str(found["points"])])
    return [
        "N* ~ C^a by three approaches:",
        "",
        *markdown_table(["approach", "a", "95% interval", "runs or budgets"], rows),
    ]


def _drop_table(entry: dict[str, Any]) -> list[str]:
    names = [name for name in ("E", "alpha", "beta", "a") if name in entry["drop_k"][0]]
    rows = []
    for row in entry["drop_k"]:
        cells = [str(row["k"]), row["dropped"], *(f"{row[name]:.4f}" for name in names)]
        rows.append([*cells, f"{row['objective']:.4g}", ", ".join(row["outside"])])
    head = ["k", "dropped", *names, "objective", "out of its interval"]
    return ["Without the k runs of highest loss or of largest FLOPs:", "", *markdown_table(head, rows)]


def _hold_outs(entry: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{row['share']:.0%} ({row['n']})",
            f"{row['compute_ratio']:.3g}",
            f"{row['relative_error_loss']:.2%}",
            f"{row['a_without']:.4f}",
            f"{row['a_drift']:+.4f}",
            f"{row['a_drift_in_half_widths']:.2g}",
        ]
        for row in entry["holdouts"]
    ]
    if not rows:
        return ["Held out: too few runs."]
    head = ["held back", "times the compute of the rest", "error of their loss", "a without", "drift", "in half-widths"]
    return ["Without the runs of largest FLOPs, these predicted:", "", *markdown_table(head, rows)]


def _sharing(entry: dict[str, Any]) -> list[str]:
    found = entry["sharing"]
    return [
        f"alpha and beta are shared by {escape(', '.join(found['groups']))}: objective "
        f"{found['objective_shared']:.6g}, with separate exponents {found['objective_free']:.6g}; robust "
        f"likelihood-ratio test p = {found['p_value']:.2g} (small: do not share)."
    ]


def _mixture(entry: dict[str, Any], key: str = "optimal_mixture") -> list[str]:
    best = entry[key]
    rows = [
        [
            escape(name),
            f"{share:.3f}",
            interval_text(best["intervals"][name], 3),
            interval_text(best["measured"][name], 3),
        ]
        for name, share in best["shares"].items()
    ]
    what = best["losses"][0] if len(best["losses"]) == 1 else f"the mean of {', '.join(best['losses'])}"
    size = f"{best['params']:.3g} parameters and {best['tokens']:.3g} tokens"
    head = f"Mixture with the lowest value of {escape(what)} at {size}"
    lines = markdown_table(["domain", "share", "95% interval", "measured"], rows)
    return [f"{head}: {best['loss']:.4f} nats", "", *lines]


def _sparsities(entry: dict[str, Any]) -> list[str]:
    rows = []
    for best in entry["optimum_by_sparsity"]:
        row = [f"{best['sparsity']:.3g}", f"{best['kappa']:.3g}"]
        for name, digits in (("params", 3), ("tokens", 3), ("loss", 4), ("a", 4)):
            value = "none" if best[name] is None else f"{best[name]:.{digits}g}"
            row.append(f"{value} {interval_text(best[f'{name}_interval'], digits)}".rstrip())
        rows.append(row)
    head = ["sparsity", "FLOPs / 6ND", "N* (all parameters)", "D*", "L*", "a"]
    return [f"Optimum at {entry['optimum_by_sparsity'][0]['flops']:.3g} FLOPs:", "", *markdown_table(head, rows)]


def _rivals(entry: dict[str, Any]) -> list[str]:
    last = len(entry["decision"]["optimum"]) - 1
    rows = []
    for name, rival in entry["rivals"]["forms"].items():
        best = rival["optimum"][last]
        size = "none" if best["params"] is None else f"{best['params']:.3g}"
        slope = "none" if rival["exponents"]["a"] is None else f"{rival['exponents']['a']:.4f}"
        verdict = f"{'rejected' if rival['rejected'] else 'not rejected'} ({rival['statistic']:.2f})"
        ends = interval_text(rival["intervals"]["a"], 4), interval_text(best["params_interval"], 3)
        rows.append(
            [name, escape(rival["formula"]), f"{rival['objective']:.4g}", verdict, slope, ends[0], size, ends[1]]
        )
    flops = entry["decision"]["optimum"][last]["flops"]
    head = ["form", "law", "objective", "verdict", "a", "95% by noise", f"N* at {flops:.3g} FLOPs", "95% by noise"]
    return [
        f"Rival forms; rejected above {entry['rivals']['critical']:.2f} spreads behind the best (Vuong's test):",
        "",
        *markdown_table(head, rows),
    ]


SECTIONS = {
    "rivals": _rivals,
    "optimum": _optimum,
    "approaches": _approaches,
    "drop_k": _drop_table,
    "holdouts": _hold_outs,
    "sharing": _sharing,
    "optimum_by_sparsity": _sparsities,
    "optimal_mixture": _mixture,
    "optimal_mixture_of_losses": lambda entry: _mixture(entry, "optimal_mixture_of_losses"),
}
"""What is printed where `fits.json` has the entry."""
