"""What the benchmarks of the ops share: measuring, ceilings of the same run, a CSV and a plot.

A script names its cases (shapes) and providers (implementations) and calls :func:`main`:

    def setup(inputs):
        return gradients(lambda: rms_norm(inputs.x, inputs.weight, 1e-6), [inputs.x, inputs.weight])

    main(op="rms_norm", cases=cases, providers=[Provider("megamm", setup), ...])

Providers that compile run after the others and minor ones last, so that a spent time budget costs the peers that matter
least, and not our own figures.
A peer that is missing or fails is a row with its error; a failure of a provider called ``megamm...`` ends the run
with status 1.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FIELDS = (
    "device",
    "driver",
    "torch",
    "triton",
    "op",
    "case",
    "provider",
    "mode",
    "dtype",
    "ms",
    "tflops",
    "gbps",
    "share_of_ceiling",
    "peak_mib",
    "error",
    "ceiling_tflops",
    "ceiling_gbps",
)
TRAINING = "forward+backward"
FORWARD = "forward"


class UnavailableError(Exception):
    """Raised by a provider's setup: it cannot run this case, and why."""


class Work(NamedTuple):
    """The least that a case needs, whoever does it.

    Attributes:
        flops: floating-point operations.
        bytes: read and written, of tensors whose dtype is always the same.
        elements: read and written, of tensors in the dtype of the run.
    """

    flops: float = 0.0
    bytes: float = 0.0
    elements: float = 0.0

    def traffic(self, dtype: torch.dtype) -> float:
        """Bytes read and written in a run in ``dtype``."""
        return self.bytes + self.elements * dtype.itemsize


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        name: as it appears in the results.
        work: of the forward and backward together.
        make: (device, dtype) -> inputs, whatever the providers of the script expect.
        forward_work: of the forward alone, for providers with ``mode="forward"``.
    """

    name: str
    work: Work
    make: Callable[[torch.device, torch.dtype], Any]
    forward_work: Work | None = None


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: ours start with ``megamm``.
        setup: inputs -> zero-argument closure to be timed. May raise ImportError or :class:`UnavailableError`.
        mode: what the closure does, ``TRAINING`` or ``FORWARD``.
        compiles: spends seconds compiling; left out of quick runs on the CPU.
        minor: a peer that nobody would use for speed, or that no aim is stated against; measured last.
    """

    name: str
    setup: Callable[[Any], Callable[[], Any]]
    mode: str = TRAINING
    compiles: bool = False
    minor: bool = False


class Ceilings(NamedTuple):
    """What this device reaches in this run: FLOP/s of a large matmul, bytes/s of a large copy."""

    flops: float
    bytes: float


def gradients(function: Callable[[], Any], leaves: Sequence[torch.Tensor], grads: Any = None) -> Callable[[], Any]:
    """A closure that runs ``function`` and its backward to ``leaves``; ``grads`` None for a scalar output."""

    def run():
        return torch.autograd.grad(function(), leaves, grads)

    return run


def milliseconds(function: Callable[[], Any], device: torch.device, quick: bool) -> float:
    """Median time of a call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        function()
        return do_bench(function, warmup=10 if quick else 25, rep=50 if quick else 150, return_mode="median")
    times = []
    for _ in range(3 if quick else 7):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def peak_mib(function: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory that a call holds above what was held before it; None where it cannot be known."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    """A square matmul and a copy, both too large for any cache."""
    cuda = device.type == "cuda"
    size, length = (8192, 2**30) if cuda else (256, 2**22) if quick else (1024, 2**28)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul_ms = milliseconds(lambda: a @ b, device, quick)
    copy_ms = milliseconds(lambda: target.copy_(source), device, quick)
    return Ceilings(2 * size**3 / matmul_ms * 1e3, 2 * length / copy_ms * 1e3)


def measure(case: Case, provider: Provider, device: torch.device, dtype: torch.dtype, quick: bool) -> dict:
    """One row's figures: time, rates and memory, or the error."""
    try:
        torch.manual_seed(0)
        if provider.compiles:
            torch.compiler.reset()
        function = provider.setup(case.make(device, dtype))
        function()
        memory = peak_mib(function, device)
        ms = milliseconds(function, device, quick)
    except ImportError as error:
        return {"error": f"not installed: {error}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    work = case.work if provider.mode == TRAINING else case.forward_work or Work()
    return {"ms": ms, "tflops": work.flops / ms / 1e9, "gbps": work.traffic(dtype) / ms / 1e6, "peak_mib": memory}


def main(
    op: str, cases: Callable[[bool], Sequence[Case]], providers: Sequence[Provider], argv: list[str] | None = None
) -> None:
    """Parse the command line, measure every case with every provider, write ``<out>/<op>.csv`` and ``.png``.

    Args:
        op: name of the op and of the output files.
        cases: quick -> cases; quick ones are tiny.
        providers: ours and the peers.
        argv: the command line; sys.argv without it.
    """
    args = parse(op, argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    start = time.monotonic()
    ceilings = measure_ceilings(device, dtype, args.quick)
    common = {
        **about(device),
        "op": op,
        "dtype": args.dtype,
        "ceiling_tflops": ceilings.flops / 1e12,
        "ceiling_gbps": ceilings.bytes / 1e9,
    }
    pairs = [(c, p) for c in cases(args.quick) for p in providers]
    rows = {}
    for case, provider in sorted(pairs, key=lambda pair: (pair[1].minor, pair[1].compiles)):
        if provider.compiles and args.quick and device.type == "cpu":
            figures = {"error": "skipped: compiles"}
        elif time.monotonic() - start > args.budget:
            figures = {"error": "skipped: out of time"}
        else:
            figures = measure(case, provider, device, dtype, args.quick)
        figures["share_of_ceiling"] = share_of_ceiling(figures, ceilings)
        name = {"case": case.name, "provider": provider.name, "mode": provider.mode}
        rows[case.name, provider.name, provider.mode] = common | name | figures
        print(describe(name, figures), flush=True)
        ordered = [rows[k] for c, p in pairs if (k := (c.name, p.name, p.mode)) in rows]
        write_csv(args.out / f"{op}.csv", ordered)
    plot(args.out / f"{op}.png", ordered)
    sys.exit(any(row.get("error") and row["provider"].startswith("megamm") for row in ordered))


def parse(op: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line that all scripts share."""
    parser = argparse.ArgumentParser(description=f"Benchmark {op} against its peers.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on CUDA, else float32")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repeats")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which the rest is skipped")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --quick runs tiny shapes, to see that the script works")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def about(device: torch.device) -> dict[str, str]:
    """Device, its driver and versions; empty where there is none."""
    driver = ""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
        with suppress(OSError, subprocess.SubprocessError):
            driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "driver": driver, "torch": torch.__version__, "triton": triton}


def share_of_ceiling(figures: dict, ceilings: Ceilings) -> float | None:
    """Time that the ceilings allow, matmul or copy, whichever is longer, over the time taken."""
    if "ms" not in figures:
        return None
    return max(figures["tflops"] * 1e12 / ceilings.flops, figures["gbps"] * 1e9 / ceilings.bytes)


def describe(name: dict, figures: dict) -> str:
    """One line for the terminal."""
    label = f"{name['case']:<28} {name['provider']:<28} {name['mode']:<17}"
    if "error" in figures:
        return f"{label} {figures['error']}"
    memory = "" if figures["peak_mib"] is None else f"{figures['peak_mib']:10.1f} MiB"
    return (
        f"{label} {figures['ms']:10.3f} ms {figures['tflops']:8.2f} TFLOP/s {figures['gbps']:8.1f} GB/s "
        f"{figures['share_of_ceiling']:6.1%}{memory}"
    )


def write_csv(path: Path, rows: list[dict]) -> None:
    """All rows so far; the file is replaced whole, so that a run that is cut off leaves a readable one."""
    part = path.with_suffix(".csv.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(part, path)


def plot(path: Path, rows: list[dict]) -> None:
    """Times as bars, a panel per mode, and memory beside them where it is known."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.get("ms")]
    panels = [(mode, key) for mode in (FORWARD, TRAINING) for key in ("ms", "peak_mib")]
    panels = [p for p in panels if any(row["mode"] == p[0] and row.get(p[1]) for row in rows)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.5), squeeze=False, layout="constrained")
    for ax, (mode, key) in zip(axes[0], panels, strict=True):
        draw_bars(ax, [row for row in rows if row["mode"] == mode], key)
        ax.set(title=f"{rows[0]['op']}, {mode}, {rows[0]['dtype']}", ylabel=key.replace("_", " "))
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_bars(ax, rows: list[dict], key: str) -> None:
    """A group of bars per case, a colour per provider."""
    cases, providers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("case", "provider"))
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        ax.bar(
            [cases.index(r["case"]) + i * width for r in mine], [r.get(key) or 0 for r in mine], width, label=provider
        )
    ax.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], cases, rotation=20, ha="right")
    ax.set_yscale("log")
    ax.legend(fontsize=8)
