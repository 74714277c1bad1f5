"""How fast models train on this machine: some steps of each, with as many at a time as the study will run."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context
from tempfile import TemporaryDirectory

from megamm.config import Config
from megamm.study.propose import Speed

WARM_STEPS = 3
LEAST_STEPS, MOST_STEPS = 6, 200
SECONDS = 1.0
"""Steps are timed for about this long."""


class SpeedTest:
    """Processes that train a few steps at the same time.

    Attributes:
        start: seconds that a training process took to start.
    """

    def __init__(self, pool: ProcessPoolExecutor, jobs: int):
        self._pool, self._jobs = pool, jobs
        began = time.perf_counter()
        self._on_all(_start)
        self.start = time.perf_counter() - began

    def measure(self, config: Config) -> Speed:
        """Seconds of a step and of the way to it, the mean over processes that work side by side."""
        found = self._on_all(_time_steps, config)
        return Speed(step=sum(s for s, _ in found) / len(found), build=max(b for _, b in found))

    def _on_all(self, work, *arguments) -> list:
        return [future.result() for future in [self._pool.submit(work, *arguments) for _ in range(self._jobs)]]


@contextmanager
def speed_test(jobs: int) -> Iterator[SpeedTest]:
    """A :class:`SpeedTest` of ``jobs`` processes, which end with the block. The cores are divided as in a study."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))  # read when a process loads torch
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield SpeedTest(pool, jobs)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


def _start() -> None:
    """What a training process loads."""
    import megamm.trainer

    time.sleep(0.5)  # so that no process takes a second one of these before all have begun
    assert megamm.trainer


def _time_steps(config: Config) -> tuple[float, float]:
    """Seconds of a step, and from nothing to the first one."""
    import torch

    from megamm.data.loader import Loader, build_pack_plan
    from megamm.trainer import Trainer

    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        config.train.run_dir, config.train.steps = folder, WARM_STEPS + MOST_STEPS
        trainer = Trainer(config)
        weights = [source.weight for source in config.data.sources.values()]
        loader = Loader(
            build_pack_plan(trainer.datasets, weights, config.data),
            trainer.datasets,
            config.data,
            global_batch_rows=config.train.batch_rows,
            end_step=config.train.steps,
        )

        def steps(count: int) -> None:
            for _ in range(count):
                trainer.train_step(next(batches))
            if trainer.world.device.type == "cuda":
                torch.cuda.synchronize()

        with closing(iter(loader)) as batches:
            steps(1)
            build = time.perf_counter() - began
            steps(WARM_STEPS - 1)
            began, done = time.perf_counter(), 0
            while done < MOST_STEPS and (done < LEAST_STEPS or time.perf_counter() - began < SECONDS):
                steps(1)
                done += 1
            return (time.perf_counter() - began) / done, build
