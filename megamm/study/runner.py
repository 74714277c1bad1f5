"""Train the ladders of a study: what is finished is skipped, what failed is reported and stops nothing else."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megamm.data.dataset_info import read_dataset_info
from megamm.data.pack_plan import scan_lengths
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError, RunError
from megamm.files import write_json, write_text
from megamm.model.counts import count_parameters
from megamm.resolve import epochs_of, remarks, resolve_config
from megamm.study.growth import finished_result, list_set_aside, make_way
from megamm.study.ladders import Run, Study
from megamm.study.launchers import Job, LocalLauncher, SlurmLauncher
from megamm.training.signals import EXIT_CODE, StopFlag, Stopped
from megamm.yaml_text import dump_yaml

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60
"""For runs in training to save when the study is ended."""
TAIL_BYTES = 8192


def resolve_study(study: Study) -> dict[str, float]:
    """Complete the configs of all runs from their data, in place.

    Returns:
        Run name -> image patches per token of its mixture.

    Raises:
        InputError: data are missing, contradict a config, or hold a document longer than a row.
    """
    shares, infos = {}, {}
    for run in study.runs:
        sources = run.config.data.sources.values()
        if not sources:
            raise InputError("base.data.sources: empty; name at least one prepared dataset (see tools/prepare_data.py)")
        resolve_config(run.config)
        share = 0.0
        for source in sources:
            # Runs share their data: each dataset is opened once.
            if source.path not in infos:
                infos[source.path] = read_dataset_info(source.path)
            _check_lengths(source.path, infos[source.path], run.config.data.row_length)
            train = infos[source.path]["splits"]["train"]
            patches, text = train["num_patches"], train["num_text_tokens"]
            share += source.weight * patches / max(1, patches + text)
        shares[run.name] = share / sum(source.weight for source in sources)
    return shares


def _check_lengths(path: str, info: dict, row_length: int) -> None:
    """Check that rows hold every document: otherwise each run of the study would find out by itself, and fail."""
    if info["max_length"] > row_length:
        for split in info["splits"]:
            scan_lengths(ShardedDataset(path, split), row_length)


def study_remarks(study: Study) -> list[str]:
    """What is allowed in a study with data at hand but rarely meant: of all runs the worst case, a line each."""
    longest = {}
    # Of runs that read the same mixture the longest says it all; its sources are then opened once.
    for run in sorted(study.runs, key=lambda run: run.tokens):
        longest[tuple((name, s.path, s.weight) for name, s in run.config.data.sources.items())] = run
    epochs: dict[str, float] = {}
    for run in longest.values():
        for name, times in epochs_of(run.config).items():
            epochs[name] = max(times, epochs.get(name, 0.0))
    return remarks(min((run.config for run in study.runs), key=lambda config: config.train.steps), epochs)


@dataclass(kw_only=True)
class Status:
    """How far a run is."""

    run: Run
    state: str = "pending"
    """pending, finished or failed."""
    reason: str | None = None
    """Why it failed."""
    result: dict | None = None
    """Its result.json."""


class StudyRunner:
    """Trains ``study`` below ``out``; resumes what an earlier call left unfinished.

    Args:
        study: with resolved configs; see :func:`resolve_study` and :func:`megamm.study.growth.take_up`.
        patch_shares: from there.
        launcher: runs as many ladders at a time as its ``jobs``, the costliest first.
    """

    def __init__(
        self, study: Study, patch_shares: dict[str, float], out: Path, launcher: LocalLauncher | SlurmLauncher
    ):
        self.study, self.out, self.launcher = study, out, launcher
        self.saving = study.saving(patch_shares)
        self.flops = {run.name: run.flops(patch_shares[run.name], own=True) for run in study.runs}
        self.status = {run.name: Status(run=run) for run in study.runs}
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.set_aside: list[dict] = []
        self.stop = StopFlag()
        self._jobs: dict[str, tuple[Job, int]] = {}  # of each ladder in training, and where its log began

    def run(self) -> list[Status]:
        """Train all that is unfinished; one :class:`Status` per run, in the order of the study.

        Raises:
            Stopped: by SIGTERM or SIGUSR1, after the runs in training have saved.
        """
        from megamm.training import run_dir  # takes torch along, which --dry-run does not need

        with run_dir.lock(self.out, patience=2.0):
            self._make_way()
            for ladder in self.study.ladders:
                self._collect(ladder)
                self._fail_branches(ladder)
            self._write_study()
            with self._progress() as progress, self.stop.listen():
                try:
                    self._train(progress)
                finally:
                    self._end_jobs()
        return list(self.status.values())

    def _make_way(self) -> None:
        """Set aside what is in the way of a run or no longer of the study; a run that is blocked fails."""
        for status in self.status.values():
            try:
                reason = make_way(status.run, self.out)
            except (InputError, RunError) as error:
                self._fail(status, str(error))
                continue
            if reason:
                self._say(f"set aside {status.run.name}: {reason}; it is trained anew")
        self.set_aside = list_set_aside(self.study, self.out)
        if self.set_aside:
            self._say(f"{len(self.set_aside)} runs are set aside: study.json names them, and they count no longer")

    def _end_jobs(self) -> None:
        """After Ctrl-C, a stop signal or an error: let what is in training save, and end it."""
        jobs = [job for job, _ in self._jobs.values()]
        try:
            for job in jobs:
                job.stop()
            deadline = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < deadline and any(job.poll() is None for job in jobs):
                time.sleep(POLL_SECONDS)
        finally:  # also where Ctrl-C comes again
            for job in jobs:
                if job.poll() is None:
                    job.kill()

    def _train(self, progress: Progress) -> None:
        total = sum(self.flops.values())
        overall = progress.add_task(f"[bold]{self.study.name}", total=total, completed=int(self._done_flops()), info="")
        bars = {}
        queue = [ladder for ladder in self.study.ladders if self._pending(ladder)]
        # The costliest is at the end, where pop takes it: begun last, it would train alone when all others are done.
        queue.sort(key=lambda ladder: sum(self.flops[s.run.name] for s in self._pending(ladder)))
        while queue or self._jobs:
            while queue and len(self._jobs) < self.launcher.jobs:
                ladder = queue.pop()
                self._jobs[ladder] = self._start(ladder)
                bars[ladder] = progress.add_task(ladder, total=sum(self._ladder_flops(ladder)), info="")
            time.sleep(POLL_SECONDS)
            if self.stop.raised:
                raise Stopped(f"{self.out}: told to stop; start it again to go on")
            for ladder, (job, log_start) in list(self._jobs.items()):
                # Asked before results are read: a job that ends in between would seem to have left its last run
                # unfinished.
                code = job.poll()
                self._collect(ladder)
                progress.update(bars[ladder], completed=self._done_flops(ladder), info=self._describe(ladder))
                if code is None:
                    continue
                del self._jobs[ladder]
                progress.remove_task(bars.pop(ladder))
                self._settle(ladder, code, log_start)
                # What comes after a run that broke the process down, or was told to stop, gets another job.
                if self._pending(ladder):
                    queue.append(ladder)
            progress.update(overall, completed=self._done_flops())

    def _start(self, ladder: str) -> tuple[Job, int]:
        folder = self.out / "runs" / ladder
        configs = []
        for status in self._pending(ladder):
            configs.append(folder / f"{status.run.name}.yaml")
            write_text(configs[-1], dump_yaml(status.run.values))
        log = folder / "log.txt"
        log.touch()
        # Where this job's lines begin: errors of earlier ones must not be taken for its own.
        return self.launcher.start(configs, log), log.stat().st_size

    def _collect(self, ladder: str) -> None:
        """Take note of newly finished runs."""
        for status in self._pending(ladder):
            result = finished_result(status.run)
            if result:
                status.state, status.result = "finished", result
                # Without jobs this is the first look, at what earlier calls have finished: run() writes study.json once
                # after it.
                if self._jobs:
                    self._write_study()
                    self._say(f"finished {status.run.name}: loss {status.result['loss']:.4f}")

    def _settle(self, ladder: str, code: int, log_start: int) -> None:
        """Decide, after a job has ended, which of its unfinished runs failed, and why."""
        with (self.out / "runs" / ladder / "log.txt").open("rb") as file:
            file.seek(log_start)
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        pending = self._pending(ladder) if code != EXIT_CODE else []  # told to stop, it goes on in another job
        for status in pending:
            prefix = f"error: {status.run.config.train.run_dir}: "
            reasons = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
            if reasons:
                self._fail(status, reasons[-1])
        if pending and all(status.state == "pending" for status in pending):
            # The process itself broke down; whatever is after the run that it was at gets another one.
            last = lines[-1].removeprefix("error: ") if lines else "no message"
            self._fail(pending[0], f"killed by signal {-code}" if code < 0 else last)
        self._fail_branches(ladder)
        self._write_study()

    def _fail_branches(self, ladder: str) -> None:
        """Give up the branches of a failed trunk."""
        first = self.study.ladders[ladder][0]
        if first.trunk and self.status[first.name].state == "failed":
            for status in self._pending(ladder):
                self._fail(status, "not run, because its trunk failed")

    def _fail(self, status: Status, reason: str) -> None:
        status.state, status.reason = "failed", reason
        self._say(f"failed {status.run.name}: {reason}")

    # ---- reporting -----------------------------------------------------------------------------------

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Runs differ in length and size: the time left is told from the last half hour, not from some seconds.
        return Progress(*columns, console=self.console, disable=not sys.stderr.isatty(), speed_estimate_period=1800)

    def _say(self, line: str) -> None:
        settled = sum(status.state != "pending" for status in self.status.values())
        self.console.print(f"[{settled}/{len(self.status)}] {line}", markup=False)

    def _pending(self, ladder: str) -> list[Status]:
        statuses = (self.status[run.name] for run in self.study.ladders[ladder])
        return [status for status in statuses if status.state == "pending"]

    def _ladder_flops(self, ladder: str) -> list[float]:
        return [self.flops[run.name] for run in self.study.ladders[ladder]]

    def _done_flops(self, ladder: str | None = None) -> float:
        """FLOPs trained so far, by the logs; what failed counts as done."""
        runs = self.study.runs if ladder is None else self.study.ladders[ladder]
        total = 0.0
        for run in runs:
            if self.status[run.name].state != "pending":
                total += self.flops[run.name]
            elif run.ladder in self._jobs:
                step, _ = _last_logged(run)
                total += self.flops[run.name] * max(0, step - run.start) / max(1, run.steps - run.start)
        return total

    def _describe(self, ladder: str) -> str:
        """The run in training: the first that is not finished."""
        pending = self._pending(ladder)
        if not pending:
            return ""
        run = pending[0].run
        step, loss = _last_logged(run)
        name = run.name.removeprefix(f"{ladder}-")
        return f"{name} step {step}/{run.steps}" + (f" loss {loss:.3f}" if loss is not None else "")

    def _write_study(self) -> None:
        """study.json: the state of every run; directories are relative to it."""
        runs = []
        for status in self.status.values():
            run = status.run
            runs.append(
                {
                    "name": run.name,
                    "dir": str(Path("runs") / run.ladder / run.name),
                    "ladder": run.ladder,
                    "architecture": run.architecture,
                    "width": run.width,
                    "mixture": run.mixture,
                    "tokens": run.tokens,
                    "steps": run.steps,
                    "trunk": run.trunk,
                    "params": count_parameters(run.config.model).total,
                    "flops_trained": self.flops[run.name],
                    "status": status.state,
                    "reason": status.reason,
                }
            )
        aside = {"num_set_aside": len(self.set_aside), "set_aside": self.set_aside}
        write_json(self.out / "study.json", {"name": self.study.name, "runs": runs, "saving": self.saving, **aside})


def _last_logged(run: Run) -> tuple[int, float | None]:
    """Step of the last line of a run's metrics.jsonl and the last training loss; (0, None) where there is none."""
    path = Path(run.config.train.run_dir) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            # A tail may begin in the middle of a line; after the last line break stands nothing, or a line that is
            # being written.
            lines = file.read().split(b"\n")[1 if file.tell() > TAIL_BYTES else 0 : -1]
    except FileNotFoundError:
        return 0, None
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if "loss" in record]
    return (records[-1]["step"] if records else 0), (losses[-1] if losses else None)
