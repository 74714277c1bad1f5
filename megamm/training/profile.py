"""A profile of some steps: what each operation took, and on CUDA which memory it held."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megamm.files import write_text

FOLDER, ROWS = "profile", 40


class Profiler:
    """Profiles steps ``first`` to ``last`` of this rank, or those of them that it takes; without steps does nothing.

    Leaves in ``run_dir/profile``: ``rank-R.json.gz``, a trace for chrome://tracing or Perfetto; ``rank-R.txt``, the
    operations that took longest; on CUDA ``rank-R-memory.pickle``, a snapshot for pytorch.org/memory_viz.

    Args:
        steps: empty, [first, last] or [one], counted from 1.
    """

    def __init__(self, run_dir: Path, steps: list[int], rank: int, device: torch.device):
        self.folder, self.steps, self.rank = run_dir / FOLDER, steps, rank
        self.cuda = device.type == "cuda"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Begin the profile if ``step`` is the first of its steps that is taken."""
        # Not only at the first step: a run may be resumed amid them.
        if self._profile is None and self.steps and self.steps[0] <= step <= self.steps[-1]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            if self.cuda:
                # Before the steps: a snapshot only knows where memory came from if it was recorded.
                torch.cuda.memory._record_memory_history()
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """End and write the profile if ``step`` is its last."""
        if self.steps and step == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """End and write a profile that has begun: the run ends before the last of its steps."""
        if self._profile is None:
            return
        self._profile.stop()
        self.folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json.gz"))
        order = f"self_{'device' if self.cuda else 'cpu'}_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=ROWS)
        write_text(self.folder / f"rank-{self.rank}.txt", table)
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank-{self.rank}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)  # recording slows every allocation
        self._profile = None
