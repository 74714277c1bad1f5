"""Rivals of E + A/N^alpha + B/D^beta in N and D alone: other laws that the same runs may follow.

What is decided (how large, how long) must not rest on one form where the runs cannot tell it from others. Each rival
departs in one way: exponents tied, terms that act together (Kaplan), a power law that breaks in N or in D, a beta that
depends on N. A break, or a beta, is told relative to a reference size and length, which a form of one table holds.
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

SMOOTH = 0.5
"""Width of a break in log N or log D: the slope changes mostly within a factor of 5 of it."""


class Tied(Form):
    """One exponent for both terms."""

    name = "tied"
    formula = "E + A/N^alpha + B/D^alpha"
    source = "equation 10 of arXiv 2203.15556 with alpha = beta"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        terms = [amplitude("A", "params", "alpha"), amplitude("B", "tokens", "alpha")]
        return [amplitude("E"), *terms, exponent("alpha")]

    def terms(self, at: Point, data: Data) -> list[Term]:
        return [
            at.linear({"E": 1.0}),
            at.linear({"A": 1.0, "alpha": -data.u}),
            at.linear({"B": 1.0, "alpha": -data.v}),
        ]


class Kaplan(Form):
    """The terms act together, without a floor: infinite N leaves B/D^beta, infinite D leaves A/N^alpha."""

    name = "kaplan"
    formula = "((A/N^alpha)^(1/beta) + (B/D^beta)^(1/beta))^beta"
    source = "equation 1.5 of arXiv 2001.08361"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        return chinchilla_parameters()[1:]

    def terms(self, at: Point, data: Data) -> list[Term]:
        def together(a: Any, alpha: Any, b: Any, beta: Any) -> Any:
            x, y = (a - alpha * data.u) / beta, (b - beta * data.v) / beta
            # The larger one taken off before exp, by its real part: derivatives come by a complex step.
            top = np.maximum(x.real, y.real)
            return beta * (top + np.log(np.exp(x - top) + np.exp(y - top)))

        return [at.general(["A", "alpha", "B", "beta"], together)]


class KaplanFloor(Kaplan):
    """The same above a floor."""

    name = "kaplan-floor"
    formula = "E + ((A/N^alpha)^(1/beta) + (B/D^beta)^(1/beta))^beta"
    source = "equation 1.5 of arXiv 2001.08361, and a floor"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        return chinchilla_parameters()

    def terms(self, at: Point, data: Data) -> list[Term]:
        return [at.linear({"E": 1.0}), *super().terms(at, data)]


class Broken(Form):
    """A term whose exponent changes by delta at a break; one break of arXiv 2210.14891, equation 1, width fixed."""

    source = "equation 1 of arXiv 2210.14891 with one break"

    def __init__(self, axis: str, reference: float, reach: tuple[float, float]) -> None:
        """``axis`` is "params" or "tokens", ``reference`` a size on it, ``reach`` log(break/reference) allowed."""
        self.axis, self.reference, self.reach = axis, reference, reach
        letter, power, other = ("N", "alpha", "B/D^beta") if axis == "params" else ("D", "beta", "A/N^alpha")
        constant = "A" if axis == "params" else "B"
        self.name = f"broken-{letter.lower()}"
        self.formula = (
            f"E + {other} + {constant}/{letter}^{power} (1 + ({letter}/{reference:.4g}/e^k)^{1 / SMOOTH:g})"
            f"^(-{SMOOTH:g} delta)"
        )

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        change = Parameter(name="delta", start=(-0.1, 0.1), bounds=(-0.5, 0.5))
        middle, half = sum(self.reach) / 2, (self.reach[1] - self.reach[0]) / 2
        place = Parameter(name="k", start=(middle - 0.5 * half, middle + 0.5 * half), bounds=self.reach)
        return [*chinchilla_parameters(), change, place]

    def terms(self, at: Point, data: Data) -> list[Term]:
        along_n = self.axis == "params"
        x, mean = (data.u, data.mean_log_n) if along_n else (data.v, data.mean_log_d)
        away = x + mean - np.log(self.reference)
        # z = log constant - power x - delta w log(1 + exp(s)) with s = (away - k)/w: by hand, as general() is slow.
        delta, s = at["delta"], (away - at["k"]) / SMOOTH
        beyond = np.logaddexp(0.0, s)
        share = np.exp(s - beyond)
        dz = np.stack([np.ones_like(s), np.broadcast_to(-x, s.shape), -SMOOTH * beyond, delta * share], axis=1)
        d2z = np.zeros((len(s), 4, 4, s.shape[1]))
        d2z[:, 2, 3] = d2z[:, 3, 2] = share
        d2z[:, 3, 3] = -delta * share * (1 - share) / SMOOTH
        names = ["A", "alpha"] if along_n else ["B", "beta"]
        z = at[names[0]] - at[names[1]] * x - delta * SMOOTH * beyond
        plain = chinchilla_terms(at, data)
        indices = [at.index[name] for name in (*names, "delta", "k")]
        plain[1 if along_n else 2] = Term(indices=indices, z=z, dz=dz, d2z=d2z)
        return plain


class BetaOfN(Form):
    """beta grows or falls with the size: at the reference length all sizes lack the same for want of data."""

    name = "beta-of-n"
    source = "equation 10 of arXiv 2203.15556 with an interaction of log N and log D"

    def __init__(self, params: float, tokens: float) -> None:
        """The reference size and length."""
        self.params, self.tokens = params, tokens
        self.formula = f"E + A/N^alpha + B (D/{tokens:.4g})^-(beta + eta log(N/{params:.4g}))"

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        *plain, _, beta = chinchilla_parameters()
        return [*plain, amplitude("B"), beta, Parameter(name="eta", start=(-0.03, 0.03), bounds=(-0.3, 0.3))]

    def terms(self, at: Point, data: Data) -> list[Term]:
        away_n = data.u + data.mean_log_n - np.log(self.params)
        away_d = data.v + data.mean_log_d - np.log(self.tokens)
        return [
            *chinchilla_terms(at, data)[:2],
            at.linear({"B": 1.0, "beta": -away_d, "eta": -away_n * away_d}),
        ]


def rival_forms(params: np.ndarray, tokens: np.ndarray) -> list[Form]:
    """The six rivals, with references and breaks for runs of ``params`` and ``tokens`` (n,).

    A break lies within the middle 80% of the logarithms of the runs: one at an end is none that the runs can show.
    """
    middles, reaches = [], []
    for values in (np.log(params), np.log(tokens)):
        middle = float(values.mean())
        low, high = np.quantile(values, [0.1, 0.9]) - middle
        # Runs of one size: a break somewhere, which nothing determines.
        reaches.append((float(min(low, -0.1)), float(max(high, 0.1))))
        middles.append(float(np.exp(middle)))
    return [
        Tied(),
        Kaplan(),
        KaplanFloor(),
        Broken("params", middles[0], reaches[0]),
        Broken("tokens", middles[1], reaches[1]),
        BetaOfN(middles[0], middles[1]),
    ]
