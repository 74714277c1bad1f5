"""Errors that a user can act on; ``megamm_laws``, a library of its own, defines them for both."""

import sys

from megamm_laws.errors import InputError, ProblemsError, RunError, error_text, exit_on_error

__all__ = ["InputError", "ProblemsError", "RunError", "error_text", "exit_on_error", "warn"]


def warn(message: str) -> None:
    """Tell of something that is not right but was put right, in a line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
