"""A cluster takes its machines back with a signal: save, then end with exit code 75 to be started again.

SIGTERM comes from Kubernetes, ``scancel`` and preemption, SIGUSR1 from ``sbatch --signal``. A signal may reach one
rank or all; the flag that it sets travels in the sum of each step's counts, so that all ranks stop after one step.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megamm.errors import exit_on_error

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818 - not an error
    """Training has saved and ended because of a signal."""


class StopFlag:
    """Whether this process was told to stop; set by a signal within :meth:`listen`."""

    def __init__(self):
        self.raised = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Note SIGTERM and SIGUSR1 instead of ending by them. Does nothing outside the main thread."""
        # Python lets no other thread set handlers.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        # Nothing more: a signal may come amid a collective or a write, from which nothing can be saved.
        self.raised = True


def exit_when_stopped(main: Callable[[], None]) -> None:
    """Run a command-line ``main`` under the exit-code contract, which gives 75 where a signal stopped it."""
    try:
        exit_on_error(main)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(EXIT_CODE)
