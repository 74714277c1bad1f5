"""The tables of the page, as HTML; all text from the study is escaped."""

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from megamm_laws.forecasts.record import HEADS, read_forecasts, summary
from megamm_laws.law import power_law
from megamm_laws.pictures.units import count, digits, power, prettify

from megamm.report.figures import colour_of, column_name, title_of
from megamm.report.findings import Finding, cautions, image_rows, signed
from megamm.report.study import StudyResults

FIRST_WARNINGS = 8
BUDGETS = (1, 10, 100)
"""Multiples of the largest compute measured for which the best size is told."""
NONE = "–"


def html_table(heads: list[str], rows: list[list[str]], left: int = 1, attributes: str = "", tall: bool = False) -> str:
    """A table in a box that scrolls.

    Args:
        heads: HTML of the headings.
        rows: HTML of the cells, bare or whole ``<td>`` or ``<th>`` elements; a row of one cell is a heading.
        left: number of columns set to the left.
        tall: whether the box is limited in height.
    """
    head = "".join(f"<th scope=col{_side(i < left or h == 'verdict')}>{h}</th>" for i, h in enumerate(heads))
    body = ""
    for row in rows:
        cells = (c if c.startswith("<t") else f"<td{_side(i < left)}>{c}</td>" for i, c in enumerate(row))
        body += f"<tr{' class=part' if len(row) == 1 else ''}>{''.join(cells)}</tr>"
    return (
        f'<div class="{"scroll tall" if tall else "scroll"}" tabindex="0"><table {attributes}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def note(text: str) -> str:
    """A small paragraph of plain text."""
    return f'<p class="note">{escape(text)}</p>'


def _side(left: bool) -> str:
    return " class=left" if left else ""


def _group(study: StudyResults, group: str) -> str:
    return f'<span class="dot" style="background:{colour_of(study, group)}"></span>{escape(title_of(group))}'


# ------------------------------------------------------------------------------------------ the comparison


def comparison_table(found: list[Finding]) -> str:
    """A row per finding: difference, ratio of FLOPs, crossover, verdict."""
    comparison = found[0].comparison
    first, second = title_of(comparison.first), title_of(comparison.second)
    rows = []
    for finding in found:
        values = (finding.difference, finding.gain, finding.crossover)
        cells = [f"{value}<small>{interval}</small>" for value, interval in values]
        verdict = f'<td class="left wrap">{escape(finding.verdict)}</td>'
        rows.append([f"<th scope=row>{escape(finding.subject)}</th>", *cells, verdict])
    explained = (
        f"Difference: loss of {first} minus that of {second}. FLOPs ratio: compute that {second} needs for the same "
        f"loss, over that of {first}. Both at the largest budget that both were measured at "
        f"({power(comparison.flops[-1])} FLOPs in the first row), with pointwise 95% intervals; verdicts use the band "
        "of the whole curve. The image encoder of late fusion is counted in its FLOPs unless the row says otherwise."
    )
    return html_table(["loss", "difference, nats", "FLOPs ratio", "crossover, FLOPs", "verdict"], rows) + note(
        explained
    )


# --------------------------------------------------------------------------------------------------- sizes


def optimum_table(study: StudyResults) -> str:
    """Parameters, tokens and loss of the best model of each architecture, at the largest budget and beyond."""
    laws = study.laws.get("loss", {})
    if not laws:
        return ""
    rows = []
    for factor in BUDGETS:
        heading = "the largest budget measured" if factor == 1 else f"{factor} times that"
        rows.append([f'<th scope=rowgroup colspan="5">{heading}</th>'])
        for group in study.groups:
            if group not in laws:
                continue
            law, at = laws[group], np.array([factor * laws[group].flops_range[1]])
            values, draws = (power_law.optimum(p, at, law.kappa) for p in (law.parameters, law.draws))
            losses = (power_law.frontier_loss(p, at, law.kappa) for p in (law.parameters, law.draws))
            loss, loss_draws = losses
            cells = [_estimate(float(v[0]), d[:, 0], count) for v, d in zip(values, draws)]
            cells.append(_estimate(float(loss[0]), loss_draws[:, 0], "{:.3f}".format))
            rows.append([_group(study, group), power(float(at[0])), *cells])
    explained = (
        "The size and length that give the lowest average loss for a budget, by the fitted law, each above its 95% "
        "interval. Beyond ten times the largest budget measured they are guesses. A size off by a factor of two costs "
        "little. megamm-plan turns a budget into a training config, and megamm-next-runs names the runs that would "
        "narrow these intervals most."
    )
    heads = ["architecture", "FLOPs", "parameters N*", "tokens D*", "loss L*"]
    return html_table(heads, rows, attributes='class="dense"') + note(explained)


def _estimate(value: float, draws: np.ndarray, form: Callable[[float], str]) -> str:
    low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5])
    return f"{form(value)}<small>{form(low)} to {form(high)}</small>"


# ---------------------------------------------------------------------------------------------------- fits


def fits_table(study: StudyResults) -> str:
    """Constants, exponents, held-out errors and warnings of all fits."""
    quantities = (*power_law.PARAMETERS, *power_law.EXPONENTS)
    symbols = {"alpha": "α", "beta": "β"}
    heads = ["", "runs", *(symbols.get(q, q) for q in quantities), "held-out error"]
    order = {group: i for i, group in enumerate(study.groups)}
    rows = []
    for column in study.loss_columns:
        rows.append([f'<th scope=rowgroup colspan="{len(heads)}">{escape(column_name(column))}</th>'])
        chosen = [fit for fit in study.fits if fit.get("loss_column", "loss") == column]
        for fit in sorted(chosen, key=lambda f: order[f["group"]]):
            values = {**fit["parameters"], **fit["exponents"]}
            cells = [_with_interval(values[q], fit["intervals"].get(q)) for q in quantities]
            rows.append([_group(study, fit["group"]), str(fit["n_runs"]), *cells, _held_out(fit)])
    explained = (
        "Law: L(N, D) = E + A/N^α + B/D^β with N parameters and D tokens. At the optimum N* ~ C^a and D* ~ C^b; "
        "L* ~ C^c along the frontier; D* ~ N*^d. Held-out error: mean relative error of the loss of the largest "
        "runs, predicted from the rest."
    )
    return note(explained) + html_table(heads, rows, attributes='class="dense"') + _warnings(study)


def _with_interval(value: float, interval: list[float] | None) -> str:
    text = digits(value).replace("-", "−")
    if not interval:
        return text
    low, high = (digits(x, 2).replace("-", "−") for x in interval)
    return f"{text}<small>[{low}, {high}]</small>"


def _held_out(fit: dict[str, Any]) -> str:
    held = fit.get("holdout") or {}
    if "relative_error_loss" in held:
        return f"{100 * held['relative_error_loss']:.2f}%<small>{held['n']} runs</small>"
    return f'<td title="{escape(prettify(str(held.get("skipped", ""))))}">not measured</td>'


def _warnings(study: StudyResults) -> str:
    items = [
        f'<li>{escape(text[0].upper() + text[1:])} <span class="note">({escape(fits)})</span></li>'
        for text, fits in cautions(study)
    ]
    if not items:
        return "<p>The fits give no warnings.</p>"
    first, rest = items[:FIRST_WARNINGS], items[FIRST_WARNINGS:]
    content = f'<h3>Warnings</h3><ul class="plain">{"".join(first)}</ul>'
    if rest:
        listed = f'<ul class="plain">{"".join(rest)}</ul>'
        content += f"<details><summary>{len(rest)} more</summary>{listed}</details>"
    return content


# ------------------------------------------------------------------------------------------ images and runs


def image_table(study: StudyResults) -> str:
    """Losses after images at the largest size: true, swapped, blind."""
    heads = ["architecture", "source", "parameters", "true images", "swapped images", "blind model"]
    rows = []
    for row in image_rows(study):
        true, swapped, blind = row["true"], row["swapped"], row["blind"]
        rows.append(
            [
                _group(study, row["group"]),
                f'<td class="left">{escape(row["source"])}</td>',
                count(row["run"].params),
                *(NONE if loss is None else f"{loss:.3f}" for loss in (true, swapped, blind)),
                signed(swapped - true),
                NONE if blind is None else signed(true - blind),
            ]
        )
    explained = (
        "Loss of the text after an image in nats per token, at the largest size and longest training. The blind model "
        "has the same decoder, but its image positions are empty; the one nearest in size is shown."
    )
    return html_table([*heads, "swapped − true", "true − blind"], rows, left=2) + note(explained)


def runs_table(study: StudyResults) -> str:
    """Every run of the run table; sortable."""
    losses = [c for c in study.in_order(study.table.loss_columns) if c != "loss"]
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("parameters", "params", count),
        ("tokens", "tokens", count),
        ("FLOPs", "flops", power),
        ("loss", "loss", "{:.3f}".format),
        *((escape(column_name(c)), c, "{:.3f}".format) for c in losses),
    ]
    mixtures = sorted({str(row.get("mixture") or NONE) for row in study.table.rows})
    mixed = len(mixtures) > 1
    widths = {run.result["name"]: run.width for run in study.finished}
    rows = []
    for name, row in _sorted_runs(study):
        architecture, mixture = str(row.get("architecture") or NONE), str(row.get("mixture") or NONE)
        cells = [
            escape(name),
            f'<td class="left" data-sort="{escape(architecture)}">{_group(study, architecture)}</td>',
            *[f'<td class="left">{escape(mixture)}</td>'] * mixed,
            str(widths.get(name, NONE)),
        ]
        for _, column, form in columns:
            value = row.get(column)
            cells.append(f"<td>{NONE}</td>" if value is None else f'<td data-sort="{value}">{form(value)}</td>')
        rows.append(cells)
    heads = ["run", "architecture", *["mixture"] * mixed, "width", *(title for title, *_ in columns)]
    explained = "Runs that the laws are fitted to."
    if not mixed:
        explained += f" Mixture of all: {mixtures[0]} (shares of tokens, %)."
    if "trained_to_longest" in study.saving:
        explained += (
            f" Thanks to shared trunks the ladders cost {study.saving['trained_to_longest']:.2f} times their longest "
            f"runs; training each run apart would cost {study.saving['apart_to_longest']:.2f} times."
        )
    content = note(f"{explained} A click on a heading sorts.")
    unfinished = [str(run.path.relative_to(study.folder)) for run in study.runs if run.result is None]
    if unfinished:
        content += note(f"Not finished, and left out: {', '.join(unfinished)}.")
    return content + html_table(heads, rows, left=2 + mixed, attributes='class="sortable"', tall=True)


def _sorted_runs(study: StudyResults) -> list[tuple[str, dict[str, Any]]]:
    """Names and rows by architecture, size and length."""
    pairs = zip(study.table.names, study.table.rows)
    return sorted(pairs, key=lambda pair: (str(pair[1].get("architecture")), pair[1]["params"], pair[1]["tokens"]))


def forecasts_table(study: StudyResults) -> str:
    """What was said before runs were trained, and what came out: the files in ``forecasts`` of the study's folder."""
    folder = study.folder / "forecasts"
    lines = read_forecasts(folder) if folder.is_dir() else []
    if not lines:
        return ""
    return note(summary(lines)) + html_table(list(HEADS), [[escape(cell) for cell in line.cells()] for line in lines])


def versions_table(study: StudyResults) -> str:
    """Versions and device, each with all values that the runs had."""
    keys = {"megamm": "megamm", "git_commit": "git commit", "torch": "PyTorch", "python": "Python", "device": "device"}
    rows = []
    for key, label in keys.items():
        values = sorted({str(run.about[key]) for run in study.runs if run.about.get(key)})
        if values:
            rows.append([f"<th scope=row>{label}</th>", f'<td class="left wrap">{escape(", ".join(values))}</td>'])
    return html_table(["item", "value"], rows, left=2)
