"""Prepared data with a tokenizer, and tasks beside them."""

import json
from pathlib import Path

from dataset_factory import make_dataset
from PIL import Image

from megamm.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["red", "green", "blue", "square", "circle", "large", "small", "above", "below", "ein", "Bär", "läuft"]
COLOURS = {"a": "red", "b": "blue"}


def make_words(folder: Path, **options) -> Path:
    """Sources caption and text with a tokenizer, and pictures a.png and b.png, in a folder, which is returned."""
    train_tokenizer([" ".join(WORDS * 40)], 300, folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    for kind in ("caption", "text"):
        known = {"vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256}
        make_dataset(folder / kind, kind=kind, num_documents=60, **known, **options)
        (folder / kind / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 30), colour).save(folder / f"{name}.png")
    return folder


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_choices(folder: Path) -> Path:
    """A file of ``choice`` questions, of which half have an image."""
    records = []
    for n, word in enumerate(WORDS):
        choices = [word, WORDS[n - 1], WORDS[n - 5]]
        image = {"image": f"{'ab'[n % 2]}.png"} if n % 3 else {}
        records.append({"prompt": WORDS[n - 3] + " ", **image, "choices": choices, "answer": n % 3})
    return write_lines(folder / "choices.jsonl", records)


def prompts(folder: Path) -> Path:
    """A file of prompts without answers."""
    records = [
        {"prompt": f"{word} ", **({"image": f"{'ab'[n % 2]}.png"} if n % 2 else {})} for n, word in enumerate(WORDS)
    ]
    return write_lines(folder / "prompts.jsonl", records)
