"""Splits: shares of tokens, a minimum of pictures, repeats kept out of validation."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data.splits import Documents


def documents(items: list[tuple[object, int, int]]) -> Documents:
    """Of (content, tokens, pictures)."""
    found = Documents()
    for content, tokens, images in items:
        found.add(hashlib.sha256(repr(content).encode()).digest()[:16], [], tokens, images, 1)
    return found


item = st.tuples(st.integers(0, 30), st.integers(1, 1000), st.integers(0, 3))


@given(items=st.lists(item, max_size=60), fraction=st.sampled_from([0, 0.02, 0.1, 0.5]))
@settings(max_examples=400, deadline=None)
def test_validation_is_there_is_small_and_holds_nothing_of_train(items, fraction):
    chosen = documents(items).hold_out(fraction)
    contents = np.array([content for content, _, _ in items])
    assert len(chosen) == len(items)
    if not fraction or len(set(contents.tolist())) < 2:
        assert not chosen.any()
        return
    assert chosen.any() and not chosen.all()
    assert not set(contents[chosen].tolist()) & set(contents[~chosen].tolist())


def test_shares_are_of_tokens_though_documents_differ_much():
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = (rng.pareto(0.9, 2000) * 20 + 5).astype(int)
        chosen = documents([((seed, n), int(size), 0) for n, size in enumerate(sizes)]).hold_out(0.02)
        assert 0.02 <= sizes[chosen].sum() / sizes.sum() <= 0.03


def test_pictures_are_held_out_where_few_documents_have_them():
    for seed in range(20):
        items = [((seed, n), 100, int(n % 50 == 0)) for n in range(2000)]
        chosen = documents(items).hold_out(0.05)
        assert sum(images for (_, _, images), held in zip(items, chosen, strict=True) if held) >= 2
        assert chosen.sum() <= 150
    one = [(n, 100, 20 * (n == 7)) for n in range(100)] + [(n, 100, 20) for n in (200, 201)]
    assert sum(images for (_, _, images), held in zip(one, documents(one).hold_out(0.02), strict=True) if held) >= 1


def test_most_documents_stay_as_a_corpus_grows():
    items = [(n, 100, 0) for n in range(4000)]
    before, after = documents(items[:2000]).hold_out(0.1), documents(items).hold_out(0.1)
    assert (before & after[:2000]).sum() > 0.8 * before.sum()


def test_pictures_of_train_are_not_in_validation():
    found, rng = Documents(), np.random.default_rng(0)
    pictures = rng.integers(0, 100, 300)
    for n, picture in enumerate(pictures):
        found.add(hashlib.sha256(bytes([n % 256, n // 256])).digest()[:16], [bytes([picture]) * 16], 50, 1, 1)
    chosen = found.hold_out(0.1)
    assert chosen.any() and not set(pictures[chosen]) & set(pictures[~chosen])


def test_repeats_are_counted():
    assert documents([("a", 1, 0), ("b", 1, 0), ("a", 1, 0), ("a", 1, 0)]).num_repeats() == 2
