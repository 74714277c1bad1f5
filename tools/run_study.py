#!/usr/bin/env python
"""Train all runs of a study; finished ones are skipped, and what was killed goes on where it was."""

import argparse
import shutil
from pathlib import Path

import yaml

from megamm.arguments import ArgumentParser
from megamm.errors import InputError, RunError, exit_on_error
from megamm.files import check_out
from megamm.study.ladders import read_study
from megamm.study.launchers import LocalLauncher, SlurmLauncher
from megamm.study.runner import StudyRunner, resolve_study
from megamm.study.tables import plan_table, result_table, saving_line


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
        help="parameter of submitit.AutoExecutor, such as gpus_per_node=8 or slurm_partition=gpu; repeatable. "
        "Jobs outlive this command if it is killed: let them end, or scancel them, before starting it again",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost, and exit")
    arguments = parser.parse_args()
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
    study = read_study(arguments.study, out)
    patch_shares = resolve_study(study)
    if arguments.dry_run:
        print(plan_table(study, patch_shares))
        return
    if arguments.launcher == "slurm":
        launcher = SlurmLauncher(out / "slurm", dict(map(parse_parameter, arguments.slurm_param)))
    else:
        launcher = LocalLauncher(arguments.jobs)
    runner = StudyRunner(study, patch_shares, out, launcher)
    out.mkdir(parents=True, exist_ok=True)
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


def parse_parameter(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--slurm-param: {text!r}: expected KEY=VALUE")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    exit_on_error(main)
