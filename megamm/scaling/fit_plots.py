"""What the pictures show, gathered from a folder of fits and the table that was fitted."""

from typing import Any

import numpy as np

from megamm.scaling import laws
from megamm.scaling.compare import Law
from megamm.scaling.plots import PALETTE, Group
from megamm.scaling.runs import RunTable

POINTS = 96


def group_of(law: Law, runs: RunTable, loss_column: str, fit: dict[str, Any], *, name: str, colour: str) -> Group:
    """The arrays of one fitted group.

    Args:
        runs: those that the law was fitted to.
        fit: its entry of fits.json, for the hold-out.
        name, colour: as drawn.
    """
    params, tokens = runs.numbers("params"), runs.numbers("tokens")
    grid = np.geomspace(*law.flops_range, POINTS)
    draws = dict(zip(laws.PARAMETERS, law.draws.T))
    E, A, alpha, B, beta = (draws[key] for key in laws.PARAMETERS)
    held = fit.get("holdout") or {}
    held_out = exponents = None
    if "relative_errors" in held:
        by_name = dict(zip(runs.names, runs.numbers("flops")))
        known = [(by_name[run], error) for run, error in zip(held["runs"], held["relative_errors"]) if run in by_name]
        held_out = tuple(np.array(known).T) if known else None
        exponents = held["a_with"], held["a_without"]
    return Group(
        name=name,
        colour=colour,
        names=runs.names,
        params=params,
        tokens=tokens,
        flops=runs.numbers("flops"),
        losses=runs.numbers(loss_column),
        predicted=laws.predict(law.parameters, params, tokens),
        grid=grid,
        frontier=law.frontier(grid),
        band=law.band(grid),
        draws={
            "E": E,
            "alpha": alpha,
            "beta": beta,
            "log A": np.log(A) - alpha * np.log(params).mean(),
            "log B": np.log(B) - beta * np.log(tokens).mean(),
        },
        held_out=held_out,
        exponents=exponents,
    )


def colours(names: list[str]) -> dict[str, str]:
    """A colour for each group, in order."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
