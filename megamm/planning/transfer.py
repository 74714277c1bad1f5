"""Native against LLM-initialised: a transfer law and the break-even.

Form: Hernandez et al. 2021, "Scaling Laws for Transfer" (arXiv 2102.01293, equation 1): starting from an LLM is worth
D_T = k D^a N^b further training tokens, so that L = L_native(N, D + D_T) with the native law of the fit. With a < 1 the
gain never vanishes but fades; two break-evens follow:

* counting the LLM's own pretraining (T_p tokens): native training is cheaper where D_T < T_p, which is below the
  break-even for a > 0 and above it for a < 0;
* with the LLM at hand for nothing: native has caught up where the gain in loss is below the noise between runs.
"""

from dataclasses import dataclass, field

import numpy as np
from megamm_laws.law.fitted import Law
from megamm_laws.runs.groups import NATIVE
from megamm_laws.runs.table import RunTable
from scipy.optimize import least_squares

from megamm.errors import InputError
from megamm.planning.inputs import BUILT

NOT_FITTED = "not fitted: no LLM-initialised runs"
FORM = "L = E + A/N^alpha + B/(D + k D^a N^b)^beta (Hernandez et al. 2021, arXiv 2102.01293)"
MIN_RUNS = 4
SPAN = (1e4, 1e15)
"""Tokens between which a break-even is looked for: from the smallest studies to more than there is text."""
LLM = ("llm", "true", "1", "yes")


@dataclass(kw_only=True)
class Transfer:
    """A transfer law: (log k', a, b) with k' the worth in tokens at the mean log N and D of its runs."""

    parameters: np.ndarray
    draws: np.ndarray
    """(R, 3), paired with ``native_draws``."""
    native_draws: np.ndarray
    """(R, 5)"""
    mean_log_n: float
    mean_log_d: float
    n_runs: int
    warnings: list[str] = field(default_factory=list)

    def worth(self, parameters: np.ndarray, params: float, tokens: np.ndarray) -> np.ndarray:
        """D_T in tokens: (..., 3) and (m,) tokens to (..., m)."""
        log_k, a, b = np.moveaxis(np.asarray(parameters, float)[..., None], -2, 0)
        return np.exp(log_k + a * (np.log(tokens) - self.mean_log_d) + b * (np.log(params) - self.mean_log_n))


def initialised_rows(table: RunTable, column: str) -> np.ndarray:
    """Which runs started from an LLM, (n,) bool.

    Raises:
        InputError: a value of ``column`` says neither.
    """
    found = []
    for row, place in zip(table.rows, table.places):
        value = str(row.get(column) or "").strip().lower()
        if value not in LLM + NATIVE:
            raise InputError(f"{table.path}: {place}: column {column}: {value!r} is neither llm nor native")
        found.append(value in LLM)
    return np.array(found, bool)


def runs_of_group(table: RunTable, group: str, loss_column: str) -> tuple[RunTable, list[str]]:
    """The LLM-initialised runs of ``table`` that the native law of ``group`` can be held against, and what is left out.

    A run that names no group is taken for one of it; a group named after an architecture is known to be in that column.
    """
    warnings = []
    for column in ("architecture", "mixture"):
        values = [str(row.get(column) or "") for row in table.rows]
        if group in values or (column == "architecture" and group in BUILT):
            others = sum(value not in ("", group) for value in values)
            if others:
                warnings.append(f"{others} LLM-initialised runs of another {column} than {group} were left out")
            table = table.select(value in ("", group) for value in values)
    measured = ~np.isnan(table.numbers(loss_column))
    if not measured.all():
        places = ", ".join(table.select(~measured).places)
        warnings.append(f"LLM-initialised runs without {loss_column} were left out: {places}")
    return table.select(measured), warnings


def fit_transfer(
    table: RunTable, native: Law, *, loss_column: str = "loss", resamples: int = 200, seed: int = 0
) -> Transfer:
    """Fit the transfer law to LLM-initialised runs, all with a loss, on top of the law of native ones.

    Least squares of log loss with a soft-L1 loss; each bootstrap draw takes one draw of the native law and a resample
    of the runs. With one size of model b cannot be told and is held at zero.

    Raises:
        InputError: fewer than 4 runs.
    """
    if len(table) < MIN_RUNS:
        raise InputError(f"{table.path}: {len(table)} LLM-initialised runs; the transfer law needs at least {MIN_RUNS}")
    n, d, y = (table.numbers(column) for column in ("params", "tokens", loss_column))
    log_n, log_d = np.log(n), np.log(d)
    result = Transfer(
        parameters=np.zeros(3),
        draws=np.zeros((0, 3)),
        native_draws=np.zeros((0, 5)),
        mean_log_n=float(log_n.mean()),
        mean_log_d=float(log_d.mean()),
        n_runs=len(table),
    )
    # Sizes within 1% of each other count as one.
    free = 3 if np.ptp(log_n) > 0.01 else 2
    if free == 2:
        result.warnings.append("one size of LLM-initialised model: b is held at 0")

    def solve(law: np.ndarray, rows: np.ndarray, start: np.ndarray) -> np.ndarray:
        def residuals(x: np.ndarray) -> np.ndarray:
            log_worth = x[0] + x[1] * (log_d - result.mean_log_d)
            log_worth = log_worth + (x[2] * (log_n - result.mean_log_n) if free == 3 else 0)
            E, A, alpha, B, beta = law
            return (np.log(E + A * n**-alpha + B * (d + np.exp(log_worth)) ** -beta) - np.log(y))[rows]

        bounds = [-30.0, -2.0, -2.0][:free], [60.0, 2.0, 2.0][:free]
        # Residuals count in squares up to the delta of the law's own fit (megamm_laws.law.solver.DELTA).
        found = least_squares(residuals, start[:free], bounds=bounds, loss="soft_l1", f_scale=1e-3)
        return np.append(found.x, np.zeros(3 - free))

    everyone = np.arange(len(table))
    # What pretraining is worth, in tokens, may be a seventh of the data or seven times as much.
    starts = [np.array([result.mean_log_d + shift, 0.2, 0.0]) for shift in (-2.0, 0.0, 2.0)]
    ends = [solve(native.parameters, everyone, start) for start in starts]
    errors = [np.abs(_misfit(native.parameters, result, end, n, d, y)).sum() for end in ends]
    result.parameters = ends[int(np.argmin(errors))]
    rng = np.random.default_rng(seed)
    # Each draw takes another native law: how well that is known is part of how well the gain is.
    picks = rng.integers(len(native.draws), size=resamples)
    result.native_draws = native.draws[picks]
    result.draws = np.array(
        [solve(law, rng.integers(len(table), size=len(table)), result.parameters) for law in result.native_draws]
    )
    return result


def _misfit(law: np.ndarray, transfer: Transfer, parameters: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray):
    E, A, alpha, B, beta = law
    worth = np.array([transfer.worth(parameters, *pair)[..., 0] for pair in zip(n, d[:, None])])
    return np.log(E + A * n**-alpha + B * (d + worth) ** -beta) - np.log(y)


def break_even(
    transfer: Transfer, native: Law, params: float, *, llm_tokens: float | None, negligible: float
) -> dict[str, dict]:
    """Training tokens at which a native model of ``params`` breaks even, under both conventions.

    Args:
        llm_tokens: tokens that the LLM was pretrained on; None leaves that convention out.
        negligible: share of the loss below which a gain counts as none.

    Returns:
        ``llm_for_nothing`` and ``pretraining_counted``: ``tokens`` with its 95% ``interval`` (None at an end outside
        1e4 to 1e15), where each of these lies (``tokens_range``, ``interval_range``: within, below or above that
        range), ``native_ahead`` above or below it, what follows for the whole range (``status``: native no worse
        from or up to a break-even, everywhere or nowhere), and the share of draws that agree on that side.
    """
    grid = np.geomspace(*SPAN, 2200)

    def gain(law: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        E, A, alpha, B, beta = (x[..., None] for x in np.moveaxis(np.asarray(law, float), -1, 0))
        alone = E + A * params**-alpha + B * grid**-beta
        helped = E + A * params**-alpha + B * (grid + transfer.worth(parameters, params, grid)) ** -beta
        return 1 - helped / alone

    fades = (
        _last_above(grid, gain(native.parameters, transfer.parameters) - negligible),
        [_last_above(grid, x - negligible) for x in gain(transfer.native_draws, transfer.draws)],
    )
    found = {"llm_for_nothing": _entry(*fades, "above") | {"draws_agree": 1.0}}
    if llm_tokens is not None:
        points = [_worth_reaches(transfer, x, params, llm_tokens) for x in (transfer.parameters, *transfer.draws)]
        side = transfer.parameters[1] > 0
        agree = float(((transfer.draws[:, 1] > 0) == side).mean())
        entry = _entry(points[0], points[1:], "below" if side else "above")
        found["pretraining_counted"] = entry | {"draws_agree": agree}
    return found


def _entry(value: float, draws: list[float], native_ahead: str) -> dict:
    # Draws may be infinite, which cannot be interpolated.
    low, high = np.percentile(draws, [2.5, 97.5], method="nearest")
    where = _range(value)
    return {
        "tokens": _within(value),
        "tokens_range": where,
        "interval": [_within(low), _within(high)],
        "interval_range": [_range(low), _range(high)],
        "native_ahead": native_ahead,
        # A break-even on the far side of the range leaves native behind in all of it.
        "status": "break-even" if where == "within" else "nowhere" if where == native_ahead else "everywhere",
    }


def _worth_reaches(transfer: Transfer, parameters: np.ndarray, params: float, tokens: float) -> float:
    """Training tokens D at which D_T equals ``tokens``."""
    log_k, a, b = parameters
    excess = np.log(tokens) - log_k - b * (np.log(params) - transfer.mean_log_n)
    with np.errstate(divide="ignore", over="ignore"):
        # With a = 0 the worth never changes. Beyond e^600 exp would overflow, and all of it lies outside of SPAN.
        return float(np.exp(np.clip(transfer.mean_log_d + excess / (a or 1e-12), -600, 600)))


def _last_above(grid: np.ndarray, values: np.ndarray) -> float:
    """The last point of the grid with a positive value; 0 if none has, infinite if the last has."""
    above = np.flatnonzero(values > 0)
    if not len(above):
        return 0.0
    return np.inf if above[-1] == len(grid) - 1 else float(grid[above[-1]])


def _within(value: float) -> float | None:
    return float(value) if _range(value) == "within" else None


def _range(value: float) -> str:
    """On which side of the tokens looked at a break-even lies."""
    if value <= SPAN[0]:
        return "below"
    return "above" if value >= SPAN[1] else "within"
