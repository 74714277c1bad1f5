"""What GPUs can do and cost: peak rates, memory, power; hours, money and energy of a number of FLOPs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.errors import InputError


@dataclass(kw_only=True, frozen=True)
class Gpu:
    """A GPU as its maker states it: what is bought and billed, whatever torch sees in it.

    Attributes:
        peak_flops: dense bf16 FLOP/s with fp32 accumulation (without structured sparsity).
        memory: bytes.
        power: board power limit in watts.
        bandwidth: bytes/s of its memory.
        link: bytes/s in each direction to the other GPUs of its node: NVLink, Infinity Fabric, else PCIe.
        dies: devices that torch sees in it, each a rank of its own with an equal part of all the above.
        source: the public data sheet.
    """

    name: str
    peak_flops: float
    memory: float
    power: float
    bandwidth: float
    link: float
    dies: int = 1
    source: str


def _gpu(name: str, teraflops: float, gigabytes: float, watts: float, tera: float, link: float, source: str, dies=1):
    """``tera``: TB/s of memory; ``link``: GB/s in each direction."""
    return Gpu(
        name=name,
        peak_flops=teraflops * 1e12,
        memory=gigabytes * 1e9,
        power=watts,
        bandwidth=tera * 1e12,
        link=link * 1e9,
        dies=dies,
        source=source,
    )


# Makers state links as the sum of both directions (NVLink 600, 900 and 1800 GB/s; PCIe 64 and 128 GB/s; 128 GB/s for
# each of the seven Infinity Fabric links of the MI300 family, 100 GB/s for each of the eight of the MI250X) and, since
# the H100, rates with sparsity. How each figure was checked: docs/plan.md.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 312, 40, 400, 1.555, 300, "NVIDIA A100 data sheet (SXM)"),
        _gpu("a100", 312, 80, 400, 2.039, 300, "NVIDIA A100 data sheet (SXM, 80 GB)"),
        _gpu("l40s", 362, 48, 350, 0.864, 32, "NVIDIA L40S data sheet (PCIe 4)"),
        _gpu("h100-pcie", 756, 80, 350, 2.0, 64, "NVIDIA H100 data sheet (PCIe 5; half the figure with sparsity)"),
        _gpu("h100", 989, 80, 700, 3.35, 450, "NVIDIA H100 data sheet (SXM; half the figure with sparsity)"),
        _gpu("h200", 989, 141, 700, 4.8, 450, "NVIDIA H200 data sheet (SXM; half the figure with sparsity)"),
        _gpu(
            "b200", 2250, 180, 1000, 8.0, 900, "NVIDIA HGX B200 data sheet (an eighth of the board, without sparsity)"
        ),
        _gpu("mi250x", 383, 128, 560, 3.2, 400, "AMD Instinct MI250X data sheet (both dies; peak power)", dies=2),
        _gpu("mi300x", 1307, 192, 750, 5.3, 448, "AMD Instinct MI300X data sheet"),
        _gpu("mi325x", 1307, 256, 1000, 6.0, 448, "AMD Instinct MI325X data sheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        InputError: not in the table.
    """
    if name.lower() not in GPUS:
        raise InputError(f"--gpu: {name!r} is not in the table; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(kw_only=True, frozen=True)
class Efficiency:
    """Model FLOPs utilisation: 6ND FLOP/s over the peak; the interval is None where it was merely stated."""

    mfu: float
    interval: tuple[float, float] | None
    source: str
    params: int | None = None
    """Of the model that it was estimated for; None where it was not estimated."""
    warnings: tuple[str, ...] = ()


def stated_mfu(value: float) -> Efficiency:
    """An MFU that the user states.

    Raises:
        InputError: not between 0 and 1.
    """
    if not 0 < value < 1:
        raise InputError(f"--mfu: {value:g} is not between 0 and 1")
    return Efficiency(mfu=value, interval=None, source="stated")


def read_mfu(path: Path | str) -> Efficiency:
    """The MFU in the log of a run, with the middle 95% of its lines; the first tenth (warm-up) is left out.

    Logs state MFU by exact operations; it is turned into one by 6ND FLOPs, in which budgets are counted, by the
    ratio of the two counts in the log.

    Args:
        path: a run directory or its metrics.jsonl.

    Raises:
        InputError: unreadable, or no line has an MFU.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
        logged = [
            r["mfu"] * (r["flops"] / r["flops_exact"] if r.get("flops_exact") and r.get("flops") else 1.0)
            for r in records
            if r.get("mfu") is not None
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a log with a JSON record per line ({error})") from error
    # Without the start: compiling, filling of caches and the first allocations are not what a long run pays.
    values = np.array(logged[len(logged) // 10 :], float)
    if not len(values) or not (np.isfinite(values).all() and (values > 0).all() and (values < 1).all()):
        raise InputError(f"{path}: no usable mfu in the log; train with train.peak_flops set, or state --mfu")
    low, high = np.percentile(values, [2.5, 97.5])
    return Efficiency(
        mfu=float(np.median(values)),
        interval=(float(low), float(high)),
        source=f"median of {len(values)} lines of {path}, by 6ND",
    )


@dataclass(kw_only=True, frozen=True)
class Bill:
    """What FLOPs take on one kind of GPU; the intervals are those of the MFU (None where it was stated)."""

    gpu: str
    num_gpus: int
    gpu_hours: float
    gpu_hours_interval: tuple[float, float] | None
    days: float
    days_interval: tuple[float, float] | None
    money: float | None
    money_interval: tuple[float, float] | None
    megawatt_hours: float
    megawatt_hours_interval: tuple[float, float] | None
    state_bytes_per_gpu: float
    least_gpus: int


def bill(
    gpu: Gpu, efficiency: Efficiency, flops: float, params: float, *, num_gpus: int, price: float | None, pue: float
) -> Bill:
    """Hours, days, money and energy of ``flops`` (6ND).

    Energy is the board power limit over all hours times ``pue`` (power usage effectiveness), an upper bound on the
    GPUs' share. The training state is 16 bytes per parameter (fp32 weights, gradients, two Adam moments), spread
    over all GPUs; ``least_gpus`` hold it in 60% of their memory, the rest being left to activations.
    """

    def hours(mfu: float) -> float:
        return flops / (gpu.peak_flops * mfu) / 3600

    used, ends = hours(efficiency.mfu), None
    if efficiency.interval:
        low, high = efficiency.interval
        # Turned around: the higher MFU takes the fewer hours.
        ends = (hours(high), hours(low))

    def of_hours(factor: float | None) -> tuple[float | None, tuple[float, float] | None]:
        """What is ``factor`` times the hours, with its interval."""
        if factor is None:
            return None, None
        return used * factor, (ends[0] * factor, ends[1] * factor) if ends else None

    (days, days_interval), (cost, cost_interval), (energy, energy_interval) = (
        of_hours(factor) for factor in (1 / num_gpus / 24, price, gpu.power * pue / 1e6)
    )
    return Bill(
        gpu=gpu.name,
        num_gpus=num_gpus,
        gpu_hours=used,
        gpu_hours_interval=ends,
        days=days,
        days_interval=days_interval,
        money=cost,
        money_interval=cost_interval,
        megawatt_hours=energy,
        megawatt_hours_interval=energy_interval,
        state_bytes_per_gpu=16 * params / num_gpus,
        least_gpus=max(1, math.ceil(16 * params / (0.6 * gpu.memory))),
    )
