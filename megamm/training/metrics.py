"""The training log: ``metrics.jsonl`` (a line per logged step) and TensorBoard."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from megamm.errors import warn
from megamm.files import write_text


class MetricsLog:
    """Appends to a run's logs; opened at a step, it first drops what was logged after that step."""

    def __init__(
        self, run_dir: Path, start_step: int, log_every: int = 1, first_step: int = 0, validates: bool = False
    ):
        """Open the log of a run.

        Args:
            log_every: steps between lines of losses.
            first_step: after which the log of this run begins.
            validates: whether the validation after ``start_step`` is still to come: its lines are dropped, too.
        """
        self.path = run_dir / "metrics.jsonl"
        kept = self._keep_until(start_step, validates) if self.path.exists() else []
        steps = [first_step, *(record["step"] for record in kept)]
        # A gap is a loss of lines only if it is wider than any that the log has already.
        usual = max([log_every, *(b - a for a, b in pairwise(steps))])  # log_every may have been another
        if start_step - steps[-1] >= usual:
            warn(f"{self.path}: has no line of steps {steps[-1] + 1} to {start_step}; losses logged there are lost")
        self._file = self.path.open("a", encoding="utf-8")
        self._writer: Any = None  # a SummaryWriter from the first record on
        self._others: list[Any] = []
        self._folder = run_dir / "tensorboard"
        self._start = start_step

    def write(self, record: dict) -> None:
        """Log one flat record of numbers; ``step`` is required."""
        # Flushed line by line: a kill loses no line that was written, and at most cuts the last one.
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # TensorBoard cannot drop lines from its files; it is told to hide those of later steps.
            self._writer = SummaryWriter(str(self._folder), purge_step=self._start + 1)
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])
        for other in self._others:
            other.write(record)

    def also_write_to(self, log: Any) -> None:
        """Hand every further record to ``log``, too: its ``write`` takes one, its ``close`` ends it."""
        self._others.append(log)

    def _keep_until(self, start_step: int, validates: bool) -> list[dict]:
        """Drop later lines and what is no record; returns the records that stay."""

        def stays(record: dict | None) -> bool:
            if record is None or record["step"] > start_step:
                return False
            # At the step itself: the line of its losses was written before its checkpoint and stays; that of a
            # validation comes again if the validation does.
            return record["step"] < start_step or "loss" in record or not validates

        lines = _complete_lines(self.path)
        records = [_parse(line) for line in lines]
        kept = [line for line, record in zip(lines, records, strict=True) if stays(record)]
        write_text(self.path, "".join(line + "\n" for line in kept))
        if garbage := records.count(None):
            warn(f"{self.path}: {garbage} of {len(lines)} lines were not records of a step and are left out")
        # There were records, and still no checkpoint to go on from.
        if start_step == 0 and lines and garbage < len(lines):
            warn(f"{self.path.parent}: no checkpoint was written before the run ended; it starts again at step 0")
        return [record for record in records if record and stays(record)]

    def close(self) -> None:
        """Flush and close both logs."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        for other in self._others:
            other.close()


def read_metrics(path: Path) -> list[dict]:
    """All complete records of a metrics.jsonl; what is none is left out."""
    return [record for line in _complete_lines(path) if (record := _parse(line))]


def _parse(line: str) -> dict | None:
    """The record in a line; None where it is none, or has no step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a kill can cut the last one short."""
    # Damage costs its own lines: with strict decoding the whole log would be unreadable.
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]
