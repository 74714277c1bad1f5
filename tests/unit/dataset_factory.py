"""Small prepared datasets for tests, written straight in the format of ``megamm.data.shards``."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from megamm.data import images
from megamm.data.shards import FORMAT_VERSION, SCHEMA
from megamm.data.tokens import BOS, EOS, IMAGE_END, SPECIAL_TOKENS

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
) -> Path:
    """Write a dataset of learnable documents and return its folder.

    A caption is an image of one of 8 colours and words that count up from a number which the colour decides;
    an interleaved document is several of these; a text counts up from a random number.

    Args:
        kind: caption, interleaved or text.
        num_documents: documents of the train split.
        num_val: documents of the val split.
        max_text: most words of a caption, of a piece of an interleaved document or of a text.
    """
    path = Path(path)
    rng = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", num_documents), ("val", num_val)):
        documents = [
            _document(rng, f"{split}-{i}", kind, image_size, patch_size, vocab_size, max_text) for i in range(count)
        ]
        splits[split] = _write_split(path / split, documents, shard_documents)
    info = {
        "format_version": FORMAT_VERSION,
        "name": path.name,
        "kind": kind,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "image_size": image_size,
        "patch_size": patch_size,
        "max_length": 1024,
        "settings": {},
        "splits": splits,
        "num_skipped": 0,
    }
    (path / "dataset.json").write_text(json.dumps(info))
    return path


def _document(rng, name, kind, image_size, patch_size, vocab_size, max_text) -> dict:
    first_word, num_words = len(SPECIAL_TOKENS), vocab_size - len(SPECIAL_TOKENS)
    tokens, layout, encoded = [BOS], [1], []
    for _ in range(rng.integers(2, 5) if kind == "interleaved" else 1):
        start = int(rng.integers(num_words))
        if kind != "text":
            colour = int(rng.integers(NUM_CLASSES))
            start = colour * num_words // NUM_CLASSES
            image = np.empty((image_size, image_size, 3), np.uint8)
            image[:] = [255 * (colour >> bit & 1) for bit in range(3)]
            noise = rng.integers(0, 32, image.shape, dtype=np.uint8)
            encoded.append(images.encode(image ^ noise))
            layout += [-((image_size // patch_size) ** 2), 1]
            tokens.append(IMAGE_END)
        count = int(rng.integers(1, max_text + 1))
        tokens += [first_word + (start + i) % num_words for i in range(count)]
        layout[-1] += count
    tokens.append(EOS)
    layout[-1] += 1
    return {"id": name, "tokens": tokens, "layout": layout, "images": encoded}


def _write_split(folder: Path, documents: list[dict], shard_documents: int) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(documents), shard_documents):
        part = documents[start : start + shard_documents]
        shards.append({"file": f"shard-{len(shards):05d}.arrow", "num_documents": len(part)})
        with pa.OSFile(str(folder / shards[-1]["file"]), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(part, schema=SCHEMA))
    patches = [-sum(n for n in d["layout"] if n < 0) for d in documents]
    lengths = np.array([[len(d["tokens"]), p] for d, p in zip(documents, patches)], np.int32).reshape(-1, 2)
    np.save(folder / "lengths.npy", lengths)
    return {
        "num_documents": len(documents),
        "num_text_tokens": int(lengths[:, 0].sum()),
        "num_patches": int(lengths[:, 1].sum()),
        "num_images": sum(len(d["images"]) for d in documents),
        "shards": shards,
    }
