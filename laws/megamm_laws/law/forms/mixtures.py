"""Data mixtures: the loss over parameters, tokens and the share of each domain.

The shares are columns ``share_<domain>``, or the ``mixture`` column as `45-45-10` (caption, interleaved, text). The
loss fitted is the one whose best mixture is sought: an average, or that of one target domain.

A share of zero is taken as e^-1000: its term vanishes, whatever the exponent.
"""

from typing import Any

import numpy as np

from megamm.errors import InputError
from megamm.scaling.forms.base import Data, Form, Parameter, Point, Term, amplitude, column_numbers, exponent
from megamm.scaling.runs import RunTable

PREFIX = "share_"
DOMAINS = ("caption", "interleaved", "text")
"""Domains of a ``mixture`` column of three numbers."""
ABSENT = -1000.0


def read_shares(table: RunTable) -> dict[str, np.ndarray]:
    """``share_<domain>`` (n,) of every domain, checked to sum to one.

    Raises:
        InputError: no shares can be read, or those of a row do not sum to 1.
    """
    names = [c for c in table.columns if c.startswith(PREFIX)]
    if names:
        shares = {name: column_numbers(table, name, 0.0, 1.0 + 1e-9, "a share") for name in names}
    else:
        parsed = [_parse(table.path, place, row.get("mixture")) for row, place in zip(table.rows, table.places)]
        shares = {PREFIX + name: column for name, column in zip(DOMAINS, np.array(parsed).T)}
    total = sum(shares.values())
    for place, value in zip(table.places, total):
        if abs(value - 1) > 0.01:
            raise InputError(f"{table.path}: {place}: shares {', '.join(shares)} sum to {value:.3g}, not 1")
    if len(shares) < 2:
        raise InputError(f"{table.path}: one domain only ({', '.join(shares)}): there is no mixture to fit")
    return {name: column / total for name, column in shares.items()}


def _parse(path: str, place: str, text: Any) -> list[float]:
    try:
        values = [float(part) for part in str(text).split("-")]
        total = sum(values)
        if len(values) != len(DOMAINS) or min(values) < 0 or not (abs(total - 1) <= 0.01 or abs(total - 100) <= 1):
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"{path}: {place}: column mixture: {text!r} is not three shares that sum to 100 (or 1), such as 45-45-10; "
            f"or give columns {PREFIX}<domain>"
        ) from error
    return [value / total for value in values]


def domains(columns: dict[str, np.ndarray]) -> list[str]:
    """Names of the domains, in the order of the columns."""
    return [name.removeprefix(PREFIX) for name in columns if name.startswith(PREFIX)]


def log_share(columns: dict[str, np.ndarray], domain: str) -> np.ndarray:
    """log of a share (n,), with ABSENT for zero."""
    share = columns[PREFIX + domain]
    return np.where(share > 0, np.log(np.maximum(share, 1e-300)), ABSENT)


def mean_shares(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean share of each domain over the runs: where a mixture law is given as a law of N and D."""
    return {PREFIX + name: float(np.mean(columns[PREFIX + name])) for name in domains(columns)}


def chinchilla_parameters() -> list[Parameter]:
    """E, A, alpha, B, beta."""
    return [
        amplitude("E"),
        amplitude("A", "params", "alpha"),
        exponent("alpha"),
        amplitude("B", "tokens", "beta"),
        exponent("beta"),
    ]


def chinchilla_terms(at: Point, data: Data) -> list[Term]:
    """E, A/N^alpha and B/D^beta."""
    return [at.linear({"E": 1.0}), at.linear({"A": 1.0, "alpha": -data.u}), at.linear({"B": 1.0, "beta": -data.v})]


class MixtureForm(Form):
    """Base of the forms below: reads shares, warns of too few mixtures, adds the optimal mixture."""

    def read(self, table: RunTable) -> dict[str, np.ndarray]:
        return read_shares(table)

    def law(self, values, columns) -> tuple[np.ndarray, dict]:
        """The law at the runs' mean mixture: all its terms that do not depend on N or D are one constant."""
        at = mean_shares(columns)
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
        table = np.stack([columns[PREFIX + name] for name in domains(columns)], axis=1).round(4)
        number, needed = len(np.unique(table, axis=0)), 2 * table.shape[1]
        if number >= needed:
            return []
        return [f"{number} distinct mixtures for {table.shape[1]} domains; at least {needed} are needed to tell"]

    def extras(self, fit) -> dict[str, Any]:
        from megamm.scaling.forms.simplex import mixture_entry

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
