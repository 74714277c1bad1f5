"""The log as lines for people, where there is no terminal for a progress bar: in a job's output on a cluster."""

import sys
import time

from megamm_laws.pictures.units import duration


class PrintedLog:
    """Prints a line on stderr for each record of the log.

    Args:
        name: of the run; a ladder's runs share one output.
        step: at which the run goes on.
        steps: of the run in all.
    """

    def __init__(self, name: str, step: int, steps: int):
        self.name, self.steps = name, steps
        self._last = (step, time.monotonic())

    def write(self, record: dict) -> None:
        """Print one flat record of numbers; ``step`` is required."""
        step = record["step"]
        parts = [f"{self.name}: step {step:,} of {self.steps:,}"]
        if "loss" in record:
            parts += [
                f"loss {record['loss']:.4f}",
                f"rate {record['lr']:.3g}",
                f"{record['tokens_per_second']:,.0f} tokens/s",
            ]
            if "mfu" in record:
                parts.append(f"MFU {record['mfu']:.1%}")
            now = time.monotonic()
            # By the steps since the last line: the first ones of a run, with a compilation, say nothing of the rest.
            seconds = (now - self._last[1]) / max(1, step - self._last[0])
            self._last = (step, now)
            if step < self.steps:
                parts.append(f"{duration(seconds * (self.steps - step))} left")
        # A validation, of whatever name, without the losses by label kind.
        parts += [
            f"{name.removesuffix('/loss')} {value:.4f}"
            for name, value in record.items()
            if name.endswith("/loss") and value is not None
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left to print."""
