"""Constants of the law that are given, and exponents that are one: what a fit is told beside its runs.

In theta of megamm_laws.law.solver these are linear: log A' = log A - alpha mean(log N), so that a given A binds A' to
alpha, and alpha = beta binds one exponent to the other. theta is thus ``offset + directions @ theta[free]``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.law.power_law import PARAMETERS

EXPONENT_BOUNDS = (0.01, 3.0)
"""Of alpha and beta, in every fit."""


@dataclass(kw_only=True)
class Subspace:
    """The theta (5,) that constraints leave, for runs of one mean size and length."""

    offset: np.ndarray
    """(5,)"""
    directions: np.ndarray
    """(5, k)"""
    free: list[int]
    """k components that decide the others."""

    def project(self, theta: np.ndarray) -> np.ndarray:
        """``theta`` (..., 5) with its bound components set from the free ones."""
        return self.offset + theta[..., self.free] @ self.directions.T


@dataclass(kw_only=True, frozen=True)
class Constraints:
    """Values by name, and whether alpha and beta are one."""

    fixed: dict[str, float] = field(default_factory=dict)
    tied: bool = False

    @classmethod
    def of(cls, fix: Sequence[str] = (), tie: Sequence[str] = ()) -> "Constraints | None":
        """From texts such as `E=1.7` and `alpha=beta`; None where there are none.

        Raises:
            InputError: an unknown name, a value out of range, another tie, or nothing left to fit.
        """
        fixed: dict[str, float] = {}
        for text in fix:
            name, _, number = text.partition("=")
            if name not in PARAMETERS:
                raise InputError(f"--fix: {text!r}: {name!r} is unknown; known: {', '.join(PARAMETERS)}, as in E=1.7")
            if name in fixed:
                raise InputError(f"--fix: {name} is given twice; remove one")
            fixed[name] = _value(text, name, number)
        for text in tie:
            if sorted(text.split("=")) != ["alpha", "beta"]:
                raise InputError(f"--tie: {text!r}: only alpha=beta can be tied")
        if tie and {"alpha", "beta"} & set(fixed):
            raise InputError("--tie alpha=beta: --fix gives one of the two; fix both in place of a tie")
        if len(fixed) + bool(tie) >= len(PARAMETERS):
            raise InputError("--fix: nothing is left to fit; leave at least one constant out")
        return cls(fixed=fixed, tied=bool(tie)) if fixed or tie else None

    @property
    def number(self) -> int:
        """Constants that are left to fit."""
        return len(PARAMETERS) - len(self.fixed) - self.tied

    def within(self, mean_log_n: float, mean_log_d: float) -> Subspace:
        """The theta that is left."""
        free = [i for i, name in enumerate(PARAMETERS) if name not in self.fixed and not (self.tied and name == "beta")]
        offset, directions = np.zeros(len(PARAMETERS)), np.zeros((len(PARAMETERS), len(free)))
        directions[free, range(len(free))] = 1.0
        if self.tied:
            directions[4, free.index(2)] = 1.0
        for name, value in self.fixed.items():
            if name not in ("A", "B"):
                offset[PARAMETERS.index(name)] = value
        for name, row, power, mean in (("A", 1, 2, mean_log_n), ("B", 3, 4, mean_log_d)):
            if name in self.fixed:  # after the exponents, whose rows it takes
                offset[row] = math.log(self.fixed[name]) - mean * offset[power]
                directions[row] = -mean * directions[power]
        return Subspace(offset=offset, directions=directions, free=free)


def _value(text: str, name: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError as error:
        raise InputError(f"--fix: {text!r}: expected {name}=NUMBER") from error
    low, high = {"E": (0.0, math.inf), "A": (1e-300, math.inf), "B": (1e-300, math.inf)}.get(name, EXPONENT_BOUNDS)
    if not low <= value <= high or math.isinf(value):
        raise InputError(f"--fix: {text!r}: expected a finite number from {low:g} to {high:g}")
    return value
