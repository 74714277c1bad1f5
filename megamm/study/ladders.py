"""A study: architectures x widths x token budgets x mixtures, expanded into ladders of training runs.

A ladder is all budgets of one model on one mixture. Its trunk runs at a constant rate and is trained once; each
budget is a branch that leaves the trunk where its own cool-down begins (Hagele et al. 2024, arXiv 2405.18392).
With budgets D_1 < ... < D_n and a cool-down share f a ladder costs (1 - f) D_n + f (D_1 + ... + D_n).
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megamm.config import Config
from megamm.errors import InputError, ProblemsError
from megamm.model.counts import count_parameters, paper_flops
from megamm.settings import build, marked, merge, setting
from megamm.training.schedule import cooldown_start
from megamm.yaml_text import read_yaml

DEFAULT_MIXTURE = "default"
TRUNK = "trunk"


@dataclass(kw_only=True)
class SingleRunConfig:
    """One run beside the grid, such as the blind text model at one size."""

    architecture: str
    """As in the grid; need not be part of it."""
    width: int = setting(min=2, max=10**6)
    """Width of the model."""
    tokens: float = setting(min=1, max=1e18)
    """Budget in training positions."""
    mixture: str | None = None
    """Name of a mixture; by default the first one."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Config sections, over those of the base, the architecture and the width."""


@dataclass(kw_only=True)
class SweepCellsConfig:
    """Which cells of the grid are swept, in every architecture and mixture."""

    widths: list[int] = setting(default_factory=list, min=2, max=10**6)
    """Some of the study's; by default all."""
    tokens: list[float] = setting(default_factory=list, min=1, max=1e18)
    """Some of the study's; by default the smallest one."""


@dataclass(kw_only=True)
class SweepConfig:
    """Runs of the grid that are trained at other learning rates, too, to see whether the ladders are tuned."""

    lr: list[float] = setting(default_factory=list, min=1e-3, max=1e3)
    """Factors on the learning rate that a run has by the other sections; without 1, which is the grid's own run."""
    at: SweepCellsConfig = field(default_factory=SweepCellsConfig)
    """The cells."""


@dataclass(kw_only=True)
class StudyConfig:
    """A grid of training runs."""

    name: str
    """Title of the study."""
    base: Config = setting(default_factory=Config, partial=True)
    """Settings of all runs, in the sections of a training config."""
    architectures: list[str] | dict[str, dict[str, Any]]
    """Values of model.architecture, or names with the config sections that each changes."""
    widths: list[int] | dict[int, dict[str, Any]] = setting(min=2, max=10**6)
    """Values of model.width, each with the config sections that it changes where it is a mapping."""
    tokens: list[float] = setting(min=1, max=1e18)
    """Budgets in training positions (text tokens, patches and padding), rounded up to whole steps."""
    mixtures: dict[str, dict[str, float]] = setting(default_factory=dict, min=1e-9, max=1e9)
    """Name -> weight of each source that takes part; by default one mixture, with the weights in the base."""
    baselines: list[SingleRunConfig] = field(default_factory=list)
    """Runs beside the grid."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Learning rates to try at some cells of the grid."""

    def problems(self) -> list[str]:
        found = [f"{name}: empty" for name in ("architectures", "widths", "tokens") if not getattr(self, name)]
        sources = self.base.data.sources
        for mixture, weights in self.mixtures.items():
            unknown = [source for source in weights if source not in sources]
            if unknown or not weights:
                named = ", ".join(unknown) or "empty mixture"
                found.append(f"mixtures.{mixture}: {named}; known in base.data.sources: {', '.join(sources)}")
        for i, single in enumerate(self.baselines):
            if single.mixture is not None and single.mixture not in self.mixtures:
                found.append(f"baselines.{i}.mixture: {single.mixture!r} is not one of mixtures")
        return found + self._sweep_problems()

    def _sweep_problems(self) -> list[str]:
        found, sweep = [], self.sweep
        if 1 in sweep.lr:
            found.append("sweep.lr: 1 is the grid's own run; leave it out")
        if not sweep.lr and (sweep.at.widths or sweep.at.tokens):
            found.append("sweep.lr: empty; give factors on the learning rate, such as [.25, .5, 2, 4]")
        grid: list[tuple[str, list, list]] = [
            ("widths", sweep.at.widths, list(self.widths)),
            ("tokens", sweep.at.tokens, self.tokens),
        ]
        for name, asked, known in grid:
            if other := [value for value in asked if value not in known]:
                named = [", ".join(f"{value:g}" for value in values) for values in (other, known)]
                found.append(f"sweep.at.{name}: {named[0]}: not in the study's {name}: {named[1]}")
        return found


@dataclass(kw_only=True)
class Run:
    """One training run of a study: a plain run, a trunk, or a branch."""

    name: str
    """Unique in the study; also the name of its directory."""
    ladder: str
    architecture: str
    width: int
    mixture: str
    start: int
    """First step that the run trains itself; a branch takes those before it from its trunk."""
    trunk: bool
    values: dict
    """Its config file."""
    config: Config
    """The same, with defaults."""

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def tokens(self) -> int:
        """Training positions, with those of its trunk."""
        return self.steps * _step_tokens(self.config)

    def flops(self, patch_share: float, *, own: bool) -> float:
        """6ND FLOPs (see ``paper_flops``) of a run with a resolved config, counting padding as tokens.

        Args:
            patch_share: image patches per position.
            own: without the steps taken from the trunk.
        """
        positions = (self.steps - self.start * own) * _step_tokens(self.config)
        return paper_flops(count_parameters(self.config.model), positions, positions * patch_share)


@dataclass(kw_only=True)
class Study:
    """All runs of a study; within a ladder the trunk comes first, then its branches by length."""

    name: str
    ladders: dict[str, list[Run]]

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.ladders.values() for run in runs]

    def saving(self, patch_shares: dict[str, float]) -> dict[str, float]:
        """What trunks save, in 6ND FLOPs, over the ladders that have one.

        Args:
            patch_shares: run name -> image patches per position.

        Returns:
            ``flops_trained`` with trunks, ``flops_apart`` if each budget were trained from the start,
            ``flops_longest`` of the longest runs alone, and ``trained_to_longest``, ``apart_to_longest``.
            Empty where no ladder has a trunk.
        """
        trained = apart = longest = 0.0
        for runs in self.ladders.values():
            if not runs[0].trunk:
                continue
            whole = [run.flops(patch_shares[run.name], own=False) for run in runs[1:]]
            trained += sum(run.flops(patch_shares[run.name], own=True) for run in runs)
            apart += sum(whole)
            longest += max(whole)
        if not longest:
            return {}
        return {
            "flops_trained": trained,
            "flops_apart": apart,
            "flops_longest": longest,
            "trained_to_longest": trained / longest,
            "apart_to_longest": apart / longest,
        }


def read_study(path: Path | str, size: str | None = None) -> dict:
    """The nested dictionaries of a study file; reads no data.

    Args:
        size: one of the file's ``sizes`` (name -> sections of the study, which are merged over those that all sizes
            share), where it has some.

    Raises:
        InputError: a file that cannot be read, a size that it does not have, or none where it has some.
    """
    values = read_yaml(path)
    sizes = values.pop("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(sections, dict) for sections in sizes.values()):
        raise InputError(f"{path}: sizes: expected a mapping of names to sections of the study")
    if size is None and not sizes:
        return values
    if size not in sizes:
        named = f"sizes here: {', '.join(map(str, sizes))}" if sizes else "the study has no sizes"
        raise InputError(f"{path}: --size: {'not given' if size is None else f'{size!r} is none of them'}; {named}")
    return merge(values, sizes[size])


def expand(values: dict, out: Path, where: str = "study") -> Study:
    """Expand the nested dictionaries of a study into runs below ``out``/runs; reads no data.

    Raises:
        InputError: every problem of the study and of the configs of its runs.
    """
    config = build(StudyConfig, values, where=where)
    cells = _cells(config)
    names = [cell.ladder for cell in cells]
    problems = {f"{n}: in the grid or in baselines twice; remove one": None for n in names if names.count(n) > 1}
    ladders: dict[str, list[Run]] = {}
    for cell in cells:
        try:
            ladders[cell.ladder] = _ladder(cell, config, values.get("base") or {}, out)
        except ProblemsError as error:
            # Runs share most settings: a problem is named once, not once per run.
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ProblemsError(where, list(problems))
    return Study(name=config.name, ladders=ladders)


@dataclass(kw_only=True)
class _Cell:
    """What a ladder is made of."""

    architecture: str
    width: int
    mixture: str
    budgets: list[float]
    overrides: dict = field(default_factory=dict)
    factor: float | None = None
    """On the learning rate, where the ladder is of a sweep."""

    @property
    def ladder(self) -> str:
        name = f"{self.architecture}-w{self.width:04d}-{self.mixture}"
        return name if self.factor is None else f"{name}-lr{self.factor:g}"


def _cells(config: StudyConfig) -> list[_Cell]:
    """The grid, then the baselines, then what is swept: a study that is stopped early has its ladders."""
    mixtures = list(config.mixtures) or [DEFAULT_MIXTURE]
    grid = [
        _Cell(architecture=architecture, width=width, mixture=mixture, budgets=config.tokens)
        for mixture in mixtures
        for architecture in config.architectures
        for width in config.widths
    ]
    singles = [
        _Cell(
            architecture=s.architecture,
            width=s.width,
            mixture=s.mixture or mixtures[0],
            budgets=[s.tokens],
            overrides=s.overrides,
        )
        for s in config.baselines
    ]
    at = config.sweep.at
    swept = [
        replace(cell, budgets=at.tokens or [min(config.tokens)], factor=factor)
        for cell in grid
        if cell.width in (at.widths or config.widths)
        for factor in config.sweep.lr
    ]
    return grid + singles + swept


def _ladder(cell: _Cell, config: StudyConfig, base: dict, out: Path) -> list[Run]:
    """The runs of one ladder.

    Raises:
        ProblemsError: with every problem.
    """
    shared = _shared_settings(cell, config, base)
    # Any length will do: only batch and schedule are read of it.
    typed = build(Config, merge(copy.deepcopy(shared), {"train": {"steps": 1}}))
    if cell.factor is not None:
        rate = float(f"{typed.optimizer.lr * cell.factor:.6g}")
        merge(shared, {"optimizer": {"lr": rate}, "train": {"sweep": f"lr {cell.factor:g}"}})
    steps = sorted(-(-int(tokens) // _step_tokens(typed)) for tokens in cell.budgets)
    starts = [cooldown_start(typed.schedule, n) for n in steps]
    _check_lengths(typed, steps, starts, cell.budgets)

    def make(label: str, start: int, changes: dict) -> Run:
        name = f"{cell.ladder}-{label}"
        place = {"train": {"run_dir": str(out / "runs" / cell.ladder / name)}}
        values = merge(copy.deepcopy(shared), merge(place, changes))
        if label == TRUNK:
            values["eval"].pop("tasks", None)  # a mapping grows in a merge: it cannot be emptied by a change
        return Run(
            name=name,
            ladder=cell.ladder,
            architecture=cell.architecture,
            width=cell.width,
            mixture=cell.mixture,
            start=start,
            trunk=label == TRUNK,
            values=values,
            config=build(Config, values, where=name),
        )

    # A name says nothing of the other budgets, so that it stays when the study grows.
    labels = [f"t{int(tokens)}" for tokens in sorted(cell.budgets)]
    if len(steps) == 1:
        return [make(labels[0], 0, {"train": {"steps": steps[0]}})]
    # The trunk's last step is the branch point of the longest branch.
    branch_points = {"checkpoint": {"steps": starts, "final": True}}
    # A trunk's losses are compared with nothing, so that swapped images and tasks need not be evaluated.
    constant = {"schedule": {"cooldown": "none"}, "eval": {"swap_images": False}}
    trunk = make(TRUNK, 0, {"train": {"steps": starts[-1]}, **branch_points, **constant})
    branches = [
        make(label, start, {"train": {"steps": n, "branch_from": trunk.config.train.run_dir}})
        for label, start, n in zip(labels, starts, steps, strict=True)
    ]
    return [trunk, *branches]


def _shared_settings(cell: _Cell, config: StudyConfig, base: dict) -> dict:
    """Config sections of all runs of a ladder: the base, then architecture, width, overrides and mixture."""
    layers = [base, cell.overrides]
    chosen: list[tuple[Any, int | str]] = [(config.widths, cell.width), (config.architectures, cell.architecture)]
    for options, key in chosen:
        if isinstance(options, dict):
            # Right behind the base: the architecture, put there last, comes before the width.
            layers.insert(1, options.get(key) or {})
    given = [
        f"{s}.{k}" for layer in layers for s, section in layer.items() if isinstance(section, dict) for k in section
    ]
    reserved = [
        f"{k}: set by the study from widths, tokens and --out; remove it" for k in marked(Config, "study") if k in given
    ]
    if reserved:
        raise ProblemsError(cell.ladder, reserved)
    shared: dict = {"model": {"architecture": cell.architecture, "width": cell.width}}
    for layer in layers:
        merge(shared, copy.deepcopy(layer))
    for key, value in (shared.get("start") or {}).items():
        if isinstance(value, str):  # not format(): other braces in a path are its own
            shared["start"][key] = value.replace("{width}", str(cell.width))
    if cell.architecture != shared["model"]["architecture"]:  # several may share a model.architecture
        merge(shared, {"train": {"variant": cell.architecture}})
    if config.mixtures:
        sources = shared["data"]["sources"]
        shared["data"]["sources"] = {s: {**sources[s], "weight": w} for s, w in config.mixtures[cell.mixture].items()}
    return shared


def _check_lengths(config: Config, steps: list[int], starts: list[int], budgets: list[float]) -> None:
    schedule, batch = config.schedule, _step_tokens(config)
    found = [
        f"tokens: a budget of {budget:,.0f} is less than one batch, {batch:,} positions (train.batch_rows "
        f"{config.train.batch_rows} x data.row_length {config.data.row_length}); make the batch smaller or the budget "
        "larger"
        for budget in budgets
        if budget < batch
    ]
    if found:  # what follows from it would only confuse
        raise ProblemsError("study", found)
    if len(set(steps)) < len(steps):
        found.append(f"tokens: budgets {', '.join(f'{b:g}' for b in budgets)} are {steps} steps; make them differ")
    if len(steps) > 1:
        if starts == steps:
            found.append(
                "schedule.cooldown: branches are the cool-downs of a trunk, and there is none; set schedule.cooldown "
                "and schedule.cooldown_fraction, or give one budget"
            )
        elif starts[0] < max(1, schedule.warmup_steps):
            found.append(
                f"schedule.warmup_steps: {schedule.warmup_steps} reach beyond step {starts[0]}, where the cool-down "
                f"of the shortest budget begins; shorten the warm-up or drop that budget"
            )
    if found:
        raise ProblemsError("study", found)


def _step_tokens(config: Config) -> int:
    """Training positions of an optimizer step."""
    return config.train.batch_rows * config.data.row_length
