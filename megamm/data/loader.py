"""The loader: global batch k is rows [k*B, (k+1)*B) of the pack plan, each rank reading its part of them.

Its whole state is the step: resuming is starting at another step, at no cost. Worker processes build batches
ahead of the training process; neither their number nor that of the ranks nor the micro-batch size changes
which rows a step holds.

Workers are forked where the system allows it safely (Linux): that takes milliseconds, while a fresh
interpreter imports PyTorch for seconds. It is safe because they only run numpy and image decoding, single
threaded, and never touch the accelerator.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import cv2
import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from megamm.config import DataConfig
from megamm.data.batch import Batch
from megamm.data.plan import PackPlan
from megamm.data.rows import RowReader
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError, RunError


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


def build_plan(
    datasets: Sequence[ShardedDataset],
    weights: Sequence[float],
    config: DataConfig,
    *,
    cache_dir: Path | str | None = None,
    num_rows: int = 0,
    world=None,
) -> PackPlan:
    """Make the pack plan of a run; rank 0 computes its index up to ``num_rows``, the others read it.

    Args:
        cache_dir: where the index is kept. Ranks that do not see the same folder compute it as they go.
        world: has ``rank`` and ``barrier()``; None for a single process.

    Raises:
        InputError: a source is empty or has a document longer than a row.
    """
    plan = PackPlan(
        datasets,
        weights,
        row_length=config.row_length,
        window_tokens=config.window_tokens,
        seed=config.seed,
        cache_dir=cache_dir,
    )
    if world is None or world.rank == 0:
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("planning rows", total=num_rows)
            plan.ensure(
                num_rows,
                lambda known: progress.update(task, completed=min(known, num_rows)),
                processes=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
            )
    if world is not None:
        world.barrier()
        plan.load_index()
    return plan


class Loader:
    """Iterates over steps ``start_step`` to ``end_step``; each gives this rank's micro-batches.

    Args:
        plan: which documents lie in which row.
        datasets: the plan's sources.
        config: workers, prefetch, augmentation and seed.
        global_batch_rows: rows of a step over all ranks; a multiple of ``num_ranks``.
        micro_rows: rows of a micro-batch; None gives one micro-batch. The last one may be smaller.
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
        reader = RowReader(plan, datasets, config.augment, config.seed)
        workers = config.workers
        self._batches = DataLoader(
            _Steps(reader, global_batch_rows, rank * rank_rows, rank_rows),
            batch_size=None,
            sampler=range(start_step, end_step),
            num_workers=workers,
            prefetch_factor=max(1, config.prefetch) if workers else None,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_init_worker,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        cv2.setNumThreads(0)  # before forking: OpenCV's thread pool does not survive it
        batches = iter(self._batches)
        try:
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, Exception):
                    raise batch
                yield split_rows(batch, self.micro_rows)
        finally:
            del batches  # ends the workers now, though a traceback may hold this frame

    def _next(self, batches: Iterator[Batch | Exception]) -> Batch | Exception | None:
        began = time.perf_counter()
        try:
            return next(batches, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a loader process died ({str(error.__cause__ or error).strip()}); out of memory, or of shared memory "
                "(/dev/shm, in Docker --shm-size)? Lower data.workers or data.prefetch"
            ) from error
        finally:
            self._wait += time.perf_counter() - began

    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches since the last call."""
        waited, self._wait = self._wait, 0.0
        return waited


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """Cut a batch into batches of ``rows`` rows, without copying; the last one may be smaller."""
    num_rows, length = batch.tokens.shape
    if rows >= num_rows:
        return [batch]
    parts = []
    for start in range(0, num_rows, rows):
        end = min(start + rows, num_rows)
        bounds = torch.tensor([start * length, end * length])
        part = {f.name: getattr(batch, f.name) for f in fields(batch)}
        patches, labels = (slice(*torch.searchsorted(part[n], bounds)) for n in ("patch_index", "label_index"))
        cuts = {"patches": patches, "patch_index": patches, "label_index": labels}
        part = {name: value[cuts.get(name, slice(start, end))] for name, value in part.items()}
        for name in ("patch_index", "label_index"):
            part[name] = part[name] - start * length
        parts.append(Batch(**part))
    return parts


class _Steps(Dataset):
    """Map from step to this rank's rows of it. Errors are returned, so that they keep their type and message."""

    def __init__(self, reader: RowReader, global_rows: int, first: int, num_rows: int):
        self.reader, self.global_rows, self.first, self.num_rows = reader, global_rows, first, num_rows

    def __getitem__(self, step: int) -> Batch | Exception:
        start = step * self.global_rows + self.first
        try:
            return self.reader.read(range(start, start + self.num_rows))
        except (InputError, RunError) as error:
            return error


def _context() -> str:
    usable = multiprocessing.get_all_start_methods()
    return "fork" if sys.platform == "linux" and "fork" in usable else "spawn"


def _init_worker(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
