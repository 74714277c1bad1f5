"""Readers of formats that wrap others: web documents in tars, zipped tables, PDF."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_pdf import PdfPages

from megamm.data import images
from megamm.data.documents import Document, Skipped, Text
from megamm.data.readers import open_inputs
from megamm.errors import InputError


def picture(value: int = 100) -> bytes:
    return images.encode(np.full((20, 20, 3), value, np.uint8))


def read(path: Path) -> tuple[list[Document], list[Skipped]]:
    items = [item for task in open_inputs([str(path)]).tasks for item in task()]
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Skipped)]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def spans_of(document):
    return [span.text.strip() if isinstance(span, Text) else span.data for span in document.spans]


def test_web_documents_and_conversations_in_tars(tmp_path, monkeypatch):
    """OBELICS, mmc4 and LLaVA records, with their pictures by name or in order, and from the archive alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.png").write_bytes(picture())
    one, two, three = picture(), picture(64), picture(96)
    obelics = {"texts": [None, "after", "end"], "images": ["https://x.example/a.png", None, "https://x.example/b.png"]}
    mmc4 = {"text_list": ["first", "second"], "image_info": [{"image_name": "z9.png", "matched_text_index": 1}]}
    talk = {"image": "c.png", "conversations": [{"from": "human", "value": "<image> what?"}]}
    members = [
        ("d/1.json", json.dumps(obelics).encode()),
        ("d/1.p0.png", one),
        ("d/1.p1.png", two),
        ("d/2.json", json.dumps(mmc4).encode()),
        ("elsewhere/z9.png", three),
        ("d/3.json", json.dumps(talk).encode()),
        ("d/c.png", one),
        ("d/4.json", b"{}"),
        ("d/5.json", json.dumps({"texts": [None, "alone"], "images": ["own.png", None]}).encode()),
        ("d/stray.png", one),
    ]
    write_tar(tmp_path / "w.tar", members)
    assert open_inputs([str(tmp_path / "w.tar")]).kinds == ["interleaved"]
    documents, skipped = read(tmp_path / "w.tar")
    assert [d.id for d in documents] == ["w.tar:d/1", "w.tar:d/2", "w.tar:d/3", "w.tar:d/5"]
    assert spans_of(documents[0]) == [one, "after", two, "end"]
    assert spans_of(documents[1]) == ["first", three, "second"]
    assert spans_of(documents[2]) == ["USER:", one, "what?"]
    assert [(s.id, s.reason) for s in skipped] == [
        ("w.tar:d/4", "no conversation or web document"),
        ("w.tar:d/5: image 0", "image not found"),
        ("w.tar:d/stray.png", "image that nothing refers to"),
    ]


def test_names_used_twice_in_a_tar(tmp_path):
    """Each record has the picture of its own sample."""
    members = []
    for value in (10, 20):
        record = {"texts": [None, f"text {value}"], "images": ["1.png", None]}
        members += [("1.json", json.dumps(record).encode()), ("1.png", picture(value))]
    write_tar(tmp_path / "w.tar", members)
    documents, skipped = read(tmp_path / "w.tar")
    assert [spans_of(d) for d in documents] == [[picture(10), "text 10"], [picture(20), "text 20"]] and not skipped


@pytest.mark.parametrize("damage", [None, "cut", "two", "locked"])
def test_zipped_tables(tmp_path, damage):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t.jsonl", '{"text": "a"}\n' * 50)
        if damage == "two":
            archive.writestr("u.jsonl", '{"text": "b"}\n')
    data = bytearray(buffer.getvalue())
    if damage == "locked":
        for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.index(mark) + flags] |= 1
    (tmp_path / "t.jsonl.zip").write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage is None:
        documents, skipped = read(tmp_path / "t.jsonl.zip")
        assert len(documents) == 50 and not skipped
    else:
        with pytest.raises(InputError, match=r"t\.jsonl\.zip: .*(not a zip|zip of 2 files|encrypted)"):
            open_inputs([str(tmp_path / "t.jsonl.zip")])


def make_pdf(path, pages=1):
    """Two columns a page: text, a picture and text on the left, text on the right; a running head and a number."""
    pixels = np.random.default_rng(0).integers(0, 255, (100, 120, 3)).astype(np.uint8)
    with PdfPages(path) as file:
        for number in range(pages):
            figure = plt.figure(figsize=(8, 8))
            figure.text(0.1, 0.95, "The running head")
            figure.text(0.1, 0.8, "Above the picture a hyphen-\nated word and\nanother line.")
            figure.figimage(pixels, xo=80, yo=300)
            figure.text(0.1, 0.2, "Below the picture.")
            figure.text(0.6, 0.8, "Right column.")
            figure.text(0.1, 0.05, f"{number + 1}")
            file.savefig(figure)
            plt.close(figure)


def test_pdf_text_and_pictures_in_order(tmp_path):
    make_pdf(tmp_path / "a.pdf")
    (document,), skipped = read(tmp_path / "a.pdf")
    first, image, second = document.spans
    assert not skipped and "hyphenated word and another line." in first.text
    assert images.read_rgb(image.data, 10**6).shape == (100, 120, 3)
    assert "Below" in second.text and "Above" not in second.text
    make_pdf(tmp_path / "a.pdf", pages=4)
    (document,), skipped = read(tmp_path / "a.pdf")
    texts = " ".join(span.text for span in document.spans if isinstance(span, Text))
    assert "running head" not in texts and texts.count("Right column") == 4
    assert [s.reason for s in skipped] == ["running head or foot of pages"]


@pytest.mark.parametrize("damage", ["cut", "junk", "locked"])
def test_bad_pdfs_are_told(tmp_path, damage):
    make_pdf(tmp_path / "a.pdf")
    data = (tmp_path / "a.pdf").read_bytes()
    (tmp_path / "a.md").write_text("a page")
    if damage == "locked":  # a standard handler whose keys fit no password
        keys = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"00" * 32 + b"> /U <" + b"00" * 32 + b"> >>"
        data = data.replace(b"trailer\n<<", b"trailer\n<< " + keys + b" /ID [<00> <00>]")
    (tmp_path / "a.pdf").write_bytes({"cut": data[:300], "junk": b"%PDF-1.4 junk", "locked": data}[damage])
    documents, skipped = read(tmp_path)
    assert [d.id for d in documents] == ["a.md"] and [s.id for s in skipped] == ["a.pdf"]
    assert skipped[0].reason.startswith("encrypted PDF" if damage == "locked" else "damaged PDF")


def test_pictures_of_urls_that_were_loaded_before(tmp_path):
    """Host and path as folders, in a folder beside the table; nothing is fetched, and nothing outside is read."""
    mirror = tmp_path / "mirror" / "img.example"
    (mirror / "a b").mkdir(parents=True)
    (mirror / "a b" / "1.png").write_bytes(picture(10))
    (mirror / "2.png").write_bytes(picture(20))
    (tmp_path.parent / "outside.png").write_bytes(picture(30))
    urls = ["a%20b/1.png", "2.png?w=3", "gone.png", "../../outside.png", "x%00.png"]
    lines = [json.dumps({"url": f"https://img.example/{url}", "caption": url}) for url in urls]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    documents, skipped = read(tmp_path)
    assert [spans_of(d) for d in documents] == [[picture(10), "a%20b/1.png"], [picture(20), "2.png?w=3"]]
    assert [s.id for s in skipped] == ["t.jsonl:2", "t.jsonl:3", "t.jsonl:4"]
    assert {s.reason for s in skipped} <= {"remote image", "image outside the input folder"}
