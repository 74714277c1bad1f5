"""Repeated data: what D tokens are worth when only U of them are distinct, and N parameters for U tokens."""

import numpy as np

from megamm_laws.law.forms.base import (
    Data,
    Form,
    Parameter,
    Point,
    Term,
    chinchilla_parameters,
    column_numbers,
)
from megamm_laws.runs.table import RunTable


def half_life(name: str) -> Parameter:
    """Repetitions after which one more is worth 1/e of fresh data."""
    return Parameter(name=name, start=(1.0, 20.0), bounds=(0.05, 1000.0))


class RepeatedData(Form):
    """Muennighoff et al. 2023 (arXiv 2305.16264), as in the code they released (huggingface/datablations).

    With U' = min(U, D) distinct tokens seen, R_D = D/U' - 1 repetitions and G = (alpha A / (beta B))^(1/(alpha+beta)):
    D' = U' + U' R_D* (1 - exp(-R_D/R_D*)); likewise N' from U_N = min(N, (U' G)^(beta/alpha) G), the parameters that
    U' tokens are optimal for, R_N = N/U_N - 1 and R_N*.
    """

    name = "repeated"
    formula = "E + A/N'^alpha + B/D'^beta, N' and D' discounted for repetition (R_N*, R_D*)"
    source = "arXiv 2305.16264, and the authors' code"

    def read(self, table: RunTable) -> dict[str, np.ndarray]:
        unique = column_numbers(table, "unique_tokens", 1.0, np.inf, "the distinct tokens that a run could see")
        # In the units of the fit; Data.v is log D over its mean.
        return {"log_unique": np.log(np.minimum(unique, table.numbers("tokens"))) - np.log(table.numbers("tokens"))}

    def parameters(self, columns: dict[str, np.ndarray]) -> list[Parameter]:
        return [
            *chinchilla_parameters(),
            half_life("R_D"),
            half_life("R_N"),
        ]

    def terms(self, at: Point, data: Data) -> list[Term]:
        log_u = data.v + data.columns["log_unique"]
        # A ratio of tokens: the unit of the fit cancels.
        repeats_d = np.expm1(data.v - log_u)

        def log_data(B, beta, R_D):
            return B - beta * (log_u + np.log1p(R_D * (1 - np.exp(-repeats_d / R_D))))

        def log_size(A, alpha, B, beta, R_N):
            # A and B are logarithms in the units of the fit, and so is G: compared with data.u and log_u only.
            log_g = (np.log(alpha) + A - np.log(beta) - B) / (alpha + beta)
            fitting = (beta / alpha) * (log_u + log_g) + log_g
            # np.real: derivatives are taken by complex steps, and complex numbers have no order.
            log_un = np.where(np.real(fitting) < data.u, fitting, data.u + 0 * fitting)
            gap = data.u - log_un
            # exp overflows beyond; there the saturated exponential below is zero anyway.
            excess = np.exp(np.where(np.real(gap) < 500, gap, 500.0)) - 1
            return A - alpha * (log_un + np.log1p(R_N * (1 - np.exp(-excess / R_N))))

        return [
            at.linear({"E": 1.0}),
            at.general(["A", "alpha", "B", "beta", "R_N"], log_size),
            at.general(["B", "beta", "R_D"], log_data),
        ]

    def predict(self, values, params, tokens, **columns) -> np.ndarray:
        """As Form.predict, with ``unique_tokens`` (n,)."""
        unique = np.minimum(np.asarray(columns.pop("unique_tokens"), float), tokens)
        return super().predict(values, params, tokens, log_unique=np.log(unique) - np.log(tokens), **columns)

    def law(self, values, columns) -> tuple[np.ndarray, dict]:
        """The law of data that are not repeated, where no size exceeds what they are optimal for."""
        stacked = np.stack([values[name] for name in ("E", "A", "alpha", "B", "beta")], axis=-1)
        return stacked, {"repetition": "none"}

    def warnings(self, columns: dict[str, np.ndarray]) -> list[str]:
        repeats = np.expm1(-columns["log_unique"])
        if repeats.max() < 1:
            return [f"R_D is not identified: no run repeats its data more than {repeats.max():.2g} times"]
        return []
