"""Errors that a user can act on.

Each message names the file or field, what was found, what was expected and the fix. Command-line
entry points turn :class:`InputError` into exit code 2 and :class:`RunError` into exit code 1, with the
message alone on stderr.
"""

import errno
import sys
from collections.abc import Callable

WRONG_PLACES = {
    errno.EEXIST: "something else lies where a folder has to be made; move it away",
    errno.ENOTDIR: "a file lies where a folder has to be; move it away",
    errno.EISDIR: "a folder lies where a file has to be; move it away",
    errno.EROFS: "the file system is read-only; mount it for writing, or write to another place",
    errno.EACCES: "this user may not read or write it; change its permissions, or use another place",
    errno.ENOSPC: "the disk is full; make room, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room, then run the same command again",
}
"""What the operating system's errors about a place mean for who has to mend it."""


class InputError(Exception):
    """Bad input: a file, field, setting or row that the user must change. Exit code 2."""


class ProblemsError(InputError):
    """All problems of one file at once: one beside its name, several on a line each below it."""

    def __init__(self, where: str, problems: list[str]):
        self.problems = problems
        lines = problems if len(problems) == 1 else [f"{len(problems)} problems", *(f"  {line}" for line in problems)]
        super().__init__(f"{where}: " + "\n".join(lines))


class RunError(Exception):
    """A failure while running on good input (NaN loss, full disk, lost rank). Exit code 1."""


def error_text(error: BaseException) -> str:
    """What an error says, in words: a place comes first, and what to do about it, where the system says only what."""
    if isinstance(error, OSError) and error.errno in WRONG_PLACES and error.filename:
        return f"{error.filename2 or error.filename}: {WRONG_PLACES[error.errno]}"  # 2: of a rename, where to
    return str(error)


def exit_on_error(main: Callable[[], None]) -> None:
    """Run a command-line ``main`` under the exit-code contract: 0 success, 1 run-time failure, 2 bad input."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)  # what shells give for an interrupt
