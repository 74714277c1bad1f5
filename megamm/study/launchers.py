"""Where the ladders of a study are trained: in processes of this machine, or in jobs of a cluster.

A launcher starts the training of several configs, one after another, as one :class:`Job`.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megamm.errors import InputError
from megamm.extras import require
from megamm.training.signals import EXIT_CODE

POLL_SECONDS = 0.5
# Since Slurm 22.05 srun no longer takes the CPUs of a task over from the job, and all ranks would share one core.
SRUN_CPUS = "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"


class Job(Protocol):
    """Training under way."""

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it."""


class LocalLauncher:
    """A process per job, which ends with this one. The cores are divided among ``jobs`` of them."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # What the caller has set in the environment wins.
        self._environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}

    def start(self, configs: list[Path], log: Path) -> Job:
        """Train ``configs``, appending what is printed to ``log``."""
        command = [sys.executable, "-m", "megamm.study.child", "--config", *map(str, configs)]
        with log.open("ab") as file:
            # The child ends when the pipe at its standard input closes (child.py). A session of its own: Ctrl-C in the
            # terminal reaches only this process, which lets the child save; and ``kill`` can end all of the group.
            return _ProcessGroup(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=self._environment, start_new_session=True
            )


class _ProcessGroup(subprocess.Popen):
    stop = subprocess.Popen.terminate
    """Only the process that trains: it needs its loader processes to reach the end of the step."""

    def kill(self) -> None:
        """Kill the process with its loader processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class SlurmLauncher:
    """A Slurm job per ladder, over one or several nodes, through submitit.

    A job whose time is up saves and queues itself again. Jobs outlive this process, which can only cancel them.

    Args:
        folder: for submitit's scripts and logs, on a file system that the cluster shares.
        parameters: of ``submitit.AutoExecutor``: nodes, timeout_min, gpus_per_node, cpus_per_task,
            slurm_partition, ...
        cluster: ``slurm``; ``local`` runs jobs here (for tests).

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or it does not know a parameter.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], cluster: str = "slurm"):
        require("submitit", "--launcher slurm")
        import submitit

        self.jobs = sys.maxsize  # the queue decides how many run at a time
        self._ranks = int(parameters.get("gpus_per_node") or 1)
        setup = [SRUN_CPUS, *(parameters.get("slurm_setup") or [])]
        # The signal comes 300 s before the time is up, for the step under way and the checkpoint.
        parameters = {"timeout_min": 24 * 60, "name": "megamm", "slurm_signal_delay_s": 300, **parameters}
        try:
            # A job may be queued again that often; submitit's own default is 3.
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=1000)
            self._executor.update_parameters(**parameters, slurm_setup=setup)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise InputError(f"--launcher slurm: {' '.join(str(error).split())}") from error

    def start(self, configs: list[Path], log: Path) -> Job:
        """Train ``configs``, a rank per GPU of all nodes of the job, appending what is printed to ``log``."""
        return _SubmittedJob(self._executor.submit(NodeCall(list(map(str, configs)), log, self._ranks)))


class _SubmittedJob:
    def __init__(self, job):
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        # A job that Slurm ended (lost node) has an exception in place of a result.
        if self._job.exception():
            return 1
        codes = self._job.results()  # one per node
        # Told to stop comes before all other codes: such a job goes on in another one.
        return next((code for code in (EXIT_CODE, *codes) if code and code in codes), 0)

    def kill(self) -> None:
        self._job.cancel()

    stop = kill


class NodeCall:
    """What a submitted job runs on each of its nodes: torchrun. Submitit pickles it.

    Args:
        configs: files, trained one after another.
        log: of the first node; that of node k has ``-k`` in its name.
        ranks: per node.
    """

    def __init__(self, configs: list[str], log: Path, ranks: int):
        self.configs, self.log, self.ranks = configs, log, ranks

    def __call__(self) -> int:
        """Train; returns the exit code of torchrun."""
        import submitit

        job = submitit.JobEnvironment()
        log = self.log if job.node == 0 else self.log.with_stem(f"{self.log.stem}-{job.node}")
        command = self.command(job.num_nodes, job.hostnames[0], job.job_id)
        with log.open("ab") as file:
            # In a session of its own: signals to the job are for submitit, which calls checkpoint.
            self._process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            while (code := self._process.poll()) is None:
                time.sleep(POLL_SECONDS)
            return code

    def command(self, num_nodes: int, head: str, job_id: str) -> list[str]:
        """The command of one node. The port follows from the number of the job: two jobs on a node must differ."""
        command = [sys.executable, "-m"]
        if num_nodes * self.ranks > 1:
            port = 20000 + int("".join(filter(str.isdigit, job_id)) or 0) % 10000
            meeting = [f"--nnodes={num_nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{port}"]
            meeting = [*meeting, f"--rdzv-id={job_id}"] if num_nodes > 1 else ["--standalone"]
            command += ["megamm.launch", *meeting, f"--nproc-per-node={self.ranks}", "--max-restarts=3", "-m"]
        return [*command, "megamm.train", "--config", *self.configs]

    def checkpoint(self) -> Any:
        """Called in a signal handler on the first node, before the job's time is up: save, then queue it again."""
        import submitit

        self._process.send_signal(signal.SIGTERM)
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # Popen's own wait may hold its lock
        return submitit.helpers.DelayedSubmission(NodeCall(self.configs, self.log, self.ranks))
