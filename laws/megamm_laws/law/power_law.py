"""The scaling law L(N, D) = E + A/N^alpha + B/D^beta and what follows from it.

N parameters, D tokens, C = 6*kappa*N*D FLOPs; kappa is 1 for a plain decoder and says, for a model with an
encoder, how its counted FLOPs compare with 6*N*D (see :func:`flops_factor`).

Parameters are arrays of float64 whose last axis is (E, A, alpha, B, beta); every function takes leading axes,
so that one call serves a fit and all its bootstrap draws. PlainForm: Hoffmann et al. 2022, equation 10; exponents
of the optimum: equation 4 there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PARAMETERS = ("E", "A", "alpha", "B", "beta")
EXPONENTS = ("a", "b", "c", "d")


def predict(parameters: np.ndarray, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Loss in nats at each run: (..., 5) parameters and (n,) params and tokens give (..., n)."""
    # The new last axis is that of the runs, so that the parameters' is the last but one.
    E, A, alpha, B, beta = np.moveaxis(np.asarray(parameters, float)[..., None], -2, 0)
    return E + A * np.asarray(params, float) ** -alpha + B * np.asarray(tokens, float) ** -beta


@dataclass(kw_only=True, frozen=True)
class PlainForm:
    """A law in N and D alone; laws with further variables are in megamm_laws.law.forms."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    predict: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


FORMS = {
    "chinchilla": PlainForm(
        name="chinchilla", formula="E + A/N^alpha + B/D^beta", parameters=PARAMETERS, predict=predict
    ),
    "shared": PlainForm(
        name="shared",
        formula="E + A/N^alpha + B/D^beta, alpha and beta shared by all groups",
        parameters=PARAMETERS,
        predict=predict,
    ),
}


def flops_factor(params: np.ndarray, tokens: np.ndarray, flops: np.ndarray) -> float:
    """kappa: the median of flops/(6*params*tokens) over runs.

    Late fusion counts 6*(N_v*D_v + N*D) and a mixture of experts 6*N_active*D, neither of them 6*N*D. In a
    ladder whose shape and mixture are fixed the ratio hardly changes with size, so that one factor carries
    the counted FLOPs into the closed form of the frontier.
    """
    return float(np.median(np.asarray(flops, float) / (6.0 * np.asarray(params, float) * tokens)))


def frontier_power_law(parameters: np.ndarray, kappa: float | np.ndarray = 1.0) -> tuple[np.ndarray, ...]:
    """E, K and g of the frontier L*(C) = E + K*C^-g, each of the leading shape of ``parameters``.

    At the optimum both terms fall with the same power g = alpha*beta/(alpha+beta) of C.
    """
    E, A, alpha, B, beta = np.moveaxis(np.asarray(parameters, float), -1, 0)
    log_g = log_size_factor(parameters)
    g = alpha * beta / (alpha + beta)
    # Each product as a logarithm: A, B and powers of G leave the range of floats one by one, their products do not.
    terms = np.exp(np.log(A) - alpha * log_g) + np.exp(np.log(B) + beta * log_g)
    return E, terms * (6.0 * np.asarray(kappa, float)) ** g, g


def log_size_factor(parameters: np.ndarray) -> np.ndarray:
    """log G, of the leading shape: N* = G*(C/6kappa)^a. Of the logarithm, as G overflows where exponents are tiny."""
    _, A, alpha, B, beta = np.moveaxis(np.asarray(parameters, float), -1, 0)
    return (np.log(alpha) + np.log(A) - np.log(beta) - np.log(B)) / (alpha + beta)


def frontier_loss(parameters: np.ndarray, flops: np.ndarray, kappa: float = 1.0) -> np.ndarray:
    """L*(C), the lowest loss that C FLOPs buy: (..., 5) and (m,) give (..., m)."""
    E, K, g = (x[..., None] for x in frontier_power_law(parameters, kappa))
    return E + K * np.asarray(flops, float) ** -g


def frontier_flops(parameters: np.ndarray, loss: np.ndarray, kappa: float = 1.0) -> np.ndarray:
    """FLOPs at which the frontier reaches ``loss``, infinite where ``loss`` <= E; leading axes broadcast."""
    E, K, g = frontier_power_law(parameters, kappa)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # np.where computes both branches, hence the 1.0 inside: a negative number has no such power. An overflow to
        # infinity is right: that loss is out of reach.
        excess = np.asarray(loss, float) - E
        return np.where(excess > 0, (K / np.where(excess > 0, excess, 1.0)) ** (1 / g), np.inf)


def optimum(parameters: np.ndarray, flops: np.ndarray, kappa: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Compute-optimal params and tokens, each (..., m): N* = G*(C/6kappa)^a, D* = (C/6kappa)^b / G.

    Kept within e^-690 and e^690, which only laws without any sense of size would leave.
    """
    _, _, alpha, _, beta = np.moveaxis(np.asarray(parameters, float)[..., None], -2, 0)
    log_g = log_size_factor(parameters)[..., None]
    log_product = np.log(np.asarray(flops, float) / (6.0 * kappa))
    logs = log_g + log_product * beta / (alpha + beta), log_product * alpha / (alpha + beta) - log_g
    # exp overflows at 709: this leaves room for the factors that callers put to N* and D*.
    params, tokens = (np.exp(np.clip(x, -690.0, 690.0)) for x in logs)
    return params, tokens


def exponents(parameters: np.ndarray, flops_range: tuple[float, float], kappa: float = 1.0) -> dict[str, np.ndarray]:
    """a, b, c, d, each of the leading shape of ``parameters``.

    N* ~ C^a with a = beta/(alpha+beta); D* ~ C^b with b = alpha/(alpha+beta); D* ~ N*^d with d = b/a; and
    L* ~ C^c, where c is the slope of the least-squares line of log L* on log C over ``flops_range`` (the
    range of the runs, 64 points evenly spaced in log C).
    """
    parameters = np.asarray(parameters, float)
    alpha, beta = parameters[..., 2], parameters[..., 4]
    low, high = flops_range
    if high < low * 1.01:  # one compute only: the local slope there
        low, high = low / 1.01, high * 1.01
    grid = np.geomspace(low, high, 64)
    x = np.log(grid) - np.log(grid).mean()
    # x has mean zero, so that log L* need not be centred.
    c = np.log(frontier_loss(parameters, grid, kappa)) @ x / (x @ x)
    return {"a": beta / (alpha + beta), "b": alpha / (alpha + beta), "c": c, "d": alpha / beta}
