"""Kinds of pages that people have: what a reader sees of them is what is prepared."""

from pathlib import Path

import pytest
from PIL import Image as Picture

from megamm.data.documents import Document, Image
from megamm.data.readers.markdown import render_markdown
from megamm.data.readers.pages import read_page

PICTURE = "<picture>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name in ("a", "b", "main_screen"):
        Picture.effect_noise((60, 40), 50).convert("RGB").save(folder / f"{name}.png")
    return folder


def seen(folder: Path, body: str | bytes, name: str = "page.html") -> tuple[str, list[str]]:
    """The page as text with pictures marked, and the reasons of what was left out."""
    path = folder / name
    if isinstance(body, bytes):
        path.write_bytes(body)
    else:
        path.write_text(body if name.endswith(".md") else f"<html><body>{body}</body></html>", encoding="utf-8")
    found = list(read_page(path, folder, name))
    (document,) = [one for one in found if isinstance(one, Document)]
    spans = [PICTURE if isinstance(span, Image) else span.text for span in document.spans]
    return "".join(spans), [one.reason for one in found if not isinstance(one, Document)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<p>2<sup>32</sup> values, H<sub>2</sub>O, 10<sup>-3</sup>.</p>", "2³² values, H₂O, 10⁻³."),
        ("<p>The 1<sup>st</sup> of x<sub>max</sub>.</p>", "The 1st of xmax."),
        ("<header><h1>Title</h1><a href=x>Home</a></header><main><p>Text.</p></main>", "Title\n\nText."),
        ("<header><h1>Site</h1></header><main><h1>Title</h1><p>Text.</p></main>", "Title\n\nText."),
        ("<form><h1>Title</h1><p>Text of a page in a form.</p></form>", "Title\n\nText of a page in a form."),
        ("<p>Text.</p><form><label>Search</label><input name=q><button>Go</button></form>", "Text."),
        ("<pre>one<br>two\n<br/>  three</pre>", "one\ntwo\n\n  three"),
        ("<p>A</p><object data='a.png' type='image/png'>Shown</object>", f"A\n\n{PICTURE}Shown"),
        (
            "<p>A</p><object data='d.svg' type='image/svg+xml'><img src='a.png' alt='Drawn'></object>",
            f"A\n\n{PICTURE}Drawn",
        ),
        ("<p>See <img src='a.png' alt='Screenshot of 2024.png'> here.</p>", f"See {PICTURE} here."),
        ("<p>A</p><object data='film.swf'><p>No film here.</p></object>", "A\n\nNo film here."),
        ("<p>So <math alttext='e^{x}'><mi>e</mi></math>.</p>", "So $e^{x}$."),
        (
            "<p>So <math><semantics><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow>"
            "<annotation encoding='application/x-tex'>a+b</annotation></semantics></math>.</p>",
            "So $a+b$.",
        ),
        ("<p>So <math><mi>a</mi><mo>+</mo><mi>b</mi></math>.</p>", "So a+b."),
        ("<p>See <img src='main_screen.png' alt='gerbview_main_screen_png'> here.</p>", f"See {PICTURE} here."),
        (
            "<p>Press <img src='a.png' alt='1'> or <img src='b.png' alt='2'> now.</p>",
            f"Press {PICTURE}1 or {PICTURE}2 now.",
        ),
        (
            "<p><img src='a.png' alt='A key'></p><p><img src='b.png' alt='A key'></p>",
            f"{PICTURE}A key\n\n{PICTURE}A key",
        ),
        ("<p>A key.</p><p><img src='a.png' alt='A key'></p>", f"A key.\n\n{PICTURE}"),
        ("<table><tr><td><p>a</p></td><td><div>b</div></td></tr><tr><td>c</td><td>d</td></tr></table>", "a | b\nc | d"),
        ("<table><tr><td><p>a</p><p>b</p></td><td><ul><li>c</li></ul></td></tr></table>", "a\nb\n- c"),
    ],
)
def test_a_page_as_its_reader_sees_it(folder, body, expected):
    assert seen(folder, body)[0] == expected


def test_the_encoding_is_the_pages_and_not_that_of_something_in_it(folder):
    page = b"<html><head></head><body><annotation encoding='application/x-tex'>x</annotation>caf\xc3\xa9</body></html>"
    assert "café" in seen(folder, page)[0]
    for head in (b"<meta charset='latin-1'>", b"<META http-equiv=x content='text/html; charset=ISO-8859-1'>"):
        assert seen(folder, b"<html><head>" + head + b"</head><body>caf\xe9</body></html>")[0] == "café"
    assert seen(folder, b"<?xml version='1.0' encoding='iso-8859-1'?><html><body>caf\xe9</body></html>")[0] == "café"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Title {#name .class}\n\nText.", "Title\n\nText."),
        ("![A screen](a.png){ width=300 }", f"{PICTURE}A screen"),
        ("A `code`{.py} and [link](x){ .md-button }.", "A code and link."),
        ('!!! note "Careful"\n    Inside.\n\n    More.\n\nAfter.', "Careful\n\nInside.\n\nMore.\n\nAfter."),
        ("???+ tip\n    Inside.\n\nAfter.", "Tip\n\nInside.\n\nAfter."),
        ('=== "Linux"\n\n    One.\n\n=== "Mac"\n\n    Two.', "Linux\n\nOne.\n\nMac\n\nTwo."),
        ('!!! note\n    === "Linux"\n\n        One.', "Note\n\nLinux\n\nOne."),
        (":::tip Title\n\nInside.\n\n:::\n\nAfter.", "Title\n\nInside.\n\nAfter."),
        (":::{warning}\nInside.\n:::", "Warning\n\nInside."),
        ("Sum $\\sum_{i=1}^{n} f(x){y}$ and {braces}.", "Sum $\\sum_{i=1}^{n} f(x){y}$ and {braces}."),
        ("```\n!!! note\n    Inside.\n# x {#y}\n```", "!!! note\n    Inside.\n# x {#y}"),
        ("Setext\n===\n\n=== no tab", "Setext\n\n=== no tab"),
    ],
)
def test_marks_of_markdown_dialects(folder, text, expected):
    assert seen(folder, text, "page.md")[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{'    ' * i}!!! note" for i in range(400)) + "\n" + "    " * 400 + "end",  # boxes in boxes
        "!!!" + " " * 30_000 + "\x01 end",  # blanks that several parts of a pattern could share out
        ":::a" + " " * 30_000 + "end",
        "a" + " " * 30_000 + "end",
        "!!! note\n" * 30_000 + "end",
    ],
)
@pytest.mark.timeout(20)  # each takes a second or less; what grows by the square takes minutes
def test_marks_take_time_in_proportion_to_the_page(text):
    assert "end" in render_markdown(text)


def test_a_line_break_in_a_paragraph_stays(folder):
    assert seen(folder, "One  \ntwo.", "page.md")[0] == "One\ntwo."


@pytest.mark.timeout(20)
def test_headings_in_deep_headers_take_time_in_proportion_to_the_page(folder):
    assert seen(folder, "<header>" * 1500 + "<h1>x</h1>" * 3000)[0] == "x"
