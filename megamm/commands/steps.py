"""The way from data to a report as a row of commands: each printed before it runs, finished ones skipped.

``examples/demo.py`` and ``megamm-start`` both take it.
"""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from megamm.errors import InputError, RunError
from megamm.files import read_json
from megamm.training.signals import EXIT_CODE, STOP_SIGNALS, Stopped

COMMANDS = {
    "megamm-tokenizer": "megamm.commands.train_tokenizer",
    "megamm-prepare": "megamm.commands.prepare_data",
    "megamm-train": "megamm.train",
    "megamm-convert-checkpoint": "megamm.commands.convert_checkpoint",
    "megamm-study": "megamm.commands.run_study",
    "megamm-collect": "megamm_laws.commands.collect_runs",
    "megamm-fit": "megamm_laws.commands.fit_scaling_laws",
    "megamm-report": "megamm.commands.render_report",
    "megamm-plan": "megamm.commands.plan_training",
}
"""Console scripts that are steps, and the modules whose ``command`` they call: a step needs no installation."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def step(title: str, name: str, *arguments: object, done: bool = False, warnings: Path | None = None) -> None:
    """Run one command, unless it is ``done`` before.

    Args:
        title: what it does, in a word or two.
        name: one of COMMANDS.
        arguments: of its command line, each turned to text.
        warnings: a file for what it says on stderr, which is shown only where it fails.

    Raises:
        RunError: it failed; its own message stands above.
        Stopped: a signal stopped it after it had saved.
    """
    if done:
        console.print(f"[bold]{title}[/]: done before")
        return
    words = [str(argument) for argument in arguments]
    console.print(f"[bold]{title}[/]")
    console.print(f"  {shlex.join([name, *words])}", style="dim", markup=False)
    started = time.monotonic()
    call = f"import sys; from {COMMANDS[name]} import command; sys.argv[0] = {name!r}; command()"
    status = _run([sys.executable, "-c", call, *words], warnings)
    if status == EXIT_CODE:
        raise Stopped(f"{title}: told to stop, and saved; run it again to go on")
    if status:
        raise RunError(f"{title}: the command above ended with exit code {status}; run it again to go on")
    console.print(f"  {time.monotonic() - started:.0f} s", style="dim")


def _run(command: list[str], warnings: Path | None) -> int:
    """Exit code of a command. It is told of the signals that we get, and waited for until it has saved."""
    if warnings is None:
        return _wait(command, None)
    warnings.parent.mkdir(parents=True, exist_ok=True)
    with warnings.open("w+b") as file:
        status = _wait(command, file)
        file.seek(0)
        lines = file.read().decode("utf-8", "replace").splitlines()
    if status:
        sys.stderr.write("".join(f"{line}\n" for line in lines[-20:]))
    elif count := sum(line.startswith("warning:") for line in lines):
        console.print(f"  {count} warnings: {warnings}; the report gathers them", markup=False)
    return status


def _wait(command: list[str], stderr: BinaryIO | None) -> int:
    with subprocess.Popen(command, stderr=stderr) as process:
        before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in STOP_SIGNALS}
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sends it to both
            process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def study_steps(
    study_yaml: Path,
    study: Path,
    report: Path,
    *,
    jobs: int,
    size: str | None = None,
    group_by: str = "architecture",
    seed: int = 0,
    warnings: Path | None = None,
) -> dict:
    """Train a study, collect its runs, fit the laws and render the report.

    Args:
        study: folder of runs/, runs.csv and fits/.
        report: folder of index.html.
        jobs: ladders trained at the same time.
        size: one of the study's sizes, where it has some.
        group_by: column of the run table; a fit for each of its values.
        seed: of the resampling.
        warnings: a file for the warnings of the fits, which are many on little data; None shows them.

    Returns:
        The report's summary: ``verdict``, ``sentences``, ...

    Raises:
        RunError, Stopped: as :func:`step`.
    """
    table, fits, page = study / "runs.csv", study / "fits" / "fits.json", report / "index.html"
    chosen = () if size is None else ("--size", size)
    whole = is_trained(study_yaml, study)
    step("Study", "megamm-study", study_yaml, *chosen, "--out", study, "--jobs", jobs, done=whole)
    step("Run table", "megamm-collect", study, "--out", table, done=is_newer(table, [study / "study.json"]))
    step(
        "Scaling laws",
        "megamm-fit",
        table,
        "--out",
        fits.parent,
        "--group-by",
        group_by,
        "--losses",
        "all",
        "--seed",
        seed,
        done=is_newer(fits, [table]),
        warnings=warnings,
    )
    step("Report", "megamm-report", study, "--out", report, done=is_newer(page, [table, fits]))
    return read_json(report / "summary.json")


def is_newer(product: Path, sources: Iterable[Path]) -> bool:
    """Whether a file was written after all of its sources."""
    files = [product, *sources]
    if not all(path.exists() for path in files):
        return False
    made, *before = [path.stat().st_mtime_ns for path in files]
    return made >= max(before)


def is_trained(study_yaml: Path, study: Path) -> bool:
    """Whether all runs of just this study file are finished; a study with sizes is asked to find out itself."""
    try:
        same = study_yaml.read_bytes() == (study / "study.yaml").read_bytes()
        runs = read_json(study / "study.json").get("runs") or []
    except (OSError, InputError):
        return False
    return same and bool(runs) and all(run["status"] == "finished" for run in runs)
