"""Damaged files: no exception but ours, all that can be read is kept, all else is named and counted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamm.data import images
from megamm.data.documents import Document, Skipped, Task, Text
from megamm.data.prepare import _encode
from megamm.data.readers import open_inputs
from megamm.data.readers.separated import BadRow, read_rows
from megamm.errors import InputError

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
PAIRS = 12
fuzz = settings(max_examples=120, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(n: int) -> bytes:
    return images.encode(np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def make_tar(files: list[tuple[str, bytes]], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pair_files(numbers=range(PAIRS)) -> list[tuple[str, bytes]]:
    return [f for n in numbers for f in ((f"{n:03d}.png", picture(n)), (f"{n:03d}.txt", f"Caption {n}.".encode()))]


def read(path: Path, kind: str = "auto") -> tuple[dict[str, Document], list[Skipped]]:
    """Documents by id, and what was left out; nothing where the input is refused."""
    try:
        items = [item for task in open_inputs([str(path)], kind).tasks for item in task()]
    except InputError as error:
        assert "\n" not in str(error)
        return {}, [Skipped(id=path.name, reason=str(error))]
    documents = [item for item in items if isinstance(item, Document)]
    assert len({document.id for document in documents}) == len(documents)
    return {document.id: document for document in documents}, [item for item in items if isinstance(item, Skipped)]


@st.composite
def damages(draw):
    """A function that damages bytes: flips one, or cuts, inserts or zeroes some."""
    what = draw(st.sampled_from(("flip", "cut", "insert", "zero", "remove")))
    place, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 700))
    value = draw(st.integers(1, 255))

    def damage(data: bytes) -> tuple[bytes, int]:
        at = int(place * len(data))
        changed = {
            "flip": data[:at] + bytes([data[at] ^ value]) + data[at + 1 :],
            "cut": data[:at],
            "insert": data[:at] + bytes([value]) * size + data[at:],
            "zero": data[:at] + bytes(size) + data[at + size :],
            "remove": data[:at] + data[at + size :],
        }[what]
        return changed, at

    return damage


WHOLE_TAR = make_tar(pair_files())
MEMBER = 512 + 512  # each member of WHOLE_TAR: a header and one block


@given(damage=damages())
@fuzz
def test_damaged_plain_tar(damage, tmp_path):
    data, at = damage(WHOLE_TAR)
    (tmp_path / "c.tar").write_bytes(data)
    documents, skipped = read(tmp_path / "c.tar")
    before = min(at // (2 * MEMBER), PAIRS)
    for n in range(before):
        assert f"c.tar:{n:03d}" in documents
    if len(documents) < PAIRS:
        assert any("c.tar" in entry.id for entry in skipped)
    if len(data) == len(WHOLE_TAR):  # flipped or zeroed in place: what lies behind is found again
        assert len(documents) >= PAIRS - 3


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
@given(damage=damages())
@fuzz
def test_damaged_packed_tar(suffix, damage, tmp_path):
    data, at = damage(PACK[suffix](WHOLE_TAR))
    (tmp_path / f"c.tar{suffix}").write_bytes(data)
    documents, skipped = read(tmp_path / f"c.tar{suffix}")
    if len(documents) < PAIRS:
        assert any(f"c.tar{suffix}" in entry.id for entry in skipped)
    if suffix == ".gz":  # its decoder works byte by byte
        with gzip.open(io.BytesIO(data[:at])) as file:
            readable = 0
            try:
                while file.read(1):
                    readable += 1
            except (EOFError, OSError):
                pass
        assert len(documents) >= min(readable // (2 * MEMBER), PAIRS) - 1


@pytest.mark.parametrize("header", [0, 20, 2 * PAIRS - 1])
@pytest.mark.parametrize("byte", [0, 124, 150, 156, 257, 345])
def test_flipped_header_byte_costs_one_pair_and_is_told(header, byte, tmp_path):
    data = bytearray(WHOLE_TAR)
    data[header * MEMBER + byte] ^= 0x41
    (tmp_path / "c.tar").write_bytes(data)
    documents, skipped = read(tmp_path / "c.tar")
    assert len(documents) == PAIRS - 1 and any(entry.reason.startswith("damaged tar") for entry in skipped)


def test_cut_between_members_is_told(tmp_path):
    (tmp_path / "c.tar").write_bytes(WHOLE_TAR[: 8 * MEMBER])
    documents, skipped = read(tmp_path / "c.tar")
    assert len(documents) == 4 and [entry.reason for entry in skipped] == ["damaged tar: cut short, it has no end mark"]


@pytest.mark.parametrize("suffix", list(PACK))
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_tars_of_all_formats(suffix, format, tmp_path):
    long = "folder/" * (12 if format == tarfile.USTAR_FORMAT else 40)
    files = [(long + name, content) for name, content in pair_files()]
    files = files[::2] + files[1::2] + [("x/é.PNG", picture(1)), ("x/é.TXT", b"One more.")]  # pictures, then captions
    (tmp_path / f"c.tar{suffix}").write_bytes(PACK[suffix](make_tar(files, format=format)))
    documents, skipped = read(tmp_path / f"c.tar{suffix}")
    assert not skipped and [d.spans[1].text for d in documents.values()][-1] == "One more."
    assert list(documents) == [f"c.tar{suffix}:{long}{n:03d}" for n in range(PAIRS)] + [f"c.tar{suffix}:x/é"]
    assert all(d.spans[0].data == picture(n) for n, d in zip(range(PAIRS), documents.values(), strict=False))


def test_members_of_other_kinds_are_counted_and_names_with_dots_kept(tmp_path):
    files = [
        ("a.v0.jpg", picture(0)),
        ("a.v1.jpg", picture(1)),
        ("a.txt", b"Both."),
        ("b.v0.png", picture(0)),
        ("b.v1.png", picture(1)),
        ("b.v0.txt", b"First."),
        ("b.v1.txt", b"Second."),
        ("c.png", picture(2)),
        ("c.json", b'{"caption": "From JSON.", "width": 8}'),
        ("d.png", picture(3)),
        ("d.txt", b"Fourth."),
        ("d.json", b"{}"),
        ("d.mp4", bytes(1000)),
        ("._d.png", b"\0"),
    ]
    (tmp_path / "c.tar").write_bytes(make_tar(files + files[9:11]))
    documents, skipped = read(tmp_path / "c.tar")
    assert {id: (len(d.spans) - 1, d.spans[-1].text) for id, d in documents.items()} == {
        "c.tar:a": (2, "Both."),
        "c.tar:b.v0": (1, "First."),
        "c.tar:b.v1": (1, "Second."),
        "c.tar:c": (1, "From JSON."),
        "c.tar:d": (1, "Fourth."),
        "c.tar:d~2": (1, "Fourth."),  # a name that comes again
    }
    assert {entry.id: entry.reason for entry in skipped} == {
        "c.tar:d.json": "file type not read: .json",
        "c.tar:d.mp4": "file type not read: .mp4",
        "c.tar:._d.png": "hidden file",
    }


def test_links_in_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name, content in pair_files(range(2)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    documents, skipped = read(tmp_path / "c.tar")
    assert len(documents) == 2
    assert [entry.reason for entry in skipped] == ["link in a tar", "member is not an ordinary file"]


ROWS = 300
TABLE = pa.table({"caption": [f"Text {n} here." for n in range(ROWS)], "n": range(ROWS)})


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@given(damage=damages())
@fuzz
def test_damaged_parquet(compression, damage, tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE, path, row_group_size=50, compression=compression, write_page_checksum=True)
    path.write_bytes(damage(path.read_bytes())[0])
    documents, skipped = read(path)
    if documents:
        assert len(documents) + len(skipped) >= ROWS or any(entry.reason.startswith("damaged") for entry in skipped)
    else:
        assert skipped


def test_damaged_parquet_loses_one_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE, path, row_group_size=50, write_page_checksum=True)
    metadata = pq.ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    data[metadata.row_group(2).column(0).data_page_offset + 60] ^= 255
    path.write_bytes(data)
    documents, skipped = read(path)
    assert set(documents) == {f"t.parquet:{n}" for n in range(ROWS) if not 100 <= n < 150}
    assert [entry.id for entry in skipped] == [f"t.parquet:{n}" for n in range(100, 150)]
    assert all(entry.reason.startswith("damaged Parquet: row group 2") for entry in skipped)


def test_a_parquet_with_a_wrong_count_of_rows_is_named(tmp_path):
    """A flipped bit made the count of one row group negative: its rows were lost and identifiers came twice."""
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE, path, row_group_size=50, compression="none", write_page_checksum=True)
    data, found = path.read_bytes(), 0
    for at in [match.start() + 1 for match in re.finditer(b"\x16\x64", data)]:  # an int64 field, zigzag 50
        path.write_bytes(data[:at] + b"\x65" + data[at + 1 :])  # -51
        metadata = pq.ParquetFile(path).metadata
        if min(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)) < 0:
            found += 1
            documents, skipped = read(path)  # which checks that identifiers come once
            assert len(documents) == ROWS - 50 and "row groups name 199 rows, its end 300" in skipped[0].reason
    assert found == ROWS // 50


def test_damaged_table_beside_a_good_one_is_counted(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    documents, skipped = read(tmp_path)
    assert len(documents) == ROWS and [entry.id for entry in skipped] == ["b.parquet"]
    assert "damaged Parquet" in skipped[0].reason


LINES = [json.dumps({"text": f"Line {n} of text.", "n": n}) for n in range(40)]


@pytest.mark.parametrize("suffix", list(PACK))
@given(damage=damages())
@fuzz
def test_damaged_jsonl(suffix, damage, tmp_path):
    whole = PACK[suffix]("\n".join(LINES).encode())
    data, at = damage(whole)
    path = tmp_path / f"t.jsonl{suffix}"
    path.write_bytes(data)
    documents, skipped = read(path)
    if not suffix:
        ends = np.cumsum([len(line) + 1 for line in LINES])
        for n in range(int((ends <= at).sum())):
            assert f"t.jsonl:{n}" in documents
        good = set()
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                good |= {record["text"]} if isinstance(record["text"], str) else set()
            except (ValueError, KeyError, TypeError):
                pass
        assert {text_of(document) for document in documents.values()} == {text.strip() for text in good}
    elif len(documents) < len(LINES):
        assert skipped


def text_of(document: Document) -> str:
    return "".join(span.text for span in document.spans if isinstance(span, Text))


fields = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(['"', 'a "b" c', "x\ny", ","])


def rows_of(data: bytes, delimiter: str = ",") -> list:
    return list(read_rows(io.BufferedReader(io.BytesIO(data)), delimiter))


@given(rows=st.lists(st.tuples(fields, fields), max_size=20), tabs=st.booleans())
@settings(max_examples=300, deadline=None)
def test_good_rows_are_those_of_the_csv_module(rows, tabs):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t" if tabs else ",")
    writer.writerows([("image", "caption"), *rows])
    expected = [row for row in rows if not tabs or "".join(row).strip()]  # blank lines are none
    found = rows_of(file.getvalue().encode(), "\t" if tabs else ",")
    clean = [tuple(part.replace("\r\n", "\n").replace("\r", "\n") for part in row) for row in expected]
    assert [tuple(p.replace("\r\n", "\n").replace("\r", "\n") for p in row.values()) for row in found] == clean


@given(damage=damages())
@fuzz
def test_damaged_csv(damage, tmp_path):
    rows = [f'p.png,"Caption {n}, with a comma."' if n % 3 else f"p.png,Caption {n}" for n in range(60)]
    whole = "image,caption\n" + "\n".join(rows)
    data, at = damage(whole.encode())
    (tmp_path / "p.png").write_bytes(picture(0))
    (tmp_path / "c.csv").write_bytes(data)
    documents, _ = read(tmp_path / "c.csv")
    ends = np.cumsum([len(line) + 1 for line in whole.split("\n")])
    for n in range(int((ends <= at).sum()) - 1):
        assert f"c.csv:{n}" in documents
    if len(data) == len(whole) and documents:  # one byte, or less than 700: the rows behind it are kept
        assert len(documents) >= 60 - 700 // 12 - 3


@pytest.mark.parametrize("place", [1, 3, 8])
@pytest.mark.parametrize("row", ['p.png,"Stray', 'p.png,"a" b', '"p.png,Stray', '"p.png","Stray\n"p.png","next"'])
def test_stray_quote_costs_its_own_row(row, place):
    rows = [f'p.png,"Caption {n}"' if n % 2 else f"p.png,Caption {n}" for n in range(10)]
    found = rows_of("\n".join(["image,caption", *rows[:place], row, *rows[place:]]).encode())
    good = [r["caption"] for r in found if not isinstance(r, BadRow)]
    assert [g for g in good if g != "next"] == [f"Caption {n}" for n in range(10)]
    assert sum(isinstance(r, BadRow) for r in found) == 1


def test_rows_with_more_fields_than_the_header_are_told_and_tabs_keep_quotes():
    found = rows_of(b"image,caption\np.png,A dog, a cat\np.png,One\n")
    assert isinstance(found[0], BadRow) and "3 fields, the header has 2" in found[0].reason
    assert found[1] == {"image": "p.png", "caption": "One"}
    assert rows_of(b'caption\turl\n"Hi" he said\tu\n"quo\tted\n', "\t") == [
        {"caption": '"Hi" he said', "url": "u"},
        {"caption": '"quo', "url": "ted"},
    ]


def test_long_fields_are_read_and_longer_ones_told(monkeypatch):
    long = "word " * 60_000
    assert rows_of(f"text\n{long}\nx\n".encode()) == [{"text": long}, {"text": "x"}]
    monkeypatch.setattr("megamm.data.readers.separated.MAX_LINE", 100)
    found = rows_of(f"text\n{long}\nx\n".encode())
    assert found[0] == BadRow("row over the size limit") and found[-1] == {"text": "x"}


def test_rows_in_utf16_and_with_bad_bytes():
    assert rows_of("text\nüber\n".encode("utf-16")) == [{"text": "über"}]
    assert rows_of(b"text\n\xff\nok\n") == [{"text": "\udcff"}, {"text": "ok"}]


def test_an_exception_in_a_task_is_a_skipped_line():
    def fail():
        yield Document(id="a", spans=(Text(text="no tokenizer for it"),))
        raise KeyError("odd\nerror")

    found = _encode([Task("bad.html", fail)], None, None)
    skipped = [(pieces, entry.skipped[0]) for pieces, entry in found]
    assert [(one.id, pieces, one.reason.split(",")[0]) for pieces, one in skipped] == [
        ("a", [], "cannot be read: AttributeError"),
        ("bad.html", [], "cannot be read: KeyError"),
    ]
