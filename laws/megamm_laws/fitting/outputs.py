"""Fit every group of a table and write the folder of results.

The folder holds `fits.json` (the contract), `fits.md` (the same for people), `bootstrap.npz` (per fit the
draws behind its intervals, a float64 array (R, 5) of E, A, alpha, B, beta; keys by fits_file.key_of; for a form of
megamm.scaling.forms (R, P) of its own parameters under `key@form` and of the plain law it implies under
`key@form/law`; no pickled objects) and plots.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megamm.errors import InputError
from megamm.files import atomic_path, write_text
from megamm.scaling import laws
from megamm.scaling.charts import to_pdf, to_png
from megamm.scaling.diagnostics import examine
from megamm.scaling.fit import MIN_RUNS, Fit, fit_group
from megamm.scaling.fit_plots import colours, fitted_group
from megamm.scaling.fits_file import digest, key_of
from megamm.scaling.fits_page import to_markdown
from megamm.scaling.forms import FORMS
from megamm.scaling.forms.fitting import FormFit, fit_form
from megamm.scaling.forms.shared import NAME as SHARED
from megamm.scaling.forms.shared import examine_shared, fit_shared
from megamm.scaling.forms.simplex import mixture_entry
from megamm.scaling.forms.warnings import form_warnings
from megamm.scaling.groups import native_groups
from megamm.scaling.plots import frontiers, residuals
from megamm.scaling.runs import RunTable


def fit_table(
    table: RunTable,
    *,
    group_by: str | None = None,
    losses: str = "loss",
    form: str = "chinchilla",
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    left_out: Callable[[str], None] = lambda text: None,
) -> list[Fit | FormFit]:
    """Fit each group of ``table``.

    Groups are those of groups.native_groups: runs that started from a trained model are left out, which is the first
    of the group's warnings. ``losses`` names a column, several with commas, or `all` for ``loss`` and each
    ``loss_*`` that at least 5 runs of the group have.
    Beside a group of 5 runs or more, smaller ones (baselines) are not fitted but told to ``left_out``.

    ``form`` is `chinchilla`, `shared` (one pair of exponents for all groups) or a name in forms.FORMS.

    Raises:
        InputError: every group has fewer than 5 runs; see also fit.fit_group and runs.RunTable.groups.
    """
    if form not in (*laws.FORMS, *FORMS):
        raise InputError(f"--form: {form!r} is unknown; known: {', '.join((*laws.FORMS, *FORMS))}")
    groups, initialised = native_groups(table, group_by)
    every = losses == "all"
    columns = table.loss_columns if every else [name.strip() for name in losses.split(",")]
    if any(len(runs) >= MIN_RUNS for runs in groups.values()):
        for group in [group for group, runs in groups.items() if len(runs) < MIN_RUNS]:
            text = f"group {group} has {len(groups.pop(group))} runs, fewer than {MIN_RUNS}: not fitted"
            left_out("; ".join([text, *initialised[group]]))
    options = {"resamples": resamples, "seed": seed}
    fits = []
    if form == SHARED:
        enough = [c for c in columns if not every or all(_measured(runs, c) >= MIN_RUNS for runs in groups.values())]
        for column in enough:
            progress(f"fitting {', '.join(groups)}, {column}")
            fits += examine_shared(fit_shared(groups, loss_column=column, **options))
    else:
        for group, runs in groups.items():
            few = [c for c in columns if every and c != "loss" and _measured(runs, c) < MIN_RUNS]
            kept = [column for column in columns if column not in few]
            fits += _fit_columns(runs, group, kept, form, options, progress)
    for fit in fits:
        fit.warnings[:0] = initialised[fit.group]
    return fits


def _fit_columns(
    runs: RunTable,
    group: str,
    columns: list[str],
    form: str,
    options: dict[str, int],
    progress: Callable[[str], None],
) -> list[Fit | FormFit]:
    """The fits of one group, one per loss column, with their warnings."""
    fits = []
    for column in columns:
        progress(f"fitting {group}, {column}")
        if form in FORMS:
            fit = fit_form(runs, form, group=group, loss_column=column, **options)
            fit.warnings += form_warnings(fit)
        else:
            fit = fit_group(runs, group=group, loss_column=column, form=form, **options)
            examine(fit)
        fits.append(fit)
    targets = [fit for fit in fits if fit.loss_column != "loss"]
    if len(targets) > 1 and "optimal_mixture" in targets[0].__dict__.get("extras", {}):
        fits[0].extras["optimal_mixture_of_losses"] = mixture_entry(targets)
    return fits


def _measured(table: RunTable, column: str) -> int:
    """How many runs have a value in ``column``."""
    return int(np.isfinite(table.numbers(column)).sum())


def write_fits(folder: Path | str, fits: list[Fit | FormFit]) -> list[Path]:
    """Write the folder of results; everything is computed before the first file is written.

    Returns the paths. Raises InputError if ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    page = to_markdown(fits)
    plots = draw_plots(fits)
    draws = io.BytesIO()
    np.savez(draws, **{key: array for fit in fits for key, array in _draws_of(fit).items()})
    document = {"fits": [fit.to_json() for fit in fits], "bootstrap_sha256": digest(draws.getvalue())}
    document = json.dumps(document, indent=2, allow_nan=False)
    for name, content in {**plots, "bootstrap.npz": draws.getvalue()}.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    write_text(folder / "fits.md", page)
    write_text(folder / "fits.json", document + "\n")  # last: whoever finds it finds the rest
    return [folder / name for name in ("fits.json", "fits.md", "bootstrap.npz", *plots)]


def _draws_of(fit: Fit | FormFit) -> dict[str, np.ndarray]:
    """Arrays of `bootstrap.npz`: of a form, all its parameters under `key@form`, its plain law under `key@form/law`."""
    key = key_of(fit.group, fit.loss_column)
    if isinstance(fit, Fit):
        return {key: fit.draws}
    key = f"{key}@{fit.form.name}"
    law = fit.law_of(fit.draws)
    return {key: fit.draws} | ({} if law is None else {f"{key}/law": law[0]})


def draw_plots(fits: list[Fit | FormFit]) -> dict[str, bytes]:
    """Frontiers and residuals of each loss column, as PNG and PDF by name; tools/plot_fits.py draws more."""
    files = {}
    for column in dict.fromkeys(fit.loss_column for fit in fits):
        chosen = [fit for fit in fits if fit.loss_column == column]
        palette = colours([fit.group for fit in chosen])
        groups = [fitted_group(fit, palette[fit.group]) for fit in chosen]
        plain = [group for group in groups if len(group.grid)]
        suffix = "" if column == "loss" else f"-{column}"
        for chart in [*([frontiers(plain, column)] if plain else []), residuals(groups)]:
            files |= {f"{chart.name}{suffix}.png": to_png(chart), f"{chart.name}{suffix}.pdf": to_pdf(chart)}
    return files
