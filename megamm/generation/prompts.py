"""From text and image files to the positions of a document, exactly as preparation and the loader make them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megamm.data import images
from megamm.data.rows import FIELDS, fill_row, picture_arrays
from megamm.data.shards import Example
from megamm.data.tokenizer import Tokenizer
from megamm.data.writer import Piece
from megamm.errors import InputError
from megamm.sequence import Batch

MARK = "<image>"
"""In a prompt: the place of an image."""
MAX_PIXELS = 100_000_000
"""An image of more is refused before it is decoded."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The beginning of a document.

    Attributes:
        example: tokens and layout.
        patches: uint8 [P, patch_size * patch_size * 3].
        grids: int32 [num_images, 2], rows and columns of patches.
    """

    example: Example
    patches: np.ndarray
    grids: np.ndarray

    @property
    def length(self) -> int:
        """Positions."""
        return int(np.abs(self.example.layout).sum())

    def with_text(self, ids: Sequence[int]) -> "Prompt":
        """The same with more text tokens at its end."""
        tokens, layout = np.append(self.example.tokens, np.array(ids, np.int32)), self.example.layout.copy()
        layout[-1] += len(ids)  # a prompt ends with <bos>, text or <image_end>
        return replace(self, example=Example(id="", tokens=tokens, layout=layout, images=[]))


class PromptMaker:
    """Makes prompts the way that a model's training data were prepared.

    Args:
        tokenizer: of the model.
        image_size, patch_size: in pixels; None of a model that knows no images.
        fit: how preparation made pictures square, if it did.
    """

    def __init__(self, tokenizer: Tokenizer, image_size: int | None, patch_size: int | None, fit: images.Fit):
        self.tokenizer, self.image_size, self.patch_size, self.fit = tokenizer, image_size, patch_size, fit

    def make(self, text: str, files: Sequence[Path | str] = ()) -> Prompt:
        """A prompt of text and images; each image stands at a ``<image>`` of the text, or before all text without any.

        Raises:
            InputError: as many images as marks are needed, or a file cannot be read or decoded.
        """
        parts = text.split(MARK)
        if len(parts) == 1:
            parts = [""] * len(files) + parts
        if len(parts) - 1 != len(files):
            raise InputError(f"prompt: {len(parts) - 1} places {MARK} for {len(files)} images; give one for each")
        if files and not (self.image_size and self.patch_size):
            raise InputError("prompt: the model knows no images; leave them out")
        piece, pictures = Piece(id=""), []
        for number, part in enumerate(parts):
            if number:
                pictures.append(self._pixels(Path(files[number - 1])))
                height, width, _ = pictures[-1].shape
                # Only the layout is needed here; the pixels go beside it.
                piece.add_image(b"", height * width // self.patch_size**2)
            try:
                piece.add_text(self.tokenizer.encode(part).tolist())
            except UnicodeEncodeError as error:
                raise InputError("prompt: the text is not UTF-8") from error
        tokens, layout = np.array(piece.tokens, np.int32), np.array(piece.layout, np.int32)
        example = Example(id="", tokens=tokens, layout=layout, images=[])
        return Prompt(example=example, **picture_arrays(pictures, self.patch_size or 1))

    def _pixels(self, path: Path) -> np.ndarray:
        try:
            pixels = images.read_rgb(path.read_bytes(), MAX_PIXELS)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); name an image file") from error
        except images.ImageError as error:
            raise InputError(f"{path}: {error}") from error
        # Through the stored form, so that the pixels are those that training would have read.
        return images.decode(images.encode(images.resize(pixels, self.image_size, self.fit, self.patch_size)))


def prompt_batch(prompts: Sequence[Prompt]) -> Batch:
    """A row for each prompt, padded to the longest."""
    shape = (len(prompts), max(prompt.length for prompt in prompts))
    arrays = {name: np.full(shape, value, dtype) for name, (dtype, value) in FIELDS.items()}
    is_image = np.stack(
        [
            fill_row({name: array[b] for name, array in arrays.items()}, [prompt.example], np.zeros(1, np.uint8))
            for b, prompt in enumerate(prompts)
        ]
    )
    return Batch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        patches=torch.from_numpy(np.concatenate([prompt.patches for prompt in prompts])),
        grids=torch.from_numpy(np.concatenate([prompt.grids for prompt in prompts])),
        patch_index=torch.from_numpy(np.flatnonzero(is_image)),
        label_index=torch.from_numpy(np.flatnonzero(arrays["targets"] >= 0)),
    )


def token_batch(tokens: torch.Tensor, lengths: torch.Tensor, active: torch.Tensor, patch_dim: int) -> Batch:
    """One further text token of each row.

    Args:
        tokens: int [B].
        lengths: int [B], positions that the row has already.
        active: bool [B]; other rows get padding.
        patch_dim: values of a patch, of which there is none.
    """
    ids, position = tokens[:, None].int(), lengths[:, None].int()
    none = torch.zeros(0, dtype=torch.int64)
    nothing = torch.zeros_like(ids)
    return Batch(
        tokens=ids.masked_fill(~active[:, None], FIELDS["tokens"][1]),
        positions=position,
        targets=torch.full_like(ids, FIELDS["targets"][1]),
        source=nothing.to(torch.uint8),
        label_kind=nothing.to(torch.uint8),
        # A row is one document, of which text sees all from its start.
        lo=nothing,
        hi=position.masked_fill(~active[:, None], -1),
        patches=torch.zeros(0, patch_dim, dtype=torch.uint8),
        patch_index=none,
        grids=torch.zeros(0, 2, dtype=torch.int32),
        label_index=none,
    )
