"""What the pictures show, gathered from a folder of fits and the table that was fitted."""

from typing import Any

import numpy as np

from megamm_laws.fitting.fit import Fit
from megamm_laws.fitting.form_fit import FormFit
from megamm_laws.fitting.isoflop import IsoFlopFit
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law
from megamm_laws.pictures.charts import Chart
from megamm_laws.pictures.plots import LOG_A, LOG_B, PALETTE, Budget, PlotGroup, blend, isoflops
from megamm_laws.runs.table import RunTable

POINTS = 96
DARKEST = 0.9
"""Share of black that many groups come near."""


def group_of(law: Law, runs: RunTable, loss_column: str, fit: dict[str, Any], *, name: str, colour: str) -> PlotGroup:
    """The arrays of one fitted group.

    Args:
        runs: those that the law was fitted to.
        fit: its entry of fits.json, for the hold-out.
        name, colour: as drawn.
    """
    params, tokens = runs.numbers("params"), runs.numbers("tokens")
    grid = np.geomspace(*law.flops_range, POINTS)
    draws = dict(zip(power_law.PARAMETERS, law.draws.T))
    E, A, alpha, B, beta = (draws[key] for key in power_law.PARAMETERS)
    held = fit.get("holdout") or {}
    held_out = exponents = None
    if "relative_errors" in held:
        by_name = dict(zip(runs.names, runs.numbers("flops")))
        # fits.json holds names and errors, the FLOPs are in the table.
        known = [(by_name[run], error) for run, error in zip(held["runs"], held["relative_errors"]) if run in by_name]
        held_out = tuple(np.array(known).T) if known else None
        exponents = held["a_with"], held["a_without"]
    return PlotGroup(
        name=name,
        colour=colour,
        names=runs.names,
        params=params,
        tokens=tokens,
        flops=runs.numbers("flops"),
        losses=runs.numbers(loss_column),
        predicted=power_law.predict(law.parameters, params, tokens),
        grid=grid,
        frontier=law.frontier(grid),
        band=law.band(grid),
        draws={
            "E": E,
            "alpha": alpha,
            "beta": beta,
            LOG_A: np.log(A) - alpha * np.log(params).mean(),
            LOG_B: np.log(B) - beta * np.log(tokens).mean(),
        },
        held_out=held_out,
        exponents=exponents,
    )


def fitted_group(fit: Fit | FormFit, colour: str) -> PlotGroup:
    """The arrays of a fit at hand; a form of more than N and D has residuals, but no frontier (empty arrays)."""
    if isinstance(fit, Fit):
        name = fit.group
        return group_of(fit.law, fit.table, fit.loss_column, fit.to_json(), name=name, colour=colour)
    runs = fit.table
    losses = runs.numbers(fit.loss_column)
    return PlotGroup(
        name=fit.group,
        colour=colour,
        names=runs.names,
        params=runs.numbers("params"),
        tokens=runs.numbers("tokens"),
        flops=runs.numbers("flops"),
        losses=losses,
        # A residual is log prediction - log loss.
        predicted=losses * np.exp(fit.residuals),
        grid=np.zeros(0),
        frontier=np.zeros(0),
        band=np.zeros((2, 0)),
    )


def isoflop_chart(fit: IsoFlopFit, name: str, title: str | None = None) -> Chart:
    """The profiles of an isoFLOP fit and the line through their minima; ``title`` is the group as people call it."""
    budgets = []
    for profile in fit.profiles:
        # A profile without a minimum is drawn all the same: it shows which sizes are missing.
        optimum, interval = None, None
        if profile.problem is None:
            n, _, loss = np.exp(profile.optimum)
            low, high = profile.interval[:, 0]
            optimum, interval = (float(n), float(loss)), (float(low), float(high))
        budgets.append(
            Budget(
                flops=profile.flops,
                params=profile.params,
                losses=profile.loss,
                grid=profile.grid,
                curve=profile.curve,
                optimum=optimum,
                interval=interval,
            )
        )
    chart = isoflops(name, budgets, fit.coefficients["params"], fit.exponents["a"], fit.loss_column)
    for panel in chart.panels:
        panel.title = f"{title or fit.group}: {panel.title[0].lower()}{panel.title[1:]}"
    return chart


def colours(names: list[str]) -> dict[str, str]:
    """A colour for each group, in order; beyond the palette its colours come again, darker each time."""
    rounds = -(-len(names) // len(PALETTE))
    return {
        name: blend(PALETTE[i % len(PALETTE)], "#000000", DARKEST * (i // len(PALETTE)) / rounds)
        for i, name in enumerate(names)
    }
