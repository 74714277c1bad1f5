"""Small models and rows for tests."""

import torch

from megamm.config import ModelConfig, VisionConfig
from megamm.model.sizes import resolve_model
from megamm.sequence import BOS, EOS, IGNORE, IMAGE, IMAGE_END, PAD, Batch

PATCHES = 4


def model_config(architecture: str, **kwargs) -> ModelConfig:
    defaults = {
        "width": 32,
        "depth": 2,
        "head_dim": 16,
        "hidden_multiple": 16,
        "vocab_size": 50,
        "image_size": 16,
        "patch_size": 8,
    }
    defaults["vision"] = VisionConfig(width=16, depth=3, head_dim=8)
    return resolve_model(ModelConfig(architecture=architecture, **(defaults | kwargs)))


def one_row(words: list[int], generator: torch.Generator) -> Batch:
    """<bos> image <image_end> words <eos>, alone in a row."""
    tokens = torch.tensor([[BOS, *[IMAGE] * PATCHES, IMAGE_END, *words, EOS]], dtype=torch.int32)
    length = tokens.shape[1]
    targets = torch.full_like(tokens, IGNORE)
    targets[0, PATCHES + 1 : -1] = tokens[0, PATCHES + 2 :]
    hi = torch.arange(length, dtype=torch.int32)[None].clone()
    hi[0, 1 : 1 + PATCHES] = PATCHES
    return Batch(
        tokens=tokens,
        positions=torch.arange(length, dtype=torch.int32)[None],
        targets=targets,
        source=torch.zeros_like(tokens, dtype=torch.uint8),
        label_kind=torch.ones_like(tokens, dtype=torch.uint8),
        lo=torch.zeros_like(tokens),
        hi=hi,
        patches=torch.randint(0, 256, (PATCHES, 192), generator=generator).to(torch.uint8),
        patch_index=torch.arange(1, 1 + PATCHES),
        grids=torch.tensor([[2, 2]], dtype=torch.int32),
        label_index=torch.arange(PATCHES + 1, length - 1),
    )


def stack_rows(documents: list[Batch | None], length: int) -> Batch:
    """A row for each document, padded to ``length``; None is a row of padding."""
    shape = (len(documents), length)
    places = torch.arange(length, dtype=torch.int32).expand(shape)
    fields = {
        "tokens": torch.full(shape, PAD, dtype=torch.int32),
        "positions": torch.zeros(shape, dtype=torch.int32),
        "targets": torch.full(shape, IGNORE, dtype=torch.int32),
        "source": torch.zeros(shape, dtype=torch.uint8),
        "label_kind": torch.zeros(shape, dtype=torch.uint8),
        "lo": places.clone(),
        "hi": places - 1,
    }
    patches, grids, patch_index, label_index = [torch.zeros(0, 192, dtype=torch.uint8)], [], [], []
    for row, document in enumerate(documents):
        if document is None:
            continue
        for name, field in fields.items():
            field[row, : document.tokens.shape[1]] = getattr(document, name)[0]
        patches.append(document.patches)
        grids.append(document.grids)
        patch_index.append(document.patch_index + row * length)
        label_index.append(document.label_index + row * length)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        **fields,
        patches=torch.cat(patches),
        patch_index=torch.cat([none, *patch_index]),
        grids=torch.cat([torch.zeros(0, 2, dtype=torch.int32), *grids]),
        label_index=torch.cat([none, *label_index]),
    )
