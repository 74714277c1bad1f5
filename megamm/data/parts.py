"""Parts: what workers write while they prepare, and what a killed run leaves to the next.

1. The reading tasks are cut into parts of equal length, numbered in their order.
2. A worker reads, decodes and tokenizes the tasks of one part. It writes the pieces to ``NNNNNNNN.arrow`` and then an
   entry per document to ``NNNNNNNN.jsonl``. The second file says that the part is whole.
3. The main process gets the entries, in the order of the parts, and never the pieces: it does not become the
   bottleneck of many workers.
4. A run that finds whole parts of the same settings and inputs takes them and makes only the others.

Nothing that comes out depends on the number of workers, on where they run or on how often the run was killed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from megamm import files
from megamm.data.documents import Skipped, Task
from megamm.data.shards import SCHEMA
from megamm.data.writer import PACK_PIECES, Piece, pieces_table

PART_TASKS = 32
"""Reading tasks of a part: few enough that two workers share a small corpus, and that a killed run loses little."""
VERSION = 2  # to go up whenever other parts come out of the same inputs
PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the main process needs to know of one document.

    Attributes:
        skipped: what was left out of it, and why.
        files: paths of the pictures that it refers to.
        digest: hex, of its content without its id; empty if the document was left out.
        image_digests: hex, of each picture.
        text_bands, image_bits: by which near repeats are found (megamm.data.near).
        num_pieces, num_tokens, num_images: of its pieces; tokens are text tokens and patches.
    """

    skipped: tuple[Skipped, ...] = ()
    files: tuple[str, ...] = ()
    digest: str = ""
    image_digests: tuple[str, ...] = ()
    text_bands: tuple[int, ...] = ()
    image_bits: tuple[int, ...] = ()
    num_pieces: int = 0
    num_tokens: int = 0
    num_images: int = 0


class PreparedParts:
    """The folder of parts of one preparation.

    Args:
        identity: everything that the parts depend on; parts of another one are removed.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        identity = {"version": VERSION, "part_tasks": PART_TASKS, **identity}
        # As JSON gives it back, so that tuples and lists are alike.
        identity = json.loads(json.dumps(identity))
        progress = folder / PROGRESS
        if not progress.is_file() or json.loads(progress.read_text(encoding="utf-8")) != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files.write_json(progress, identity)

    def make(self, tasks: Iterator[Task], run: Callable[[Iterable], Iterator[Sequence[Entry]]]) -> Iterator[Entry]:
        """Entries of all documents in the order of the tasks; parts that are there already are not made again.

        Args:
            run: maps (number of a part, its tasks or None) to its entries, in order, a few of them ahead.
        """
        cut = enumerate(iter(lambda: list(islice(tasks, PART_TASKS)), []))
        # The tasks of a part that is there are passed over: what they would read is not sent to a worker.
        jobs = ((number, None if self._entries(number).exists() else part) for number, part in cut)
        for entries in run(jobs):
            yield from entries

    def tables(self) -> Iterator[pa.Table]:
        """Pieces of each part, in order, as columns of a shard."""
        for path in sorted(self.folder.glob("*.arrow")):
            with pa.memory_map(str(path)) as file:
                yield pa.ipc.open_file(file).read_all()

    def _entries(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"


def read_part(folder: Path, number: int) -> list[Entry]:
    """The entries of a part that is whole."""
    lines = (folder / f"{number:08d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Entry(
            **fields
            | {key: tuple(fields[key]) for key in ("files", "image_digests", "text_bands", "image_bits")}
            | {"skipped": tuple(Skipped(**one) for one in fields["skipped"])}
        )
        for fields in map(json.loads, lines)
    ]


def write_part(folder: Path, number: int, documents: Iterable[tuple[Sequence[Piece], Entry]]) -> list[Entry]:
    """Write one part, document by document: it is never held in memory as a whole.

    Args:
        documents: sealed pieces of each document, and its entry.
    """
    entries: list[Entry] = []
    pending: list[Piece] = []
    path = folder / f"{number:08d}.arrow"
    with files.atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for pieces, entry in documents:
                pending += pieces
                entries.append(entry)
                if len(pending) >= PACK_PIECES:
                    writer.write_table(pieces_table(pending))
                    pending = []
            writer.write_table(pieces_table(pending))
        _to_disk(temporary)
    with files.atomic_path(folder / f"{number:08d}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries), encoding="utf-8")
        _to_disk(temporary)
    return entries


def listing_digest(inputs: Sequence[str]) -> str:
    """Digest over name, size and time of change of every file below the inputs: hex."""
    digest = hashlib.sha256()
    for name in inputs:
        path = Path(name)
        digest.update(repr(name).encode())
        found = [path] if path.is_file() else []
        for above, folders, names in os.walk(path):
            folders.sort()
            found += [Path(above, one) for one in sorted(names)]
        for one in found:
            state = os.lstat(one)
            digest.update(os.fsencode(one) + repr((state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """A part that is whole must still be so after the machine has lost its power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
