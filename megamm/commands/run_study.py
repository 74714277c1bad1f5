"""Train all runs of a study; finished ones are skipped, and what was killed goes on where it was."""

import argparse
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from megamm_laws.arguments import ArgumentParser

from megamm.errors import InputError, RunError
from megamm.estimate.hardware import GPUS, find_gpu
from megamm.files import check_out, write_text
from megamm.study.cost import ladder_costs, resolve_without_data
from megamm.study.growth import take_up
from megamm.study.ladders import Study, expand, read_study
from megamm.study.launchers import LocalLauncher, SlurmLauncher
from megamm.study.runner import StudyRunner, resolve_study, study_remarks
from megamm.study.tables import cost_table, grid_table, result_table, saving_line
from megamm.training.signals import exit_when_stopped
from megamm.yaml_text import dump_yaml, parse_yaml


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "study", metavar="STUDY.yaml", help="architectures, widths, tokens, mixtures (see examples/studies)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where runs/, study.json and study.yaml go")
    parser.add_argument("--jobs", type=int, default=1, help="ladders trained at a time, locally (default: %(default)s)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="default: %(default)s")
    parser.add_argument(
        "--slurm-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of submitit.AutoExecutor, such as nodes=2, gpus_per_node=8 or slurm_partition=gpu; repeatable. "
        "Jobs outlive this command if it is killed: let them end, or scancel them, before starting it again",
    )
    parser.add_argument("--size", metavar="NAME", help="which of the study's sizes, where the file has some")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost, and exit; needs no data")
    parser.add_argument("--gpu", metavar="NAME", help=f"with --dry-run: cost on it; {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many of them train a ladder")
    parser.add_argument("--price", type=float, metavar="P", help="money per GPU-hour")
    arguments = parser.parse_args()
    if (arguments.gpu is None) != (arguments.gpus is None) or (arguments.price is not None and not arguments.gpu):
        parser.error("--gpu, --gpus: give both, and --price only with them")
    if arguments.gpu and not arguments.dry_run:
        parser.error("--gpu: only with --dry-run; a study trains on what its launcher finds")
    if arguments.gpus is not None and arguments.gpus < 1:
        parser.error(f"--gpus: {arguments.gpus} is not positive")
    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        parser.error(f"--price: {arguments.price:g} is not a number from 0")
    if arguments.jobs < 1:
        parser.error(f"--jobs: {arguments.jobs} is not positive")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if not arguments.dry_run:
        check_out(arguments.out, folder=True)
    # Branches record where their trunk is, and another spelling of --out must not make them other runs.
    out, here = Path(arguments.out).resolve(), Path.cwd()
    out = out.relative_to(here) if out.is_relative_to(here) else out
    values = read_study(arguments.study, arguments.size)
    study = expand(values, out, where=arguments.study)
    if arguments.dry_run:
        print_cost(study, arguments)
        return
    patch_shares = resolve_study(study)
    for line in study_remarks(study):
        print(f"warning: {line}", file=sys.stderr)
    take_up(study)
    launcher: LocalLauncher | SlurmLauncher
    if arguments.launcher == "slurm":
        launcher = SlurmLauncher(out / "slurm", dict(map(parse_parameter, arguments.slurm_param)))
    else:
        launcher = LocalLauncher(arguments.jobs)
    runner = StudyRunner(study, patch_shares, out, launcher)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.size is not None:
        write_text(out / "study.yaml", dump_yaml(values))
    else:
        with suppress(shutil.SameFileError):  # a study may be edited and started where the last call put it
            shutil.copyfile(arguments.study, out / "study.yaml")
    statuses = runner.run()
    print(result_table(statuses))
    if runner.saving:
        print(saving_line(runner.saving))
    failed = [status for status in statuses if status.state == "failed"]
    if failed:
        lines = [f"  {status.run.name}: {status.reason}" for status in failed]
        raise RunError(
            "\n".join([f"{len(failed)} of {len(statuses)} runs failed (logs: {out}/runs/*/log.txt)", *lines])
        )


def print_cost(study: Study, arguments: argparse.Namespace) -> None:
    """The runs, their FLOPs and, on named GPUs, GPU-hours and money."""
    missing = [path for path in paths_of(study) if not (Path(path) / "dataset.json").is_file()]
    if missing:
        patch_shares, origin = resolve_without_data(study)
    else:
        patch_shares, origin = resolve_study(study), ""
        take_up(study)
    print(grid_table(study, patch_shares))
    if missing:
        print(f"data: {origin}")
    else:
        for line in study_remarks(study):
            print(f"warning: {line}")
    if arguments.gpu:
        print("\n" + cost_table(ladder_costs(study, find_gpu(arguments.gpu), arguments.gpus), arguments.price))


def paths_of(study: Study) -> list[str]:
    """The prepared datasets of a study, each once."""
    return list({source.path: None for run in study.runs for source in run.config.data.sources.values()})


def parse_parameter(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--slurm-param: {text!r}: expected KEY=VALUE")
    return key, parse_yaml(value, where=f"--slurm-param {key}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract, and 75 where a signal stopped it."""
    exit_when_stopped(main)
