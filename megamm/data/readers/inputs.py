"""From command-line inputs to reading tasks: what is in a folder, and of which kind."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megamm.data.documents import Document, Skipped
from megamm.data.readers import tables
from megamm.data.readers.captions import match_captions, read_pair
from megamm.data.readers.pages import HTML_SUFFIXES, MARKDOWN_SUFFIXES, read_page
from megamm.data.readers.text import SUFFIXES as TEXT_SUFFIXES
from megamm.data.readers.text import read_text
from megamm.errors import InputError

KINDS = ("caption", "interleaved", "text")
SCENES = "scenes:"
PAGE_SUFFIXES = HTML_SUFFIXES + MARKDOWN_SUFFIXES
TABLE_WEIGHT = 1000
"""A table counts for this many single files when a folder's kind is detected."""

Task = Callable[[], Iterable[Document | Skipped]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was found.

    Attributes:
        kinds: the kind of each input.
        tasks: reading tasks in a fixed order: inputs as given, files by name.
        num_tasks: how many, None where a table's records are not counted yet.
    """

    kinds: list[str]
    tasks: Iterator[Task]
    num_tasks: int | None


def open_inputs(
    inputs: list[str], kind: str = "auto", *, num_documents: int = 10_000, seed: int = 0, image_size: int = 224
) -> Inputs:
    """List the reading tasks of folders, files and ``scenes:KIND`` generators.

    Args:
        inputs: paths, or ``scenes:caption``, ``scenes:interleaved``, ``scenes:text``.
        kind: one of KINDS, or auto: found for each input by itself.
        num_documents, seed, image_size: for ``scenes:`` inputs.

    Raises:
        InputError: an input does not exist, is of an unknown format or holds nothing of ``kind``.
    """
    kinds, opened, total = [], [], 0
    for name, prefix in zip(inputs, _prefixes(inputs), strict=True):
        if name.startswith(SCENES):
            found = name.removeprefix(SCENES)
            if found not in KINDS:
                raise InputError(f"{name}: unknown scenes; expected one of {', '.join(SCENES + k for k in KINDS)}")
            if kind not in ("auto", found):
                raise InputError(f"{name}: is of kind {found}, --kind says {kind}")
            opened.append(partial(_scene_tasks, found, prefix, num_documents, seed, image_size))
            count = num_documents
        else:
            files = _Files(Path(name), prefix)
            found = files.detect() if kind == "auto" else kind
            if not files.count(found):
                raise InputError(f"{name}: nothing of kind {found} found; give another folder, file or --kind")
            opened.append(partial(files.tasks, found))
            count = None if found in files.tables.values() else files.count(found)
            if found == "caption" and count is not None:
                count += len(files.unpaired)
        kinds.append(found)
        total = None if total is None or count is None else total + count
    tasks = (task for tasks in opened for task in tasks())
    return Inputs(kinds=kinds, tasks=tasks, num_tasks=total)


class _Files:
    """The files of one input, sorted by name, grouped by how they are read."""

    def __init__(self, path: Path, prefix: str):
        self.prefix = prefix
        if path.is_dir():
            self.root, names = path, _walk(path)
        elif path.is_file():
            self.root, names = path.parent, [path.name]
            if not path.name.lower().endswith(PAGE_SUFFIXES + TEXT_SUFFIXES + tables.SUFFIXES):
                known = " ".join(PAGE_SUFFIXES + TEXT_SUFFIXES + tables.SUFFIXES)
                raise InputError(f"{path}: unknown format; expected a folder or one of {known}")
        else:
            raise InputError(f"{path}: not found; expected a folder, a file or scenes:KIND")
        self.pages = [n for n in names if n.lower().endswith(PAGE_SUFFIXES)]
        self.pairs, self.unpaired = match_captions(names)
        captions = {caption for _, caption in self.pairs}
        self.texts = [n for n in names if n.lower().endswith(TEXT_SUFFIXES) and n not in captions]
        self.tables = {n: "" for n in names if n.lower().endswith(tables.SUFFIXES)}
        for name in self.tables:
            try:
                self.tables[name] = tables.table_kind(self.root / name)
            except InputError:
                if path.is_file():
                    raise  # in a folder, a table of something else is no input

    def count(self, kind: str) -> int:
        """How many files of the kind there are, tables weighted."""
        loose = {"interleaved": len(self.pages), "caption": len(self.pairs), "text": len(self.texts)}[kind]
        if kind == "text" and not loose:
            loose = len(self.pages)  # pages without their pictures
        return loose + TABLE_WEIGHT * sum(found == kind for found in self.tables.values())

    def detect(self) -> str:
        """The kind of most files."""
        counts = {"interleaved": len(self.pages), "caption": self.count("caption"), "text": self.count("text")}
        best = max(counts, key=lambda kind: counts[kind])
        if not counts[best]:
            raise InputError(
                f"{self.root}: no pages ({' '.join(PAGE_SUFFIXES)}), no images with caption files (x.png + x.txt), "
                f"no text ({' '.join(TEXT_SUFFIXES)}) and no tables ({' '.join(tables.SUFFIXES)}) in it"
            )
        return best

    def tasks(self, kind: str) -> Iterator[Task]:
        if kind == "interleaved" or (kind == "text" and not self.texts):
            for name in self.pages:
                yield partial(read_page, self.root / name, self.root, self.prefix + name)
        if kind == "text":
            for name in self.texts:
                yield partial(read_text, self.root / name, self.prefix + name)
        if kind == "caption":
            for image, caption in self.pairs:
                yield partial(read_pair, self.root / image, self.root / caption, self.prefix + image)
            if self.pairs:
                for skipped in self.unpaired:
                    yield partial(_given, Skipped(id=self.prefix + skipped.id, reason=skipped.reason))
        for name, found in self.tables.items():
            if found == kind:
                yield from tables.table_tasks(self.root / name, self.prefix + name, kind)


def _walk(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted; hidden ones left out."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _prefixes(inputs: list[str]) -> list[str]:
    """What makes ids of several inputs differ: nothing for one, else each input's name, numbered if equal."""
    if len(inputs) == 1:
        return [""]
    names = [name if name.startswith(SCENES) else Path(name).resolve().name for name in inputs]
    return [f"{n}/" if names.count(n) == 1 else f"{n}~{names[:i].count(n) + 1}/" for i, n in enumerate(names)]


def _scene_tasks(kind: str, prefix: str, num_documents: int, seed: int, image_size: int) -> Iterator[Task]:
    for index in range(num_documents):
        yield partial(_read_scene, kind, prefix, index, seed, image_size)


def _read_scene(kind: str, prefix: str, index: int, seed: int, image_size: int) -> Iterator[Document]:
    from megamm.data import scenes  # draws with OpenCV; not needed for files

    document = scenes.document(kind, index, seed, image_size)
    yield Document(id=prefix + document.id, spans=document.spans)


def _given(document: Document | Skipped) -> Iterator[Document | Skipped]:
    yield document
