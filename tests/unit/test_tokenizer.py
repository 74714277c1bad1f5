"""Tokenizer: training, loading, round trips, and text that spells special tokens."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train_tokenizer
from megamm.errors import InputError
from megamm.sequence import SPECIAL_TOKENS

TEXTS = ["the cat sat on the mat, 1234 times", "the dog sat on the log <image> and <eos>", "ünïcödé 日本語"] * 5


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer(path)


def test_special_tokens_come_first(path):
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_training_is_deterministic_and_compresses(path, tokenizer, tmp_path):
    size = train_tokenizer(TEXTS, 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert size == tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
    assert tokenizer.sha256 == Tokenizer(tmp_path / "again.json").sha256


def test_minimum_size_is_bytes_and_special_tokens(tmp_path):
    assert train_tokenizer(TEXTS, MIN_VOCAB_SIZE, tmp_path / "t.json") == MIN_VOCAB_SIZE
    text = "any text: \x00 é 🎉"
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert len(tokenizer.encode(text)) == len(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(InputError, match=r"--vocab-size: 260 is too small.*261"):
        train_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1, tmp_path / "u.json")
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(["", ""], 300, tmp_path / "u.json")
    assert not (tmp_path / "u.json").exists()


@given(parts=st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=20), max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_without_special_ids(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids >= len(SPECIAL_TOKENS)).all() and (ids < tokenizer.vocab_size).all()
    assert tokenizer.decode(ids) == text


def test_batch_equals_single(tokenizer):
    texts = ["", "<bos>", *TEXTS]
    for found, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(found, tokenizer.encode(text))


def test_decode_spells_special_tokens(tokenizer):
    assert tokenizer.decode([1, *tokenizer.encode("cat"), 4, 2]) == "<bos>cat<image_end><eos>"


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("bad \udcff byte")


def test_wrong_files(path, tmp_path):
    with pytest.raises(InputError, match=r"missing\.json.*train_tokenizer"):
        Tokenizer(tmp_path / "missing.json")
    bad = tmp_path / "bad.json"
    for content in (b"{", b'{"a": 1}', b"\xff\xfe"):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"not a tokenizer\.json"):
            Tokenizer(bad)


def test_tokenizer_without_our_special_tokens_is_refused(path, tmp_path):
    value = json.loads(path.read_text())
    swapped = json.loads(json.dumps(value).replace("<image>", "<picture>"))
    (tmp_path / "swapped.json").write_text(json.dumps(swapped))
    with pytest.raises(InputError, match="special token <image> must have id 3, has None"):
        Tokenizer(tmp_path / "swapped.json")
    for token in value["added_tokens"]:
        token["special"] = False  # then a literal <image> in a page would become the image id
    (tmp_path / "open.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="encoded to special ids"):
        Tokenizer(tmp_path / "open.json")
