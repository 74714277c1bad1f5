"""One view of weights, wherever they lie: parameters by our names, read one at a time and in parts.

run directory, or one of its checkpoints   through torch.distributed.checkpoint, whatever layout wrote it
config.json + safetensors                  a Hugging Face folder of a known family
model.yaml + safetensors                   our names, as ``convert.py`` writes them
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamm.config import ModelConfig, load
from megamm.errors import InputError
from megamm.exchange import towers
from megamm.exchange.families import read_decoder
from megamm.exchange.names import DECODER, Row, layouts_of, rows_of
from megamm.exchange.tensors import TensorFolder
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import resolve_model
from megamm.parallel.mesh import World
from megamm.sequence import BOS, EOS, IMAGE, PAD
from megamm.settings import build, setting
from megamm.training.checkpoint import STATE, find_damage, newest_whole, step_of
from megamm.training.tensor_files import error_words, load_tensors
from megamm.yaml_text import read_yaml

Part = tuple[slice, ...]

MODEL = "model.yaml"
"""Settings of the model in a folder of our own: :class:`FolderSettings`."""


@dataclass(kw_only=True)
class SpecialIds:
    """Token ids with a meaning; ours unless the weights came with others. null: none."""

    bos: int | None = setting(BOS, min=0, max=10**9)
    """First token of a document."""
    eos: int | None = setting(EOS, min=0, max=10**9)
    """Last token of a document."""
    pad: int | None = setting(PAD, min=0, max=10**9)
    """Padding."""
    image: int | None = setting(IMAGE, min=0, max=10**9)
    """Position of an image's patch."""

    @classmethod
    def of(cls, hf: dict) -> "SpecialIds":
        """Those that a config.json names; of several the first."""
        text, found = hf.get("text_config", hf), {}
        for name, keys in SPECIAL_KEYS.items():
            value = next((part[key] for part in (hf, text) for key in keys if part.get(key) is not None), None)
            value = value[0] if isinstance(value, list) and value else value
            # Not isinstance, which takes true for a number.
            found[name] = value if type(value) is int and value >= 0 else None
        return cls(**found)


SPECIAL_KEYS = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "pad": ("pad_token_id",),
    "image": ("image_token_index", "image_token_id"),
}
"""Their names in a config.json."""


@dataclass(kw_only=True)
class FolderSettings:
    """What goes with safetensors under our names."""

    model: ModelConfig = field(default_factory=ModelConfig)
    row_length: int = setting(4096, min=1, max=2**31 - 1)
    """Positions of the rows that the model was trained on."""
    special: SpecialIds = field(default_factory=SpecialIds)


class Weights(ABC):
    """Parameters of a model.

    Attributes:
        place: where they lie, for messages.
        config: the model's settings, resolved; of a tower alone only ``vision`` and the sizes of images count.
        shapes: of each parameter, by our names.
        length: positions of a row that the model was made for.
        special: ids of special tokens.
    """

    place: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    length: int = 4096
    special: SpecialIds = SpecialIds()

    @abstractmethod
    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        """A parameter, or part of it (slices without steps), in float32."""


def open_weights(path: Path | str) -> Weights:
    """Open weights by what lies at a path.

    Raises:
        InputError: nothing that is known, or something damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: not a folder; give a run directory, a checkpoint or a folder with safetensors")
    if (path / STATE).exists() or step_of(path) is not None:
        return CheckpointWeights(path, path.parent.parent)
    if (path / "checkpoints").is_dir():
        newest = newest_whole(path, _alone())
        if newest is None:
            raise InputError(f"{path}: the run has no checkpoint yet")
        return CheckpointWeights(newest, path)
    if (path / "config.json").exists():
        return HuggingFaceWeights(path)
    return OwnWeights(path)


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a whole model has learnt: parameters, and the biases that balance experts."""
    with torch.device("meta"):
        model = MultimodalModel(config)  # nothing is allocated
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _alone() -> World:
    """A world of this process: files are read without the other ranks."""
    return World(rank=0, size=1, device=torch.device("cpu"))


class CheckpointWeights(Weights):
    """A checkpoint of a run, checked against its manifest."""

    def __init__(self, path: Path, run_dir: Path):
        if not (run_dir / "config.yaml").exists():
            raise InputError(f"{run_dir / 'config.yaml'}: missing; a checkpoint is read with its run's settings")
        if damage := find_damage(path, _alone()):
            raise InputError(f"{path}: {damage}")
        run = load(run_dir / "config.yaml")
        self.run_dir = run_dir
        self.place, self.config, self.length = path, resolve_model(run.model), run.data.row_length
        self.shapes = model_shapes(self.config)

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        whole = torch.empty(self.shapes[name])
        load_tensors(self.place, {"model": {name: whole}}, _alone())
        return whole if part is None else whole[part]


class OwnWeights(Weights):
    """A folder of safetensors under our names, with the model's settings in ``model.yaml``."""

    def __init__(self, path: Path):
        self.place, self._tensors = path, TensorFolder(path)
        if not (path / MODEL).exists():
            raise InputError(f"{path}: neither config.json nor {MODEL} is there, so the model is not known")
        settings: FolderSettings = build(FolderSettings, read_yaml(path / MODEL), str(path / MODEL))
        self.config, self.length = resolve_model(settings.model), settings.row_length
        self.special = settings.special
        self.shapes = model_shapes(self.config)
        check_tensors(path, {name: (name, shape) for name, shape in self.shapes.items()}, self._tensors.shapes)

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        return self._tensors.read(name, part)


class HuggingFaceWeights(Weights):
    """A folder of Hugging Face's transformers: a decoder, a LLaVA, or a tower alone."""

    def __init__(self, path: Path):
        self.place, self._tensors = path, TensorFolder(path)
        where = path / "config.json"
        try:
            hf = json.loads(where.read_text(encoding="utf-8"))
            if not isinstance(hf, dict):
                raise ValueError("not a mapping")
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: cannot be read ({error}); copy it again") from error
        names = self._tensors.shapes
        try:
            self.config, rows = _rows_of_folder(hf, str(where), names)
            length = hf.get("text_config", hf).get("max_position_embeddings")
            self.special = SpecialIds.of(hf)
        except (AttributeError, TypeError, KeyError) as error:
            raise InputError(f"{where}: not the config of a model ({error_words(error)}); copy it again") from error
        if type(length) is int and length > 0:
            self.length = length
        layouts = layouts_of(self.config)
        self._rows: dict[str, Row] = {row.ours: row for row in rows}
        self._layouts = {row.ours: layouts[row.layout] for row in rows}
        expected: dict[str, tuple] = {}
        shapes = towers.tower_shapes(self.config) if towers.is_tower(hf) else model_shapes(self.config)
        for name, row in self._rows.items():
            parts = self._layouts[name].split(torch.empty(shapes[name], device="meta"))
            expected |= {one: (name, tuple(part.shape)) for one, part in zip(row.theirs, parts, strict=True)}
        self.shapes = {name: shapes[name] for name in self._rows}
        check_tensors(path, expected, names, lambda name: towers.is_left_out(name, hf))

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        row, layout = self._rows[name], self._layouts[name]
        # Only a tensor that is taken as it is can be read in part: the others are made of several.
        if layout.is_same:
            return self._tensors.read(row.theirs[0], part)
        whole = layout.join([self._tensors.read(one) for one in row.theirs])
        return whole if part is None else whole[part]


def _rows_of_folder(hf: dict, where: str, names: dict[str, tuple[int, ...]]) -> tuple[ModelConfig, list[Row]]:
    """Settings and table of what a config.json describes."""
    if towers.is_tower(hf):
        return towers.read_tower_folder(hf, where, names)
    if hf.get("model_type") == "llava":
        return towers.read_llava(hf, where, names)
    config = resolve_model(build(ModelConfig, {"architecture": "text"} | read_decoder(hf, where), where))
    return config, rows_of(DECODER, config, config.depth)


def check_tensors(folder: Path, expected: dict, found: dict[str, tuple[int, ...]], may_be_left=lambda name: False):
    """Check that a folder holds what a model needs, in the right shapes, and nothing else.

    Args:
        expected: their name -> (our name, shape).
        found: their name -> shape.
        may_be_left: of a name that the model does not need, whether it may be there all the same.

    Raises:
        InputError: names the first tensor that is missing, of another shape, or left over.
    """
    for name, (ours, shape) in expected.items():
        if name not in found:
            raise InputError(f"{folder}: {name} is missing (our {ours}); the folder is not whole, copy it again")
        if found[name] != shape:
            raise InputError(
                f"{folder}: {name} is {list(found[name])}, but {list(shape)} by the folder's config; one of the two "
                "is of another model"
            )
    left = [name for name in found if name not in expected and not may_be_left(name)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(f"{folder}: {left[0]}{more} have no place in the model that its config describes")
