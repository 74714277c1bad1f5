"""A run's log at Weights & Biases."""

import uuid
from pathlib import Path

from megamm.config import Config
from megamm.files import write_text
from megamm.settings import to_dict


class WandbRun:
    """Logs to the project ``train.wandb``; a resumed run goes on in the same one there.

    What W&B reads from its environment (``WANDB_MODE=offline``, ``WANDB_ENTITY``, ...) holds.
    """

    def __init__(self, run_dir: Path, config: Config):
        import wandb  # slow to import

        name = run_dir / "wandb-id"
        if not name.exists():
            write_text(name, uuid.uuid4().hex)
        self._run = wandb.init(
            project=config.train.wandb,
            name=run_dir.name,
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=to_dict(config),
            settings=wandb.Settings(console="off"),
        )
        # Not W&B's own step, which may only grow: a run that goes on from a checkpoint logs some steps again.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict) -> None:
        """Log one flat record of numbers; ``step`` is required."""
        self._run.log({name: value for name, value in record.items() if value is not None})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
