"""Small prepared datasets for tests, written straight in the format of ``megamm.data.shards``."""

import json
import shutil
from pathlib import Path

import numpy as np

from megamm.data import images
from megamm.data.dataset_info import make_info
from megamm.data.writer import Piece, ShardWriter, pieces_table
from megamm.sequence import BOS, EOS, IMAGE_END, SPECIAL_TOKENS

NUM_CLASSES = 8


def make_dataset(
    path: Path | str,
    *,
    kind: str = "caption",
    num_documents: int = 100,
    seed: int = 0,
    image_size: int = 16,
    patch_size: int = 8,
    vocab_size: int = 300,
    max_text: int = 30,
    num_val: int = 20,
    shard_documents: int = 64,
    tokenizer_sha256: str = "0" * 64,
    fit: images.Fit = images.DEFAULT_FIT,
) -> Path:
    """Write a dataset of learnable documents and return its folder.

    A caption is an image of one of 8 colours and words that count up from a number which the colour decides;
    an interleaved document is several of these; a text counts up from a random number.

    Args:
        kind: caption, interleaved or text.
        num_documents: documents of the train split.
        num_val: documents of the val split.
        max_text: most words of a caption, of a piece of an interleaved document or of a text.
        fit: native: images of any shape.
    """
    path = Path(path)
    rng = np.random.default_rng(seed)
    splits, fingerprints = {}, {}
    for split, count in (("train", num_documents), ("val", num_val)):
        documents = [
            _document(rng, f"{split}-{i}", kind, image_size, patch_size, vocab_size, max_text, fit == "native")
            for i in range(count)
        ]
        shutil.rmtree(path / split, ignore_errors=True)
        writer = ShardWriter(path / split, shard_documents, fit == "native")
        writer.add_table(pieces_table(documents))
        splits[split], fingerprints[split] = writer.close(), writer.fingerprint.hex()
    info = make_info(
        kind=kind,
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        image_size=image_size,
        patch_size=patch_size,
        max_length=1024,
        splits=splits,
        fingerprints=fingerprints,
        fit=fit,
    )
    (path / "dataset.json").write_text(json.dumps(info))
    return path


def _document(rng, name, kind, image_size, patch_size, vocab_size, max_text, native) -> Piece:
    first_word, num_words = len(SPECIAL_TOKENS), vocab_size - len(SPECIAL_TOKENS)
    tokens, layout, encoded = [BOS], [1], []
    for _ in range(rng.integers(2, 5) if kind == "interleaved" else 1):
        start = int(rng.integers(num_words))
        if kind != "text":
            colour = int(rng.integers(NUM_CLASSES))
            start = colour * num_words // NUM_CLASSES
            side = image_size // patch_size
            rows, columns = rng.integers(1, side + 1, 2).tolist() if native else (side, side)
            image = np.empty((rows * patch_size, columns * patch_size, 3), np.uint8)
            image[:] = [255 * (colour >> bit & 1) for bit in range(3)]
            noise = rng.integers(0, 32, image.shape, dtype=np.uint8)
            encoded.append(images.encode(image ^ noise))
            layout += [-rows * columns, 1]
            tokens.append(IMAGE_END)
        count = int(rng.integers(1, max_text + 1))
        tokens += [first_word + (start + i) % num_words for i in range(count)]
        layout[-1] += count
    tokens.append(EOS)
    layout[-1] += 1
    length = len(tokens) + sum(-n for n in layout if n < 0)
    return Piece(id=name, tokens=tokens, layout=layout, images=encoded, length=length).seal()
