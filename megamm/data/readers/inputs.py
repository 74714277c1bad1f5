"""From command-line inputs to reading tasks: what is in a folder, and of which kind."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megamm.data.dataset_info import KINDS
from megamm.data.documents import Document, Skipped, Task, given, printable, unread
from megamm.data.readers import pdf, tables
from megamm.data.readers.captions import IMAGE_SUFFIXES, VECTOR_SUFFIXES, match_captions, read_class, read_pair
from megamm.data.readers.pages import HTML_SUFFIXES, MARKDOWN_SUFFIXES, NOTEBOOK_SUFFIXES, read_page
from megamm.data.readers.streams import inside
from megamm.data.readers.text import SUFFIXES as TEXT_SUFFIXES
from megamm.data.readers.text import read_text
from megamm.errors import InputError

SCENES = "scenes:"
PAGE_SUFFIXES = HTML_SUFFIXES + MARKDOWN_SUFFIXES + NOTEBOOK_SUFFIXES + pdf.SUFFIXES
ABOUT = frozenset(
    """
    readme license licence copying copyright notice authors contributors changelog changes news todo index robots
    requirements citation contributing
    """.split()  # noqa: SIM905
)
"""Names of files that tell of a folder; they do not make it one of several kinds."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was found.

    Attributes:
        kinds: the kind of each input.
        tasks: reading tasks in a fixed order: inputs as given, files by name.
        num_tasks: how many, None where a table's records are not counted yet.
        pictures: path and id of each picture that pages and tables of a folder may refer to.
    """

    kinds: list[str]
    tasks: Iterator[Task]
    num_tasks: int | None
    pictures: dict[str, str]


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
    pictures: dict[str, str] = {}
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
            if kind == "caption":
                files.take_classes()
            # Also of a kind that was asked for: an empty dataset helps nobody.
            if not files.of(found):
                raise InputError(f"{name}: nothing of kind {found} found; give another folder, file or --kind")
            opened.append(partial(files.tasks, found))
            pictures |= files.pictures(found)
            # To count records would be to read the tables twice.
            count = None if found in files.tables.values() else sum(1 for _ in files.tasks(found))
        kinds.append(found)
        total = None if total is None or count is None else total + count
    # Lazily: tasks of tables hold records, and there may be millions.
    tasks = (task for tasks in opened for task in tasks())
    return Inputs(kinds=kinds, tasks=tasks, num_tasks=total, pictures=pictures)


class _Files:
    """The files of one input, sorted by name, grouped by how they are read."""

    def __init__(self, path: Path, prefix: str):
        self.prefix, self.root = prefix, path
        self.skipped: list[Skipped] = []
        if path.is_dir():
            names = self._walk(path)
        elif path.is_file():
            self.root, names = path.parent, [path.name]
            if not path.name.lower().endswith(PAGE_SUFFIXES + TEXT_SUFFIXES + tables.SUFFIXES):
                known = " ".join((*PAGE_SUFFIXES, *TEXT_SUFFIXES, *tables.SHOWN_SUFFIXES))
                raise InputError(f"{path}: unknown format; expected a folder or one of {known}")
            if not inside(path, path.parent):  # whoever names a link means what it leads to
                self.root, names = path.resolve().parent, [path.resolve().name]
        elif path.exists():
            raise InputError(f"{path}: is not an ordinary file; expected a folder, a file or scenes:KIND")
        else:
            raise InputError(f"{path}: not found; expected a folder, a file or scenes:KIND")
        self.names = names
        # Sphinx offers pages as notebooks, too: the same text twice.
        double = {n for n in names if n.lower().endswith(NOTEBOOK_SUFFIXES) and "_downloads" in Path(n).parts}
        self.pages = [n for n in names if n.lower().endswith(PAGE_SUFFIXES) and n not in double]
        self.pairs, self.unpaired = match_captions(names)
        captions = {caption for _, caption in self.pairs}
        self.texts = [n for n in names if n.lower().endswith(TEXT_SUFFIXES) and n not in captions]
        self.classes: list[str] = []
        self.tables: dict[str, str] = {}
        stems = {str(Path(image).with_suffix("")) for image in names if image.lower().endswith(IMAGE_SUFFIXES)}
        for name in names:
            if name.lower().endswith(".json") and name[:-5] in stems:
                self._skip(name, "metadata of an image: not read")
            elif Path(name).name.startswith("cache-") and name.endswith(".arrow"):
                self._skip(name, "cache of a data set: not read")
            elif name.lower().endswith(tables.SUFFIXES):
                try:
                    self.tables[name] = tables.table_kind(self.root / name)
                except InputError as error:
                    if path.is_file():
                        raise
                    reason = str(error).removeprefix(f"{self.root / name}: ")
                    self._skip(name, reason if reason.startswith("damaged") else f"table that cannot be used: {reason}")
        # Whatever nobody reads is told, too: nothing is left out in silence.
        read = (*PAGE_SUFFIXES, *TEXT_SUFFIXES, *IMAGE_SUFFIXES, *VECTOR_SUFFIXES, *tables.SUFFIXES)
        for name in names:
            if not name.lower().endswith(read):
                self._skip(name, f"file type not read: {Path(name).suffix.lower()}")
            elif name.lower().endswith(NOTEBOOK_SUFFIXES) and name not in self.pages:
                self._skip(name, "download of a page: not read")

    def take_classes(self) -> None:
        """Take the pictures of folders as those of the class that the folder is named after (ImageFolder)."""
        if not self.of("caption"):
            self.classes = [n for n in self.names if "/" in n and n.lower().endswith(IMAGE_SUFFIXES)]

    def of(self, kind: str) -> list[str]:
        """Files that are read as ``kind``."""
        captioned = [image for image, _ in self.pairs]
        loose = {"interleaved": self.pages, "caption": captioned or self.classes, "text": self.texts}[kind]
        if kind == "text" and not loose:
            loose = self.pages  # pages without their pictures
        return [*loose, *(name for name, found in self.tables.items() if found == kind)]

    def detect(self) -> str:
        """The one kind of the files.

        Raises:
            InputError: there is nothing to read, or files of several kinds, of which most would be lost.
        """
        # A .txt beside a picture is its caption, so texts that are not more than pairs are strays.
        texts = self.texts if len(self.texts) > len(self.pairs) else []  # else captions that lost their pictures
        found = {"interleaved": self.of("interleaved"), "caption": self.of("caption"), "text": texts}
        found["text"] = [*texts, *(name for name, kind in self.tables.items() if kind == "text")]
        # A folder of pictures may have a README.md, and pages their sources, without being of another kind.
        data = {kind: [n for n in names if not _is_about(n)] for kind, names in found.items()}
        found = data if any(data.values()) else found
        kinds = [kind for kind in found if found[kind]]
        if not kinds:
            reasons = Counter(skipped.reason.split(":")[0] for skipped in self.skipped)
            listed = "".join(f"; {count} x {reason}" for reason, count in reasons.most_common(5))
            tried = next((s for s in self.skipped if s.id.lower().endswith(tables.SUFFIXES)), None)
            listed += f"; first table {printable(tried.id)}: {tried.reason}" if tried else ""
            if any("/" in image.id for image in self.unpaired if image.id.lower().endswith(IMAGE_SUFFIXES)):
                listed += "; there are pictures in folders: --kind caption takes the folders' names as captions"
            raise InputError(
                f"{self.root}: no pages ({' '.join(PAGE_SUFFIXES)}), no images with caption files (x.png + x.txt), "
                f"no text ({' '.join(TEXT_SUFFIXES)}) and no tables ({' '.join(tables.SHOWN_SUFFIXES)}) in it{listed}"
            )
        if len(kinds) > 1:
            listed = ", ".join(f"{len(found[kind])} {kind} ({found[kind][0]})" for kind in kinds)
            raise InputError(
                f"{self.root}: holds files of several kinds: {printable(listed)}; give --kind, which leaves the others "
                "out, or prepare each from a folder of its own"
            )
        return kinds[0]

    def tasks(self, kind: str) -> Iterator[Task]:
        """What is read as ``kind``, then every other file with the reason why it is not."""
        # Each file comes once: read, or with one reason why it was not.
        used = {entry.id for entry in self.skipped}
        left_out = list(self.skipped)
        if kind == "caption":
            for image, caption in self.pairs:
                yield self._task(image, read_pair, self.root / image, self.root / caption, self.root)
                used |= {image, caption}
            if self.pairs and kind not in self.tables.values():
                left_out += self.unpaired
                used |= {entry.id for entry in self.unpaired}
        for name in self.of(kind):
            if name in self.tables:
                id = self._id(name)
                yield from _to_the_end(tables.table_tasks(self.root / name, self.root, id, kind), id)
            elif kind == "caption":
                if name in self.classes:
                    yield self._task(name, read_class, self.root / name, self.root)
            else:
                page = pdf.read_pdf if name.lower().endswith(pdf.SUFFIXES) else read_page
                yield self._task(name, read_text if name in self.texts else page, self.root / name, self.root)
            used.add(name)
        pictures = set(self.pictures(kind).values())
        for name in self.names:
            if name not in used and self._id(name) not in pictures:
                left_out.append(Skipped(id=name, reason=f"of another kind: not {kind}"))
        for entry in left_out:
            yield given(Skipped(id=self._id(entry.id), reason=entry.reason))

    def pictures(self, kind: str) -> dict[str, str]:
        """Path and id of the pictures that pages and tables may refer to, and that no caption file belongs to."""
        if kind == "text" or (kind == "caption" and kind not in self.tables.values()):
            return {}
        paired = {image for image, _ in self.pairs} if kind == "caption" else ()
        suffixes = IMAGE_SUFFIXES + VECTOR_SUFFIXES
        # A picture with a caption file of its own is accounted for by its pair.
        names = (name for name in self.names if name.lower().endswith(suffixes) and name not in paired)
        # Normalised as read_picture does it, since the two are compared.
        return {os.path.normpath(self.root / name): self._id(name) for name in names}

    def _task(self, name: str, read: Callable, *arguments) -> Task:
        id = self._id(name)
        return Task(id, partial(read, *arguments, id))

    def _id(self, name: str) -> str:
        return printable(self.prefix + name)

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(id=name, reason=reason))

    def _walk(self, folder: Path) -> list[str]:
        """Names of the ordinary files below a folder, relative to it, sorted; others are told."""
        names = []
        for parent, folders, files in os.walk(folder, onerror=self._unread):
            for name in (*folders, *files):
                path = Path(parent, name)
                relative = path.relative_to(folder).as_posix()
                # A dot folder is told as one entry: what is in it belongs to tools (.git).
                if name.startswith("."):
                    self._skip(relative, "hidden file or folder")
                elif name in folders:
                    if path.is_symlink():
                        self._skip(relative, "link to a folder")
                elif not inside(path, folder):
                    self._skip(relative, "link out of the input folder")
                elif not path.is_file():
                    self._skip(relative, "not an ordinary file")
                else:
                    names.append(relative)
            # In place: os.walk goes on by this very list. Links to folders it does not follow.
            folders[:] = [name for name in folders if not name.startswith(".")]
        # os.walk comes in the file system's order, which differs between machines.
        self.skipped.sort(key=lambda entry: entry.id)
        return sorted(names)

    def _unread(self, error: OSError) -> None:
        self._skip(Path(error.filename).relative_to(self.root).as_posix(), f"cannot be read: {error.strerror}")


def _is_about(name: str) -> bool:
    """Whether a file tells of the others beside it, as README.md does."""
    stem = Path(name).name.partition(".")[0].lower()
    return stem in ABOUT or "_sources" in Path(name).parts


def _to_the_end(tasks: Iterator[Task], id: str) -> Iterator[Task]:
    """Tasks of a file; what a library raises at its damage is one more of them."""
    try:
        yield from tasks
    except Exception as error:  # any bytes may come in
        yield given(unread(id, error))


def _prefixes(inputs: list[str]) -> list[str]:
    """What makes ids of several inputs differ: nothing for one, else each input's name, numbered if equal."""
    if len(inputs) == 1:
        return [""]
    names = [name if name.startswith(SCENES) else Path(name).resolve().name for name in inputs]
    return [f"{n}/" if names.count(n) == 1 else f"{n}~{names[:i].count(n) + 1}/" for i, n in enumerate(names)]


def _scene_tasks(kind: str, prefix: str, num_documents: int, seed: int, image_size: int) -> Iterator[Task]:
    for index in range(num_documents):
        yield Task(f"{prefix}{kind} {index}", partial(_read_scene, kind, prefix, index, seed, image_size))


def _read_scene(kind: str, prefix: str, index: int, seed: int, image_size: int) -> Iterator[Document]:
    from megamm.data import scenes  # draws with OpenCV; not needed for files

    document = scenes.document(kind, index, seed, image_size)  # type: ignore[arg-type]  # it checks the kind
    yield Document(id=prefix + document.id, spans=document.spans)
