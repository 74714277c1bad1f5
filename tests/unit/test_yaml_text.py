"""YAML: what plain words mean, keys that stand twice, and text that cannot be read."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megamm.errors import InputError
from megamm.settings import parse_overrides
from megamm.yaml_text import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("064", 64),
        ("-007", -7),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000_000", 1_000_000),
        ("1e-3", 0.001),
        ("1E6", 1e6),
        (".5", 0.5),
        ("2.", 2.0),
        ("-.inf", float("-inf")),
        ("2026-01-31", "2026-01-31"),
        ("1:30:00", "1:30:00"),
        ("0b101", "0b101"),
        ("1_", "1_"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("n", "n"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'064'", "064"),
        ("!!str 5", "5"),
    ],
)
def test_plain_words(text, value):
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)
    assert parse_overrides([f"--a.b={text}"]) == {"a": {"b": value}}, "overrides are read by the same rules"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_what_is_written_reads_back(value):
    assert parse_yaml(dump_yaml({"key": value}), "here") == {"key": value}


@pytest.mark.parametrize("word", ["yes", "064", "0o7", "1e3", "1:30", "2026-01-31", "null", "", "1_0", "=", "<<", ".5"])
def test_text_that_looks_like_something_else_is_quoted_for_every_reader(word):
    written = dump_yaml({"key": word})
    assert parse_yaml(written, "here") == yaml.safe_load(written) == {"key": word}


def test_every_key_that_stands_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: {x: 1}\nb:\n  c: 1\n  d: [{e: 1, e: 2}]\n  c: 2\na: {}\n64: 1\n064: 2\n")
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 4 problems\n")
    for part in ("a: stands twice, in lines 1 and 6", "b.c: stands twice, in lines 3 and 5", "064: stands twice, in"):
        assert part in message
    assert "b.d.0.e: stands twice in line 4" in message


def test_a_merged_mapping_gives_way_to_the_keys_beside_it():
    text = "base: &base {lr: 1, eps: 2}\nrun: {<<: *base, lr: 3}\n"
    assert parse_yaml(text, "here")["run"] == {"lr": 3, "eps": 2}
    with pytest.raises(InputError, match="k: stands twice"):
        parse_yaml("run: {<<: {k: 1, k: 2}}", "here")


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "!!python/object/apply:os.system ['true']",
        "!!int many",
        "!!timestamp x",
        "!!map [1]",
        "&a [*a]",
        "? [a]\n: 1",
        "--- 1\n--- 2",
        "[" * 3000,
        "9" * 5000,
        "\x00",
    ],
)
def test_what_cannot_be_read_is_one_line(text):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml: not valid YAML: ") and "\n" not in str(caught.value)


@given(st.text(alphabet="ab:- {}[]&*!?|>'\"#%,\n\t01._e<~", max_size=40))
def test_no_text_ends_in_a_traceback(text):
    try:
        parse_yaml(text, "here")
    except InputError as error:
        assert str(error).startswith("here: ")
