"""The whole way in one command: data -> tokenizer -> shards -> study -> laws -> report.

    python examples/demo.py            built-in scenes, about a quarter of an hour on two cores
    python examples/demo.py --real     Debian's manuals, stamps and dictionary, prepared by examples/real_data.sh
    python examples/demo.py --study moe_vs_dense
                                       a study of examples/studies at its smoke size, on the built-in scenes

Each step is one command, printed before it runs; finished steps are skipped. For your own pages: megamm-start.
"""

import argparse
import os
import time
from pathlib import Path

from megamm_laws.arguments import ArgumentParser

from megamm.commands.steps import console, is_newer, step, study_steps
from megamm.training.signals import exit_when_stopped

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"caption": 30000, "interleaved": 10000, "text": 10000}
"""Documents of each kind of built-in scenes: a little over one epoch of the largest budget."""
JOBS = max(1, min(2, os.cpu_count() or 1))
STUDIES = (
    "early_vs_late",
    "encoder_free_vs_pretrained",
    "mixture",
    "moe_vs_dense",
    "native_vs_continual",
    "resolution",
)
"""Files of examples/studies that have a size called smoke."""
GROUPED_BY = {"mixture": "mixture", "native_vs_continual": "init"}
"""Column of the run table by whose values laws are fitted; else architecture."""
PARENTS = Path("studies", "parents")
LLM_WIDTHS = (16, 32, 64)
"""Of native_vs_continual at its smoke size."""
PLANNED_FLOPS = 1e13
"""Some ten times the longest run of native_vs_continual at its smoke size."""


def prepare_scenes(folder: Path, name: str = "data", patch_size: int = 8) -> None:
    """Built-in scenes: a tokenizer and three prepared sources below ``folder``/``name``."""
    tokenizer = folder / "tokenizer.json"
    inputs = [f"scenes:{kind}" for kind in KINDS]
    step(
        "Tokenizer",
        "megamm-tokenizer",
        *inputs,
        "--num-documents",
        2000,
        "--vocab-size",
        640,
        "--out",
        tokenizer,
        done=tokenizer.exists(),
    )
    for kind, count in KINDS.items():
        out = folder / name / kind
        step(
            f"Data: {name}/{kind}",
            "megamm-prepare",
            f"scenes:{kind}",
            "--num-documents",
            count,
            "--out",
            out,
            "--tokenizer",
            tokenizer,
            "--image-size",
            32,
            "--patch-size",
            patch_size,
            "--max-length",
            256,
            "--val-fraction",
            0.05,
            "--workers",
            JOBS,
            done=(out / "dataset.json").exists(),
        )


def train_parent(config: str, name: str, *settings: object) -> None:
    """Train what runs of a study start from, and write it in Hugging Face's layout; see examples/studies/parents."""
    run, out = PARENTS / name, PARENTS / f"{name}-hf"
    path = Path("examples", "studies", "parents", f"{config}.yaml")
    place = ("--train.run_dir", run)
    step(f"Parent: {name}", "megamm-train", "--config", path, *place, *settings, done=(run / "result.json").exists())
    given = ("--to", "hf", "--out", out)
    step(f"Layout: {name}", "megamm-convert-checkpoint", run, *given, done=(out / "config.json").exists())


def train_parents(study: str) -> None:
    """What the runs of a study start from; nothing for most of them."""
    if study == "encoder_free_vs_pretrained":
        train_parent("tower", "tower")
    if study == "native_vs_continual":
        for width in LLM_WIDTHS:
            train_parent("llm", f"llm-{width}", "--model.width", width)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--real", action="store_true", help="use the data that examples/real_data.sh prepared")
    kind.add_argument("--study", choices=STUDIES, help="another study than demo.yaml")
    parser.add_argument("--jobs", type=int, default=JOBS, help="ladders trained at the same time")
    args = parser.parse_args()
    started = time.monotonic()
    name = args.study or ("demo-real" if args.real else "demo")
    folder = Path("studies", name) if args.study else Path(name)
    os.chdir(ROOT)
    if not args.real:
        prepare_scenes(Path("demo"))
    if name == "resolution":
        for patch_size in (4, 16):
            prepare_scenes(Path("demo"), f"data-32-{patch_size}", patch_size)
    train_parents(name)
    summary = study_steps(
        Path("examples", "studies", f"{name}.yaml"),
        folder / "study",
        folder / "report",
        jobs=args.jobs,
        size="smoke" if args.study else None,
        group_by=GROUPED_BY.get(name, "architecture"),
    )
    if name == "native_vs_continual":
        laws, table, plan = folder / "study" / "fits" / "fits.json", folder / "study" / "runs.csv", folder / "plan"
        options = ("--runs", table, "--group", "native", "--flops", PLANNED_FLOPS, "--out", plan)
        step("Break-even", "megamm-plan", laws, *options, done=is_newer(plan / "plan.json", [laws, table]))
    console.print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"Report: {folder / 'report' / 'index.html'}\nVerdict: {summary['verdict']}")


if __name__ == "__main__":
    exit_when_stopped(main)
