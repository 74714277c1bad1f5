"""A trained model, ready to be asked: its weights, tokenizer and image preprocessing."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import get_args

import torch

from megamm.config import DataConfig, ModelConfig, load
from megamm.data import images
from megamm.data.dataset_info import read_dataset_info
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.exchange.weights import CheckpointWeights, open_weights
from megamm.generation.prompts import PromptMaker
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import has_learnt_positions
from megamm.training.run_dir import recorded_data


@dataclass(kw_only=True)
class Loaded:
    """A model on its device, and what makes its prompts.

    Attributes:
        max_length: positions of the rows that it was trained on.
    """

    model: MultimodalModel
    prompts: PromptMaker
    max_length: int

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompts.tokenizer


def load_for_generation(
    path: Path | str,
    device: torch.device | str = "cpu",
    tokenizer: Path | str | None = None,
    fit: images.Fit | None = None,
) -> Loaded:
    """Load a run's newest checkpoint, a checkpoint, or a folder of safetensors, from whatever layout wrote it.

    Args:
        tokenizer: a tokenizer.json; by default that of the run's prepared data.
        fit: how images become square, or native; by default as in the data that the run was trained on, else
            images.DEFAULT_FIT.

    Raises:
        InputError: something is missing or damaged, the tokenizer is not the model's, or the run was trained on images
            that became square in several ways and ``fit`` does not choose one.
    """
    weights = open_weights(path)
    data = _data_of_run(weights.run_dir) if isinstance(weights, CheckpointWeights) else None
    if tokenizer is None:
        tokenizer = data.tokenizer if data else None
        if tokenizer is None:
            raise InputError(f"{path}: its prepared data are not at hand; name the tokenizer.json with --tokenizer")
    words = Tokenizer(tokenizer)
    config = weights.config
    if words.vocab_size > config.vocab_size:
        raise InputError(
            f"{tokenizer}: has {words.vocab_size} tokens, the model {config.vocab_size}; it is not the model's"
        )
    if data and data.tokenizers and words.sha256 not in data.tokenizers:
        raise InputError(f"{tokenizer}: not the tokenizer on which {path} was trained")
    if fit is None:
        fit = data.fit(config, "--fit") if data else images.DEFAULT_FIT
    if fit == "native" and has_learnt_positions(config):
        raise InputError(
            f"--fit: native, but the {config.vision.kind} tower of {path} takes square images; name another"
        )
    with torch.device("meta"):
        model = MultimodalModel(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if name in weights.shapes:
                tensor.copy_(weights.read(name))
            else:
                tensor.zero_()  # counts of training, for which to_empty leaves whatever was in memory
    model.requires_grad_(False).eval()
    prompts = PromptMaker(words, config.image_size, config.patch_size, fit)
    return Loaded(model=model, prompts=prompts, max_length=weights.length)


def _data_of_run(run_dir: Path) -> "TrainingData":
    """As its ``run.json`` recorded them; where that is missing, the data that are at hand."""
    recorded = recorded_data(run_dir) if (run_dir / "run.json").exists() else {}
    return TrainingData(load(run_dir / "config.yaml").data, recorded)


class TrainingData:
    """What a run is or was trained on.

    Args:
        config: of the data; they need not be at hand.
        recorded: their fingerprints of each source, if the run has noted any.

    Attributes:
        tokenizer: the file, if it is at hand.
    """

    def __init__(self, config: DataConfig, recorded: dict[str, dict]):
        at_hand = {name: s.path for name, s in config.sources.items() if (Path(s.path) / "dataset.json").is_file()}
        self._infos = {name: read_dataset_info(path) for name, path in at_hand.items()}
        self._fingerprints = {name: info["fingerprints"] for name, info in self._infos.items()} | recorded
        own = [path for name, path in at_hand.items() if self._infos[name]["tokenizer_sha256"] in self.tokenizers]
        self.tokenizer = Path(own[0]) / "tokenizer.json" if own else None

    @property
    def tokenizers(self) -> set[str]:
        """Digests; the sources of a run share one tokenizer."""
        return {found["tokenizer"] for found in self._fingerprints.values()}

    def fit(self, config: ModelConfig, setting: str) -> images.Fit:
        """How the images of all sources became square.

        Args:
            setting: by which a user can choose a way, for the message.

        Raises:
            InputError: not all in one way.
        """
        if config.image_size is None or config.patch_size is None:
            return images.DEFAULT_FIT  # nothing has images
        digests = {
            images.preprocessing_fingerprint(config.image_size, config.patch_size, fit): fit
            for fit in get_args(images.Fit)
        }
        found: dict[images.Fit, str] = {}
        for name, fingerprints in self._fingerprints.items():
            info = self._infos.get(name)
            # Data that are not at hand are taken to have images.
            has_images = info is None or any(split["num_images"] for split in info["splits"].values())
            if has_images and fingerprints["preprocessing"] in digests:
                found.setdefault(digests[fingerprints["preprocessing"]], name)
        if len(found) > 1:
            ways = ", ".join(f"{name}: {fit}" for fit, name in found.items())
            raise InputError(f"{setting}: the run's sources made images square in unlike ways ({ways}); name one")
        return next(iter(found), images.DEFAULT_FIT)
