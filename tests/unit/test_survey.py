"""A look at raw inputs: it counts what preparation will find."""

import io

import pytest
from PIL import Image

from megamm.data.survey import first_texts, survey
from megamm.errors import InputError


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side // 2), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pages(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(40 + i))
        (tmp_path / f"{i}.html").write_text(f"<body><p>Page {i}.</p><img src='{i}.png'></body>")
    (tmp_path / "lost.png").write_bytes(png(100))
    (tmp_path / "empty.html").write_text("<body></body>")
    (tmp_path / "tool.exe").write_bytes(b"x")
    return tmp_path


def test_pages(pages):
    seen = []
    found = survey(str(pages), report=lambda done, total: seen.append(done))
    assert (found.kind, found.documents, found.characters, found.images) == (
        "interleaved",
        4,
        4 * len("Page 0.\n\n"),
        4,
    )
    assert found.image_side == 41 and found.sizes == [[len("Page 0.\n\n"), 1]] * 4
    assert found.skipped == {"no text": 1, "file type not read": 1, "image that nothing refers to": 1}
    assert seen == list(range(1, len(seen) + 1))


def test_captions_and_text(tmp_path):
    (tmp_path / "a.png").write_bytes(png(30))
    (tmp_path / "a.txt").write_text("A cat.")
    found = survey(str(tmp_path))
    assert (found.kind, found.documents, found.characters, found.images) == ("caption", 1, len("A cat."), 1)
    assert survey(str(tmp_path / "a.txt")).kind == "text"


def test_many_documents_are_kept_as_a_sample(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"x" * (i % 7 + 1)}"}}\n' for i in range(2500)))
    found = survey(str(tmp_path / "a.jsonl"))
    assert found.documents == 2500 and 500 <= len(found.sizes) <= 1000
    assert first_texts(str(tmp_path / "a.jsonl"), "text", 3) == ["x", "xx", "xxx"]


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="no pages"):
        survey(str(tmp_path))
