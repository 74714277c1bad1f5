"""Every setting of a training run, in one place.

Keyword-only dataclasses filled from YAML and ``--section.key value`` overrides. Values are parsed and typed
by jsonargparse, one setting at a time, so that *all* problems are reported at once, an unknown key with the
nearest known one. jsonargparse and yaml are imported where they parse: settings made in Python need neither.
"""

import dataclasses
import difflib
import functools
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megamm.errors import InputError, ProblemsError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


MAX_DEPTH = 10_000
"""Blocks; the deepest transformers trained have a thousand."""


@dataclass(kw_only=True)
class VisionConfig:
    """The image encoder of a late-fusion model."""

    width: int | None = None
    """Width of the vision tower; by default half of model.width, rounded up to a multiple of head_dim."""
    depth: int | None = None
    """Number of blocks; by default model.depth."""
    head_dim: int | None = None
    """Width of an attention head; by default model.head_dim."""


@dataclass(kw_only=True)
class AttentionConfig:
    """Who computes the decoder's attention; all backends give the same numbers."""

    backend: Literal["interval", "flex", "flex_flash", "flash", "sdpa"] | None = None
    """interval: our Triton kernel; flex: FlexAttention; flex_flash: its FLASH backend (flash-attn-4); flash:
    flash-attn, for rows of text only; sdpa: torch's own, also on the CPU. By default interval on CUDA, sdpa on the
    CPU."""


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture and size."""

    architecture: Literal["early", "late", "text"] = "early"
    """early: raw patches in the decoder; late: a ViT before it; text: blind, images left empty (a baseline)."""
    width: int = 800
    """Width of the residual stream."""
    depth: int = 24
    """Number of blocks."""
    head_dim: int | None = None
    """Width of an attention head; by default the multiple of 8 nearest to 64 that divides the width."""
    hidden_multiple: int = 256
    """The SwiGLU hidden width is 8/3 of the width rounded up to a multiple of this."""
    vocab_size: int | None = None
    """Rows of both embedding tables; by default the tokenizer's, from the prepared data."""
    image_size: int | None = None
    """Image height and width in pixels; by default the prepared data's."""
    patch_size: int | None = None
    """Patch height and width in pixels; by default the prepared data's."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMS norm."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def problems(self) -> list[str]:
        found = []
        for name in ("width", "depth", "hidden_multiple"):
            if getattr(self, name) < 1:
                found.append(f"model.{name}: {getattr(self, name)} is not positive")
        optional = {name: getattr(self, name) for name in ("head_dim", "vocab_size", "image_size", "patch_size")}
        optional |= {f"vision.{name}": value for name, value in vars(self.vision).items()}
        below = [name for name, value in optional.items() if value is not None and value < 1]
        found += [f"model.{name}: {optional[name]} is not positive" for name in below]
        for name, depth in (("depth", self.depth), ("vision.depth", self.vision.depth or 0)):
            if depth > MAX_DEPTH:
                found.append(f"model.{name}: {depth} is above {MAX_DEPTH} blocks")
        if self.head_dim is not None and "head_dim" not in below and (self.head_dim % 2 or self.width % self.head_dim):
            found.append(f"model.head_dim: {self.head_dim} must be even and divide model.width {self.width}")
        if self.head_dim is None and self.width % 8:
            found.append(f"model.width: {self.width} is not a multiple of 8; change it or set model.head_dim")
        if self.image_size and self.patch_size and not below and self.image_size % self.patch_size:
            found.append(f"model.patch_size: {self.patch_size} does not divide model.image_size {self.image_size}")
        return found


@dataclass(kw_only=True)
class SourceConfig:
    """One data source of the mixture."""

    path: str
    """Folder written by tools/prepare_data.py."""
    weight: float = 1.0
    """Share of the mixture's tokens (text tokens and patches), relative to the other sources."""


@dataclass(kw_only=True)
class AugmentConfig:
    """Image augmentation, drawn anew for each epoch from the data seed."""

    crop_scale_min: float = 1.0
    """Random resized crop keeps between this share of the area and all of it (the paper: 0.4); 1 = off."""
    flip: bool = False
    """Random horizontal flip. Wrong for captions that say left and right, and for text in images."""


@dataclass(kw_only=True)
class DataConfig:
    """Mixture, packing and loading."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> prepared dataset and weight; the names head the per-source losses."""
    row_length: int = 1024
    """Positions in a packed row."""
    window_tokens: int = 1_000_000
    """Documents of about this many tokens are drawn, shuffled and packed together."""
    seed: int = 0
    """Seed of the data order."""
    workers: int = 1
    """Loader processes per rank; 0 loads in the training process. The data order does not depend on it."""
    prefetch: int = 4
    """Batches each worker keeps ready."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def problems(self) -> list[str]:
        found = []
        if not 8 <= self.row_length < 2**31:
            found.append(f"data.row_length: {self.row_length} is not between 8 and 2147483647 (positions are int32)")
        for name, source in self.sources.items():
            if not source.weight > 0:
                found.append(f"data.sources.{name}.weight: {source.weight} is not positive")
        if not 0 < self.augment.crop_scale_min <= 1:
            found.append(f"data.augment.crop_scale_min: {self.augment.crop_scale_min} is not in (0, 1]")
        if self.workers < 0:
            found.append(f"data.workers: {self.workers} is negative")
        return found


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    lr: float = 1.5e-3
    """Peak learning rate."""
    vision_lr_factor: float = 0.01
    """The vision tower's learning rate is this times lr (late fusion)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-4
    """Share of a weight removed per step at the peak rate, not multiplied by lr; on matrices only."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""

    def problems(self) -> list[str]:
        return [f"optimizer.{n}: {getattr(self, n)} is not positive" for n in ("lr",) if not getattr(self, n) > 0]


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over steps: warm-up, constant, cool-down."""

    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    cooldown: Literal["inverse_sqrt", "one_minus_sqrt", "linear", "cosine", "none"] = "inverse_sqrt"
    """Shape of the cool-down; none keeps the rate constant (the trunk of a ladder)."""
    cooldown_fraction: float = 0.2
    """Share of all steps spent in the cool-down."""

    def problems(self) -> list[str]:
        if not 0 <= self.cooldown_fraction <= 1:
            return [f"schedule.cooldown_fraction: {self.cooldown_fraction} is not in [0, 1]"]
        return []


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch, numerics and place of a run."""

    run_dir: str = "runs/default"
    """Where config.yaml, run.json, metrics.jsonl, tensorboard/, checkpoints/ and result.json go."""
    steps: int | None = None
    """Optimizer steps; give this or tokens."""
    tokens: float | None = None
    """Positions to train on (text tokens, patches and padding); rounded up to whole steps."""
    batch_rows: int = 2048
    """Rows of a global batch; with rows of 1024 the default is 2M tokens."""
    micro_rows: int | None = None
    """Rows of one forward and backward pass of a rank; by default the rank's whole share of the batch."""
    seed: int = 0
    """Seed of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters and optimizer state stay float32."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    peak_flops: float | None = None
    """FLOP/s of one rank's device, against which MFU is stated; without it MFU is not logged."""
    branch_from: str | None = None
    """Run directory of a trunk; start from its checkpoint of the step where the cool-down begins."""

    def problems(self) -> list[str]:
        found = []
        if (self.steps is None) == (self.tokens is None):
            found.append("train.steps, train.tokens: give exactly one of the two")
        for name in ("steps", "tokens", "batch_rows", "micro_rows", "log_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"train.{name}: {value} is not positive")
        return found


@dataclass(kw_only=True)
class EvalConfig:
    """Validation on the val split of every source, the same rows each time."""

    every: int = 0
    """Steps between validations; 0 = at the end only."""
    rows: int = 64
    """Rows per source."""
    swap_images: bool = False
    """Also evaluate with each image replaced by another one, to show how far images are used."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming. A run directory with a checkpoint is resumed from it."""

    every: int = 1000
    """Steps between checkpoints; 0 = at the end and at `steps` only."""
    steps: list[int] = field(default_factory=list)
    """Further steps to save at; these are never deleted (the branch points of a trunk)."""
    keep: int = 2
    """Number of the newest periodic checkpoints kept."""
    final: bool = True
    """Save at the last step."""

    def problems(self) -> list[str]:
        return [f"checkpoint.keep: {self.keep} is below 1"] if self.keep < 1 else []


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    data: int | None = None
    """Ranks that each hold a shard of every parameter (FSDP2) and read their own rows; by default all."""


@dataclass(kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def problems(self) -> list[str]:
        """Everything wrong with the values, a line each."""
        sections = (getattr(self, f.name) for f in dataclasses.fields(self))
        return [line for section in sections if hasattr(section, "problems") for line in section.problems()]


def to_dict(config: Any) -> dict:
    """The settings as nested plain dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The settings as YAML, in the order of their definition."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: Path | str) -> dict:
    """Read a YAML mapping safely.

    Raises:
        InputError: the file is missing, is not YAML or is not a mapping.
    """
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping of sections (model:, data:, ...)")
    return value


def parse_overrides(arguments: list[str]) -> dict:
    """Turn ``["--train.steps", "10", "--data.workers=2"]`` into nested dictionaries; values are YAML scalars."""
    import yaml

    nested: dict = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise InputError(f"{key!r}: expected --section.key value")
        key, equals, value = key[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"--{key}: a value must follow")
            value = rest.pop(0)
        try:
            merge(nested, _nest(key.split("."), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise InputError(f"--{key}: {value!r} is not valid YAML") from error
    return nested


def merge(base: dict, changes: dict) -> dict:
    """Merge nested ``changes`` into ``base`` in place, the later value winning; returns ``base``."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value
    return base


def build(cls: type, values: dict, where: str = "config") -> Any:
    """Make a dataclass of settings from nested dictionaries.

    Raises:
        ProblemsError: with every problem in ``values``.
    """
    from jsonargparse import ArgumentError

    parser = _parser(cls)
    problems: list[str] = []
    leaves = _known_leaves(cls, values, [], problems)
    good = functools.reduce(lambda nested, leaf: merge(nested, _nest(*leaf)), leaves, {})
    try:
        parser.parse_object(good)
    except ArgumentError:  # parse one setting at a time, to name each that is wrong
        good = {}
        for path, value in leaves:
            try:
                parser.parse_object(_nest(path, value))
            except ArgumentError as error:
                problems.append(f"{'.'.join(path)}: {_last_line(error)}")
            else:
                merge(good, _nest(path, value))
    config = None
    try:
        config = cls(**vars(parser.instantiate(parser.parse_object(good))))
    except ArgumentError as error:
        if not problems:
            problems.append(_last_line(error))
    if config is not None and hasattr(config, "problems"):
        problems.extend(config.problems())
    if problems:
        raise ProblemsError(where, problems)
    return config


def load(paths: list[Path | str] | Path | str | None, overrides: list[str] | None = None) -> Config:
    """Read a training config from YAML and command-line overrides.

    Raises:
        InputError: a file that cannot be read, or every problem of the settings at once.
    """
    values: dict = {}
    paths = [paths] if isinstance(paths, (str, Path)) else paths or []
    for path in paths:
        merge(values, read_yaml(path))
    merge(values, parse_overrides(overrides or []))
    return build(Config, values, where=", ".join(map(str, paths)) or "config")


def make_parser(cls: type = Config, **kwargs) -> "ArgumentParser":
    """The jsonargparse parser of a dataclass of settings (also the source of ``--help``)."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, **kwargs)
    parser.add_class_arguments(cls, None)
    return parser


@functools.cache
def _parser(cls: type) -> "ArgumentParser":
    return make_parser(cls)


def _known_leaves(cls: type, values: dict, prefix: list[str], problems: list[str]) -> list[tuple[list[str], Any]]:
    """List the settings in ``values`` that ``cls`` has; note the unknown ones in ``problems``."""
    hints = typing.get_type_hints(cls)
    leaves = []
    for key, value in values.items():
        path = [*prefix, str(key)]
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(hints)}"
            problems.append(f"{'.'.join(path)}: unknown key; {hint}")
            continue
        nested = _dataclass_in(hints[key])
        if typing.get_origin(hints[key]) is dict and nested and isinstance(value, dict):
            for name, entry in value.items():
                if isinstance(entry, dict):
                    _known_leaves(nested, entry, [*path, str(name)], problems)
                    known = {k: v for k, v in entry.items() if k in typing.get_type_hints(nested)}
                    leaves.append(([*path, str(name)], known))
                else:
                    leaves.append(([*path, str(name)], entry))
        elif nested and isinstance(value, dict):
            leaves.extend(_known_leaves(nested, value, path, problems))
        elif nested and value is None:
            continue
        elif dataclasses.is_dataclass(hints[key]):
            problems.append(f"{'.'.join(path)}: expected a mapping of settings, found {value!r}")
        else:
            leaves.append((path, value))
    return leaves


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type hint holds, if any (itself, in a dict's values or in a union)."""
    if dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (dict, types.UnionType):
        return next((a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)), None)
    return None


def _nest(path: list[str], value: Any) -> dict:
    return {path[0]: _nest(path[1:], value) if len(path) > 1 else value}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else str(error)
