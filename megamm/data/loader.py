"""The loader: global batch k is rows [k*B, (k+1)*B) of the pack plan, each rank reading its part of them.

A rank's part is the next rows in order, or rows dealt by their work (balance.py). The whole state is the step:
resuming is starting at another step, at no cost. Worker processes build batches ahead of the training process; neither
their number nor that of the ranks nor the micro-batch size changes which rows a step holds.

Workers are forked where the system allows it safely (Linux): that takes milliseconds, while a fresh
interpreter imports PyTorch for seconds. It is safe because they only run numpy and image decoding, single
threaded, and never touch the accelerator.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from megamm.config import DataConfig
from megamm.data.balance import RowContents, deal_rows, row_contents
from megamm.data.pack_plan import PackPlan
from megamm.data.rows import RowReader
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError, RunError
from megamm.sequence import Batch


def open_sources(config: DataConfig, split: str) -> list[ShardedDataset]:
    """Open the prepared datasets of a mixture, in the order of ``config.sources``.

    Raises:
        InputError: one is missing or damaged, or two were prepared with different tokenizers or images.
    """
    datasets = [ShardedDataset(source.path, split) for source in config.sources.values()]
    for key in ("tokenizer_sha256", "vocab_size", "image_size", "patch_size"):
        having = [d for d in datasets if d.info.get(key) is not None]
        for other in having[1:]:
            if other.info[key] != having[0].info[key]:
                raise InputError(
                    f"data.sources: {having[0].path} has {key} {having[0].info[key]}, {other.path} has "
                    f"{other.info[key]}; prepare both with the same tokenizer, image size and patch size"
                )
    return datasets


def build_pack_plan(
    datasets: Sequence[ShardedDataset],
    weights: Sequence[float],
    config: DataConfig,
    *,
    cache_dir: Path | str | None = None,
    other_dirs: Sequence[Path | str] = (),
    num_rows: int = 0,
    world=None,
) -> PackPlan:
    """Make the pack plan of a run; rank 0 computes its index up to ``num_rows``, the others read it.

    Args:
        cache_dir: where the index is kept. Ranks that do not see the same folder compute it as they go.
        other_dirs: further folders where it may lie.
        num_rows: rows before the first one to be read, and that one. Later rows are found as they are read.
        world: has ``rank`` and ``agree()``; None for a single process.

    Raises:
        InputError: a source is empty or has a document longer than a row.
    """
    # Each rank scans the lengths itself, and may find its copy of the data damaged.
    with world.agree() if world is not None else nullcontext():
        plan = PackPlan(
            datasets,
            weights,
            row_length=config.row_length,
            window_tokens=config.window_tokens,
            seed=config.seed,
            cache_dir=cache_dir,
            other_dirs=other_dirs,
            saves=world is None or world.rank == 0,
        )
        # To pack all windows once is the slow part: rank 0 does it, and agree() lets the others wait for the file.
        if world is None or world.rank == 0:
            _extend(plan, num_rows)
    if world is not None:
        # After agree(), when it has been written.
        plan.load_index()
    return plan


def _extend(plan: PackPlan, num_rows: int) -> None:
    """Extend a plan's index, with a bar on a terminal."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("planning rows", total=num_rows)
        plan.ensure(
            num_rows,
            lambda known: progress.update(task, completed=min(known, num_rows)),
            # The cores that this process may use: in a container or under Slurm these may be fewer than the machine
            # has.
            processes=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        )


class Loader:
    """Iterates over steps ``start_step`` to ``end_step``; each gives this rank's micro-batches.

    Args:
        plan: which documents lie in which row.
        datasets: the plan's sources.
        config: workers, prefetch, augmentation and seed.
        global_batch_rows: rows of a step over all ranks; a multiple of ``num_ranks``.
        micro_rows: rows of a micro-batch; None gives one micro-batch. The last one may be smaller.
        work: of rows from their contents, [num_rows]. Rows are then dealt so that ranks, and where micro-batches are
            equally long these too, have nearly the same work; otherwise in order. A step has the same rows either way.
        pin_memory: copy batches to page-locked memory; by default where CUDA is available.

    Raises:
        InputError: the batch does not divide among the ranks; while iterating, a shard is damaged.
        RunError: while iterating: a document is damaged, or a worker process died.
    """

    def __init__(
        self,
        plan: PackPlan,
        datasets: Sequence[ShardedDataset],
        config: DataConfig,
        *,
        global_batch_rows: int,
        rank: int = 0,
        num_ranks: int = 1,
        micro_rows: int | None = None,
        work: Callable[[RowContents], np.ndarray] | None = None,
        start_step: int = 0,
        end_step: int,
        pin_memory: bool | None = None,
    ):
        if global_batch_rows % num_ranks:
            raise InputError(
                f"train.batch_rows: {global_batch_rows} is not a multiple of the {num_ranks} data-parallel ranks"
            )
        rank_rows = global_batch_rows // num_ranks
        self.micro_rows = micro_rows or rank_rows
        self._wait = 0.0
        self._datasets = datasets
        # Made here and copied to the workers, each of which opens its own files.
        reader = RowReader(plan, datasets, config.augment, config.seed)
        workers = config.workers
        self._batches = DataLoader(
            _Steps(reader, _Deal(plan, global_batch_rows, rank, num_ranks, self.micro_rows, work)),
            # An item is a whole step of this rank; the DataLoader must not put several together.
            batch_size=None,
            # Resuming is a range that begins later.
            sampler=range(start_step, end_step),
            num_workers=workers,
            prefetch_factor=max(1, config.prefetch) if workers else None,
            multiprocessing_context=_context() if workers else None,  # DataLoader refuses both without workers
            worker_init_fn=_init_worker,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        )

    def __iter__(self) -> Generator[list[Batch], None, None]:
        cv2.setNumThreads(0)  # before forking: OpenCV's thread pool does not survive it
        # Children that were there before are no workers of this loader.
        others = multiprocessing.active_children()
        with _deaths_told_where_read():
            batches = iter(self._batches)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        try:
            while (batch := self._next(batches, workers)) is not None:
                # Raised here, in the training process, where it is agreed on among ranks.
                if isinstance(batch, Exception):
                    raise batch
                yield split_batch(batch, self.micro_rows)
        finally:
            del batches  # ends the workers now, though a traceback may hold this frame

    def _next(self, batches: Iterator[Batch | Exception], workers: list[BaseProcess]) -> Batch | Exception | None:
        began = time.perf_counter()
        try:
            return next(batches, None)
        except Exception as error:
            # A worker that was killed shows as an error of its pipe, which says nothing of the reason.
            if codes := _exit_codes_of_dead(workers):
                raise _death(codes, self._datasets) from error
            raise
        finally:
            # Time that the device stood still for data: the log's loader_wait.
            self._wait += time.perf_counter() - began

    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches since the last call."""
        waited, self._wait = self._wait, 0.0
        return waited


@contextmanager
def _deaths_told_where_read() -> Iterator[None]:
    """Keep the handler of SIGCHLD as it is: PyTorch's would raise anywhere in the program, even between steps.

    A worker that died is then found where its batch is awaited, within seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and PyTorch sets none in others
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _exit_codes_of_dead(workers: list[BaseProcess]) -> list[int]:
    """Exit codes of the workers that failed; one may still be on its way out when its pipe is found closed."""
    for worker in workers:
        worker.join(timeout=1 / len(workers))  # a second for all of them
    return [worker.exitcode for worker in workers if worker.exitcode]


def _death(codes: list[int], datasets: Sequence[ShardedDataset]) -> InputError | RunError:
    """What to tell of it: the shard that was cut while it was mapped, which kills its reader, or what else it is."""
    try:
        for dataset in datasets:
            # SIGBUS leaves no message: looking for a shard that has shrunk is the only way to name it.
            dataset.check_shards()
    except InputError as damage:
        return damage
    how = ", ".join(signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"exit code {code}" for code in codes)
    return RunError(
        f"a loader process died ({how}); out of memory, or of shared memory (/dev/shm, in Docker --shm-size)? "
        "Lower data.workers or data.prefetch"
    )


def split_batch(batch: Batch, rows: int) -> list[Batch]:
    """Cut a batch into batches of ``rows`` rows, without copying; the last one may be smaller."""
    num_rows, length = batch.tokens.shape
    if rows >= num_rows:
        return [batch]
    parts = []
    for start in range(0, num_rows, rows):
        end = min(start + rows, num_rows)
        # patch_index and label_index increase, so a run of rows has a run of each.
        bounds = torch.tensor([start * length, end * length])
        part = {f.name: getattr(batch, f.name) for f in fields(batch)}
        patches, labels = (torch.searchsorted(part[n], bounds) for n in ("patch_index", "label_index"))
        # No image lies in two rows: those that end before a row's first patch are of rows before.
        images = torch.searchsorted(part["grids"].long().prod(1).cumsum(0), patches, right=True)
        ends = {"patches": patches, "patch_index": patches, "grids": images, "label_index": labels}
        cuts = {name: slice(*between) for name, between in ends.items()}
        part = {name: value[cuts.get(name, slice(start, end))] for name, value in part.items()}
        for name in ("patch_index", "label_index"):
            part[name] = part[name] - start * length  # counted from the first row of the part
        parts.append(Batch(**part))
    return parts


class _Deal:
    """Which rows of a step a rank has, in the order of its micro-batches."""

    def __init__(
        self,
        plan: PackPlan,
        global_rows: int,
        rank: int,
        num_ranks: int,
        micro_rows: int,
        work: Callable[[RowContents], np.ndarray] | None,
    ):
        self.plan, self.global_rows, self.rank, self.num_ranks, self.work = plan, global_rows, rank, num_ranks, work
        rank_rows = global_rows // num_ranks
        # Micro-batches are evened out as well, since ranks meet in each of them; not where the last one is shorter.
        self.parts = num_ranks * (rank_rows // micro_rows if rank_rows % micro_rows == 0 else 1)

    def rows(self, step: int) -> Sequence[int]:
        every = range(step * self.global_rows, (step + 1) * self.global_rows)
        # In order: nothing needs to be known of the rows.
        if self.work is None or self.parts == 1:
            size = self.global_rows // self.num_ranks
            return every[self.rank * size : (self.rank + 1) * size]
        work = self.work(row_contents(self.plan, every))
        # Every worker of every rank deals all rows of the step and takes its own: nobody has to be asked.
        own = deal_rows(work, self.parts).reshape(self.num_ranks, -1)[self.rank]
        return (own + every.start).tolist()


class _Steps(Dataset):
    """Map from step to this rank's rows of it. Errors are returned, so that they keep their type and message."""

    def __init__(self, reader: RowReader, deal: _Deal):
        self.reader, self.deal = reader, deal

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.reader.read(self.deal.rows(step))
        # What a worker raises, the DataLoader raises again with a whole traceback as its message.
        except (InputError, RunError) as error:
            return error


def _context() -> str:
    usable = multiprocessing.get_all_start_methods()
    return "fork" if sys.platform == "linux" and "fork" in usable else "spawn"


def _init_worker(_: int) -> None:
    # A cluster signals the whole group; training still needs its loader to reach the end of the step and save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The workers are the parallelism.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
