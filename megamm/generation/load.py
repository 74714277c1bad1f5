"""A trained model, ready to be asked: its weights, tokenizer and image preprocessing."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megamm.config import load
from megamm.data import images
from megamm.data.dataset_info import read_dataset_info
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.exchange.weights import CheckpointWeights, open_weights
from megamm.generation.prompts import PromptMaker
from megamm.model.multimodal import MultimodalModel


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
        fit: how images become square; by default as in the run's prepared data.

    Raises:
        InputError: something is missing or damaged, or the tokenizer is not the model's.
    """
    weights = open_weights(path)
    prepared = {}
    if isinstance(weights, CheckpointWeights):
        run = load(weights.run_dir / "config.yaml")
        prepared = _prepared([source.path for source in run.data.sources.values()])
    if tokenizer is None:
        if not prepared:
            raise InputError(f"{path}: its prepared data are not at hand; name the tokenizer.json with --tokenizer")
        tokenizer = Path(prepared["path"]) / "tokenizer.json"
    words = Tokenizer(tokenizer)
    config = weights.config
    if words.vocab_size > config.vocab_size:
        raise InputError(
            f"{tokenizer}: has {words.vocab_size} tokens, the model {config.vocab_size}; it is not the model's"
        )
    if prepared and words.sha256 != prepared["tokenizer_sha256"]:
        raise InputError(f"{tokenizer}: not the tokenizer of {prepared['path']}, on which the model was trained")
    default: images.Fit = prepared.get("settings", {}).get("fit", "squash")
    with torch.device("meta"):
        model = MultimodalModel(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    model.requires_grad_(False).eval()
    prompts = PromptMaker(words, config.image_size, config.patch_size, fit or default)
    return Loaded(model=model, prompts=prompts, max_length=weights.length)


def _prepared(paths: list[str]) -> dict:
    """dataset.json of the first source that is at hand, with its ``path``; empty if none is."""
    for path in paths:
        if (Path(path) / "dataset.json").is_file():
            return read_dataset_info(path) | {"path": path}
    return {}
