"""Whole-or-nothing file output - write beside the target, then rename over it - and JSON read back."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamm_laws.errors import InputError


def check_out(path: Path | str, *, folder: bool, option: str = "--out") -> None:
    """Check that a folder or a file can be written at ``path``, without making anything: call it before long work.

    Raises:
        InputError: an empty path, something of another kind in the way, or a folder above that is not writable.
    """
    if not str(path):  # else the working directory
        raise InputError(f"{option}: no path is given; name a {'folder' if folder else 'file'}")
    path = Path(path)
    if not folder and path.is_dir():
        raise InputError(f"{option}: {path} is a folder; give the path of a file")
    if not folder and path.exists() and not path.is_file():  # a device would be replaced, not written to
        raise InputError(f"{option}: {path} is no ordinary file; give another path")
    places = [path, *path.parents] if folder else path.parents
    nearest = next(place for place in places if os.path.lexists(place))  # "." or "/" at last
    if not nearest.is_dir():
        raise InputError(f"{option}: {nearest} is a file, not a folder; give another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option}: folder {nearest} is not writable; give another path")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces ``path`` if the block succeeds.

    On an exception the temporary file is removed and ``path`` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename over a border of file systems would copy, and could stop halfway.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    # ValueError: both what is no JSON and what is no UTF-8.
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all; NaN and infinity are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
