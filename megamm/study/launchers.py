"""Where the ladders of a study are trained: in processes of this machine, or in jobs of a cluster.

A launcher starts the training of several configs, one after another, as one :class:`Job`.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megamm.errors import InputError


class Job(Protocol):
    """Training under way."""

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""

    def kill(self) -> None:
        """End it."""


class LocalLauncher:
    """A process per job, which ends with this one. The cores are divided among ``jobs`` of them."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}

    def start(self, configs: list[Path], log: Path) -> Job:
        """Train ``configs``, appending what is printed to ``log``."""
        command = [sys.executable, "-m", "megamm.study.child", "--config", *map(str, configs)]
        with log.open("ab") as file:
            return _ProcessGroup(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=self._environment, start_new_session=True
            )  # fmt: skip


class _ProcessGroup(subprocess.Popen):
    def kill(self) -> None:
        """Kill the process with its loader processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class SlurmLauncher:
    """A Slurm job per ladder, through submitit. Jobs outlive this process: it can only be asked to cancel them.

    Args:
        folder: for submitit's scripts and logs, on a file system that the cluster shares.
        parameters: of ``submitit.AutoExecutor``: timeout_min, gpus_per_node, cpus_per_task, slurm_partition, ...
        cluster: ``slurm``; ``local`` runs jobs here (for tests).

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or it does not know a parameter.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], cluster: str = "slurm"):
        try:
            import submitit
        except ImportError as error:
            raise InputError("--launcher slurm: submitit is not installed; pip install 'megamm[slurm]'") from error
        self.jobs = sys.maxsize  # the queue decides how many run at a time
        self._ranks = int(parameters.get("gpus_per_node") or 1)
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": 24 * 60, "name": "megamm", **parameters})
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise InputError(f"--launcher slurm: {' '.join(str(error).split())}") from error

    def start(self, configs: list[Path], log: Path) -> Job:
        """Train ``configs`` on one node, a rank per GPU, appending what is printed to ``log``."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self._ranks}", "-m"]
        command = [sys.executable, "-m", *(torchrun if self._ranks > 1 else []), "megamm.train", "--config"]
        return _SubmittedJob(self._executor.submit(_call, [*command, *map(str, configs)], log))


class _SubmittedJob:
    def __init__(self, job):
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        # A job that Slurm ended (time limit, lost node) has an exception in place of a result.
        return 1 if self._job.exception() else self._job.result()

    def kill(self) -> None:
        self._job.cancel()


def _call(command: list[str], log: Path) -> int:
    """What a submitted job runs."""
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=file).returncode
