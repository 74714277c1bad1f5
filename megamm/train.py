"""Entry point: ``torchrun --nproc-per-node N -m megamm.train --config FILE [--section.key VALUE ...]``.

``python -m megamm.train`` is the one-process case. Several files after ``--config`` are several runs, trained
one after another in the same process (the runs of a ladder: a trunk and its branches). SIGTERM and SIGUSR1 save and
end it with exit code 75: started again, it goes on.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megamm.config import Config, load
from megamm.errors import InputError, RunError, error_text, exit_on_error
from megamm.estimate.machine import device_here
from megamm.extras import check_extras
from megamm.model.context import check_backend
from megamm.parallel.launch import Launch
from megamm.resolve import epochs_of, fill_in, remarks, resolve_config
from megamm.settings import add_options, to_yaml
from megamm.training.signals import EXIT_CODE, Stopped

USAGE = "python -m megamm.train --config FILE [FILE ...] [--dry-run] [--print_config] [--section.key VALUE ...]"


def make_parser() -> argparse.ArgumentParser:
    """The parser of our flags; ``--section.key value`` overrides are left to :func:`megamm.config.load`."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", nargs="+", default=[], metavar="FILE", help="training config; several are several runs")
    add("--dry-run", action="store_true", help="print parameters, FLOPs, memory and layout, and exit")
    add("--print_config", "--print-config", action="store_true", help="print the resolved config as YAML, and exit")
    add("--help", "-h", action="store_true", help="print this, and exit")
    return parser


def main() -> None:
    parser = make_parser()
    flags, overrides = parser.parse_known_args(sys.argv[1:])
    if flags.help or flags.print_config or flags.dry_run:
        if os.environ.get("RANK", "0") == "0":
            show(parser, flags, overrides)
        return
    launch = Launch.from_environment()
    configs, refused = start(launch, flags.config, overrides)
    failed = train_all(configs, launch, refused)
    if failed:
        kind = InputError if all(isinstance(error, InputError) for error in failed.values()) else RunError
        stop(kind(f"{len(failed)} of {len(configs)} runs failed"), launch.rank == 0)


def show(parser: argparse.ArgumentParser, flags: argparse.Namespace, overrides: list[str]) -> None:
    """Print what was asked for instead of training."""
    if flags.help:
        add_options(parser, Config)
        parser.print_help()
        return
    configs = load_all(flags.config, overrides)
    if flags.print_config:
        print("---\n".join(resolved_yaml(config) for config in configs), end="")
        return
    from megamm.dry_run import describe_run

    print("\n".join(describe_run(config) for config in configs))


def resolved_yaml(config: Config) -> str:
    """The config as a run would have it; comments name what cannot be known here, such as data that is elsewhere."""
    problems = fill_in(config)
    return "".join(f"# not resolved: {problem}\n" for problem in problems) + to_yaml(config)


def load_all(paths: list[str], overrides: list[str]) -> list[Config]:
    """The configs of all runs.

    Raises:
        InputError: with the problems of all files.
    """
    configs, problems = [], []
    for path in paths or [None]:
        try:
            configs.append(load(path, overrides))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return configs


def start(launch: Launch, paths: list[str], overrides: list[str]) -> tuple[list[Config], list[str | None]]:
    """Read and check the configs of all runs on all ranks, before any of them joins a process group.

    Returns:
        The configs, and for each why its run is refused (by any rank), or None.

    Raises:
        InputError: a config cannot be read, or the only run is refused; on one rank, SystemExit on the others.
    """
    configs, unread = [], None
    try:
        configs = load_all(paths, overrides)
    except InputError as error:
        unread = str(error)
    every = launch.tell_all([unread, [refusal(config, launch.size) for config in configs]])
    unread = first_reason([unread for unread, _ in every])
    if unread:
        stop(InputError(unread), launch.rank == 0)
    refused = [first_reason(reasons) for reasons in zip(*(one for _, one in every), strict=True)]
    if len(configs) == 1 and refused[0]:
        stop(InputError(refused[0]), launch.rank == 0)
    return configs, refused


def first_reason(reasons: Sequence[str | None]) -> str | None:
    """Of what each rank found the first; it names the rank where others found nothing."""
    rank, reason = next(((rank, reason) for rank, reason in enumerate(reasons) if reason), (0, None))
    return reason if all(reasons) or reason is None else f"{reason} (on rank {rank}, but not on all ranks)"


def refusal(config: Config, world_size: int) -> str | None:
    """Why a run cannot start, as far as settings, data and its run directory say; None where it can."""
    from megamm.data.loader import open_sources
    from megamm.generation.scores import open_tasks
    from megamm.parallel.layout import resolve_layout
    from megamm.training.run_dir import check_settings

    try:
        if not config.data.sources:
            raise InputError("data.sources: empty; name at least one prepared dataset (see tools/prepare_data.py)")
        for split in ("train", "val"):
            open_sources(config.data, split)
        resolved = resolve_config(copy.deepcopy(config))
        check_extras(resolved)
        if device_here(resolved) == "cpu":  # on GPUs a check would take up the first one's memory on every rank
            check_backend(resolved.model, "cpu")
        open_tasks(resolved)
        resolve_layout(resolved, world_size)
        check_settings(Path(resolved.train.run_dir), resolved)
    except (InputError, OSError) as error:
        return error_text(error)
    return None


def stop(error: InputError | RunError | OSError, speaks: bool) -> None:
    """End with ``error``: raise it on the rank that speaks, leave quietly with its exit code on the others."""
    if speaks:
        raise error
    sys.exit(2 if isinstance(error, InputError) else 1)


def train_all(configs: list[Config], launch: Launch, refused: list[str | None]) -> dict[str, Exception]:
    """Train one run after another; a failed one does not stop the rest, but for its branches.

    Args:
        refused: for each config why it is not to be trained, or None.

    Returns:
        Run directory -> error of the failed ones; each is a line ``error: RUN_DIR: REASON`` on stderr.
    """
    from megamm.trainer import Trainer

    failed: dict[str, Exception] = {}
    try:
        for config, reason in zip(configs, refused, strict=True):
            run_dir = config.train.run_dir
            try:
                if reason:
                    raise InputError(reason)
                if config.train.branch_from in failed:
                    raise RunError("not run, because its trunk failed")
                trainer = Trainer(config)
                if trainer.world.rank == 0:
                    for line in remarks(trainer.config, epochs_of(trainer.config)):
                        print(f"warning: {run_dir}: {line}", file=sys.stderr, flush=True)
                result = trainer.run()
            except (InputError, RunError, OSError) as error:
                if len(configs) == 1:
                    stop(error, launch.says(error_text(error)))
                failed[run_dir] = error
                text = f"error: {run_dir}: {error_text(error)}"
                if launch.says(text):
                    print(text, file=sys.stderr, flush=True)
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


def leave(code: int) -> None:
    """End a finished or stopped rank without the interpreter's teardown.

    Threads of gloo that still let go of Python objects abort the process there now and then (SIGABRT, seen on a busy
    machine), and torchrun would report a run as failed whose results are all written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    code = 0
    try:
        exit_on_error(main)
    except Stopped as stopped:
        code = EXIT_CODE
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stopped}", file=sys.stderr)
    if "RANK" in os.environ:  # set by torchrun
        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
