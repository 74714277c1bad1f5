"""Plan a training run from fitted scaling laws and a budget: plan.json, plan.md and train.yaml."""

import argparse
import dataclasses
import sys
from pathlib import Path

from megamm_laws.arguments import ArgumentParser
from megamm_laws.runs.table import read_runs
from rich.console import Console

from megamm.config import ModelConfig, load
from megamm.data.dataset_info import read_dataset_info
from megamm.errors import InputError, exit_on_error
from megamm.estimate.hardware import GPUS, Efficiency, Gpu, find_gpu, read_mfu, stated_mfu
from megamm.estimate.step import estimated_efficiency
from megamm.estimate.tokens import resolve_for_estimate
from megamm.files import check_out
from megamm.planning.inputs import PlanRequest, default_model, read_fits
from megamm.planning.outputs import write_plan
from megamm.planning.proposal import make_plan
from megamm.settings import build
from megamm.yaml_text import read_yaml


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("fits", metavar="fits.json", help="written by fit_scaling_laws.py, with bootstrap.npz beside it")
    add("--out", metavar="DIR", default="plan", help="folder for the results (default: %(default)s)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--flops", type=float, metavar="C", help="training FLOPs, counted as the runs' were")
    budget.add_argument("--gpu-hours", type=float, metavar="H")
    budget.add_argument("--money", type=float, metavar="M", help="in the currency of --price")
    add(
        "--gpu",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"the first is budgeted, the rest compared: {', '.join(GPUS)}",
    )
    add("--price", nargs="+", type=float, default=[], metavar="P", help="money per GPU-hour, one per --gpu")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help="model FLOPs utilisation by 6ND, between 0 and 1")
    speed.add_argument("--run-logs", metavar="RUN", help="run directory or metrics.jsonl to read the MFU from")
    speed.add_argument(
        "--mfu-from-estimate",
        metavar="CONFIG",
        help="training config whose MFU on --num-gpus of the first --gpu is estimated (see tools/estimate.py)",
    )
    add("--num-gpus", type=int, default=64, help="GPUs trained on, for days and memory (default: %(default)s)")
    add("--pue", type=float, default=1.2, help="power usage effectiveness (default: %(default)s)")
    add("--group", help="group to plan with (default: the one of lowest predicted loss)")
    add("--loss-column", default="loss", metavar="COLUMN", help="loss to plan for (default: %(default)s)")
    add("--base-config", metavar="YAML", help="training config with the data and model shape; its width is replaced")
    add("--tensor-parallel", type=int, default=1, metavar="T", help="ranks that share a layer (default: %(default)s)")
    add("--inference-tokens", type=float, metavar="T", help="tokens to be served over the model's life")
    add("--unique-tokens", type=float, metavar="U", help="training tokens at hand; more are repeated ones")
    add("--prep-rate", type=float, metavar="R", help="tokens that one CPU-hour prepares")
    add("--cpu-price", type=float, metavar="P", help="money per CPU-hour")
    add("--runs", metavar="runs.csv", help="runs of the fit, and LLM-initialised ones for the transfer law")
    add("--init-column", default="init", metavar="COLUMN", help="llm or native in --runs (default: %(default)s)")
    add("--llm-tokens", type=float, metavar="T", help="tokens that the LLM was pretrained on, to be counted")
    add("--pilot-share", type=float, default=0.03, help="pilot FLOPs over those of the full run (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    check_out(arguments.out, folder=True)
    with Console(stderr=True).status("reading fits"):
        fits, left_out = read_fits(arguments.fits, arguments.loss_column)
        base = _read_base(arguments.base_config) if arguments.base_config else {}
        gpus = [find_gpu(name) for name in arguments.gpu]
        same = ["flops", "gpu_hours", "money", "num_gpus", "pue", "group", "loss_column", "tensor_parallel"]
        same += ["unique_tokens", "prep_rate", "cpu_price", "init_column", "llm_tokens", "pilot_share"]
        request = PlanRequest(
            **{name: getattr(arguments, name) for name in same},
            gpus=gpus,
            prices=arguments.price,
            efficiency=_efficiency(arguments, gpus),
            served_tokens=arguments.inference_tokens,
            model=_template(base, arguments.group or fits[0].law.name, arguments.base_config),
            runs=read_runs(arguments.runs) if arguments.runs else None,
        )
    with Console(stderr=True).status("planning"):
        plan = make_plan(request, fits)
        written = write_plan(arguments.out, plan, request, base)
    for text in left_out:
        print(f"left out: {text}", file=sys.stderr)
    print(Path(written[1]).read_text(encoding="utf-8"))
    print(f"-> {', '.join(str(path) for path in written)}")


def _efficiency(arguments: argparse.Namespace, gpus: list[Gpu]) -> Efficiency | None:
    """The MFU as stated, read from a run or estimated; None where nothing is said of it."""
    if arguments.run_logs:
        return read_mfu(arguments.run_logs)
    if arguments.mfu is not None:
        return stated_mfu(arguments.mfu)
    if not arguments.mfu_from_estimate:
        return None
    if not gpus:
        raise InputError("--mfu-from-estimate: needs --gpu")
    config, stats, _ = resolve_for_estimate(load(arguments.mfu_from_estimate))
    return estimated_efficiency(config, arguments.num_gpus * gpus[0].dies, gpus[0], stats)


def _read_base(path: str) -> dict:
    """A training config, of which may be missing what the plan fills in; what the plan reads of it is checked."""
    base = read_yaml(path)
    sections = {name: base.get(name) for name in ("model", "data", "optimizer", "schedule", "train", "parallel")}
    if isinstance(base.get("data"), dict):
        sections["data.sources"] = base["data"].get("sources")
    for name, section in sections.items():
        if not isinstance(section, dict | None):
            raise InputError(f"{path}: {name}: expected a mapping")
    for section, name in (("data", "row_length"), ("train", "batch_rows")):
        value = (base.get(section) or {}).get(name, 1)
        if not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            raise InputError(f"{path}: {section}.{name}: {value!r} is not a whole number above zero")
    return base


def _template(base: dict, group: str, where: str | None) -> ModelConfig | None:
    """The base config's model over the defaults of the group; None without one, so that each group has its own."""
    if not base:
        return None
    section = base.get("model") or {}
    defaults = dataclasses.asdict(default_model(group))
    sources = (base.get("data") or {}).get("sources") or {}
    for source in list(sources.values())[:1]:  # the data decides vocabulary and image size, where it is at hand
        if isinstance(source, dict) and (Path(str(source.get("path"))) / "dataset.json").is_file():
            info = read_dataset_info(source["path"])
            defaults |= {name: info[name] for name in ("vocab_size", "image_size", "patch_size") if name in info}
    return build(ModelConfig, {**defaults, **section}, where=str(where))


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
