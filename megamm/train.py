"""Entry point: ``torchrun --nproc-per-node N -m megamm.train --config FILE [--section.key VALUE ...]``.

``python -m megamm.train`` is the one-process case. Several files after ``--config`` are several runs, trained
one after another in the same process (the runs of a ladder: a trunk and its branches).
"""

import argparse
import json
import os
import sys

import torch.distributed as dist
from rich.console import Console

from megamm.config import Config, load, make_parser, to_yaml
from megamm.errors import InputError, RunError, exit_on_error

USAGE = "python -m megamm.train --config FILE [FILE ...] [--dry-run] [--print_config] [--section.key VALUE ...]"


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our flags and ``--section.key value`` overrides."""
    parser = argparse.ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--print_config", "--print-config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_known_args(arguments)


def main() -> None:
    flags, overrides = parse_arguments(sys.argv[1:])
    if flags.help:
        print(__doc__)
        make_parser(Config, usage=USAGE).print_help()
        return
    configs = [load(path, overrides) for path in flags.config] or [load(None, overrides)]
    if flags.print_config:
        print("---\n".join(to_yaml(config) for config in configs), end="")
        return
    if flags.dry_run:
        from megamm.dry_run import describe

        print("\n".join(describe(config) for config in configs))
        return
    failed = train_all(configs)
    if failed:
        raise RunError(f"{len(failed)} of {len(configs)} runs failed")


def train_all(configs: list[Config]) -> list[str]:
    """Train one run after another; a failed one does not stop the rest, but for its branches.

    Returns:
        The run directories of the failed ones; each failure is a line ``error: RUN_DIR: REASON`` on stderr.
    """
    from megamm.trainer import Trainer

    failed = []
    try:
        for config in configs:
            run_dir = config.train.run_dir
            try:
                if config.train.branch_from in failed:
                    raise RunError("not run, because its trunk failed")
                trainer = Trainer(config)
                result = trainer.run()
            except (InputError, RunError, OSError) as error:
                if len(configs) == 1:
                    raise
                failed.append(run_dir)
                print(f"error: {run_dir}: {error}", file=sys.stderr, flush=True)
                continue
            if trainer.world.rank == 0:
                losses = {name: round(values["loss"], 4) for name, values in result["losses"].items()}
                Console(stderr=True).print(
                    f"{run_dir}: {result['steps']} steps, {result['tokens']:,} tokens, "
                    f"validation loss {result['loss']:.4f} {json.dumps(losses)}",
                    highlight=False,
                    soft_wrap=True,
                )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return failed


def leave() -> None:
    """End a finished rank without the interpreter's teardown.

    Threads of gloo that still let go of Python objects abort the process there now and then (SIGABRT, seen on a busy
    machine), and torchrun would report a run as failed whose results are all written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    exit_on_error(main)
    if "RANK" in os.environ:  # set by torchrun
        leave()
