"""What a form of law declares, and how any such form is evaluated with first and second derivatives.

A form is a sum of positive terms, L = sum_k exp(z_k(theta)). It names its parameters (with bounds and a start
range) and writes each z_k, mostly as a linear combination of parameters: log(A/N^alpha) = log A - alpha log N. From
that the log prediction, a log-sum-exp, gets its exact derivatives here, once for all forms:

    d log L = sum_k w_k dz_k            with w_k = exp(z_k) / L
    d2 log L = sum_k w_k (dz_k dz_k' + d2z_k) - (d log L) (d log L)'

Units: inside a fit N and D are divided by their geometric means, so that amplitudes and exponents are nearly
uncorrelated; the declared ``scale`` of an amplitude takes it back to params and tokens.

Shapes: n runs, b problems in a batch, p parameters of a term, P of the form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.law.constraints import Subspace
from megamm_laws.runs.table import RunTable

COMPLEX_STEP = 1e-30
"""The error goes with the square of the step, which is zero in float64."""
DIFFERENCE_STEP = 1e-6
"""Smaller, and rounding spoils the difference; larger, and curvature does."""


@dataclass(kw_only=True, frozen=True)
class Parameter:
    """One parameter of a form.

    An amplitude (positive, fitted as its logarithm) has bounds and start range as shares of the median loss; any
    other parameter has them as they are.
    """

    name: str
    start: tuple[float, float]
    bounds: tuple[float, float]
    amplitude: bool = False
    scale: tuple[str, ...] = ()
    """Of an amplitude: ("params" or "tokens", exponent[, divisor]); its unit is that quantity to exponent/divisor."""


def amplitude(name: str, *scale: str) -> Parameter:
    """A term that starts between 2% and 80% of the loss."""
    return Parameter(name=name, start=(0.02, 0.8), bounds=(1e-7, 20.0), amplitude=True, scale=scale)


def exponent(name: str) -> Parameter:
    """A power of N or D."""
    return Parameter(name=name, start=(0.15, 0.7), bounds=(0.01, 3.0))


@dataclass(kw_only=True)
class Term:
    """log of one term: ``z`` (b, n), its derivatives ``dz`` (b or 1, p, n) and ``d2z`` (b, p, p, n) or None."""

    indices: list[int]
    z: np.ndarray
    dz: np.ndarray
    d2z: np.ndarray | None = None


@dataclass(kw_only=True)
class Point:
    """theta (b, P) with names; makes terms."""

    theta: np.ndarray
    index: Mapping[str, int]

    def __getitem__(self, name: str) -> np.ndarray:
        """(b, 1)."""
        return self.theta[:, self.index[name], None]

    def linear(self, features: Mapping[str, Any], offset: Any = 0.0) -> Term:
        """z = offset + sum of parameter times feature; a feature is a number or (n,)."""
        names = list(features)
        columns = np.broadcast_arrays(*(np.asarray(features[name], float) for name in names), np.asarray(offset, float))
        stacked = np.stack(columns[:-1])
        # Where all features are plain numbers, n is 1 here: one column for all runs, which broadcasts.
        dz = stacked.reshape(1, len(names), -1)
        indices = [self.index[name] for name in names]
        return Term(indices=indices, z=columns[-1].reshape(1, -1) + self.theta[:, indices] @ dz[0], dz=dz)

    def power_of_sum(self, inner: list[Term], power: str | float, rest: Mapping[str, Any] | None = None) -> Term:
        """z = power * log(sum_i exp(inner_i)) + rest; ``power`` is a number or the name of a parameter.

        ``inner`` are linear terms; the parameters of inner terms, power and rest must be distinct.
        """
        n = max(term.z.shape[1] for term in inner)
        z = np.stack([np.broadcast_to(term.z, (len(self.theta), n)) for term in inner], axis=1)
        top = z.max(axis=1)
        parts = np.exp(z - top[:, None])
        total = parts.sum(axis=1)
        # The largest was taken off before exp, which overflows otherwise.
        log_sum, share = top + np.log(total), parts / total[:, None]
        indices = [i for term in inner for i in term.indices]
        blocks = [np.broadcast_to(t.dz, (len(self.theta), t.dz.shape[1], n)) for t in inner]
        m = np.concatenate([share[:, i, None] * block for i, block in enumerate(blocks)], axis=1)
        p = m.shape[1]
        # Second derivatives of a log-sum-exp. Inner terms are linear, so that they add none of their own.
        second = -m[:, :, None] * m[:, None]
        at = 0
        for i, block in enumerate(blocks):
            part = slice(at, at + block.shape[1])
            second[:, part, part] += share[:, i, None, None] * block[:, :, None] * block[:, None]
            at = part.stop
        if not isinstance(power, str):
            term = Term(indices=indices, z=power * log_sum, dz=power * m, d2z=power * second)
        else:
            s = self[power][:, :, None]
            grown = np.zeros((len(m), p + 1, p + 1, n))
            grown[:, :p, :p] = s[..., None] * second
            # z is linear in the power, so that the corner stays zero.
            grown[:, :p, p] = grown[:, p, :p] = m
            dz = np.concatenate([s * m, log_sum[:, None]], axis=1)
            term = Term(indices=[*indices, self.index[power]], z=s[:, 0] * log_sum, dz=dz, d2z=grown)
        return term if not rest else self._plus(term, self.linear(rest))

    def _plus(self, one: Term, other: Term) -> Term:
        """Sum of a term and a linear one on other parameters."""
        b, p, n = one.dz.shape
        q = other.dz.shape[1]
        d2z = np.zeros((b, p + q, p + q, n))
        # The other term is linear and shares no parameter: all further second derivatives are zero.
        d2z[:, :p, :p] = one.d2z
        dz = np.concatenate([one.dz, np.broadcast_to(other.dz, (b, q, n))], axis=1)
        return Term(indices=[*one.indices, *other.indices], z=one.z + other.z, dz=dz, d2z=d2z)

    def general(self, names: list[str], function: Callable[..., np.ndarray]) -> Term:
        """Any analytic z = function(*parameters), each (b, 1).

        First derivatives by complex step, which is exact; second ones by differences of these, good to six digits,
        which costs Newton's method nothing but its last digit of speed. For terms that are not linear; slower.
        """
        values = [self[name] for name in names]
        p = len(names)

        def slope(i: int, shifted: int | None = None) -> np.ndarray:
            point = [v + DIFFERENCE_STEP if j == shifted else v for j, v in enumerate(values)]
            point[i] = point[i] + 1j * COMPLEX_STEP
            return np.imag(function(*point)) / COMPLEX_STEP

        z = function(*values)
        dz = np.stack([slope(i) for i in range(p)], axis=1)
        d2z = np.empty((len(self.theta), p, p, z.shape[1]))
        for i in range(p):
            for j in range(i, p):
                d2z[:, i, j] = d2z[:, j, i] = (slope(i, j) - dz[:, i]) / DIFFERENCE_STEP
        return Term(indices=[self.index[name] for name in names], z=z, dz=dz, d2z=d2z)


@dataclass(kw_only=True)
class Data:
    """Runs as a form sees them: ``u`` and ``v`` (n,), logs of N and D in units of their means; further columns."""

    u: np.ndarray
    v: np.ndarray
    columns: dict[str, np.ndarray]
    mean_log_n: float = 0.0
    mean_log_d: float = 0.0


class Form:
    """Base of all forms; see the module docstring, and moe.py for the shortest example."""

    name: str
    formula: str
    source: str
    """Paper and equation."""

    def read(self, table: RunTable) -> dict[str, np.ndarray]:
        """Columns beyond params, tokens and loss, checked. Raises InputError naming the row and column."""
        return {}

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        """Declared parameters, in the order of theta; they may depend on the columns (domains, groups)."""
        raise NotImplementedError

    def terms(self, at: Point, data: Data) -> list[Term]:
        """The terms at theta."""
        raise NotImplementedError

    def law(self, values: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> tuple[np.ndarray, dict] | None:
        """(E, A, alpha, B, beta), (..., 5), that holds at typical ``columns``, and what these are; None if there is
        no such law."""
        return None

    def warnings(self, columns: dict[str, np.ndarray]) -> list[str]:
        """What in the columns leaves the form undetermined."""
        return []

    def extras(self, fit: Any) -> dict[str, Any]:
        """Further entries of `fits.json`."""
        return {}

    def predict(self, values: Mapping[str, Any], params: Any, tokens: Any, **columns: Any) -> np.ndarray:
        """Loss in nats: parameters by name, each a number or (b,), and runs (n,), give (n,) or (b, n)."""
        read = {name: np.asarray(column, float) for name, column in columns.items()}
        declared = self.parameters(read)
        arrays = np.broadcast_arrays(*(np.asarray(values[p.name], float) for p in declared))
        with np.errstate(divide="ignore"):
            # An amplitude of zero is a term that is not there: -inf now, and zero again after exp.
            theta = np.stack([np.log(a) if p.amplitude else a for a, p in zip(arrays, declared)], axis=-1)
        # Not centred, unlike in a fit: the parameters given are in units of params and tokens.
        data = Data(u=np.log(np.atleast_1d(params)), v=np.log(np.atleast_1d(tokens)), columns=read)
        point = Point(theta=np.atleast_2d(theta), index={p.name: i for i, p in enumerate(declared)})
        loss = sum(np.exp(term.z) for term in self.terms(point, data))
        return loss if theta.ndim > 1 else loss[0]


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


def column_numbers(table: RunTable, column: str, low: float, high: float, hint: str) -> np.ndarray:
    """A further column as numbers from ``low`` on and below ``high``, (n,).

    Raises:
        InputError: the column is missing, or a row is empty, no number or out of range.
    """
    if column not in table.columns:
        raise InputError(f"{table.path}: no column {column!r}: {hint}; has {', '.join(table.columns)}")
    values = []
    for row, place in zip(table.rows, table.places):
        try:
            value = float(row[column])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{table.path}: {place}: column {column}: {row.get(column)!r} is not a number") from error
        # Put this way round, NaN is turned away, too.
        if not low <= value < high:
            raise InputError(f"{table.path}: {place}: column {column}: {value:g} is not from {low:g} to {high:g}")
        values.append(value)
    return np.array(values)


@dataclass(kw_only=True)
class FormProblem:
    """A form and its runs as megamm_laws.law.solver needs them: bounds and derivatives in theta (b, P)."""

    form: Form
    data: Data
    y: np.ndarray
    declared: list[Parameter]
    held: tuple[int, ...] = ()
    subspace: Subspace | None = None
    continuation: tuple[float, ...] = (1.0, 0.1, 3e-2, 5e-3)
    """Begins wider than the plain law's, whose starts are nearer: least squares found their amplitudes."""
    index: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, form: Form, table: RunTable, loss_column: str = "loss", columns: dict | None = None) -> "FormProblem":
        log_n, log_d = np.log(table.numbers("params")), np.log(table.numbers("tokens"))
        mean_n, mean_d = float(log_n.mean()), float(log_d.mean())
        columns = form.read(table) if columns is None else columns
        declared = form.parameters(columns)
        data = Data(u=log_n - mean_n, v=log_d - mean_d, columns=columns, mean_log_n=mean_n, mean_log_d=mean_d)
        index = {p.name: i for i, p in enumerate(declared)}
        return cls(form=form, data=data, y=np.log(table.numbers(loss_column)), declared=declared, index=index)

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.declared]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        middle = float(np.median(self.y))
        ends = [np.log(p.bounds) + middle if p.amplitude else np.array(p.bounds) for p in self.declared]
        low, high = np.array(ends, float).T
        return low, high

    def starts(self, number: int = 48) -> np.ndarray:
        """theta (number, P): evenly filling points of the start ranges (an additive recurrence, no randomness)."""
        ratio = 2.0
        # By repeated insertion, which gains a digit or so each time.
        for _ in range(40):  # the root of x^(P+1) = x + 1 (Roberts 2018)
            ratio = (1 + ratio) ** (1 / (len(self.declared) + 1))
        steps = ratio ** -np.arange(1.0, len(self.declared) + 1)
        unit = (0.5 + np.arange(1, number + 1)[:, None] * steps) % 1.0
        middle = float(np.median(self.y))
        ends = [np.log(p.start) + middle if p.amplitude else np.array(p.start) for p in self.declared]
        low, high = np.array(ends, float).T
        return np.clip(low + unit * (high - low), *self.bounds)

    def to_parameters(self, theta: np.ndarray) -> np.ndarray:
        """(..., P) theta to (..., P) parameters in units of params and tokens."""
        theta = np.asarray(theta, float)
        values = theta.copy()
        for i, p in enumerate(self.declared):
            if p.amplitude:
                values[..., i] = np.exp(theta[..., i] + self._unit(p, theta))
        return values

    def to_theta(self, parameters: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_parameters`."""
        parameters = np.asarray(parameters, float)
        theta = parameters.copy()
        for i, p in enumerate(self.declared):
            if p.amplitude:
                theta[..., i] = np.log(parameters[..., i]) - self._unit(p, parameters)
        return theta

    def _unit(self, p: Parameter, values: np.ndarray) -> np.ndarray | float:
        """log of the unit of an amplitude; exponents are the same in theta and in parameters."""
        if not p.scale:
            return 0.0
        mean = self.data.mean_log_n if p.scale[0] == "params" else self.data.mean_log_d
        power = values[..., self.index[p.scale[1]]]
        if len(p.scale) > 2:
            power = power / values[..., self.index[p.scale[2]]]
        return power * mean

    def log_prediction(self, theta: np.ndarray) -> np.ndarray:
        """(b, P) to (b, n)."""
        z = self._stacked(self._terms(theta))
        top = z.max(axis=1)
        return top + np.log(np.exp(z - top[:, None]).sum(axis=1))

    def evaluate(self, theta: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
        """Objective, gradient, Hessian and reweighted least-squares matrix, as minimise.evaluate."""
        terms = self._terms(theta)
        z = self._stacked(terms)
        top = z.max(axis=1)
        parts = np.exp(z - top[:, None])
        total = parts.sum(axis=1)
        residual = top + np.log(total) - self.y
        share = parts / total[:, None]
        size = np.abs(residual)
        psi = np.clip(residual, -delta, delta)
        pull = weights * psi
        J = np.zeros((len(theta), theta.shape[1], len(self.y)))
        hessian = np.zeros((len(theta), theta.shape[1], theta.shape[1]))
        for k, term in enumerate(terms):
            rows = np.array(term.indices)
            J[:, rows] += share[:, k, None] * term.dz
            # The part of d2 log L that is a sum over terms, see above; the rest follows after the loop.
            force = pull * share[:, k]
            # A term of plain numbers has one column for all runs: arithmetic broadcasts it, a matrix product would not.
            block = (force[:, None] * term.dz) @ np.broadcast_to(term.dz, J[:, rows].shape).transpose(0, 2, 1)
            if term.d2z is not None:
                block += np.einsum("bijn,bn->bij", term.d2z, force)
            # numpy adds once to an index that comes twice: the reason that a term's parameters must be distinct.
            hessian[:, rows[:, None], rows] += block
        gradient = (J @ pull[:, :, None])[:, :, 0]
        transposed = J.transpose(0, 2, 1)
        hessian += (J * (weights * (size <= delta) - pull)[:, None]) @ transposed
        reweighted = (J * (weights * (delta / np.maximum(size, delta)))[:, None]) @ transposed
        return (pull * (residual - 0.5 * psi)).sum(-1), gradient, hessian, reweighted

    def _stacked(self, terms: list[Term]) -> np.ndarray:
        """(b, terms, n)."""
        return np.stack([np.broadcast_to(term.z, (len(term.z), len(self.y))) for term in terms], axis=1)

    def _terms(self, theta: np.ndarray) -> list[Term]:
        return self.form.terms(Point(theta=theta, index=self.index), self.data)
