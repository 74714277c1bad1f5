"""A fitted law with the draws behind its intervals: what is compared, drawn and planned with."""

from dataclasses import dataclass, field

import numpy as np

from megamm_laws.law import power_law
from megamm_laws.law.percentiles import percentile_band

CHINCHILLA, SHARED = "chinchilla", "shared"


@dataclass(kw_only=True, eq=False)
class Pairing:
    """Draws of two fits that belong together, since runs of the two groups match and err together."""

    draws: dict[str, np.ndarray]
    """(R, 5) by the name of the group; row b of one belongs to row b of the other."""
    matched: int
    """Pairs of runs with the same size, length and further columns."""
    correlation: float
    """Of the errors of two matched runs, noise and error of the form together: posterior mean."""


@dataclass(kw_only=True)
class Law:
    """A fitted law and what its compute costs.

    Attributes:
        parameters: (5,) E, A, alpha, B, beta.
        draws: (R, 5), the same of each draw behind the intervals.
        kappa: FLOPs per 6ND of a model with ``reference`` parameters.
        flops_range: compute of the runs.
        growth: power of N with which FLOPs per 6ND change, 0 where they do not.
        reference: N0, parameters.
        form: as in fits.json; draws of two `shared` laws of one fit belong together row by row.
        warnings: what the fit itself is to be distrusted for.
        pairings: by the name of another group of the same fit, draws of both laws together.
    """

    name: str
    parameters: np.ndarray
    draws: np.ndarray
    kappa: float
    flops_range: tuple[float, float]
    growth: float = 0.0
    reference: float = 1.0
    form: str = CHINCHILLA
    warnings: list[str] = field(default_factory=list)
    pairings: dict[str, Pairing] = field(default_factory=dict)

    def frontier(self, flops: np.ndarray, parameters: np.ndarray | None = None) -> np.ndarray:
        """L*(C): (m,) FLOPs to nats, (m,) or (R, m) for ``parameters`` (R, 5) in place of the fitted ones."""
        return power_law.frontier_loss(self._effective(parameters), flops, self.kappa)

    def flops_for(self, loss: np.ndarray, parameters: np.ndarray | None = None) -> np.ndarray:
        """FLOPs at which the frontier reaches ``loss`` (..., m), infinite where it never does."""
        return power_law.frontier_flops(self._effective(parameters)[..., None, :], loss, self.kappa)

    def band(self, flops: np.ndarray) -> np.ndarray:
        """Pointwise 95% band of the frontier, (2, m)."""
        return percentile_band(self.frontier(flops, self.draws))

    def _effective(self, parameters: np.ndarray | None) -> np.ndarray:
        """The law in M = N (N/N0)^growth, of which C = 6 kappa M D: the plain closed form holds for M and D."""
        values = np.array(self.parameters if parameters is None else parameters, float)
        if self.growth:
            alpha = values[..., 2]
            values[..., 1] *= self.reference ** (-alpha * self.growth / (1 + self.growth))
            values[..., 2] = alpha / (1 + self.growth)
        return values
