"""Preparation: rows, splits, whole-or-nothing output, equal bytes for any number of workers, bad samples."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data import images
from megamm.data.parts import PART_TASKS
from megamm.data.prepare import PrepareSettings, prepare
from megamm.data.shards import ShardedDataset
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.data.writer import MIN_TEXT_AFTER_IMAGE, split_pieces
from megamm.errors import InputError, RunError
from megamm.sequence import BOS, EOS, IMAGE_END

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([TEXT] * 3, 300, path)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder of 30 pages with two good pictures each, and some with bad ones."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for n in range(4):
        (folder / f"{n}.png").write_bytes(images.encode(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)))
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:2000])
    for n in range(30):
        bad = '<img src="broken.png" alt="bad one">' if n % 10 == 0 else ""
        page = f'<h1>Page {n}</h1>{bad}<p>{TEXT * (n % 7)}</p><img src="{n % 4}.png"><p>Middle</p><img src="1.png">'
        (folder / f"page{n:02d}.html").write_text(page)
    (folder / "empty.html").write_text("<nav>Menu</nav>")
    (folder / "latin.html").write_bytes(b"<p>\xff</p>")
    return folder


def options(tokenizer: Path, *inputs: Path | str, **changes) -> PrepareSettings:
    values = {"image_size": 16, "patch_size": 8, "max_length": 64, "val_fraction": 0.1} | changes
    return PrepareSettings(inputs=tuple(map(str, inputs)), tokenizer=str(tokenizer), **values)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def examples(folder: Path):
    for split in ShardedDataset(folder, "train").info["splits"]:
        dataset = ShardedDataset(folder, split)
        for index in range(len(dataset)):
            yield dataset[index], dataset.lengths[index]


def test_rows_obey_the_contract(tokenizer, pages, tmp_path):
    info = prepare(options(tokenizer, pages), tmp_path / "out")
    loaded = Tokenizer(tmp_path / "out" / "tokenizer.json")
    ends, texts = 0, {}
    for row, (num_text, num_patches) in examples(tmp_path / "out"):
        text_counts = row.layout[row.layout > 0]
        assert row.tokens[0] == BOS and (row.tokens == BOS).sum() == 1 and (row.tokens[:-1] != EOS).all()
        assert num_text == len(row.tokens) == text_counts.sum() and num_patches == -row.layout[row.layout < 0].sum()
        assert num_text + num_patches <= 64 and (row.layout[row.layout < 0] == -4).all()
        starts = np.cumsum(np.maximum(row.layout, 0))[row.layout < 0]
        assert (row.tokens[starts] == IMAGE_END).all() and len(starts) == len(row.images)
        assert all(images.decode(data).shape == (16, 16, 3) for data in row.images)
        ends += row.tokens[-1] == EOS
        name = row.id.split("#")[0]
        texts[name] = texts.get(name, "") + loaded.decode(row.tokens[1:])
    assert ends == 30 == len(texts)
    middle = "<image_end>Middle\n\n<image_end><eos>"
    assert texts["page03.html"] == f"Page 3\n\n{(TEXT * 3).strip()}\n\n{middle}"
    assert texts["page10.html"] == f"Page 10\n\nbad one\n\n{(TEXT * 3).strip()}\n\n{middle}"
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in skipped} == {"empty.html", "latin.html"} | {
        f"page{n}.html: broken.png" for n in ("00", "10", "20")
    }
    assert info["num_skipped"] == 5 == sum(info["skipped_by_reason"].values())
    assert info["kind"] == "interleaved" and info["vocab_size"] == loaded.vocab_size
    assert info["tokenizer_sha256"] == loaded.sha256 and sum(s["num_images"] for s in info["splits"].values()) == 60
    assert info["splits"]["train"]["num_documents"] == len(ShardedDataset(tmp_path / "out", "train"))


def test_output_is_the_same_for_any_workers_and_again(tokenizer, pages, tmp_path):
    first = tmp_path / "1" / "out"
    prepare(options(tokenizer, pages), first, workers=1)
    expected = content(first)
    prepare(options(tokenizer, pages), first, workers=1)
    assert content(first) == expected and os.listdir(first.parent) == ["out"]
    prepare(options(tokenizer, pages), tmp_path / "3" / "out", workers=3)
    assert content(tmp_path / "3" / "out") == expected
    assert b"1970" not in expected["dataset.json"] and str(tmp_path).encode() not in expected["dataset.json"]


def test_parts_of_a_document_share_its_split(tokenizer, pages, tmp_path):
    prepare(options(tokenizer, pages, max_length=24), tmp_path / "out")
    names = {
        split: {e.id.split("#")[0] for e in map(ShardedDataset(tmp_path / "out", split).__getitem__, range(n))}
        for split, n in ((s, len(ShardedDataset(tmp_path / "out", s))) for s in ("train", "val"))
    }
    assert names["val"] and not names["val"] & names["train"] and len(names["val"] | names["train"]) == 30


def test_caption_with_a_bad_image_goes_whole(tokenizer, tmp_path):
    good = images.encode(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    for name, data in (("a", good), ("b", good[:600]), ("c", b"no"), ("d", good), ("e", good)):
        (tmp_path / f"{name}.png").write_bytes(data)
        (tmp_path / f"{name}.txt").write_text("A caption" if name != "d" else " ")
    info = prepare(options(tokenizer, tmp_path, val_fraction=0), tmp_path.parent / "captions")
    assert info["kind"] == "caption" and list(info["splits"]) == ["train"]
    assert info["skipped_by_reason"] == {"broken image": 1, "no text": 1, "not an image of a known format": 1}
    assert {row.id for row, _ in examples(tmp_path.parent / "captions")} == {"a.png", "e.png"}
    with pytest.raises(InputError, match=r"no document is left \(.*4 x image over the pixel limit"):
        prepare(options(tokenizer, tmp_path, max_pixels=300), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_text_records_with_bad_bytes_and_limits(tokenizer, tmp_path):
    lines = [json.dumps({"text": f"line {n} and more"}).encode() for n in range(20)]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "\\ud800"}', b'{"text": "x"}', b'{"text": ""}']))
    info = prepare(options(tokenizer, tmp_path / "t.jsonl", min_tokens=2), tmp_path / "out")
    assert info["skipped_by_reason"] == {"no text": 1, "too little text": 1, "wrong encoding": 1}
    assert sum(split["num_documents"] for split in info["splits"].values()) == 20
    info = prepare(options(tokenizer, tmp_path / "t.jsonl", limit=7), tmp_path / "out")
    assert sum(split["num_documents"] for split in info["splits"].values()) == 7


def test_a_full_disk_leaves_the_old_dataset(tokenizer, pages, tmp_path):
    out = tmp_path / "out"
    prepare(options(tokenizer, pages), out)
    expected = content(out)

    def full(done, total, skipped):
        if done == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"no space left.*goes on where it was \(.out.partial holds"):
        prepare(options(tokenizer, pages, image_size=8), out, report=full)
    assert content(out) == expected and sorted(os.listdir(tmp_path)) == [".out.partial", "out"]
    prepare(options(tokenizer, pages), out)
    assert content(out) == expected and os.listdir(tmp_path) == ["out"]


def test_a_killed_run_goes_on_with_its_parts(tokenizer, tmp_path):
    """Killed in its third part: the next run takes two, and writes the bytes of an undisturbed one."""
    lines = [json.dumps({"text": f"line {n} and more"}) for n in range(5 * PART_TASKS)]
    lines[3] = lines[40] = "{"
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    settings = options(tokenizer, tmp_path / "t.jsonl", val_fraction=0.1)
    prepare(settings, whole)
    code = (
        "import os, signal\nfrom megamm.data.prepare import *\n"
        "def report(done, total, skipped):\n"
        f"    if done == {2 * PART_TASKS + 9}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare({settings!r}, {str(out)!r}, report=report)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert os.listdir(out.parent) == [".out.partial"]
    parts = out.parent / ".out.partial" / "parts"
    (parts / "00000002.jsonl").unlink()  # as if it had been killed a moment earlier: half a part is none
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.arrow")}
    made = {}

    def look(done, total, skipped):
        made.update({path.name: path.stat().st_mtime_ns for path in parts.glob("*.arrow")})

    prepare(settings, out, workers=2, report=look)
    assert [made[name] == done[name] for name in sorted(done)] == [True, True, False] and len(made) == 5
    assert content(out) == content(whole) and os.listdir(out.parent) == ["out"]


def test_parts_of_other_inputs_are_not_taken(tokenizer, pages, tmp_path):
    def stop(done, total, skipped):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {n} and more"}) for n in range(40)))
    with pytest.raises(KeyboardInterrupt):
        prepare(options(tokenizer, text), out, report=stop)
    text.write_text(text.read_text().replace("more", "less"))
    prepare(options(tokenizer, text), out)
    prepare(options(tokenizer, text), tmp_path / "expected" / "out")
    assert content(out) == content(tmp_path / "expected" / "out")


def test_another_tokenizer_of_the_same_path_is_another_one(pages, tmp_path):
    """In one process, as a notebook would do it."""
    path = tmp_path / "tokenizer.json"
    for place, size in (("first", 300), ("second", 280)):
        train_tokenizer([TEXT] * 3, size, path)
        prepare(options(path, pages), tmp_path / place)
    shutil.copy(path, tmp_path / "elsewhere.json")
    prepare(options(tmp_path / "elsewhere.json", pages), tmp_path / "third")
    shards = [(tmp_path / name / "train" / "shard-00000.arrow").read_bytes() for name in ("first", "second", "third")]
    assert shards[0] != shards[1] == shards[2]


@pytest.mark.timeout(180)
def test_output_is_the_same_on_ray(tokenizer, pages, tmp_path):
    pytest.importorskip("ray")
    prepare(options(tokenizer, pages), tmp_path / "here" / "out")
    prepare(options(tokenizer, pages), tmp_path / "ray" / "out", workers=2, ray=True)
    assert content(tmp_path / "ray" / "out") == content(tmp_path / "here" / "out")


def test_other_folders_are_not_replaced(tokenizer, pages, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and not a prepared dataset"):
        prepare(options(tokenizer, pages), tmp_path)
    with pytest.raises(InputError, match="holds the input"):
        prepare(options(tokenizer, pages), pages)
    with pytest.raises(InputError, match="is a file"):
        prepare(options(tokenizer, pages), tmp_path / "mine.txt")


def test_mixed_kinds_and_bad_settings(tokenizer, pages, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"different kinds .*is interleaved; .*is text.*own folder, or give --kind"):
        prepare(options(tokenizer, pages, tmp_path / "a.txt"), tmp_path / "out")
    for changes, message in (
        ({"patch_size": 7}, "--patch-size: 7 does not divide --image-size 16"),
        ({"max_length": 6, "patch_size": 16}, "--max-length: 6 is too short"),
        ({"image_size": 64, "max_length": 66}, "image of 64 patches with its marks needs 67"),
        ({"val_fraction": 0.9}, "--val-fraction: 0.9"),
        ({"image_size": 0, "limit": 0}, "(?s)--image-size: 0.*--limit: 0"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(options(tokenizer, pages, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(
    spans=st.lists(st.integers(0, 60) | st.just("image"), min_size=1, max_size=8),
    num_patches=st.integers(1, 20),
    extra=st.integers(3, 30),
)
@settings(max_examples=300, deadline=None)
def test_split_pieces_loses_nothing(spans, num_patches, extra):
    max_length = max(8, num_patches + extra)
    numbers = iter(range(10, 10_000))
    units = [b"image" if span == "image" else [next(numbers) for _ in range(span)] for span in spans]
    units.append([next(numbers), EOS])
    rows = split_pieces("x", units, max_length, [num_patches] * len(units))
    found = []
    for index, row in enumerate(rows):
        assert row.id == ("x" if index == 0 else f"x#{index}")
        assert 2 <= row.length <= max_length and row.length == sum(map(abs, row.layout))
        assert row.tokens[0] == BOS and row.tokens[1:] != [EOS]
        tokens, pictures, sequence = iter(row.tokens), iter(row.images), []
        for n in row.layout:
            sequence += [next(pictures)] if n < 0 else [next(tokens) for _ in range(n)]
        assert [sequence[i + 1] for i, item in enumerate(sequence) if item == b"image"] == [IMAGE_END] * len(row.images)
        found += sequence[1:]
        if index + 1 < len(rows):  # a row is left early only for an image, or to keep <eos> company
            assert row.length >= max_length - num_patches - MIN_TEXT_AFTER_IMAGE
    expected = [t for unit in units for t in ([unit, IMAGE_END] if unit == b"image" else unit)]
    assert found == expected


def test_command_line(tokenizer, pages, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(TOOL), *map(str, arguments), "--tokenizer", str(tokenizer)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    small = ("--image-size", 16, "--patch-size", 8, "--workers", 1)
    done = run(pages, "--out", tmp_path / "out", *small)
    assert done.returncode == 0 and "interleaved" in done.stdout and "broken image" in done.stdout, done.stderr
    for arguments, message in (
        ((tmp_path / "gone", "--out", tmp_path / "o"), "not found"),
        ((pages, "--out", tmp_path / "o", "--max-length", 3), "--max-length: 3 is too short"),
    ):
        failed = run(*arguments, *small)
        assert failed.returncode == 2 and "error: " in failed.stderr and message in failed.stderr.replace("\n", " ")
        assert "Traceback" not in failed.stderr and not (tmp_path / "o").exists()
