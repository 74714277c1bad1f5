"""What a plan is made from: the request, the fitted laws, and numbers with their intervals."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megamm_laws.fitting.fit import OBJECTIVE
from megamm_laws.fitting.fits_file import read_fits_file
from megamm_laws.forecasts.one_run import noise_between_runs, with_noise
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law
from megamm_laws.runs.table import RunTable

from megamm.config import ModelConfig
from megamm.errors import InputError
from megamm.estimate.hardware import Efficiency, Gpu
from megamm.planning.tradeoffs import repeated_loss

BUDGETS = {"flops": "--flops", "gpu_hours": "--gpu-hours", "money": "--money"}
"""Fields of a request of which one is given, the budget, and their options."""
POSITIVE = {
    **BUDGETS,
    "served_tokens": "--inference-tokens",
    "unique_tokens": "--unique-tokens",
    "prep_rate": "--prep-rate",
    "cpu_price": "--cpu-price",
    "llm_tokens": "--llm-tokens",
}
"""Fields of a request that are finite and above zero where they are given, and their options."""


@dataclass(kw_only=True)
class PlanRequest:
    """What is asked for; exactly one of ``flops``, ``gpu_hours`` and ``money``."""

    flops: float | None = None
    """Training FLOPs as the fit counted them (6ND forms)."""
    gpu_hours: float | None = None
    money: float | None = None
    gpus: list[Gpu] = field(default_factory=list)
    """The first one is bought from the budget; the others are compared."""
    prices: list[float] = field(default_factory=list)
    """Money per GPU-hour, one per GPU, or none."""
    efficiency: Efficiency | None = None
    num_gpus: int = 64
    pue: float = 1.2
    """Power usage effectiveness of the data centre."""
    group: str | None = None
    """By default the group of lowest predicted loss."""
    loss_column: str = "loss"
    model: ModelConfig | None = None
    """Shape to be scaled in width; by default the paper's (depth 24, vocabulary 50432, patch 14 of 224)."""
    tensor_parallel: int = 1
    served_tokens: float | None = None
    unique_tokens: float | None = None
    prep_rate: float | None = None
    """Tokens that one CPU-hour prepares."""
    cpu_price: float | None = None
    """Money per CPU-hour."""
    runs: RunTable | None = None
    init_column: str = "init"
    llm_tokens: float | None = None
    pilot_share: float = 0.03
    """FLOPs of the pilot ladder over those of the full run."""

    def check(self) -> None:
        """Raises InputError where the request contradicts itself."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError("give exactly one budget: --flops, --gpu-hours or --money")
        for name, option in POSITIVE.items():
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"{option}: {value:g} is not a finite number above zero")
        if not 1 <= self.pue < np.inf:
            raise InputError(f"--pue: {self.pue:g} is below 1, which is a data centre without any loss of power")
        if self.cpu_price is not None and self.prep_rate is None:
            raise InputError("--cpu-price: needs --prep-rate, the tokens that one CPU-hour prepares")
        if given[0] != "flops" and not (self.gpus and self.efficiency):
            raise InputError(f"{BUDGETS[given[0]]}: needs --gpu, and --mfu, --run-logs or --mfu-from-estimate")
        if given[0] == "money" and not self.prices:
            raise InputError("--money: needs --price, the money per GPU-hour")
        if self.prices and len(self.prices) != len(self.gpus):
            raise InputError(f"--price: {len(self.prices)} prices for {len(self.gpus)} GPUs; give one for each")
        if any(not (np.isfinite(price) and price > 0) for price in self.prices):
            raise InputError("--price: a price is not a finite number above zero")
        if self.gpus and not self.efficiency:
            raise InputError("--gpu: needs --mfu, --run-logs or --mfu-from-estimate for the time")
        if self.tensor_parallel < 1 or self.num_gpus < 1 or self.num_gpus % self.tensor_parallel:
            raise InputError(
                f"--num-gpus: {self.num_gpus} is not a multiple of --tensor-parallel {self.tensor_parallel}"
            )
        if not 0 <= self.pilot_share <= 1:
            raise InputError(f"--pilot-share: {self.pilot_share:g} is not between 0 and 1")


@dataclass(kw_only=True)
class Fitted:
    """A law from fits.json with what a plan needs beside it."""

    law: Law
    entry: dict[str, Any]

    @property
    def noise(self) -> float:
        """Standard deviation of log loss between runs."""
        return noise_between_runs(self.entry)


def read_fits(path: Path | str, loss_column: str = "loss") -> tuple[list[Fitted], list[str]]:
    """The laws of one loss column in fits.json with their draws in bootstrap.npz beside it, and what was left out.

    A fit of another form is taken by the plain law that it comes down to, where it states one.

    Raises:
        InputError: no fit can be planned with; see also fits_file.read_fits_file.
    """
    fits, found, left_out = read_fits_file(path), [], []
    for fit in fits:
        if fit.loss_column != loss_column:
            continue
        if fit.entry["objective_name"] != OBJECTIVE:
            left_out.append(
                f"group {fit.group}: objective_name is {fit.entry['objective_name']}; the noise between runs can be "
                f"told from {OBJECTIVE} only"
            )
        elif fit.law is None:
            left_out.append(f"group {fit.group}: form {fit.entry['form']} comes down to no law in N and D alone")
        else:
            found.append(Fitted(law=fit.law, entry=fit.entry))
    if not found:
        columns = sorted({fit.loss_column for fit in fits})
        reason = "; ".join(left_out) or f"it has {', '.join(columns) or 'no fits'}"
        raise InputError(f"{path}: no usable fit of column {loss_column!r}: {reason}")
    return found, left_out


def measured(value: float, draws: np.ndarray) -> dict[str, Any]:
    """A number with its 95% percentile interval over draws; an infinite end is None."""
    # Between a number and infinity there is nothing to interpolate: it would give NaN.
    low, high = np.percentile(draws, [2.5, 97.5], method="linear" if np.isfinite(draws).all() else "nearest")
    return {"value": _finite(value), "interval": [_finite(low), _finite(high)]}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


BUILT: tuple[Literal["early", "late", "text"], ...] = ("early", "late", "text")
"""Architectures of megamm.config.ModelConfig; a group of another name has no model of its own."""


def default_model(group: str) -> ModelConfig:
    """The paper's shape, in the architecture that the group is named after, else early fusion."""
    architecture = next((built for built in BUILT if built == group), BUILT[0])
    return ModelConfig(architecture=architecture, depth=24, vocab_size=50432, image_size=224, patch_size=14)


def template_of(request: PlanRequest, group: str) -> tuple[ModelConfig, bool]:
    """What a model of the plan has besides its width, and whether its depth may grow with it."""
    return (default_model(group), True) if request.model is None else (request.model, False)


def losses_at(fitted: Fitted, params: float, tokens: float, unique: float | None = None) -> dict[str, Any]:
    """Loss of the law and of one run at (N, D), with intervals; tokens beyond ``unique`` are repeated ones."""
    law = fitted.law

    def predict(parameters: np.ndarray) -> np.ndarray:
        if unique is not None and tokens > unique:
            return repeated_loss(parameters, params, tokens, unique)
        return power_law.predict(parameters, np.array([params]), np.array([tokens]))[..., 0]

    value, draws = float(predict(law.parameters)), predict(law.draws)
    loss = measured(value, draws)
    return {
        "loss": loss,
        "loss_of_one_run": {"value": value, "interval": with_noise(value, loss["interval"], fitted.noise)},
    }
