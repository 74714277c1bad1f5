"""The training log: ``metrics.jsonl`` (a line per logged step) and TensorBoard."""

import json
from pathlib import Path

from megamm.files import write_text


class MetricsLog:
    """Appends to a run's logs; opened at a step, it first drops what was logged after that step."""

    def __init__(self, run_dir: Path, start_step: int):
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in _complete_lines(self.path) if json.loads(line)["step"] <= start_step]
            write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        self._folder = run_dir / "tensorboard"
        self._start = start_step

    def write(self, record: dict) -> None:
        """Log one flat record of numbers; ``step`` is required."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(self._folder), purge_step=self._start + 1)
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close both logs."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict]:
    """All complete records of a metrics.jsonl."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a kill can cut the last one short."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
