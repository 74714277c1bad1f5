"""Where a plan leaves the compute-optimal point: models to be served, data too short, data to be prepared.

Every function takes laws (..., 5) as megamm_laws.law.power_law does, so that bootstrap draws give the intervals.
"""

import numpy as np
from megamm_laws.law import power_law

REPEAT_DATA = 15.387756
"""R_D*: epochs beyond the first after which one more is worth 1/e of fresh data (Muennighoff et al. 2023, arXiv
2305.16264)."""
REPEAT_PARAMS = 5.309743
"""R_N*: the same for parameters beyond those that the unique tokens warrant."""
GRID = 400


def tokens_for_loss(parameters: np.ndarray, params: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Tokens at which a model of ``params`` reaches ``loss``; infinite where it never does. Axes broadcast."""
    E, A, alpha, B, beta = np.moveaxis(np.asarray(parameters, float), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        excess = loss - E - A * np.asarray(params, float) ** -alpha
        # Both sides are computed everywhere, so the power must not meet a number below zero.
        return np.where(excess > 0, (B / np.where(excess > 0, excess, 1.0)) ** (1 / beta), np.inf)


def serving_optimum(
    parameters: np.ndarray, flops: float, served_tokens: float, kappa: float = 1.0
) -> dict[str, np.ndarray]:
    """The cheapest model, training and serving together, with the loss L*(``flops``): arrays (...,).

    Minimises 6 kappa N D + 2 kappa N T subject to L(N, D) = L* for T tokens served (Sardana et al. 2024, "Beyond
    Chinchilla-Optimal", arXiv 2401.00448), over a grid of N from a hundredth of N* to N*.
    """
    parameters = np.asarray(parameters, float)
    best = power_law.optimum(parameters, np.array([flops]), kappa)[0]
    loss = power_law.frontier_loss(parameters, np.array([flops]), kappa)
    # Never above N*: serving only ever speaks for a smaller model.
    params = best * np.geomspace(0.01, 1.0, GRID)
    tokens = tokens_for_loss(parameters[..., None, :], params, loss)
    total = 6 * kappa * params * tokens + 2 * kappa * params * served_tokens
    index = total.argmin(-1)[..., None]
    picked = {"params": params, "tokens": tokens, "total": total}
    picked = {name: np.take_along_axis(x, index, -1)[..., 0] for name, x in picked.items()}
    picked["training"] = 6 * kappa * picked["params"] * picked["tokens"]
    picked["saved"] = 1 - picked["total"] / (flops + 2 * kappa * best[..., 0] * served_tokens)
    return picked


def serving_table(
    parameters: np.ndarray, flops: float, served_tokens: float, kappa: float, shares: tuple[float, ...]
) -> list[dict[str, np.ndarray]]:
    """For models of ``shares`` of N*: tokens, training, serving and total FLOPs for the loss L*(``flops``)."""
    parameters = np.asarray(parameters, float)
    best = power_law.optimum(parameters, np.array([flops]), kappa)[0][..., 0]
    loss = power_law.frontier_loss(parameters, np.array([flops]), kappa)[..., 0]
    rows = []
    for share in shares:
        params = share * best
        tokens = tokens_for_loss(parameters, params, loss)
        training, serving = 6 * kappa * params * tokens, 2 * kappa * params * served_tokens
        rows.append(
            {
                "share": np.asarray(share),
                "params": params,
                "tokens": tokens,
                "training": training,
                "serving": serving,
                "total": training + serving,
            }
        )
    return rows


def repeated_loss(
    parameters: np.ndarray, params: np.ndarray | float, tokens: np.ndarray | float, unique: float
) -> np.ndarray:
    """Loss when ``tokens`` are epochs over ``unique`` ones; axes broadcast.

    L = E + A/N'^alpha + B/D'^beta with D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), and N' likewise from
    U_N = min(N, G (U G)^(beta/alpha)), the parameters for which U tokens are compute-optimal (Muennighoff et al.
    2023, arXiv 2305.16264). U is what is at hand, also where D is less: the paper takes the tokens
    used, by which models larger than optimal would lose worth even on data that are not repeated.
    """
    E, A, alpha, B, beta = np.moveaxis(np.asarray(parameters, float), -1, 0)
    params, tokens = np.asarray(params, float), np.asarray(tokens, float)
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    # At least one parameter: with a degenerate law the power may come out as zero or infinity.
    warranted = np.clip(G * (unique * G) ** (beta / alpha), 1.0, params)
    distinct = np.minimum(tokens, unique)
    # expm1, since few repetitions make the exponent tiny.
    worth_n = warranted * (1 + REPEAT_PARAMS * -np.expm1(-(params / warranted - 1) / REPEAT_PARAMS))
    worth_d = distinct * (1 + REPEAT_DATA * -np.expm1(-(tokens / distinct - 1) / REPEAT_DATA))
    return E + A * worth_n**-alpha + B * worth_d**-beta


def repeated_optimum(parameters: np.ndarray, flops: float, unique: float, kappa: float = 1.0) -> dict[str, np.ndarray]:
    """The best split of ``flops`` over ``unique`` tokens: params, tokens, epochs, loss, each (...,)."""
    parameters = np.asarray(parameters, float)
    best = power_law.optimum(parameters, np.array([flops]), kappa)[0]
    # To both sides of N*: what short data want depends on how worth fades in either.
    params = best * np.geomspace(0.03, 30, GRID)
    tokens = flops / (6 * kappa * params)
    losses = repeated_loss(parameters[..., None, :], params, tokens, unique)
    index = losses.argmin(-1)[..., None]
    picked = {"params": params, "tokens": tokens, "loss": losses}
    picked = {name: np.take_along_axis(x, index, -1)[..., 0] for name, x in picked.items()}
    picked["epochs"] = picked["tokens"] / unique
    return picked
