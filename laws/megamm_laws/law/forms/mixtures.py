"""Data mixtures: the loss over parameters, tokens and the share of each domain.

The shares are columns ``share_<domain>``, or the ``mixture`` column as `45-45-10` (caption, interleaved, text). The
loss fitted is the one whose best mixture is sought: an average, or that of one target domain.

A share of zero is taken as e^-1000: its term vanishes, whatever the exponent.
"""

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
    exponent,
)
from megamm_laws.law.forms.shares import PREFIX, domains, log_share, mean_shares, read_shares
from megamm_laws.law.forms.simplex import mixture_entry
from megamm_laws.runs.table import RunTable


class MixtureForm(Form):
    """Base of the forms below: reads shares, warns of too few mixtures, adds the optimal mixture."""

    def read(self, table: RunTable) -> dict[str, np.ndarray]:
        return read_shares(table)

    def law(self, values, columns) -> tuple[np.ndarray, dict]:
        """The law at the runs' mean mixture: all its terms that do not depend on N or D are one constant."""
        at = mean_shares(columns)
        # So large that A/N^alpha and B/D^beta are as good as gone, and the rest is left.
        far = {"params": np.array([1e300]), "tokens": np.array([1e300])}
        one = {name: np.array([share]) for name, share in at.items()}
        E = self.predict(values, **far, **one)[..., 0]
        A, B = self.scales(values, one)
        shape = np.broadcast_shapes(np.shape(E), np.shape(A))
        parts = (E, A, values["alpha"], B, values["beta"])
        return np.stack([np.broadcast_to(part, shape) for part in parts], axis=-1), at

    def scales(self, values, shares) -> tuple[Any, Any]:
        """A and B at one mixture."""
        return values["A"], values["B"]

    def warnings(self, columns: dict[str, np.ndarray]) -> list[str]:
        # Rounded, as shares divided by their sum differ in the last digits.
        table = np.stack([columns[PREFIX + name] for name in domains(columns)], axis=1).round(4)
        number, needed = len(np.unique(table, axis=0)), 2 * table.shape[1]
        if number >= needed:
            return []
        return [f"{number} distinct mixtures for {table.shape[1]} domains; at least {needed} are needed to tell"]

    def extras(self, fit) -> dict[str, Any]:
        return {"optimal_mixture": mixture_entry([fit])}


class AdditiveMixture(MixtureForm):
    """The mixture moves the floor only, so the best one does not depend on N and D."""

    name = "mixture-additive"
    formula = "E + 1/(sum_i C_i h_i^gamma_i) + A/N^alpha + B/D^beta"
    source = "arXiv 2507.09404, additive law"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        found = chinchilla_parameters()
        for name in domains(columns):
            found.append(_inverse(f"C_{name}"))
            found.append(_share_power(f"gamma_{name}"))
        return found

    def terms(self, at: Point, data: Data) -> list[Term]:
        inner = [
            at.linear({f"C_{name}": 1.0, f"gamma_{name}": log_share(data.columns, name)})
            for name in domains(data.columns)
        ]
        return [*chinchilla_terms(at, data), at.power_of_sum(inner, -1.0)]


class JointMixture(MixtureForm):
    """The mixture moves the floor and both scales, so the best one depends on N and D; 5 + 4k constants."""

    name = "mixture-joint"
    formula = "E + 1/(sum_i C_i h_i^gamma_i) + (sum_i F_i h_i)^phi/N^alpha + (sum_i G_i h_i)^psi/D^beta"
    source = "arXiv 2507.09404, joint law"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        found = [amplitude("E"), exponent("alpha"), exponent("beta"), _outer("phi"), _outer("psi")]
        for name in domains(columns):
            found.append(_inverse(f"C_{name}"))
            found.append(_share_power(f"gamma_{name}"))
            found.append(amplitude(f"F_{name}", "params", "alpha", "phi"))
            found.append(amplitude(f"G_{name}", "tokens", "beta", "psi"))
        return found

    def terms(self, at: Point, data: Data) -> list[Term]:
        names = domains(data.columns)
        logs = {name: log_share(data.columns, name) for name in names}
        floor = [at.linear({f"C_{name}": 1.0, f"gamma_{name}": logs[name]}) for name in names]
        size = [at.linear({f"F_{name}": 1.0}, offset=logs[name]) for name in names]
        length = [at.linear({f"G_{name}": 1.0}, offset=logs[name]) for name in names]
        return [
            at.linear({"E": 1.0}),
            at.power_of_sum(floor, -1.0),
            at.power_of_sum(size, "phi", rest={"alpha": -data.u}),
            at.power_of_sum(length, "psi", rest={"beta": -data.v}),
        ]

    def scales(self, values, shares) -> tuple[Any, Any]:
        names = domains(shares)
        A = sum(values[f"F_{name}"] * shares[PREFIX + name][0] for name in names) ** values["phi"]
        B = sum(values[f"G_{name}"] * shares[PREFIX + name][0] for name in names) ** values["psi"]
        return A, B


class ExponentialMixture(MixtureForm):
    """Ye et al. 2024 (arXiv 2403.16952): exponential in the shares; their k is absorbed, as shares sum to one."""

    name = "mixture-exponential"
    formula = "E + A/N^alpha + B/D^beta + exp(sum_i t_i h_i)"
    source = "arXiv 2403.16952, with the terms in N and D beside it"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        slopes = [Parameter(name=f"t_{n}", start=(-4.0, 0.5), bounds=(-30.0, 5.0)) for n in domains(columns)]
        return [*chinchilla_parameters(), *slopes]

    def terms(self, at: Point, data: Data) -> list[Term]:
        shares = {f"t_{name}": data.columns[PREFIX + name] for name in domains(data.columns)}
        return [*chinchilla_terms(at, data), at.linear(shares)]


def _inverse(name: str) -> Parameter:
    """C_i: the floor it gives alone is 1/C_i."""
    return Parameter(name=name, start=(0.1, 3.0), bounds=(1e-6, 1e4), amplitude=True)


def _share_power(name: str) -> Parameter:
    return Parameter(name=name, start=(0.1, 1.0), bounds=(0.03, 3.0))


def _outer(name: str) -> Parameter:
    return Parameter(name=name, start=(0.3, 1.5), bounds=(0.05, 5.0))
