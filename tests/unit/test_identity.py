"""Identity of prepared data: fingerprints, checksums, and a dataset.json whose every field is checked."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_factory import make_dataset

from megamm.data.dataset_info import read_dataset_info
from megamm.data.images import preprocessing_fingerprint
from megamm.data.shards import ShardedDataset, document_digest
from megamm.data.verify import verify
from megamm.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


@pytest.fixture
def folder(tmp_path):
    """A dataset of which all is right; its tokenizer is a stand-in of the hash that is noted."""
    make_dataset(tmp_path / "a", num_documents=30, shard_documents=7)
    return tmp_path / "a"


def fingerprints(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())["fingerprints"]


def test_split_fingerprint_depends_on_documents_and_not_on_shards_or_folder(folder, tmp_path):
    expected = fingerprints(folder)
    for n in (1, 30, 64):
        make_dataset(tmp_path / f"b{n}", num_documents=30, shard_documents=n)
        assert fingerprints(tmp_path / f"b{n}") == expected
    for change in ({"seed": 1}, {"num_documents": 29}, {"max_text": 29}):
        make_dataset(tmp_path / "c", **{"num_documents": 30} | change)
        assert fingerprints(tmp_path / "c")["splits"]["train"] != expected["splits"]["train"]
    assert set(expected) == {"tokenizer", "preprocessing", "splits"} and set(expected["splits"]) == {"train", "val"}


def test_document_digest_keeps_all_parts_apart():
    document = {"id": "a", "tokens": [1, 2, 3], "layout": [2, -4, 1], "images": [b"xy", b"z"]}
    digests = {document_digest(**document)}
    for change in (
        {"id": "b"},
        {"tokens": [1, 2, 4]},
        {"tokens": [1, 2], "layout": [3, 2, -4, 1]},
        {"images": [b"x", b"yz"]},
        {"images": [b"xyz"]},
        {"images": [b"xy", b"Z"]},
    ):
        digests.add(document_digest(**document | change))
    assert len(digests) == 7 and all(len(digest) == 16 for digest in digests)


def test_preprocessing_fingerprint():
    found = {
        preprocessing_fingerprint(*a) for a in ((224, 14, "pad"), (224, 16, "pad"), (112, 14, "pad"), (224, 14, "crop"))
    }
    assert len(found) == 4 and preprocessing_fingerprint(224, 14, "pad") in found


def test_verify_finds_each_flipped_byte(folder):
    token = b"{}"
    (folder / "tokenizer.json").write_bytes(token)
    with pytest.raises(InputError, match=r"tokenizer\.json: is not the tokenizer"):
        verify(folder)
    note_tokenizer(folder, token)
    assert verify(folder)["splits"]["train"]["num_documents"] == 30
    for name in ("train/shard-00002.arrow", "val/shard-00000.arrow", "train/lengths.npy"):
        whole = (folder / name).read_bytes()
        for place in (0.3, 0.5, 0.9):
            data = bytearray(whole)
            data[int(place * len(data))] ^= 4
            (folder / name).write_bytes(data)
            with pytest.raises(InputError, match=name):
                verify(folder)
        (folder / name).write_bytes(whole[:-8])
        with pytest.raises(InputError, match=name):
            verify(folder)
        (folder / name).write_bytes(whole)
    verify(folder)


def note_tokenizer(folder: Path, content: bytes) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    edit(folder, lambda info: info.update(tokenizer_sha256=sha256) or info["fingerprints"].update(tokenizer=sha256))


def edit(folder: Path, change) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    change(info)
    (folder / "dataset.json").write_text(json.dumps(info))


def paths(value, at=()):
    """Places of all values in nested mappings and lists, but those free in form."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key != "settings":
            yield (*at, key)
            if isinstance(inner, dict | list):
                yield from paths(inner, (*at, key))


@pytest.mark.parametrize("bad", ["-1", -1, None, 1.5, [], True, "../x", float("inf")])
def test_each_bad_field_is_one_clear_line(folder, bad):
    whole = json.loads((folder / "dataset.json").read_text())
    places = [p for p in paths(whole) if p != ("format_version",)]
    assert len(places) > 40
    for place in places:
        info = copy.deepcopy(whole)
        inner = info
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = bad
        (folder / "dataset.json").write_text(json.dumps(info))
        with pytest.raises(InputError, match=r"dataset\.json.*prepare the dataset again") as caught:
            read_dataset_info(folder)
        assert "\n" not in str(caught.value)


def test_other_versions_and_damaged_json(folder):
    edit(folder, lambda info: info.update(format_version=1))
    with pytest.raises(InputError, match=r"is 1, this version reads 2 and 3; prepare the dataset again$"):
        ShardedDataset(folder, "train")
    for text in ("", "[]", "{", "null", '"x"', "[" * 100_000):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=r"dataset\.json.*prepare the dataset again"):
            read_dataset_info(folder)


def test_verify_on_the_command_line(folder):
    def run():
        return subprocess.run(
            [sys.executable, str(TOOL), "--verify", str(folder)], capture_output=True, text=True, check=False
        )

    (folder / "tokenizer.json").write_bytes(b"")
    note_tokenizer(folder, b"")
    done = run()
    assert done.returncode == 0 and "all 50 documents are as they were written" in done.stdout, done.stderr
    shard = folder / "train" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    failed = run()
    assert failed.returncode == 2 and "train/shard-00001.arrow: damaged" in failed.stderr
    assert "Traceback" not in failed.stderr
