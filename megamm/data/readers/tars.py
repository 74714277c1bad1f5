"""Webdataset tars: pictures and captions that share a name, in any order, from damaged archives too.

The archive is read header by header, and not through ``tarfile``, which ends without a word at a header that is
damaged, at a cut between two members and at the first end mark of archives that were put together.
"""

import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megamm.data.documents import Skipped, Task, given, printable
from megamm.data.readers.captions import IMAGE_SUFFIXES
from megamm.data.readers.interleaved import is_interleaved, with_pictures
from megamm.data.readers.records import read_record, text_of
from megamm.data.readers.streams import MAX_FILE_BYTES, Stream, open_stream

BLOCK = 512
CAPTION_SUFFIXES = (".txt", ".text", ".caption")
METADATA_SUFFIX = ".json"
MAX_NAME_BYTES = 2**20
PROBE_MEMBERS = 1000
"""Members that are looked at to find what an archive holds."""

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_WITHOUT_CONTENT = (*_LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file of an archive whose content lies at ``offset`` of the archive or of the store."""

    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()

    @property
    def stem(self) -> str:
        return self.name[: len(self.name) - len(self.suffix)]

    @property
    def key(self) -> str:
        """What the members of a sample share: the name up to the first dot of its last part."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]


@dataclass
class _Sample:
    members: list[Member] = field(default_factory=list)

    def of(self, *suffixes: str) -> list[Member]:
        return [member for suffix in suffixes for member in self.members if member.suffix == suffix]


def tar_kind(path: Path) -> str:
    """interleaved if the first metadata in a tar is a conversation or a web document, else caption."""
    stream, buffered = open_stream(path)
    with buffered, tempfile.TemporaryFile() as store:
        content = store if stream.packed else buffered
        for member in islice(_Archive(stream, buffered, store, "").members(), PROBE_MEMBERS):
            if isinstance(member, Member) and member.suffix == METADATA_SUFFIX:
                record = _json(_read(content, member))
                return "interleaved" if isinstance(record, dict) and is_interleaved(record) else "caption"
    return "caption"


def tar_tasks(path: Path, id: str, kind: str) -> Iterator[Task]:
    """Tasks of a tar: one for each sample, then what was not used.

    Members belong together if their names are alike up to the first dot, wherever in the archive they are; a name
    that comes again starts another sample. Pictures with a caption each (a.v0.jpg, a.v0.txt) are documents of
    their own, else a sample is its pictures and then its caption.
    """
    stream, buffered = open_stream(path)
    with buffered, tempfile.TemporaryFile() as store:
        # A packed archive can be read once from the front only, while samples are complete at its end: its files wait
        # in a temporary one.
        content = store if stream.packed else buffered
        samples: dict[str, _Sample] = {}
        latest: dict[str, str] = {}  # name of a sample -> its last repeat
        unused: list[Skipped] = []
        for found in _Archive(stream, buffered, store, id).members():
            if isinstance(found, Skipped):
                unused.append(found)
                continue
            key = latest.get(found.key, found.key)
            # Archives that were put together may use names twice: two pictures must not become one sample.
            if any(member.name == found.name for member in samples.get(key, _Sample()).members):
                number = int(key.rpartition("~")[2]) + 1 if found.key in latest else 2
                latest[found.key] = key = f"{found.key}~{number}"
            samples.setdefault(key, _Sample()).members.append(found)
        if kind == "interleaved":
            yield from _interleaved_tasks(samples, id, content)
        else:
            for key, sample in samples.items():
                yield from _sample_tasks(sample, f"{id}:{key}", content, kind)
        for entry in unused:
            yield given(entry)


def _sample_tasks(sample: _Sample, id: str, content: BinaryIO, kind: str) -> Iterator[Task]:
    images, texts, metadata = sample.of(*IMAGE_SUFFIXES), sample.of(*CAPTION_SUFFIXES), sample.of(METADATA_SUFFIX)
    images.sort(key=lambda member: member.name)  # whatever the order in the archive
    own = {text.stem: text for text in reversed(texts)}  # reversed: of equal stems the first one holds
    # Each has its own caption: several documents under one name.
    if len(images) > 1 and len({image.stem for image in images} & own.keys()) == len(images):
        documents = [(f"{id}{image.stem[len(image.key) :]}", [image], own[image.stem]) for image in images]
    else:
        # A text member is surer to be a caption than a field of metadata.
        documents = [(id, images, (texts or metadata or [None])[0])]
    used = [caption for _, _, caption in documents]
    for name, pictures, caption in documents:
        record: dict = {"image": [_read(content, picture) for picture in pictures]}
        if caption is not None:
            record["text"] = _caption(_read(content, caption), caption.suffix)
        yield Task(name, partial(read_record, record, Path(), Path(), name, kind))
    for member in (*texts, *metadata):
        if member not in used:
            reason = "file type not read: .json" if member.suffix == METADATA_SUFFIX else "second caption"
            yield given(Skipped(id=f"{id}{member.name[len(member.key) :]}", reason=reason))


def _interleaved_tasks(samples: dict[str, _Sample], id: str, content: BinaryIO) -> Iterator[Task]:
    """Documents of the records of an archive, then what none of them uses.

    Pictures are found by the names in the records, wherever in the archive they are, or share the record's name.
    """
    every = [member for sample in samples.values() for member in sample.of(*IMAGE_SUFFIXES)]
    pictures = {member.name: member for member in every}
    by_file = {name.rpartition("/")[2]: name for name in pictures}
    used: set[Member] = set()

    def find(name: str) -> str | None:
        return name if name in pictures else by_file.get(name.rpartition("/")[2])

    def load(name: str, own: dict[str, Member]) -> bytes:
        member = own.get(name) or pictures[name]
        used.add(member)
        return _read(content, member)

    for key, sample in samples.items():
        # First the record's own: archives that were put together may use a name twice.
        own = {member.name: member for member in sample.of(*IMAGE_SUFFIXES)}
        for number, member in enumerate(sample.of(METADATA_SUFFIX)):
            name = f"{id}:{key}" if not number else f"{id}:{member.name}"
            record = _json(_read(content, member))
            if not isinstance(record, dict) or not is_interleaved(record):
                yield given(Skipped(id=name, reason="no conversation or web document"))
                continue
            record = with_pictures(record, sorted(own), find, partial(load, own=own))
            yield Task(name, partial(read_record, record, Path(), Path(), name, "interleaved"))
        for text in sample.of(*CAPTION_SUFFIXES):
            yield given(Skipped(id=f"{id}:{text.name}", reason="of another kind: not interleaved"))
    for member in every:
        if member not in used:
            yield given(Skipped(id=f"{id}:{member.name}", reason="image that nothing refers to"))


def _json(content: bytes):
    """A value of JSON; None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _caption(content: bytes, suffix: str) -> str | None:
    if suffix != METADATA_SUFFIX:
        return content.decode("utf-8-sig", errors="surrogateescape")  # preparation knows the bad ones by it
    record = _json(content)
    return text_of(record) if isinstance(record, dict) else None


class _Archive:
    """The files of an archive in their order, and what is damaged or of no use in it.

    Behind a damaged header the next good one is looked for. The content of files of use is copied to ``store``
    where the archive is packed.
    """

    def __init__(self, stream: Stream, file: BinaryIO, store: BinaryIO, id: str):
        self.stream, self.file, self.store, self.id = stream, file, store, id
        self.position = 0
        # With a size content is jumped over; of a packed archive it is not known and all is read.
        self.size = None if stream.packed else os.fstat(stream.fileno()).st_size
        # What headers before the next file said of it: a long name, a large size.
        self.extended: dict[str, str] = {}

    def members(self) -> Iterator[Member | Skipped]:
        zeros, lost = 0, False
        try:
            while block := self._read(BLOCK, or_less=True):
                if not block.strip(b"\0"):
                    zeros += len(block) == BLOCK  # a block that is cut short is no end mark
                    continue
                # Two blocks of zeros end an archive, but another one may follow.
                after_end, zeros = zeros >= 2, 0
                # After damage the content of a file may pass for a header now and then: the magic word is asked for as
                # well.
                header = None if lost and block[257:262] != b"ustar" else _header(block)
                if header is None:
                    if not lost:
                        what = "bytes behind the end" if after_end else "no good header"
                        yield self._damaged(f"{what} at byte {self.position - len(block)}; reading on at the next one")
                        self.extended = {}
                    lost = True
                    continue
                lost = False
                if not self._is_extension(header):
                    found = self._member(header, block)
                    if found is not None:
                        yield found
            # A cut between two members looks like an end otherwise.
            if zeros < 2 and not self.stream.damage:
                yield self._damaged("cut short, it has no end mark")
        except _CutShortError as cut:
            if not self.stream.damage:
                yield self._damaged(f"cut short inside {cut}")
        if self.stream.damage:
            yield self._damaged(f"{self.stream.damage} behind byte {self.position} of what it holds")

    def _is_extension(self, header: tarfile.TarInfo) -> bool:
        """Whether a header only tells of the next one; then what it tells is kept."""
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            self.extended |= _pax_fields(self._text(header))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            self.extended["path"] = self._text(header).rstrip("\0")
        elif header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            self._text(header)
        else:
            return False
        return True

    def _text(self, header: tarfile.TarInfo) -> str:
        if header.size > MAX_NAME_BYTES:
            self._pass_over(header.size, header.name)
            return ""
        content = self._read(header.size)
        self._pass_over(-header.size % BLOCK, header.name)
        return content.decode("utf-8", "surrogateescape")

    def _member(self, header: tarfile.TarInfo, block: bytes) -> Member | Skipped | None:
        """A file of use, or why it is none; None for a folder."""
        extended, self.extended = self.extended, {}
        name = printable(extended.get("path", header.name))
        # A header's own field is too small for files above 8 GiB.
        size = int(extended["size"]) if extended.get("size", "").isdecimal() else header.size
        base = name.rpartition("/")[2]
        reason = None
        if header.type in _WITHOUT_CONTENT:
            # A link's header may name the size of what it leads to; no content follows.
            size = 0
            reason = "link in a tar" if header.type in _LINKS else "member is not an ordinary file"
        elif header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
            reason = "member is not an ordinary file: sparse"
            # Further headers of the map of holes follow, while a byte says so; they must be passed to find the next
            # file.
            more = header.type == tarfile.GNUTYPE_SPARSE and block[482]
            while more:
                more = self._read(BLOCK)[504]
        elif base.startswith("."):
            reason = "hidden file"
        elif not base.lower().endswith((*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, METADATA_SUFFIX)):
            reason = f"file type not read: {Path(base).suffix.lower()}"
        elif size > MAX_FILE_BYTES:
            reason = f"file over the size limit: {size} bytes, at most {MAX_FILE_BYTES} are read"
        offset = self.position
        if reason is None and self.stream.packed:
            offset = self.store.seek(0, os.SEEK_END)
            self._pass_over(size, name, self.store)
        else:
            self._pass_over(size, name)
        self._pass_over(-size % BLOCK, name)  # content is filled up to whole blocks
        if header.type == tarfile.DIRTYPE:
            return None
        return Skipped(id=f"{self.id}:{name}", reason=reason) if reason else Member(name=name, offset=offset, size=size)

    def _read(self, size: int, or_less: bool = False) -> bytes:
        data = self.file.read(size)
        self.position += len(data)
        if len(data) < size and not or_less:
            raise _CutShortError("a header")
        return data

    def _pass_over(self, size: int, name: str, store: BinaryIO | None = None) -> None:
        """Go on by ``size`` bytes, which are copied to ``store`` if there is one."""
        if self.size is not None:
            # Seeking beyond the end raises nothing.
            if self.position + size > self.size:
                raise _CutShortError(name)
            self.file.seek(size, os.SEEK_CUR)
            self.position += size
        while self.size is None and size:
            data = self.file.read(min(size, 1 << 16))
            if not data:
                raise _CutShortError(name)
            self.position += len(data)
            size -= len(data)
            if store is not None:
                store.write(data)

    def _damaged(self, detail: str) -> Skipped:
        return Skipped(id=self.id, reason=f"damaged tar: {detail}")


class _CutShortError(Exception):
    """The archive ends inside the member that the message names."""


def _header(block: bytes) -> tarfile.TarInfo | None:
    """What a header block says; None if its checksum or a number in it is wrong."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # checks the checksum, too
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None  # base-256 numbers can be negative


def _pax_fields(text: str) -> dict[str, str]:
    """Keys and values of an extended header: lines of "length key=value"; those that are damaged are left out."""
    lines = (re.fullmatch(r"\d+ ([^=]+)=(.*)", line) for line in text.split("\n"))
    return {line[1]: line[2] for line in lines if line}


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
