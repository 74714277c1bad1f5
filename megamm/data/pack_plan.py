"""The pack plan: which documents lie in row i.

Every source is an endless stream of its documents, epoch after epoch, each epoch in a new pseudo-random order.
Window w takes the next slice of each stream, as long as the mixture says, packs these documents into rows and
shuffles the rows. Since a stream can be entered anywhere, a window is a pure function of (seed, w). The number
of rows differs between windows; an index of cumulative counts, kept on disk, finds row i.

The cost: to know where row i lies, all windows before it must have been packed once (about ten seconds per million
documents and core). Whoever reads rows in order packs them anyway, so the index grows as rows are read and a run does
not wait for it; a run that goes on, and a branch of it, find it on disk. A window is held in memory.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count
from pathlib import Path

import numpy as np

from megamm import files
from megamm.data.packing import num_rows, pack_documents
from megamm.data.permutation import derive_seed, hash64, permute
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError

PLAN_VERSION = 1  # to go up whenever other rows come out: it names the index
DIGEST_BYTES = 32
MAX_SOURCES = 256
"""Batches number their sources in uint8."""
# In a smaller window documents fit together worse.
MIN_WINDOW_ROWS = 128
WINDOWS_KEPT = 3
# Fewer missing windows than this are not worth the start of processes.
PARALLEL_WINDOWS = 256
# A grown index is written after this many windows, and not before it is longer by this share (1 in 64): writing it
# must not cost more than packing, however long it is.
SAVED_WINDOWS, SAVED_SHARE = 32, 64
_ORDER, _ROWS, _WITHIN = range(3)  # what a derived seed is for


@dataclass(frozen=True, kw_only=True)
class Window:
    """Packed documents of a window, row after row.

    Attributes:
        sources: uint8 [num_documents]; index of each document's source.
        documents: int64 [num_documents]; index in its source.
        offsets: int64 [num_rows + 1]; row r holds documents offsets[r] to offsets[r + 1].
    """

    sources: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[r], self.offsets[r + 1])
        return self.sources[part], self.documents[part]


class PackPlan:
    """Row i as a pure function of (seed, settings, datasets, i).

    Args:
        datasets: the sources, all of one split.
        weights: share of the mixture's tokens (text tokens and patches) of each source, relative to the others.
        row_length: positions in a row.
        window_tokens: tokens drawn and packed together. Where a source would repeat within a window, the window
            shrinks to one epoch of it, though not below 128 rows.
        seed: seed of the order.
        cache_dir: folder for the index; None keeps it in memory only.
        other_dirs: further folders where an index of the same plan may lie, such as that of another run; only read.
        saves: whether this process writes the index as it grows. One rank does.

    Raises:
        InputError: more than 256 sources, one is empty or has a document longer than a row.
    """

    def __init__(
        self,
        datasets: Sequence[ShardedDataset],
        weights: Sequence[float],
        *,
        row_length: int,
        window_tokens: int,
        seed: int,
        cache_dir: Path | str | None = None,
        other_dirs: Sequence[Path | str] = (),
        saves: bool = True,
    ):
        if len(datasets) > MAX_SOURCES:
            raise InputError(f"data.sources: {len(datasets)} sources, at most {MAX_SOURCES}; prepare some together")
        self.datasets, self.row_length, self.seed = list(datasets), row_length, seed
        # Also checks that every document fits in a row: packing relies on it.
        scans = [scan_lengths(dataset, row_length) for dataset in self.datasets]
        total_weight = sum(map(_exact, weights))
        # Exact, so that 45 45 10 and .45 .45 .1 are the same mixture and have the same plan.
        self.shares = [_exact(weight) / total_weight for weight in weights]
        # Tokens of the window in which the source that is soonest through has been seen once.
        epoch = min(scan.num_tokens / share for scan, share in zip(scans, self.shares, strict=True))
        self.window_tokens = min(window_tokens, max(int(epoch), MIN_WINDOW_ROWS * row_length))
        # Documents of each source per window. Fractions, since a float would drift by whole documents.
        self._rates = [
            self.window_tokens * share * len(dataset) / scan.num_tokens
            for dataset, share, scan in zip(self.datasets, self.shares, scans, strict=True)
        ]
        self._ends = np.zeros(0, np.int64)
        self._windows: dict[int, Window] = {}
        self._saves, self._num_saved = saves, 0
        identity: list[int | str] = [PLAN_VERSION, seed, row_length, self.window_tokens]
        # The lengths alone decide the rows: a copy of the data elsewhere finds the same index.
        identity += [f"{share} {scan.sha256}" for share, scan in zip(self.shares, scans, strict=True)]
        name = f"rows-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.index"
        self._index_path = None if cache_dir is None else Path(cache_dir) / name
        for folder in other_dirs:
            self._load(Path(folder) / name)
        self.load_index()

    def __getstate__(self):
        # Workers pack the windows that they need.
        return self.__dict__ | {"_windows": {}}

    @property
    def num_rows_known(self) -> int:
        """Rows that the index covers; later ones are found by extending it."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def ensure(self, num_rows: int, progress: Callable[[int], None] | None = None, processes: int = 1) -> None:
        """Extend the index to at least ``num_rows`` rows and save it.

        Args:
            num_rows: number of rows that will be read.
            progress: called with the number of rows covered so far.
            processes: used where there is much to do.
        """
        missing = num_rows - self.num_rows_known
        if missing <= 0:
            return
        # About the number of windows that are missing. Should they not do, the rest is counted one by one.
        first, ahead = len(self._ends), missing * self.row_length // self.window_tokens
        if processes > 1 and ahead >= PARALLEL_WINDOWS:
            with multiprocessing.Pool(processes) as pool:
                counts = pool.imap(self._count_rows, range(first, first + ahead), chunksize=PARALLEL_WINDOWS // 8)
                self._extend(num_rows, chain(counts, map(self._count_rows, count(first + ahead))), progress)
        else:
            self._extend(num_rows, map(self._count_rows, count(first)), progress)
        self._save()

    def load_index(self) -> None:
        """Read the saved index, if there is a longer one than that in memory."""
        if self._index_path is not None:
            self._num_saved = max(self._num_saved, self._load(self._index_path))

    def _load(self, path: Path) -> int:
        """Take over an index that is longer than that in memory; returns the number of its windows, 0 if damaged."""
        # Read, not mapped: it is 8 bytes a window, and a file that another machine replaces must not be mapped.
        try:
            stored = path.read_bytes() if path.stat().st_size > DIGEST_BYTES + 8 * len(self._ends) else b""
        except OSError:  # none yet
            return 0
        digest, ends = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        # It is only a cache: found again, and written anew.
        if not ends or len(ends) % 8 or hashlib.sha256(ends).digest() != digest:
            return 0
        self._ends = np.frombuffer(ends, "<i8")
        return len(self._ends)

    def _save(self) -> None:
        """Write the index; whole or not at all, since other ranks read it at any time."""
        if self._index_path is None or not self._saves:
            return
        ends = np.ascontiguousarray(self._ends, "<i8").tobytes()
        with files.atomic_path(self._index_path) as temporary:
            # With a digest, since a wrong index would give wrong rows without a word.
            temporary.write_bytes(hashlib.sha256(ends).digest() + ends)
        self._num_saved = len(self._ends)

    def _grow(self, i: int) -> None:
        """Extend the index to row i as rows are read: from the file, if another process was faster, else by packing."""
        self.load_index()
        if i >= self.num_rows_known:
            self._extend(i + 1, map(self._count_rows, count(len(self._ends))))
            if len(self._ends) - self._num_saved >= max(SAVED_WINDOWS, self._num_saved // SAVED_SHARE):
                # A full disk costs the next start some seconds, not the run its life.
                with suppress(OSError):
                    self._save()

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of row i in order: sources uint8 [n] and indices in their source int64 [n]."""
        if i >= self.num_rows_known:
            self._grow(i)
        w = int(np.searchsorted(self._ends, i, side="right"))  # right: a row at an end is the next window's first
        return self.window(w).row(i - int(self._ends[w - 1] if w else 0))

    def window(self, w: int) -> Window:
        """Window w; the last few are kept in memory."""
        if w not in self._windows:
            while len(self._windows) >= WINDOWS_KEPT:
                # The earliest, not the one used longest ago: rows are read from front to back.
                del self._windows[min(self._windows)]
            self._windows[w] = self._pack(w)
        return self._windows[w]

    def _extend(self, num_rows: int, counts: Iterator[int], progress: Callable[[int], None] | None = None) -> None:
        """Append windows to the index; ``counts`` gives the rows of each window after its end."""
        known = self.num_rows_known
        ends = []
        while known < num_rows:
            known += next(counts)
            ends.append(known)
            if progress:
                progress(known)
        self._ends = np.concatenate([self._ends, np.array(ends, np.int64)])

    def _count_rows(self, w: int) -> int:
        return self.window(w).num_rows

    def _pack(self, w: int) -> Window:
        drawn = [self._draw(s, w) for s in range(len(self.datasets))]
        sources = np.repeat(np.arange(len(drawn), dtype=np.uint8), [len(d) for d in drawn])
        documents = np.concatenate(drawn)
        lengths = np.concatenate([d.lengths[chosen].sum(1) for d, chosen in zip(self.datasets, drawn, strict=True)])
        packed = pack_documents(lengths, self.row_length)
        rows = np.arange(num_rows(packed))
        place = np.empty_like(rows)
        # Packing leaves rows in the order of their longest document; hashes shuffle them alike on every machine.
        place[np.argsort(hash64(rows, derive_seed(self.seed, _ROWS, w)))] = rows
        # Within a row, too, documents must not stand by length.
        within = hash64(np.arange(len(documents)), derive_seed(self.seed, _WITHIN, w))
        order = np.lexsort((within, place[packed]))
        counts = np.bincount(place[packed], minlength=len(rows))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return Window(sources=sources[order], documents=documents[order], offsets=offsets)

    def _draw(self, s: int, w: int) -> np.ndarray:
        """Documents that window w takes from the stream of source s: int64 [n]."""
        # Rates are fractions, and int cuts them off: windows meet exactly, and no document is drawn twice or left out.
        start, end = int(w * self._rates[s]), int((w + 1) * self._rates[s])
        n = len(self.datasets[s])
        parts = [np.zeros(0, np.int64)]
        # A window may end one epoch and begin the next, which has an order of its own.
        for epoch in range(start // n, -(-end // n)):
            begin = epoch * n
            positions = np.arange(max(start, begin), min(end, begin + n)) - begin
            parts.append(permute(positions, n, derive_seed(self.seed, _ORDER, s, epoch)))
        return np.concatenate(parts)


@dataclass(frozen=True)
class LengthScan:
    """Tokens (text tokens and patches) of a source, and the digest of its lengths."""

    num_tokens: int
    sha256: str


def scan_lengths(dataset: ShardedDataset, row_length: int, chunk: int = 1 << 20) -> LengthScan:
    """Check a source's lengths and sum them up.

    Raises:
        InputError: it is empty or has a document longer than a row.
    """
    if not len(dataset):
        raise InputError(f"{dataset.path}: the {dataset.split} split has no documents; prepare more data")
    num_tokens = 0
    # In chunks: the lengths of a large corpus are mapped, not loaded.
    for start in range(0, len(dataset), chunk):
        part = dataset.lengths[start : start + chunk]
        # Several times faster than sum(1) over two columns.
        lengths = np.add(part[:, 0], part[:, 1], dtype=np.int64)
        num_tokens += int(lengths.sum())
        longest = int(lengths.argmax())
        if lengths[longest] > row_length:
            raise InputError(
                f"{dataset.path}: document {dataset[start + longest].id!r} of the {dataset.split} split has "
                f"{lengths[longest]} tokens and patches, more than data.row_length {row_length}; prepare with "
                f"--max-length {row_length} or raise data.row_length"
            )
    # Compared with the lengths when they were opened.
    return LengthScan(num_tokens, dataset.info["splits"][dataset.split]["lengths_sha256"])


def _exact(weight: float) -> Fraction:
    """The decimal number that the user wrote."""
    # repr gives the shortest decimal of a float: .1 is 1/10, not the binary number next to it.
    return Fraction(repr(float(weight)))
