"""Readers: pages in reading order without navigation, captions, text, tables, detection of kinds."""

import base64
import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data import images
from megamm.data.documents import Document, Image, Skipped, Text
from megamm.data.readers import open_inputs
from megamm.data.readers.captions import without_translations
from megamm.data.readers.html import html_spans
from megamm.errors import InputError


def picture(value: int = 100, size: int = 20) -> bytes:
    return images.encode(np.full((size, size, 3), value, np.uint8))


def spans(page: str) -> list[str]:
    """Spans of a page; an image as [its source]."""
    found = html_spans(page, lambda source: Image(data=picture(), name=source))
    return [span.text if isinstance(span, Text) else f"[{span.name}]" for span in found]


def write(folder: Path, **files: bytes | str) -> Path:
    """Write files; __ in a name stands for a dot, ___ for a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(*inputs: Path | str, kind: str = "auto", **options) -> tuple[list[Document], list[Skipped]]:
    items = [item for task in open_inputs([str(i) for i in inputs], kind, **options).tasks for item in task()]
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Skipped)]


def text_of(document: Document) -> str:
    return "".join(span.text for span in document.spans if isinstance(span, Text))


def test_reading_order_alt_text_and_captions():
    page = """<html><head><title>Not used</title><style>p {}</style></head><body>
    <nav><a href="/">Home</a></nav><header><p>Site name</p></header>
    <h1>A   heading</h1><p>First
    words <b>bold</b>.</p>
    <figure><img src="a.png" alt="A cat"><figcaption>Figure 1. A cat!</figcaption></figure>
    <p>Click <img src="b.png" alt="the button"> now.</p><img src="c.png" alt="c.png">
    <p>End.</p><script>var x;</script><footer>Copyright</footer></body></html>"""
    assert spans(page) == [
        "A heading\n\nFirst words bold.\n\n",
        "[a.png]",
        "Figure 1. A cat!\n\nClick ",
        "[b.png]",
        "the button now.\n\n",
        "[c.png]",
        "End.",
    ]


def test_lists_tables_code_and_breaks():
    page = """<h2>T</h2><ul><li>one</li><li><p>two</p><ol start="3"><li>x</li><li>y</li></ol></li></ul>
    <table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2 <b>3</b></td></tr></table>
    <pre>def f():
    return  1
</pre><p>a<br>b&nbsp;c</p><dl><dt>term</dt><dd><p>meaning</p></dd></dl>"""
    assert spans(page) == [
        "T\n\n- one\n- two\n3. x\n4. y\n\na | b\n1 | 2 3\n\ndef f():\n    return  1\n\na\nb c\n\nterm\nmeaning"
    ]


def test_navigation_is_dropped_and_content_with_links_kept():
    page = """<div class="navheader"><table><tr><td>Chapter 3. Tools</td></tr></table></div>
    <div role="navigation">skip me</div><ul><li><a href="1">Chapter one</a></li><li><a href="2">Two</a></li></ul>
    <p><a href="p">Previous</a> | <a href="n">Next</a></p>
    <article><header><h1>Title</h1></header><p>See <a href="x">the manual</a> for more of it.</p>
    <ul><li><a href="3">Item</a> with much explanation</li></ul></article>
    <p hidden>secret</p><!-- comment --><div class="navfooter">Up</div>"""
    assert spans(page) == ["Title\n\nSee the manual for more of it.\n\n- Item with much explanation"]


def test_sidebars_are_dropped_only_if_they_are_menus():
    links = "".join(f'<p><a href="{n}">Chapter {n}</a></p>' for n in "abcd")
    page = f'<h1>T</h1><div class="sidebar">{links}</div><div class="sidebar"><p>An aside.</p></div>'
    assert spans(page) == ["T\n\nAn aside."]


def test_main_is_preferred_and_title_stands_in_for_a_heading():
    page = "<title>The title</title><body><p>around</p><main><p>inside</p></main></body>"
    assert spans(page) == ["The title\n\ninside"]


def test_header_and_icons():
    icon, large = (base64.b64encode(picture(size=n)).decode() for n in (15, 16))
    page = f"""<p>a <img src="data:image/png;base64,{icon}" alt="bullet"> b</p>
    <img src="data:image/png;base64,{large}" alt="[Note]"><p>c</p><img src="data:image/png;base64,{large}">"""
    assert spans(page) == ["a b\n\nc\n\n", "[data URI]"]


ODD_PAGES = ("", "   ", "<!-- only -->", "<html></html>", "\x00", "<p>" * 3000, "<![CDATA[", "&#0;")


@pytest.mark.parametrize("page", ODD_PAGES)
def test_empty_and_odd_pages_give_nothing(page):
    assert "".join(spans(page)).strip("\x00\ufffd") == ""


TAGS = "<p> </p> <li> <ul> <table> <td> <img> <pre> </ <!-- & word <a".split()  # noqa: SIM905


@given(st.lists(st.sampled_from(TAGS) | st.text()))
@settings(max_examples=150, deadline=None)
def test_any_string_is_read(parts):
    html_spans("".join(parts).encode("utf-8", "replace").decode(), lambda source: None)


@given(st.lists(st.text(alphabet=st.characters(categories=["L", "Nd"]), min_size=1), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_no_word_is_lost(words):
    assert html_spans("".join(f"<p>{word}</p>" for word in words), lambda s: None)[0].text.split("\n\n") == words


def test_pages_folder(tmp_path):
    write(
        tmp_path,
        b__html="<h1>B</h1><img src='img/x.png' alt='An X'><img src='gone.png' alt='gone'><p>é</p>".encode(),
        sub___a__md="# A\n\n![Alt](/img/x.png)\n\ntext `code`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
        bad__html=b"<p>\xff\xfe</p>",
        latin__html='<meta charset="iso-8859-1"><p>caf\xe9</p>'.encode("latin-1"),
        outside__html='<p>t</p><img src="../../etc/x.png"><img src="https://e.org/x.png"><img src="v.svg">',
        img___x__png=picture(),
        __hidden___c__html="<p>c</p>",
    )
    inputs = open_inputs([str(tmp_path)])
    assert inputs.kinds == ["interleaved"] and inputs.num_tasks == 6
    documents, skipped = read(tmp_path)
    assert [d.id for d in documents] == ["b.html", "latin.html", "outside.html", "sub/a.md"]
    b, latin, _, a = documents
    assert [type(s) for s in b.spans] == [Text, Image, Text] and b.spans[1].data == picture()
    assert text_of(b) == "B\n\nAn X\n\ngone\n\né" and text_of(latin) == "café"
    assert text_of(a) == "A\n\nAlt\n\ntext code\n\na | b\n1 | 2"
    assert {(s.id, s.reason) for s in skipped} == {
        ("b.html: gone.png", "image not found"),
        (".hidden", "hidden file or folder"),
        ("bad.html", "wrong encoding: not UTF-8 nor what the page declares"),
        ("outside.html: ../../etc/x.png", "image outside the input folder"),
        ("outside.html: https://e.org/x.png", "remote image"),
        ("outside.html: v.svg", "SVG image"),
    }


def test_caption_folder(tmp_path):
    write(
        tmp_path,
        a__png=picture(),
        a__txt="A dog.\nde.utf8=Ein Hund.\nzh_CN.utf8=狗\nca@valencia.utf8=Un gos.\n",
        b__jpg=picture(),
        b__txt="Two lines\nof caption",
        c__svg="<svg/>",
        c__txt="A circle",
        a__svg="<svg/>",
        d__png=picture(),
        README__md="# read me",
    )
    inputs = open_inputs([str(tmp_path)])
    documents, skipped = read(tmp_path)
    assert inputs.kinds == ["caption"] and inputs.num_tasks == len(documents) + len(skipped)
    assert [(d.id, type(d.spans[0]), d.spans[1].text) for d in documents] == [
        ("a.png", Image, "A dog."),
        ("b.jpg", Image, "Two lines\nof caption"),
    ]
    assert {s.id: s.reason for s in skipped} == {
        "a.svg": "SVG image beside a pixel version",
        "c.svg": "SVG image without a pixel version",
        "c.txt": "caption file without an image",
        "d.png": "image without a caption file",
        "README.md": "of another kind: not caption",
    }


def test_translations_are_recognised():
    assert without_translations("One.\n\nfr.utf8=Un.\n") == "One."
    assert without_translations("x = 1\ny = 2") == "x = 1\ny = 2"
    assert without_translations("") == ""


def test_text_files(tmp_path):
    write(tmp_path, a__txt="\ufeffone  \r\n\r\n\r\n\r\ntwo\n", b__txt=b"\xff", c__txt="")
    documents, skipped = read(tmp_path)
    assert [d.spans for d in documents] == [(Text(text="one\n\ntwo"),), (Text(text=""),)]
    assert [s.id for s in skipped] == ["b.txt"]


RECORDS = [{"image": "p.png", "caption": "one"}, {"image": "gone.png", "caption": "two"}, {"caption": "no image"}]


def test_jsonl_of_text_and_of_captions(tmp_path):
    lines = [json.dumps(r) for r in RECORDS] + ["{", "[1]", "", json.dumps({"image": "p.png"})]
    write(tmp_path, p__png=picture(), c__jsonl="\n".join(lines).encode() + b'\n{"caption": "\xff"}')
    documents, skipped = read(tmp_path / "c.jsonl")
    assert [(d.id, d.spans[1].text) for d in documents] == [("c.jsonl:0", "one")]
    assert [(s.id, s.reason.split(":")[0]) for s in skipped] == [
        ("c.jsonl:1", "image not found"),
        ("c.jsonl:2", "no image field"),
        ("c.jsonl:3", "not valid JSON"),
        ("c.jsonl:4", "not valid JSON"),
        ("c.jsonl:6", "no text field"),
        ("c.jsonl:7", "wrong encoding"),
    ]
    write(tmp_path, t__jsonl='{"text": "a", "n": 1}\n{"text": " b "}')
    assert open_inputs([str(tmp_path / "t.jsonl")]).kinds == ["text"]
    assert [text_of(d) for d in read(tmp_path / "t.jsonl")[0]] == ["a", "b"]


def test_csv_parquet_and_tar_of_captions(tmp_path):
    data = picture()
    (tmp_path / "p.png").write_bytes(data)
    with (tmp_path / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), ("p.png", 'one, "two"'), ("q.png", "gone")])
    table = pa.table({"image": [{"bytes": data, "path": "x"}] * 2, "text": ["one", "two"], "other": [1, 2]})
    pq.write_table(table, tmp_path / "c.parquet")
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name, content in (("k/1.png", data), ("k/1.txt", b"one"), ("k/2.txt", b"alone"), ("k/3.png", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    expected = {
        "c.csv": (["c.csv:0"], ['one, "two"'], ["image not found"]),
        "c.parquet": (["c.parquet:0", "c.parquet:1"], ["one", "two"], []),
        "c.tar": (["c.tar:k/1"], ["one"], ["no image field", "no text field"]),
    }
    for name, (ids, texts, reasons) in expected.items():
        documents, skipped = read(tmp_path / name)
        assert ([d.id for d in documents], [text_of(d) for d in documents]) == (ids, texts), name
        assert all(d.spans[0].data == data for d in documents) and [s.reason for s in skipped] == reasons, name


def test_cut_tar_keeps_what_came_before(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("1.png", picture()), ("1.txt", b"one"), ("2.png", bytes(5000))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "c.tar").write_bytes(buffer.getvalue()[:4000])
    documents, skipped = read(tmp_path / "c.tar")
    assert [d.id for d in documents] == ["c.tar:1"] and skipped[-1].reason.startswith("damaged tar")


def test_several_inputs_have_distinct_ids(tmp_path):
    for name in ("x/en", "y/en", "z"):
        write(tmp_path / name, a__txt=name)
    documents, _ = read(tmp_path / "x/en", tmp_path / "y/en", tmp_path / "z", kind="text")
    assert [(d.id, text_of(d)) for d in documents] == [("en~1/a.txt", "x/en"), ("en~2/a.txt", "y/en"), ("z/a.txt", "z")]


def test_text_kind_takes_pages_too(tmp_path):
    write(tmp_path, a__html="<p>words</p>")
    assert [text_of(d) for d in read(tmp_path, kind="text")[0]] == ["words"]


def test_scenes_are_documents():
    documents, skipped = read("scenes:caption", num_documents=3, seed=1, image_size=32)
    assert len(documents) == 3 and not skipped and isinstance(documents[0].spans[0], Image)
    assert documents == read("scenes:caption", num_documents=3, seed=1, image_size=32)[0]


def test_bad_inputs(tmp_path):
    write(tmp_path, x__bin=b"1", empty__jsonl="", other__csv="a,b\n1,2\n", bad__parquet=b"no")
    for name, message in (
        ("gone", "not found"),
        ("x.bin", "unknown format"),
        ("empty.jsonl", "no text field"),
        ("other.csv", "no text field"),
        ("bad.parquet", "damaged Parquet"),
    ):
        with pytest.raises(InputError, match=message):
            open_inputs([str(tmp_path / name)])
    with pytest.raises(InputError, match="no pages"):
        open_inputs([str(tmp_path)])
    with pytest.raises(InputError, match="scenes:nothing: unknown scenes"):
        open_inputs(["scenes:nothing"])
    with pytest.raises(InputError, match="nothing of kind caption"):
        open_inputs([str(write(tmp_path / "t", a__txt="x"))], "caption")
