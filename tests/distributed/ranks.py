"""Functions that run on several ranks: processes of their own, joined over gloo."""

import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    Below 32768: the system hands the ports above to outgoing connections, which could take it before the test does.
    """
    for port in random.SystemRandom().sample(range(15000, 32768), 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port among a hundred")


def run_ranks(function: Callable, num_ranks: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Run ``function(*args)`` on every rank of a default group over gloo; one thread each.

    A rank that has its result leaves without tearing gloo down, which can abort a process that has finished.

    Args:
        function: at the top of a module, so that the processes find it; like ``args``, it is pickled.
        timeout: seconds, after which all ranks are killed.

    Returns:
        What each rank returned, pickled.

    Raises:
        AssertionError: with the traceback of each rank that failed, or the ranks that did not end in time.
    """
    # Ranks are forked from a server that has imported torch: a fresh interpreter takes seconds for that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamm.trainer"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(function, r, num_ranks, folder, timeout, args))
            for r in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            late = _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        if not errors and late:
            errors = [f"ranks {late} did not end within {timeout:g} s"]
        results = [folder / f"result-{r}" for r in range(num_ranks)]
        errors = errors or [f"{path.name}: missing; the rank died" for path in results if not path.exists()]
        if errors:
            raise AssertionError("\n".join(errors))
        return [pickle.loads(path.read_bytes()) for path in results]


def _wait(ranks: list, deadline: float) -> list[int]:
    """Wait until all have ended, or one has failed, or the deadline; returns those still running at the deadline."""
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            time.sleep(1.0)  # others may fail too, and say why
            return []
        if time.monotonic() > deadline:
            return [r for r, process in enumerate(ranks) if process.is_alive()]
        time.sleep(0.02)
    return []


def _rank(function: Callable, rank: int, num_ranks: int, folder: Path, timeout: float, args: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    code = 0
    try:
        store = dist.FileStore(str(folder / "store"), num_ranks)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout)
        )
        result = function(*args)
        dist.barrier()  # nobody leaves while another still needs it
        temporary = folder / f"writing-{rank}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(folder / f"result-{rank}")
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank} of {num_ranks}:\n{traceback.format_exc()}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
