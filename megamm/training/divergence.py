"""What to do about a run whose loss is no number any more."""

from pathlib import Path

from megamm.config import Config
from megamm.errors import RunError


def diverged(config: Config, what: str) -> RunError:
    """The error of a run that diverged, with a command-line change that the next try can start with.

    A run directory keeps its settings, and a branch those of its trunk: the lower rate needs new folders.

    Args:
        config: of the run.
        what: what was seen and when, such as "loss nan between steps 10 and 20".
    """
    train, rate = config.train, float(f"{config.optimizer.lr / 3:.2g}")

    def beside(folder: str) -> str:
        return str(Path(folder).with_name(f"{Path(folder).name}-lr{rate:g}"))

    advice = f"--optimizer.lr {rate:g} --train.run_dir {beside(train.run_dir)}"
    folder = "a new folder, as this one keeps its settings"
    if train.branch_from:
        advice += f" --train.branch_from {beside(train.branch_from)}"
        folder = "new folders for trunk and branch, as these keep their settings"
    return RunError(
        f"{train.run_dir}: {what}; the checkpoints there are good. Lower optimizer.lr (or lengthen "
        f"schedule.warmup_steps) in {folder}: {advice}"
    )
