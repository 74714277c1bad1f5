"""Mixtures of experts: the loss over total parameters, tokens and sparsity."""

from typing import Any

import numpy as np

from megamm_laws.law.forms.base import (
    Data,
    Form,
    Parameter,
    Point,
    Term,
    amplitude,
    chinchilla_parameters,
    chinchilla_terms,
    column_numbers,
    exponent,
)
from megamm_laws.runs.table import RunTable


def signed_amplitude(name: str) -> Parameter:
    """A power of the active share, of either sign."""
    return Parameter(name=name, start=(-0.6, 0.6), bounds=(-3.0, 3.0))


class MoeSparsity(Form):
    """N counts all parameters; S is the share of experts (or, lacking that, of parameters) a token leaves idle.

    Abnar et al. 2025 (arXiv 2501.12370), equation 6, where S = (experts - active ones)/experts; powers of 1 - S have
    either sign.
    """

    name = "moe"
    formula = "E + A/N^alpha + B/D^beta + C/(1-S)^lambda + F/((1-S)^delta N^gamma)"
    source = "arXiv 2501.12370, equation 6"

    def read(self, table: RunTable) -> dict[str, np.ndarray]:
        """``sparsity`` where given, else 1 - params_active/params."""
        if "sparsity" in table.columns:
            return {"sparsity": column_numbers(table, "sparsity", 0.0, 1.0, "the share of idle experts")}
        active = column_numbers(table, "params_active", 1.0, np.inf, "or give sparsity, the share of idle experts")
        # Below 1: the logarithm of the active share must be finite. Not below 0, where active parameters count more
        # than all do.
        return {"sparsity": np.clip(1 - active / table.numbers("params"), 0.0, 1 - 1e-9)}

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        return [
            *chinchilla_parameters(),
            amplitude("C"),
            signed_amplitude("lambda"),
            amplitude("F", "params", "gamma"),
            signed_amplitude("delta"),
            exponent("gamma"),
        ]

    def terms(self, at: Point, data: Data) -> list[Term]:
        active = np.log1p(-data.columns["sparsity"])
        return [
            *chinchilla_terms(at, data),
            at.linear({"C": 1.0, "lambda": -active}),
            at.linear({"F": 1.0, "delta": -active, "gamma": -data.u}),
        ]

    def extras(self, fit: Any) -> dict[str, Any]:
        from megamm_laws.law.forms.optimum import optima_by_sparsity

        return optima_by_sparsity(fit)

    def warnings(self, columns: dict[str, np.ndarray]) -> list[str]:
        number = len(np.unique(columns["sparsity"].round(3)))
        if number >= 3:
            return []
        return [f"exponents are not identified: {number} distinct sparsities, at least 3 are needed"]
