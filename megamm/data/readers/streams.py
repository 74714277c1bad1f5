"""Files as they come: plain or packed, cut short or damaged, linked out of their folder, or no file at all."""

import bz2
import io
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from megamm.data.documents import Image, printable

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
MAX_FILE_BYTES = 256 * 2**20
"""A picture, caption, page or text above this size is refused before it is read."""

_CHUNK = 4096
_STEP = 512
"""Bytes unpacked at a time: what a decoder has made when it meets damage is lost with the call."""


class RefusedError(Exception):
    """A file that is not read; the message is a short reason."""


def without_compression(name: str) -> str:
    """A file name, lower case, without the suffix of a compression."""
    name = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def inside(path: Path, root: Path) -> bool:
    """Whether a path, links followed, lies in the folder ``root``."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def read_file(path: Path, root: Path, what: str = "file", max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of an ordinary file below ``root``.

    Raises:
        RefusedError: there is none, it lies elsewhere (``..``, a link), is a pipe or device, or is too large.
    """
    try:
        if not inside(path, root):
            raise RefusedError(f"{what} outside the input folder")
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe would block
            # Of the open file: between a look at the name and its opening another file could take its place.
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RefusedError(f"{what} is not an ordinary file")
            if status.st_size > max_bytes:
                raise RefusedError(f"{what} over the size limit: {status.st_size} bytes, at most {max_bytes} are read")
            return file.read()
    except FileNotFoundError as error:
        raise RefusedError(f"{what} not found") from error
    except (OSError, ValueError) as error:  # a NUL in the name, a name too long, a loop of links
        raise RefusedError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_picture(path: Path, root: Path, name: str) -> Image:
    """The picture in a file below ``root``; raises as :func:`read_file` does."""
    return Image(data=read_file(path, root, "image"), name=printable(name), file=os.path.normpath(path))


def decode_text(content: bytes) -> str:
    """Text of UTF-8, or of UTF-16 with its mark, without the mark.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # without a mark UTF-16 cannot be told from bytes
    return content.decode("utf-16" if utf16 else "utf-8-sig")


class Stream(io.RawIOBase):
    """The bytes of a file, unpacked if it is gzip, bzip2, xz, zstd or a zip of one file (known by its first bytes).

    Damage is no exception: the stream ends at the last byte that can be had.

    Attributes:
        damage: why the stream ended early; None where it did not.
        packed: whether the file is compressed, and so can only be read from front to back.
    """

    def __init__(self, path: Path):
        self.damage: str | None = None
        self._file = open(path, "rb")  # noqa: SIM115 (closed with the stream)
        # By content, not by name: many files are packed otherwise than they are called.
        head = self._file.read(6)
        self._file.seek(0)
        unpack = next((unpack for magic, unpack in _UNPACK.items() if head.startswith(magic)), None)
        self.packed = unpack is not None
        self._parts = unpack(self._file) if unpack else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self.packed

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        if self.damage:
            return 0
        try:
            data = next(self._parts, b"") if self.packed else self._file.read(len(buffer))
        except EOFError:
            self.damage = "compressed data cut short"
            return 0
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            self.damage = f"compressed data damaged ({error})" if self.packed else f"cannot be read ({error})"
            return 0
        buffer[: len(data)] = data
        return len(data)


def open_stream(path: Path) -> tuple[Stream, io.BufferedReader]:
    """A stream, and the same buffered."""
    stream = Stream(path)
    return stream, io.BufferedReader(stream, 1 << 16)


def _unpack(file: BinaryIO, make: Callable) -> Iterator[bytes]:
    """Parts of at most _STEP bytes; files put together of several packed ones are one."""
    pending = b""
    while True:
        # Tapes and some tools pad packed files with zeros.
        while not (pending := pending.lstrip(b"\0")):
            pending = file.read(_CHUNK)
            if not pending:
                return
        decoder = make()
        while not decoder.eof:
            # Amid a packed file: it was cut short.
            if decoder.needs_input and not pending and not (pending := file.read(_CHUNK)):
                raise EOFError
            data = decoder.decompress(pending, _STEP)
            pending = decoder.unused_data
            if data:
                yield data


class _Gzip:
    """zlib's decoder with the interface of those of bz2 and lzma."""

    def __init__(self):
        self._decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)  # 16: with gzip's header
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        # zlib hands back what it could not use, where bz2 and lzma keep it.
        out = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.needs_input = not self._decoder.unconsumed_tail and len(out) < max_length
        return out

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _unpack_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Through Arrow: the standard library has no zstd before Python 3.14."""
    stream = pa.CompressedInputStream(pa.PythonFile(_InChunks(file), "r"), "zstd")
    while data := stream.read(_STEP):
        yield data


def _unpack_zip(file: BinaryIO) -> Iterator[bytes]:
    """The one file of a zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            # Some tools add folders, and notes of their own.
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if len(names) != 1:
                raise ValueError(f"a zip of {len(names)} files, expected one: unpack it")
            with archive.open(names[0]) as member:
                while data := member.read(_STEP):
                    yield data
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, packed oddly
        raise ValueError(str(error)) from error


class _InChunks(io.RawIOBase):
    """A file that gives little at a time, so that little is lost at damage."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(_CHUNK if size < 0 else min(size, _CHUNK))


_UNPACK: dict[bytes, Callable] = {
    b"\x1f\x8b\x08": partial(_unpack, make=_Gzip),
    b"BZh": partial(_unpack, make=bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": partial(_unpack, make=lzma.LZMADecompressor),
    b"\x28\xb5\x2f\xfd": _unpack_zstd,
    b"PK\x03\x04": _unpack_zip,
}
