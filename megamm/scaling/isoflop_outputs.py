"""Write isoFLOP fits: `isoflops.json`, `isoflops.md` and the profiles as `isoflops.png` and `.pdf`."""

import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megamm.errors import InputError
from megamm.files import atomic_path, write_text
from megamm.scaling.isoflop import IsoFlopFit


def write_isoflops(folder: Path | str, fits: list[IsoFlopFit]) -> list[Path]:
    """Write the folder of results, computed before the first file is written; returns the paths.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    document = json.dumps({"fits": [fit.to_json() for fit in fits]}, indent=2, allow_nan=False)
    page = to_markdown(fits)
    plots = draw_profiles(fits)
    for name, content in plots.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    write_text(folder / "isoflops.md", page)
    write_text(folder / "isoflops.json", document + "\n")
    return [folder / name for name in ("isoflops.json", "isoflops.md", *plots)]


def to_markdown(fits: list[IsoFlopFit]) -> str:
    """Exponents and the optimum of every budget, with 95% intervals over noise draws."""
    lines = ["# IsoFLOP fits", ""]
    meanings = {"a": "a (N* ~ C^a)", "b": "b (D* ~ C^b)", "c": "c (L* ~ C^c)"}
    for fit in fits:
        entry = fit.to_json()
        lines += [
            f"## {fit.group}, {fit.loss_column}",
            "",
            "| exponent | value | 95% interval |",
            "| --- | --- | --- |",
        ]
        for name, value in fit.exponents.items():
            low, high = entry["intervals"][name]
            lines.append(f"| {meanings[name]} | {value:.4f} | [{low:.4f}, {high:.4f}] |")
        parabola = "not available" if fit.parabola_a is None else f"{fit.parabola_a:.4f}"
        lines += [
            "",
            f"- {len(fit.table)} runs, {len(fit.used)} of {len(fit.profiles)} budgets used; noise {fit.noise:g} nats, "
            f"{len(fit.exponent_draws)} draws, seed {fit.seed}",
            f"- a by parabolas through the runs around each minimum: {parabola}",
            "",
            "| FLOPs | runs | N* | 95% interval | D* | loss |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for budget in entry["budgets"]:
            head = f"| {budget['flops']:.3g} | {budget['n_runs']} "
            if "left_out" in budget:
                lines.append(head + f"| not used: {budget['left_out']} | | | |")
                continue
            low, high = budget["params_interval"]
            lines.append(
                head + f"| {budget['params']:.4g} | [{low:.4g}, {high:.4g}] | {budget['tokens']:.4g} "
                f"| {budget['loss']:.4f} |"
            )
        lines += ["", *([f"- **Warning**: {text}" for text in fit.warnings] or ["No warnings."]), ""]
    return "\n".join(lines)


def draw_profiles(fits: list[IsoFlopFit]) -> dict[str, bytes]:
    """PNG and PDF by name: a row per fit, its profiles beside N* over compute."""
    figure = Figure(figsize=(11, 4.2 * len(fits)), layout="constrained")
    grid = figure.subplots(len(fits), 2, squeeze=False)
    for fit, (left, right) in zip(fits, grid):
        _plot_profiles(left, fit)
        _plot_optima(right, fit)
    files = {}
    for kind in ("png", "pdf"):
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=130)
        files[f"isoflops.{kind}"] = out.getvalue()
    return files


def _plot_profiles(axes, fit: IsoFlopFit) -> None:
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0, 0.9, len(fit.profiles)))
    for profile, color in zip(fit.profiles, shades):
        axes.plot(profile.grid, profile.curve, color=color, linewidth=1, label=f"{profile.flops:.2g}")
        axes.scatter(profile.params, profile.loss, color=color, s=10)
        if profile.problem is None:
            best = np.exp(profile.optimum)
            axes.scatter(best[0], best[2], color=color, marker="*", s=90, edgecolors="black", linewidths=0.5)
    axes.set_xscale("log")
    axes.set_xlabel("parameters N")
    axes.set_ylabel(f"{fit.loss_column} (nats per token)")
    axes.set_title(f"{fit.group}: isoFLOP profiles".replace("$", "\\$"))
    axes.legend(fontsize=7, title="FLOPs", ncols=2)


def _plot_optima(axes, fit: IsoFlopFit) -> None:
    flops = np.array([p.flops for p in fit.used])
    logs = np.array([p.optimum[0] for p in fit.used])
    spread = np.array([p.spread[0] for p in fit.used])
    best = np.exp(logs)
    errors = np.abs(np.exp([logs - 1.96 * spread, logs + 1.96 * spread]) - best)
    axes.errorbar(flops, best, yerr=errors, fmt="o", markersize=4, color="#0072B2", label="optima, 95%")
    grid = np.geomspace(flops.min(), flops.max(), 50)
    line = fit.coefficients["params"] * grid ** fit.exponents["a"]
    axes.plot(grid, line, color="#D55E00", label=f"N* ~ C^{fit.exponents['a']:.4f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training compute C (FLOPs)")
    axes.set_ylabel("compute-optimal parameters N*")
    axes.legend(fontsize=8)
