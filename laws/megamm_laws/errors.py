"""Errors that a user can act on.

Each message names the file or field, what was found, what was expected and the fix. Command-line
entry points turn :class:`InputError` into exit code 2 and :class:`RunError` into exit code 1, with the
message alone on stderr.
"""

import sys
from collections.abc import Callable


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


def exit_on_error(main: Callable[[], None]) -> None:
    """Run a command-line ``main`` under the exit-code contract: 0 success, 1 run-time failure, 2 bad input."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)  # what shells give for an interrupt
