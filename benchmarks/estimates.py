"""The estimator beside published training speeds, tokens per second and GPU.

    python benchmarks/estimates.py [--matmul 0.54]

One figure chose the default share of the peak that matrix products reach (marked); no choice has seen the others.
Sources: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md; llm-foundry, scripts/train/benchmarking/README.md.
Their models are dense text models; ours are set to their widths, depths and FLOPs per block (a gated feed-forward of
8/3 of the width costs what their plain one of 4 widths does; their embeddings are tied, ours are not).
"""

import argparse
import sys
from dataclasses import dataclass, replace

import numpy as np
from megamm_laws.arguments import ArgumentParser
from rich.console import Console
from rich.table import Table

from megamm.config import Config, DataConfig, ModelConfig, TrainConfig
from megamm.errors import exit_on_error
from megamm.estimate.assumptions import Assumptions
from megamm.estimate.hardware import GPUS, Gpu
from megamm.estimate.step import Estimate, estimate
from megamm.model.counts import TokenStats
from megamm.model.sizes import resolve_model

# torchtitan's H100 have HBM2e of 2.4 TB/s, 96 GB and a limit of 500 W instead of 700. Power grows with the third power
# of the clock where voltage follows it, so that the rate is taken to fall with the cube root of the power.
H100_500W = replace(GPUS["h100"], bandwidth=2.4e12, memory=96e9, peak_flops=989e12 * (500 / 700) ** (1 / 3))

# torchtitan's selective recomputation also computes every second matrix product of a block again; ours keeps them all.
# In Llama 3 8B: keys (4096 x 1024), attention output (4096 x 4096) and up (4096 x 14336) of 218M weights of a block.
AGAIN = (4096 * 1024 + 4096 * 4096 + 4096 * 14336) / (2 * 4096 * 1024 + 2 * 4096**2 + 3 * 4096 * 14336)


@dataclass(frozen=True)
class Case:
    """A published run."""

    name: str
    gpu: Gpu
    num_gpus: int
    model: ModelConfig
    row_length: int
    micro_rows: int
    passes: int
    recompute: str
    published: float
    chosen: bool = False
    again: float = 0.0
    """Of the forward's matrix products, the share that the backward computes again beyond ours."""


def llama_8b() -> ModelConfig:
    sizes = {"width": 4096, "depth": 32, "head_dim": 128, "key_heads": 8, "hidden_multiple": 14336}
    return ModelConfig(architecture="text", vocab_size=128256, image_size=224, patch_size=14, **sizes)


def mpt(width: int, depth: int) -> ModelConfig:
    sizes = {"width": width, "depth": depth, "head_dim": 128, "hidden_multiple": 8}
    return ModelConfig(architecture="text", vocab_size=50368, image_size=224, patch_size=14, **sizes)


SIZES = {"760m": (1536, 24), "1b": (2048, 24), "3b": (2560, 32), "7b": (4096, 32), "13b": (5120, 40), "30b": (7168, 48),
         "70b": (8192, 80)}  # fmt: skip
# model, row length, GPUs, rows of a micro-batch, micro-batches, recomputation, tokens per second and GPU
FOUNDRY = {
    "h100": [
        ("760m", 4096, 8, 12, 2, "none", 55459), ("760m", 2048, 32, 24, 1, "none", 67971),
        ("1b", 4096, 8, 7, 4, "none", 38535), ("1b", 2048, 64, 20, 1, "none", 44402),
        ("1b", 8192, 8, 3, 4, "none", 29157), ("3b", 8192, 8, 3, 6, "none", 16578),
        ("3b", 2048, 64, 6, 3, "none", 22525), ("3b", 4096, 8, 5, 6, "none", 20964),
        ("7b", 4096, 8, 16, 2, "full", 8611), ("7b", 1024, 8, 64, 2, "full", 10203),
        ("13b", 2048, 64, 2, 1, "none", 4800), ("13b", 4096, 8, 10, 3, "full", 4717),
        ("30b", 2048, 32, 14, 3, "full", 2308), ("70b", 2048, 64, 8, 4, "full", 1039),
    ],
    "a100": [
        ("760m", 2048, 8, 24, 2, "none", 32434), ("1b", 2048, 8, 14, 4, "none", 20513),
        ("3b", 2048, 8, 10, 2, "none", 10811), ("7b", 2048, 8, 6, 2, "none", 4641),
        ("13b", 4096, 8, 10, 3, "full", 2060), ("30b", 2048, 8, 3, 21, "full", 916),
        ("70b", 2048, 64, 8, 4, "full", 410),
    ],
}  # fmt: skip


def cases() -> list[Case]:
    found = [
        Case("torchtitan Llama 3 8B", H100_500W, 8, llama_8b(), 8192, 2, 1, "per_op", 6667, True, AGAIN),
        Case("torchtitan Llama 3 8B", H100_500W, 128, llama_8b(), 8192, 2, 1, "per_op", 6514, False, AGAIN),
    ]
    for gpu, rows in FOUNDRY.items():
        for size, row_length, num_gpus, micro_rows, passes, recompute, published in rows:
            model = mpt(*SIZES[size])
            name = f"llm-foundry {size}"
            found.append(Case(name, GPUS[gpu], num_gpus, model, row_length, micro_rows, passes, recompute, published))
    return found


def estimate_of(case: Case, assumptions: Assumptions) -> tuple[float, Estimate]:
    """Tokens per second and GPU, and the whole estimate."""
    resolve_model(case.model)
    rows = case.num_gpus * case.micro_rows * case.passes
    train = TrainConfig(
        steps=1, batch_rows=rows, micro_rows=case.micro_rows, dtype="bfloat16", recompute=case.recompute
    )
    config = Config(model=case.model, data=DataConfig(row_length=case.row_length), train=train)
    stats = TokenStats(patches=0.0, labels=1.0, pairs=(case.row_length + 1) / 2)
    found = estimate(config, case.num_gpus, case.gpu, stats, assumptions)
    products = sum(found.times[name] for name in ("qkv", "attention output", "gate and up", "down"))
    time = found.step_time + case.again * products / 3
    return found.tokens_per_step / time / case.num_gpus, found


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matmul", type=float, default=Assumptions.matmul, help="share of the peak rate (%(default)s)")
    assumptions = Assumptions(matmul=parser.parse_args().matmul)
    table = Table(title=f"tokens per second and GPU, matrix products at {assumptions.matmul:.2f} of the peak")
    for name in ("run", "GPU", "GPUs", "row", "recompute", "published", "estimated", "ratio"):
        table.add_column(name, justify="right")
    ratios: dict[str, list[float]] = {}
    for case in cases():
        tokens, _ = estimate_of(case, assumptions)
        ratio = tokens / case.published
        if not case.chosen:
            ratios.setdefault(case.gpu.name, []).append(ratio)
        gpu = case.gpu.name + (" 500 W" if case.gpu is H100_500W else "")
        cells = (case.row_length, case.recompute, case.published, f"{tokens:,.0f}")
        mark = " (chosen on it)" if case.chosen else ""
        table.add_row(case.name, gpu, str(case.num_gpus), *map(str, cells), f"{ratio:.3f}{mark}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, values in ratios.items():
        off = np.abs(np.log(values))
        mean, median = np.exp(np.mean(np.log(values))), np.exp(np.median(off)) - 1
        console.print(
            f"{name}: {len(values)} figures that no choice has seen: ratio {mean:.3f} on average, from "
            f"{min(values):.3f} to {max(values):.3f}; off by {median:.1%} in the median"
        )


if __name__ == "__main__":
    exit_on_error(main)
