"""Records and files as other projects lay them out: conversations, web documents, COCO, notebooks, data sets."""

import base64
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megamm.data import images
from megamm.data.documents import Document, Image, Skipped
from megamm.data.readers import open_inputs
from megamm.errors import InputError

PICTURE = images.encode(np.full((40, 40, 3), 90, np.uint8))
OTHER = images.encode(np.full((40, 40, 3), 200, np.uint8))
NAMES = {PICTURE: "[1]", OTHER: "[2]"}


def read(path, kind="auto"):
    """Kind, documents as text with [1] and [2] for the pictures, and reasons by id."""
    inputs = open_inputs([str(path)], kind)
    items = [item for task in inputs.tasks for item in task()]
    documents = {
        item.id: "".join(NAMES[span.data] if isinstance(span, Image) else span.text for span in item.spans)
        for item in items
        if isinstance(item, Document)
    }
    return inputs.kinds[0], documents, {item.id: item.reason for item in items if isinstance(item, Skipped)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "a.png").write_bytes(PICTURE)
    (tmp_path / "train2017" / "b.png").write_bytes(OTHER)
    return tmp_path


def said(*turns):
    return [{"from": speaker, "value": value} for speaker, value in turns]


CONVERSATIONS = [
    {"image": "a.png", "conversations": said(("human", "<image>\nWhat?"), ("gpt", "A cat."))},
    {"image": ["a.png", "b.png"], "conversations": said(("human", "Is <image> like <image>?"), ("gpt", "No."))},
    {"image": "b.png", "conversations": said(("human", "No mark."), ("gpt", "Still."))},
    {"conversations": said(("human", "Hello."), ("gpt", "Hi."))},
    {"conversations": said(("human", "<image> Lost."), ("gpt", "Yes."))},
    {"image": "gone.png", "conversations": said(("human", "<image> Gone."), ("gpt", "Yes."))},
    {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
    },
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_conversations(suffix, folder):
    text = json.dumps(CONVERSATIONS) if suffix == "json" else "\n".join(map(json.dumps, CONVERSATIONS))
    (folder / f"c.{suffix}").write_text(text)
    kind, documents, skipped = read(folder)
    assert kind == "interleaved" and list(documents.values()) == [
        "USER: [1]\nWhat?\nASSISTANT: A cat.",
        "USER: Is [1] like [2]?\nASSISTANT: No.",
        "[2]USER: No mark.\nASSISTANT: Still.",
        "USER: Hello.\nASSISTANT: Hi.",
        "USER: [1]What?\nASSISTANT: A cat.",
    ]
    assert skipped == {
        f"c.{suffix}:4": "more <image> marks than images: 1 marks, 0 images",
        f"c.{suffix}:5": "image not found",
    }


def test_a_picture_that_could_be_one_of_several_is_refused(folder):
    (folder / "val2017").mkdir()
    (folder / "val2017" / "a.png").write_bytes(OTHER)
    (folder / "tables").mkdir()
    (folder / "tables" / "c.jsonl").write_text(json.dumps(CONVERSATIONS[0]))
    assert read(folder)[2]["tables/c.jsonl:0"] == "image in several folders: train2017, val2017"


def test_coco_captions(folder):
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 7, "caption": "A cat."},
            {"image_id": 7, "caption": "A grey cat. "},
            {"image_id": 9, "caption": "Lost."},
            {"image_id": 7, "bbox": [0, 0, 1, 1]},
        ],
    }
    (folder / "annotations" / "c.json").write_text(json.dumps(content))
    kind, documents, skipped = read(folder)
    assert (kind, documents) == ("caption", {"annotations/c.json:7": "[1]A cat.\nA grey cat."})
    assert skipped == {
        "annotations/c.json:annotation 3": "annotation without a caption",
        "annotations/c.json:8": "image without a caption or a file_name",
        "annotations/c.json:9": "caption of no image in the file: 1 captions",
    }


def test_web_documents(folder):
    obelics = pa.table({"images": [[None, "a.png", "https://e.org/x.png"]], "texts": [["One.", None, None]]})
    pq.write_table(obelics, folder / "o.parquet")
    infos = [{"image_name": "b.png", "matched_text_index": 1}]
    lines = [{"text_list": ["A", "B"], "image_info": infos}, {"text_list": ["A"], "image_info": infos}]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kind, documents, skipped = read(folder)
    assert kind == "interleaved" and documents == {"m.jsonl:0": "A\n[2]B\n", "o.parquet:0": "One.\n\n[1]"}
    assert skipped == {
        "m.jsonl:1": "no good matched_text_index: 1, of 1 texts",
        "o.parquet:0: image 2": "remote image",
    }


def test_notebooks(tmp_path):
    code = base64.b64encode(PICTURE).decode()
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Words."]},
        {"cell_type": "markdown", "source": "![x](attachment:x.png)", "attachments": {"x.png": {"image/png": code}}},
        {
            "cell_type": "code",
            "source": "a < b",
            "outputs": [
                {"output_type": "stream", "text": ["True\n"]},
                {"output_type": "display_data", "data": {"image/png": code, "text/plain": "<Figure>"}},
                {"output_type": "error", "ename": "E", "evalue": "bad"},
            ],
        },
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    for name, content in {"b": "{", "c": "{}", "d": '{"cells": [1]}'}.items():
        (tmp_path / f"{name}.ipynb").write_text(content)
    kind, documents, skipped = read(tmp_path)
    words = documents["a.ipynb"].split()
    assert kind == "interleaved" and list(documents) == ["a.ipynb"]
    assert "".join(words) == "TitleWords.[1]xa<bTrue[1]E:bad"
    assert len(skipped) == 3 and all(reason.startswith("damaged notebook: ") for reason in skipped.values())


def test_arrow_files_of_a_data_set(tmp_path):
    table = pa.table({"image": [{"bytes": PICTURE, "path": None}] * 3, "text": ["One.", "Two.", "Three."]})
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=1)
    (tmp_path / "cache-1.arrow").write_bytes(b"")
    (tmp_path / "state.json").write_text('{"_split": "train"}')
    kind, documents, skipped = read(tmp_path)
    assert kind == "caption" and list(documents.values()) == ["[1]One.", "[1]Two.", "[1]Three."]
    assert skipped["cache-1.arrow"] == "cache of a data set: not read"
    assert skipped["state.json"].endswith("COCO's captions, found _split")
    whole = tmp_path / "data-00000-of-00001.arrow"
    os.truncate(whole, whole.stat().st_size - 60)
    _, documents, skipped = read(whole)
    assert 0 < len(documents) <= 3 and (len(documents) == 3 or "damaged Arrow file" in str(skipped))


def test_folders_of_classes_are_captions_where_asked_for(tmp_path):
    for name, content in (("tabby_cat", PICTURE), ("dog", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(content)
    with pytest.raises(InputError, match="--kind caption takes the folders' names"):
        open_inputs([str(tmp_path)])
    kind, documents, skipped = read(tmp_path, "caption")
    assert kind == "caption" and documents == {"dog/0.png": "[2]dog", "tabby_cat/0.png": "[1]tabby cat"}
    assert not skipped


def test_urls_and_code_are_what_they_are(tmp_path):
    (tmp_path / "cc.tsv").write_text("a cat\thttps://e.org/1\na dog\thttps://e.org/2\n")
    kind, _, skipped = read(tmp_path / "cc.tsv")
    assert kind == "caption" and skipped == {"cc.tsv:0": "remote image", "cc.tsv:1": "remote image"}
    pq.write_table(pa.table({"URL": ["https://e.org/1"], "TEXT": ["A"], "WIDTH": [9]}), tmp_path / "laion.parquet")
    assert read(tmp_path / "laion.parquet")[0] == "caption"
    pq.write_table(pa.table({"path": ["a.svg", "b.py"], "content": ["<svg/>", "b"]}), tmp_path / "code.parquet")
    kind, documents, skipped = read(tmp_path / "code.parquet")
    assert kind == "text" and list(documents.values()) == ["<svg/>", "b"] and not skipped


def test_a_table_of_unknown_columns_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"instruction": "a", "output": "b"}')
    with pytest.raises(InputError, match=r"first table t\.jsonl: .*it has instruction, output"):
        open_inputs([str(tmp_path)])
    (tmp_path / "t.jsonl").unlink()
    (tmp_path / "versions.json").write_text('[{"version": "1", "description": "old"}]')
    with pytest.raises(InputError, match=r"of no known layout: .*found version, description"):
        open_inputs([str(tmp_path)])
    for content in ("3", "null", "[]", "[[1]]", '"a"', "{}", "{", '{"annotations": [3]}', '{"annotations": 1}'):
        (tmp_path / "versions.json").write_text(content)
        with pytest.raises(InputError, match="no text field found"):
            open_inputs([str(tmp_path)])
