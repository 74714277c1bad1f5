"""Fit every group of a table and write the folder of results.

The folder holds `fits.json`, `bootstrap.npz` and `pairs.npz` (see fits_file.py), `fits.md` (the same for people) and
plots.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.files import atomic_path
from megamm_laws.fitting.diagnostics import examine
from megamm_laws.fitting.fit import MIN_RUNS, Fit, fit_group
from megamm_laws.fitting.fits_file import to_bytes
from megamm_laws.fitting.form_fit import FormFit, fit_form
from megamm_laws.fitting.form_warnings import form_warnings
from megamm_laws.fitting.page import to_markdown
from megamm_laws.fitting.pictures import colours, fitted_group
from megamm_laws.fitting.shared import NAME as SHARED
from megamm_laws.fitting.shared import examine_shared, fit_shared
from megamm_laws.law import power_law
from megamm_laws.law.constraints import Constraints
from megamm_laws.law.fitted import CHINCHILLA
from megamm_laws.law.forms import FORMS
from megamm_laws.law.forms.simplex import mixture_entry
from megamm_laws.pictures.charts import to_pdf, to_png
from megamm_laws.pictures.plots import frontiers, residuals
from megamm_laws.runs.groups import native_groups
from megamm_laws.runs.table import RunTable
from megamm_laws.uncertainty.pairing import pair_fits
from megamm_laws.uncertainty.rivals import judge_rivals


def fit_table(
    table: RunTable,
    *,
    group_by: str | None = None,
    losses: str = "loss",
    form: str = "chinchilla",
    resamples: int = 1000,
    seed: int = 0,
    rivals: bool = False,
    budgets: tuple[float, ...] = (),
    constraints: Constraints | None = None,
    progress: Callable[[str], None] = lambda text: None,
    left_out: Callable[[str], None] = lambda text: None,
) -> list[Fit | FormFit]:
    """Fit each group of ``table``.

    Groups are those of groups.native_groups: runs that started from a trained model are left out, which is the first
    of the group's warnings. ``losses`` names a column, several with commas, or `all` for ``loss`` and each
    ``loss_*`` that at least 5 runs of the group have.
    Beside a group of 5 runs or more, smaller ones (baselines) are not fitted but told to ``left_out``.

    ``form`` is `chinchilla`, `shared` (one pair of exponents for all groups) or a name in forms.FORMS. With ``rivals``,
    the first is judged against other forms, and its optimum is also told at ``budgets`` (FLOPs).
    ``constraints`` hold for every group.

    Raises:
        InputError: every group has fewer than 5 runs; see also fit.fit_group and runs.RunTable.groups.
    """
    if form not in (*power_law.FORMS, *FORMS):
        raise InputError(f"--form: {form!r} is unknown; known: {', '.join((*power_law.FORMS, *FORMS))}")
    groups, initialised = native_groups(table, group_by)
    every = losses == "all"
    columns = table.loss_columns if every else [name.strip() for name in losses.split(",")]
    if any(len(runs) >= MIN_RUNS for runs in groups.values()):
        for group in [group for group, runs in groups.items() if len(runs) < MIN_RUNS]:
            text = f"group {group} has {len(groups.pop(group))} runs, fewer than {MIN_RUNS}: not fitted"
            left_out("; ".join([text, *initialised[group]]))
    if constraints is not None and form != CHINCHILLA:
        raise InputError(f"--fix and --tie: only with --form {CHINCHILLA}, not {form}")
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    if constraints is not None:
        options["constraints"] = constraints
    fits: list[Fit | FormFit] = []
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
            if rivals and isinstance(fit, Fit):
                progress(f"fitting rivals, {fit.group}, {fit.loss_column}")
                fit.checks |= judge_rivals(fit, budgets)
        for column in columns:
            progress(f"pairing groups, {column}")
            pair_fits([fit for fit in fits if isinstance(fit, Fit) and fit.loss_column == column])
    for fit in fits:
        fit.warnings[:0] = initialised[fit.group]
    return fits


def _fit_columns(
    runs: RunTable,
    group: str,
    columns: list[str],
    form: str,
    options: dict[str, Any],
    progress: Callable[[str], None],
) -> list[Fit | FormFit]:
    """The fits of one group, one per loss column, with their warnings."""
    fits: list[Fit | FormFit] = []
    for column in columns:
        progress(f"fitting {group}, {column}")
        if form in FORMS:
            of_form = fit_form(runs, form, group=group, loss_column=column, **options)
            of_form.warnings += form_warnings(of_form)
            fits.append(of_form)
        else:
            fit = fit_group(runs, group=group, loss_column=column, form=form, **options)
            examine(fit)
            fits.append(fit)
    with_mixture = [fit for fit in fits if isinstance(fit, FormFit) and "optimal_mixture" in fit.extras]
    targets = [fit for fit in with_mixture if fit.loss_column != "loss"]
    if len(targets) > 1:
        with_mixture[0].extras["optimal_mixture_of_losses"] = mixture_entry(targets)
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
    page, plots = to_markdown(fits), draw_plots(fits)
    numbers = to_bytes(fits)
    files = plots | {"fits.md": page.encode()} | numbers
    for name, content in files.items():  # fits.json last: whoever finds it finds the rest
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in ("fits.json", "fits.md", *(n for n in numbers if n != "fits.json"), *plots)]


def draw_plots(fits: list[Fit | FormFit]) -> dict[str, bytes]:
    """Frontiers and residuals of each loss column, as PNG and PDF by name; tools/plot_fits.py draws more."""
    files: dict[str, bytes] = {}
    for column in dict.fromkeys(fit.loss_column for fit in fits):
        chosen = [fit for fit in fits if fit.loss_column == column]
        palette = colours([fit.group for fit in chosen])
        groups = [fitted_group(fit, palette[fit.group]) for fit in chosen]
        plain = [group for group in groups if len(group.grid)]
        suffix = "" if column == "loss" else f"-{column}"
        for chart in [*([frontiers(plain, column)] if plain else []), residuals(groups)]:
            files |= {f"{chart.name}{suffix}.png": to_png(chart), f"{chart.name}{suffix}.pdf": to_pdf(chart)}
    return files
