"""Near repeats of texts and pictures: found, and never divided between training and validation."""

import hashlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data import images, near
from megamm.data.splits import Documents


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth_picture(rng: np.random.Generator, size: int = 200) -> np.ndarray:
    """A picture of soft spots, as varied as a photograph's miniature."""
    return cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def share_of_runs(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of the runs of two texts, counted without hashes."""
    runs = [{tuple(t[i : i + near.RUN]) for i in range(len(t) - near.RUN + 1)} for t in (a.tolist(), b.tolist())]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@pytest.mark.parametrize("low, high, least, most", [(0.88, 0.93, 0.95, 1), (0.45, 0.55, 0, 0.3), (0, 0.3, 0, 0.05)])
def test_near_texts_are_those_that_share_runs(rng, low, high, least, most):
    found, seen = 0, 0
    while seen < 100:
        text = rng.integers(0, 30_000, 300)
        other = text.copy()
        # A stretch is written anew: that changes the share of runs by known amounts.
        length = int(300 * (1 - rng.uniform(low, high)) / 1.5) if high < 1 else 0
        start = rng.integers(0, 300 - length)
        other[start : start + length] = rng.integers(0, 30_000, length)
        if low <= share_of_runs(text, other) <= high:
            seen += 1
            found += bool((near.text_bands(text) == near.text_bands(other)).any())
    assert least <= found / seen <= most


def test_short_texts_are_near_nothing():
    assert len(near.text_bands(np.arange(10))) == 0 and len(near.text_bands(np.arange(24))) == near.BANDS


@pytest.mark.parametrize("change", ["size", "quality", "brightness"])
def test_pictures_made_anew_are_near(rng, change):
    hits = 0
    for _ in range(50):
        pixels = smooth_picture(rng)
        if change == "size":
            other = cv2.resize(pixels, (150, 130), interpolation=cv2.INTER_AREA)
        elif change == "quality":
            other = images.read_rgb(cv2.imencode(".jpg", pixels[..., ::-1], [1, 40])[1].tobytes(), 10**6)
        else:
            other = (pixels * 0.9).astype(np.uint8)
        hits += (near.image_bits(pixels) ^ near.image_bits(other)).bit_count() <= near.IMAGE_BITS
    assert hits >= 45


def test_pictures_of_one_colour_are_near_nothing():
    bits = [near.image_bits(np.full((30, 30, 3), value, np.uint8)) for value in (0, 100, 255)]
    assert bits == [0, 0, 0] and not len(near.near_images(np.array(bits, np.uint64), np.arange(3)))


@given(bits=st.lists(st.integers(1, 2**64 - 1), min_size=2, max_size=20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_pictures_of_few_differing_bits_are_found(bits, data):
    """Against all pairs, in sets no larger than the neighbourhood that is searched."""
    flips = data.draw(st.lists(st.integers(0, 63), max_size=near.IMAGE_BITS))
    bits.append(bits[0])
    for flip in flips:
        bits[-1] ^= 1 << flip
    edges = near.near_images(np.array(bits, np.uint64), np.arange(len(bits)))
    found = {tuple(sorted(edge)) for edge in edges.tolist()}
    pairs = [(i, j) for j in range(len(bits)) for i in range(j) if bits[i] and bits[j]]
    assert found == {(i, j) for i, j in pairs if (bits[i] ^ bits[j]).bit_count() <= near.IMAGE_BITS}


def corpus(texts: list[np.ndarray]) -> Documents:
    documents = Documents()
    for number, text in enumerate(texts):
        documents.add(
            hashlib.sha256(str(number).encode()).digest()[:16], [], len(text), 0, 1, near.text_bands(text).tolist()
        )
    return documents


def test_near_repeats_are_not_divided(rng):
    """Templates filled in differently: no page of validation is near one of training, and the share holds."""
    originals = [rng.integers(0, 30_000, 200) for _ in range(300)]
    texts, source = [], []
    for number, text in enumerate(originals):
        for _ in range(1 if number % 3 else 4):
            copy = text.copy()
            copy[rng.integers(0, 200)] = 1
            texts.append(copy)
            source.append(number)
    documents = corpus(texts)
    assert documents.num_repeats() == 0 and 280 <= documents.num_near_repeats() <= 300
    held = documents.hold_out(0.1)
    source = np.array(source)
    assert 0.09 < held.mean() < 0.15
    assert not set(source[held]) & set(source[~held])


def test_a_corpus_of_near_repeats_alone(rng):
    """Groups go to validation as a whole; where all are one group, equal content alone counts."""
    originals = [rng.integers(0, 30_000, 200) for _ in range(20)]
    held = corpus([text for text in originals for _ in range(5)]).hold_out(0.1)
    groups = held.reshape(20, 5)
    assert held.any() and (groups.all(1) | ~groups.any(1)).all() and held.mean() <= 0.2
    held = corpus([originals[0]] * 50).hold_out(0.1)
    assert held.any() and held.mean() <= 0.2
