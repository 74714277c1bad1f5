"""Packages that only some settings need: asked for by a setting, never found and used unasked."""

from importlib.util import find_spec

from megamm.config import Config
from megamm.errors import InputError

EXTRAS = {"torchao": "fp8", "wandb": "wandb", "submitit": "slurm", "pycocoevalcap": "eval", "ray": "ray"}
"""Package -> the extra of pyproject.toml that brings it."""


def require(package: str, setting: str) -> None:
    """Check that a package is there.

    Raises:
        InputError: it is missing; the message names the extra.
    """
    if find_spec(package) is None:
        extra = EXTRAS[package]
        raise InputError(
            f"{setting}: needs {package}, which is not installed; pip install {package}, "
            f"or pip install '.[{extra}]' in megamm's folder"
        )


def check_extras(config: Config) -> None:
    """Check that what a run's settings ask for is installed.

    Raises:
        InputError: a package is missing.
    """
    if config.train.fp8:
        require("torchao", "train.fp8")
    if config.train.wandb:
        require("wandb", "train.wandb")
    for name, task in config.eval.tasks.items():
        if task.kind == "caption":
            require("pycocoevalcap", f"eval.tasks.{name}.kind caption")
