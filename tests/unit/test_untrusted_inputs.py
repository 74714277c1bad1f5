"""Folders as people have them: links, pipes, odd names, several kinds; nothing is lost in silence, nothing hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_damaged_inputs import picture, read

from megamm.data import images
from megamm.data.pack_plan import PackPlan
from megamm.data.prepare import PrepareSettings, prepare
from megamm.data.readers import open_inputs
from megamm.data.readers.html import html_spans
from megamm.data.readers.pages import read_page
from megamm.data.tokenizer import train_tokenizer
from megamm.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["The quick brown fox jumps over the lazy dog. "] * 3, 300, path)
    return path


def options(tokenizer: Path, *inputs: Path, **changes) -> PrepareSettings:
    values = {"image_size": 16, "patch_size": 8, "max_length": 64} | changes
    return PrepareSettings(inputs=tuple(map(str, inputs)), tokenizer=str(tokenizer), **values)


def reasons(skipped) -> dict[str, str]:
    return {entry.id: entry.reason for entry in skipped}


def test_links_pipes_and_hidden_files_are_refused_and_counted(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "secret.txt").write_text("secret")
    (other / "secret.png").write_bytes(picture(0))
    (folder / "page.html").write_text(
        "<p>Text</p><img src=out.png><img src=pipe.png><img src=in.png><img src=zero.png><img src=sub/out.png>"
    )
    (folder / "real.png").write_bytes(images.encode(np.zeros((40, 40, 3), np.uint8)))
    (folder / "in.png").symlink_to("real.png")
    (folder / "out.png").symlink_to(other / "secret.png")
    (folder / "out.html").symlink_to(other / "secret.txt")
    (folder / "sub").symlink_to(other)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.html").symlink_to("loop.html")
    (folder / ".git").mkdir()
    (folder / "style.css").write_text("p {}")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.html")
    documents, skipped = read(folder)
    assert [len(d.spans) for d in documents.values()] == [2]
    found = reasons(skipped)
    assert found == {
        "page.html: out.png": "image outside the input folder",
        "page.html: pipe.png": "image is not an ordinary file",
        "page.html: zero.png": "image outside the input folder",
        "page.html: sub/out.png": "image outside the input folder",
        "out.html": "link out of the input folder",
        "out.png": "link out of the input folder",
        "zero.png": "link out of the input folder",
        "pipe.png": "not an ordinary file",
        "pipe.html": "not an ordinary file",
        "loop.html": "not an ordinary file",
        "sub": "link to a folder",
        ".git": "hidden file or folder",
        "style.css": "file type not read: .css",
    }


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "sub/../../secret.png", "link.png"])
def test_tables_read_pictures_of_their_folder_only(name, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(picture(0))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "ok.png").write_bytes(picture(1))
    rows = [{"image": name, "caption": "Out."}, {"image": "ok.png", "caption": "In."}]
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents, skipped = read(tmp_path / "in" / "t.jsonl")
    assert list(documents) == ["t.jsonl:1"]
    assert reasons(skipped) == {"t.jsonl:0": "image outside the input folder"}


def test_names_in_latin1_are_read_and_shown(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    for stem in (b"caf\xe9", b"plain", "über".encode()):
        path = os.fsencode(tmp_path / "in") + b"/" + stem
        with open(path + b".png", "wb") as file:
            file.write(picture(len(stem)))
        with open(path + b".txt", "w") as file:
            file.write(f"Caption {stem!r}")
    info = prepare(options(tokenizer, tmp_path / "in"), tmp_path / "out", workers=2)
    assert sum(split["num_documents"] for split in info["splits"].values()) == 3 and not info["num_skipped"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'<meta charset="iso-8859-1"><p>\x93caf\xe9\x94', "\u201ccaf\u00e9\u201d"),
        (b'<meta charset="gb2312"><p>' + "汉字镕".encode("gb18030"), "汉字镕"),
        (b'<meta charset="shift_jis"><p>' + "日本語①".encode("cp932"), "日本語①"),
        (b'<meta charset="utf-16"><p>ok', "ok"),
        ("\ufeff<p>über".encode("utf-16-le"), "über"),
        *((b'<meta charset="%b"><p>x' % name, None) for name in (b"undefined", b"idna", b"hex", b"utf_7", b"nonsense")),
    ],
)
def test_encodings_as_browsers_read_them(content, expected, tmp_path):
    (tmp_path / "a.html").write_bytes(content)
    documents, skipped = read(tmp_path / "a.html")
    if expected is None:
        assert not documents and skipped[0].reason.startswith("wrong encoding")
    else:
        assert [d.spans[0].text for d in documents.values()] == [expected] and not skipped


MARKS = "<p>|<ol start='|99999999999|'>|<li>|<table><tr>|</|<img src=|\0|&#xffffffff;|<!--|]]>|charset=|\xff|<svg>"
pieces = st.sampled_from([mark.encode("latin-1") for mark in MARKS.split("|")])


@given(parts=st.lists(pieces | st.binary(max_size=20), max_size=40), suffix=st.sampled_from([".html", ".md"]))
@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_page_or_a_skipped_one(parts, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"".join(parts))
    assert list(read_page(path, tmp_path, "a"))


@pytest.mark.parametrize("start", ["9" * 5000, "²", "-3", "x", ""])
def test_starts_of_lists(start):
    text = html_spans(f"<ol start='{start}'><li>a<li>b</ol>", lambda source: None)[0].text
    assert text == ("-3. a\n-2. b" if start == "-3" else "1. a\n2. b")


LARGE = {
    "one list": "<ol>" + "<li>x</li>" * 60_000 + "</ol>",
    "blocks in blocks": "<div>" * 1000 + "<p>x <a href=y>z</a></p>" * 10_000 + "</div>" * 1000,
    "pictures": "<p>" + "<img src=a.png alt='some text'>" * 10_000 + "</p>",
    "never closed": "<table><tr><td><b>" * 20_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_time_grows_with_the_page_and_no_faster(name):
    began = time.process_time()
    html_spans(LARGE[name], lambda source: None)
    assert time.process_time() - began < 5


def test_depth_and_large_text_nodes():
    told: list[tuple[str, str]] = []

    def note(source: str, reason: str) -> None:
        told.append((source, reason))

    deep = html_spans("<div>" * 1500 + "inside" + "</div>" * 1500 + "<p>end</p>", lambda s: None, note)
    assert deep[0].text == "inside\n\nend" and not told
    html_spans("<div>" * 5000 + "lost", lambda s: None, note)
    assert told and told[0][1].startswith("damaged page")
    assert html_spans("<p>" + "y" * 11_000_000 + "</p>end", lambda s: None)[0].text.endswith("end")


def test_a_page_over_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / "a.html").open("wb") as file:
        file.truncate(50 * 2**20)
    (tmp_path / "b.html").write_text("<p>small")
    documents, skipped = read(tmp_path)
    assert list(documents) == ["b.html"] and skipped[0].reason.startswith("page over the size limit: 52428800 bytes")


def test_pictures_left_out_of_pages_are_told(tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("shown", "unseen", "nav", "icon"):
        size = 12 if name == "icon" else 40
        (folder / f"{name}.png").write_bytes(images.encode(np.full((size, size, 3), len(name) * 20, np.uint8)))
    (folder / "a.html").write_text(
        "<nav><img src=nav.png></nav><p>Text <img src=shown.png> and <img src=icon.png> more</p>"
        "<svg><path/></svg><object data=film.swf></object><img src='data:image/png;base64,@'>"
    )
    (folder / "b.html").write_text("<p>Another page")
    prepare(options(tokenizer, folder), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {
        "a.html: nav.png": "image in navigation or a hidden part",
        "a.html: icon.png": "icon: at most 15 pixels a side",
        "a.html: svg": "svg element",
        "a.html: film.swf": "object element",
        "a.html: data URI": "not an image of a known format",
        "unseen.png": "image that nothing refers to",
        "nav.png": "image that nothing refers to",
    }


def test_a_folder_of_several_kinds_is_refused_or_told(tmp_path):
    (tmp_path / "page.html").write_text("<p>A page")
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("A caption")
    (tmp_path / "README.md").write_text("About")
    with pytest.raises(InputError, match=r"several kinds: .*interleaved.*caption \(a\.png\); give --kind"):
        open_inputs([str(tmp_path)])
    documents, skipped = read(tmp_path, kind="caption")
    assert list(documents) == ["a.png"]
    assert reasons(skipped) == dict.fromkeys(("page.html", "README.md"), "of another kind: not caption")
    documents, skipped = read(tmp_path, kind="interleaved")
    assert list(documents) == ["README.md", "page.html"] and reasons(skipped) == {
        "a.txt": "of another kind: not interleaved"
    }


def test_tables_that_used_to_become_text(tmp_path):
    (tmp_path / "p.png").write_bytes(picture(0))
    first = [
        {"text": "No picture."},
        {"text": "One.", "image": "p.png"},
        {"text": "Two.", "images": ["p.png", "p.png"]},
    ]
    (tmp_path / "first.jsonl").write_text("\n".join(map(json.dumps, first)))
    documents, skipped = read(tmp_path / "first.jsonl")
    assert [len(d.spans) for d in documents.values()] == [2, 3]
    assert reasons(skipped) == {"first.jsonl:0": "no image field"}
    (tmp_path / "urls.csv").write_text("url,caption\nhttps://e.org/x,A dog\n")
    documents, skipped = read(tmp_path / "urls.csv")
    assert not documents and reasons(skipped) == {"urls.csv:0": "remote image"}
    (tmp_path / "upper.csv").write_text("URL,TEXT\np.png,A dog\n")
    assert list(read(tmp_path / "upper.csv")[0]) == ["upper.csv:0"]
    (tmp_path / "code.jsonl").write_text('{"content": "x = 1", "path": "a/b.py", "url": "https://e.org/page"}')
    documents, skipped = read(tmp_path / "code.jsonl")
    assert [d.spans[0].text for d in documents.values()] == ["x = 1"] and not skipped
    late = [{"text": f"Line {n}"} for n in range(1500)] + [{"text": "Late", "image": "p.png"}]
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, late)))
    documents, skipped = read(tmp_path / "late.jsonl")
    assert len(documents) == 1501 and reasons(skipped) == {
        "late.jsonl:1500: image": "image of a record that is read as text"
    }


def test_more_sources_than_a_batch_can_number_are_refused():
    with pytest.raises(InputError, match=r"data\.sources: 257 sources, at most 256"):
        PackPlan([None] * 257, [1.0] * 257, row_length=8, window_tokens=64, seed=0)


def test_repeats_are_told_and_not_held_out(tokenizer, tmp_path):
    lines = [{"text": f"line {n % 40}"} for n in range(80)] + [{"text": f"single {n}"} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    info = prepare(options(tokenizer, tmp_path / "t.jsonl", val_fraction=0.1), tmp_path / "out")
    assert info["num_repeats"] == 40 and 5 <= info["splits"]["val"]["num_documents"] <= 20


def test_workers_of_a_killed_run_end(tokenizer, tmp_path):
    code = (
        "import sys\nfrom megamm.data.prepare import *\n"
        "def report(done, total, skipped):\n"
        "    if done == 40:\n"
        "        import multiprocessing\n"
        "        print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "        time.sleep(60)\n"
        "import time\n"
        f"if __name__ == '__main__':\n"
        f"    settings = PrepareSettings(inputs=('scenes:text',), tokenizer={str(tokenizer)!r})\n"
        f"    prepare(settings, {str(tmp_path / 'o')!r}, 2, report)"
    )
    (tmp_path / "run.py").write_text(code)
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
