"""``python -m megamm.study.child ARGUMENTS``: ``python -m megamm.train`` that does not outlive its parent.

The parent holds the other end of our standard input. When it ends, killed with -9 or not, that pipe closes, and
we end with our loader processes; otherwise an orphan would go on training and keep the run directory locked.
"""

import os
import signal
import threading

from megamm.train import command


def end_with_parent() -> None:
    """Kill this process's group (the parent made it a leader) as soon as standard input closes."""

    def wait() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    command()
