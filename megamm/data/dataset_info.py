"""``dataset.json`` of a prepared dataset: what it says, made and checked in one place."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamm.data import images
from megamm.errors import InputError

FORMAT_VERSION = 2
NATIVE_VERSION = 3
"""The same with images of unlike shape, of which ``lengths.npy`` tells more."""
FILE = "dataset.json"
KINDS = ("caption", "interleaved", "text")


class Fingerprint:
    """Fingerprint of a split: a digest over the digests of its documents, in order.

    It depends neither on the number of workers nor on how documents lie in shards.
    """

    def __init__(self):
        self._hash = hashlib.sha256()

    def add(self, document_digest: bytes) -> None:
        """Go on by one document (see :func:`megamm.data.shards.document_digest`)."""
        self._hash.update(document_digest)

    def hex(self) -> str:
        return self._hash.hexdigest()


def make_info(
    *,
    kind: str,
    vocab_size: int,
    tokenizer_sha256: str,
    image_size: int,
    patch_size: int,
    max_length: int,
    splits: Mapping[str, dict],
    fingerprints: Mapping[str, str],
    fit: images.Fit = images.DEFAULT_FIT,
    settings: Mapping[str, Any] | None = None,
    num_repeats: int = 0,
    num_near_repeats: int = 0,
    skipped_by_reason: Mapping[str, int] | None = None,
) -> dict:
    """The content of ``dataset.json``.

    Args:
        splits: of each split what :meth:`megamm.data.writer.ShardWriter.close` gives.
        fingerprints: of each split, hex.
        settings: of preparation, for the record.
        num_repeats: documents with the content of an earlier one.
        num_near_repeats: others that are much like an earlier one.
    """
    skipped = dict(sorted((skipped_by_reason or {}).items()))
    return {
        "format_version": NATIVE_VERSION if fit == "native" else FORMAT_VERSION,
        "kind": kind,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "image_size": image_size,
        "patch_size": patch_size,
        "max_length": max_length,
        "fingerprints": {
            "tokenizer": tokenizer_sha256,
            "preprocessing": images.preprocessing_fingerprint(image_size, patch_size, fit),
            "splits": dict(fingerprints),
        },
        "settings": dict(settings or {}),
        "splits": dict(splits),
        "num_repeats": num_repeats,
        "num_near_repeats": num_near_repeats,
        "num_skipped": sum(skipped.values()),
        "skipped_by_reason": skipped,
    }


def read_dataset_info(path: Path | str) -> dict:
    """Read ``dataset.json`` of a prepared dataset and check each of its fields.

    Keys: ``format_version, kind, vocab_size, tokenizer_sha256, image_size, patch_size, max_length,
    fingerprints: {tokenizer, preprocessing, splits: {split: hex}}, settings, splits: {split: {num_documents,
    num_text_tokens, num_patches, num_images, shards: [{file, num_documents, num_bytes, sha256}]}}, num_repeats,
    num_near_repeats (not in older ones), num_skipped, skipped_by_reason``.

    Raises:
        InputError: it is missing, no JSON, of another version, or a field is not what it should be.
    """
    file = Path(path) / FILE
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: not found; make it with tools/prepare_data.py --out {path}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # JSON nested a thousand deep is a RecursionError
        raise InputError(f"{file}: not valid JSON ({error}); prepare the dataset again") from error
    # Before all other fields: of another version they may mean something else.
    version = info.get("format_version") if isinstance(info, dict) else None
    if version not in (FORMAT_VERSION, NATIVE_VERSION):
        raise InputError(
            f"{file}: format_version is {version!r}, this version reads {FORMAT_VERSION} and {NATIVE_VERSION}; prepare "
            "the dataset again"
        )
    try:
        _check(info)
    except _FieldError as error:
        raise InputError(f"{file}: {error}; prepare the dataset again") from None
    return info


def repeats_line(info: dict) -> str:
    """How many documents repeat others, in a sentence; nothing where none does."""
    equal, near = info["num_repeats"], info["num_near_repeats"]
    if not (equal or near):
        return ""
    return (
        f"{equal:,} documents repeat an earlier one, {near:,} more are nearly like one; repeats are not divided "
        "between training and validation."
    )


def is_native(info: dict) -> bool:
    """Whether a dataset's images have grids of their own; otherwise all are squares of ``image_size``."""
    return info["format_version"] == NATIVE_VERSION


class _FieldError(Exception):
    """The message names the field, its value and what was expected."""


def _check(info: dict) -> None:
    _expect("kind", info.get("kind"), info.get("kind") in KINDS, f"one of {', '.join(KINDS)}")
    # In this order: later checks use fields that earlier ones have found good.
    for key in ("vocab_size", "image_size", "patch_size", "max_length"):
        _whole(info, key, least=1)
    multiple = f"a multiple of patch_size {info['patch_size']}"
    _expect("image_size", info["image_size"], info["image_size"] % info["patch_size"] == 0, multiple)
    _whole(info, "num_repeats")
    info.setdefault("num_near_repeats", 0)  # what older ones lack
    _whole(info, "num_near_repeats")
    _whole(info, "num_skipped")
    _mapping(info, "settings")
    for reason in _mapping(info, "skipped_by_reason"):
        _whole(info["skipped_by_reason"], reason, where="skipped_by_reason.")
    fingerprints = _mapping(info, "fingerprints")
    for key in ("tokenizer", "preprocessing"):
        _hex(fingerprints, key, where="fingerprints.")
    same = info.get("tokenizer_sha256") == fingerprints["tokenizer"]
    _expect("tokenizer_sha256", info.get("tokenizer_sha256"), same, "the value of fingerprints.tokenizer")
    of_splits, splits = _mapping(fingerprints, "splits", where="fingerprints."), _mapping(info, "splits")
    _expect("splits", list(splits), "train" in splits, "train among them")
    for split in splits:
        # Names of folders: nothing in them may lead elsewhere.
        _expect("splits", split, bool(re.fullmatch("[a-z]+", split)), "names of small letters")
        _hex(of_splits, split, where="fingerprints.splits.")
        _check_split(_mapping(splits, split, where="splits."), f"splits.{split}.")


def _check_split(split: dict, where: str) -> None:
    for key in ("num_documents", "num_text_tokens", "num_patches", "num_images"):
        _whole(split, key, where=where)
    _hex(split, "lengths_sha256", where=where)
    shards = split.get("shards")
    _expect(f"{where}shards", shards, isinstance(shards, list), "a list")
    for index, shard in enumerate(shards):
        place = f"{where}shards[{index}]"
        _expect(place, shard, isinstance(shard, dict), "a mapping")
        file = shard.get("file")
        plain = isinstance(file, str) and re.fullmatch(r"\w[\w.-]*", file)  # no slash, and no dot in front
        _expect(f"{place}.file", file, bool(plain), "the name of a file in the split's folder")
        _whole(shard, "num_documents", where=f"{place}.", least=1)
        _whole(shard, "num_bytes", where=f"{place}.", least=1)
        _hex(shard, "sha256", where=f"{place}.")
    total = sum(shard["num_documents"] for shard in shards)
    _expect(f"{where}num_documents", split["num_documents"], split["num_documents"] == total, f"{total}, as in shards")


def _expect(where: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        raise _FieldError(f"{where}: {'missing' if value is None else repr(value)[:80]}, expected {wanted}")


def _whole(values: dict, key: str, *, where: str = "", least: int = 0) -> None:
    value = values.get(key)
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least  # in Python True is an int
    _expect(where + key, value, good, f"a whole number of at least {least}")


def _hex(values: dict, key: str, *, where: str = "") -> None:
    value = values.get(key)
    good = isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{64}", value))
    _expect(where + key, value, good, "64 hexadecimal digits")


def _mapping(values: dict, key: str, *, where: str = "") -> dict:
    value = values.get(key)
    _expect(where + key, value, isinstance(value, dict), "a mapping")
    return value
