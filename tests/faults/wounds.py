"""What goes wrong inside of a training process: each is called in it before the training begins."""

import builtins
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megamm.trainer import Trainer
from megamm.training import tensor_files

FILE_CALLS = [(os, "replace"), (os, "rename"), (os, "fsync"), (shutil, "rmtree"), (tensor_files.dcp, "save")]
"""Calls at which a run that writes is between two states of its folder."""

LASTING = ("told_otherwise",)
"""Wounds that a new start does not heal."""


def before_step(step: int, act: Callable[[Trainer], object]) -> None:
    """Do something once, before the training step ``step``."""
    train_step, done = Trainer.train_step, []

    def wounded(self, batches):
        if self.step == step and not done:
            done.append(step)
            act(self)
        return train_step(self, batches)

    Trainer.train_step = wounded


def at_file_call(number: int, act: Callable[[], object]) -> None:
    """Do something at the ``number``-th of the file calls, instead of it."""
    seen = [0]

    def watched(call):
        def run(*args, **kwargs):
            seen[0] += 1
            if seen[0] == number:
                act()
            return call(*args, **kwargs)

        return run

    for owner, name in FILE_CALLS:
        setattr(owner, name, watched(getattr(owner, name)))


def signal_at(step: int, number: int) -> None:
    before_step(step, lambda _: os.kill(os.getpid(), number))


def killed_when_saved(step: int) -> None:
    """Killed before a step, once the last checkpoint is whole (it is written beside the training)."""

    def kill(trainer: Trainer) -> None:
        trainer.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    before_step(step, kill)


def signal_in_validation(number: int) -> None:
    validate = Trainer.validate

    def wounded(self, *args, **kwargs):
        os.kill(os.getpid(), number)
        return validate(self, *args, **kwargs)

    Trainer.validate = wounded


def signal_at_file_call(call: int, number: int) -> None:
    at_file_call(call, lambda: os.kill(os.getpid(), number))


def full_disk_at(call: int) -> None:
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    at_file_call(call, full)


def nan_at(step: int) -> None:
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            next(iter(trainer.model.parameters())).fill_(float("nan"))

    before_step(step, spoil)


def clock_jumps_at(step: int, seconds: float) -> None:
    clock = time.time

    def jump(_: Trainer) -> None:
        time.time = lambda: clock() + seconds

    before_step(step, jump)


def loader_dies_at(step: int) -> None:
    def kill(_: Trainer) -> None:
        import multiprocessing

        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    before_step(step, kill)


def file_cut_at(step: int, path: str) -> None:
    before_step(step, lambda _: os.truncate(path, os.path.getsize(path) // 2))


def file_gone_at(step: int, path: str) -> None:
    before_step(step, lambda _: Path(path).unlink())


def folder_gone_at(step: int, path: str) -> None:
    before_step(step, lambda _: shutil.rmtree(path))


def read_only_from(step: int, path: str) -> None:
    """Nothing can be written below a folder any more, as on a file system that was mounted again after an error.

    Not by permissions: they do not stop the superuser.
    """

    def close_folder(_: Trainer) -> None:
        def guard(call, writes):
            def run(place, *args, **kwargs):
                if str(place).startswith(path) and writes(*args, **kwargs):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
                return call(place, *args, **kwargs)

            return run

        def writing(mode="r", *_, **__):
            return set(mode) & set("wax+")

        # What pathlib and shutil call in the end.
        io.open = builtins.open = guard(builtins.open, writing)
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, guard(getattr(os, name), lambda *_, **__: True))

    before_step(step, close_folder)


def second_process_at(step: int) -> None:
    """The same command is started again, while this one trains: it has to end, with one line."""

    def start(_: Trainer) -> None:
        command = [sys.executable, "-m", "megamm.train", *sys.argv[1:]]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if found.returncode != 1 or "error: " not in found.stderr or "Traceback" in found.stderr:
            raise AssertionError(f"the second process ended with {found.returncode}: {found.stderr}")

    before_step(step, start)


def told_otherwise(setting: str, value: str) -> None:
    """This rank's command line has another value of a setting than the others'."""
    sys.argv = [*(a for a in sys.argv if not a.startswith(f"--{setting}=")), f"--{setting}={value}"]
