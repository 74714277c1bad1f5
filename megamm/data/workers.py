"""Where jobs are done: in this process, in processes of this machine, or on a Ray cluster. Results keep their order."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import cv2

from megamm.errors import RunError

AHEAD = 2
"""Jobs of each worker that are under way: results wait for their turn, and a job may hold records."""


def run_jobs(function: Callable, jobs: Iterable[tuple], *, workers: int, ray: bool = False) -> Iterator[Any]:
    """``function(*job)`` for each job, in their order.

    Args:
        function: importable by its name, as it is sent to other processes.
        workers: processes; 1 is this one. With ``ray`` they are those of a local cluster, where none is named.
        ray: on the cluster of ``RAY_ADDRESS``, or on a local one; its nodes must see the same files.

    Raises:
        RunError: a worker was killed, or the cluster cannot be reached.
    """
    if ray:
        yield from _on_ray(function, jobs, workers)
    elif workers > 1:
        yield from _in_processes(function, jobs, workers)
    else:
        for job in jobs:
            yield function(*job)


def _in_processes(function: Callable, jobs: Iterable[tuple], workers: int) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")  # fork is unsafe once the tokenizer's threads exist
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process)
    try:
        yield from _in_order(jobs, lambda job: pool.submit(function, *job).result, AHEAD * workers)
    except BrokenProcessPool as error:
        raise RunError("a worker was killed (out of memory?); try fewer --workers") from error
    finally:
        # Also when the reader of this generator has enough (a limit) or fails.
        pool.shutdown(cancel_futures=True)


def _on_ray(function: Callable, jobs: Iterable[tuple], workers: int) -> Iterator[Any]:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    try:
        # A cluster that is there has its own number of CPUs.
        num_cpus = None if address else workers
        ray.init(address, num_cpus=num_cpus, include_dashboard=None if address else False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"RAY_ADDRESS: no Ray cluster at {address or 'this machine'} ({error})") from error
    remote = ray.remote(_one_thread)
    try:
        ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))

        def submit(job: tuple) -> Callable[[], Any]:
            reference = remote.remote(function, job)
            return lambda: ray.get(reference)

        yield from _in_order(jobs, submit, ahead)
    except ray.exceptions.RayError as error:
        raise RunError(f"--ray: a worker failed ({str(error).strip().splitlines()[-1]})") from error
    finally:
        ray.shutdown()


def _in_order(jobs: Iterable[tuple], submit: Callable[[tuple], Callable[[], Any]], ahead: int) -> Iterator[Any]:
    """Results in the order of the jobs, of which ``ahead`` are under way; ``submit`` gives who waits for one."""
    left = iter(jobs)
    pending = deque(submit(job) for job in islice(left, ahead))
    while pending:
        yield pending.popleft()()
        pending.extend(submit(job) for job in islice(left, 1))


def _one_thread(function: Callable, job: tuple) -> Any:
    cv2.setNumThreads(1)  # the workers are the parallelism
    return function(*job)


def _start_process() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    """A run that was killed must not leave its workers behind: they wait for jobs for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)  # from a thread: sys.exit would end only that
