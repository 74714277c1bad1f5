"""Pictures of packed rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models

from megamm.data.picture import CAUSAL, HIDDEN, WITHIN_IMAGE, draw_row, mask_picture
from megamm.sequence import BOS, EOS, IGNORE, IMAGE, IMAGE_END, PAD, SPECIAL_TOKENS, Batch, row_spans

PATCH, SCALE = 4, 2
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = [*SPECIAL_TOKENS, "red", "blue", "cat"]
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))


@pytest.fixture
def batch() -> Batch:
    """A row of padding, then one of a caption of four one-coloured patches, a text, and padding."""
    caption = [BOS, *[IMAGE] * 4, IMAGE_END, 5, 6, EOS]
    text = [BOS, 7, EOS]
    tokens = [*caption, *text, PAD, PAD]
    lo = [0] * 9 + [9] * 3 + [12, 12]
    hi = [0, 4, 4, 4, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11]
    targets = [t if t not in (IMAGE, IMAGE_END, PAD, BOS) else IGNORE for t in (*tokens[1:], PAD)]
    targets[8] = IGNORE
    empty = [0] * len(tokens)

    def rows(first: list[int], second: list[int], dtype=torch.int32) -> torch.Tensor:
        return torch.tensor([first, second], dtype=dtype)

    patches = np.repeat(np.array(COLOURS, np.uint8)[:, None], PATCH * PATCH, axis=1).reshape(4, -1)
    return Batch(
        tokens=rows([PAD] * len(tokens), tokens),
        positions=rows(empty, empty),
        targets=rows([IGNORE] * len(tokens), targets),
        source=rows(empty, [0] * 9 + [1] * 5, torch.uint8),
        label_kind=rows(empty, empty, torch.uint8),
        lo=rows([0] * len(tokens), lo),
        hi=rows([-1] * len(tokens), hi),
        patches=torch.from_numpy(patches),
        patch_index=torch.arange(4) + len(tokens) + 1,
        grids=torch.tensor([[2, 2]], dtype=torch.int32),
        label_index=torch.tensor([len(tokens) + i for i, t in enumerate(targets) if t != IGNORE]),
    )


def test_splits_a_row_into_documents_and_spans(batch):
    documents = row_spans(*(x[1].numpy() for x in (batch.tokens, batch.lo, batch.hi)))
    assert [[(s.start, s.stop, s.is_image) for s in spans] for spans in documents] == [
        [(0, 1, False), (1, 5, True), (5, 9, False)],
        [(9, 12, False)],
    ]
    assert row_spans(*(x[0].numpy() for x in (batch.tokens, batch.lo, batch.hi))) == []


def test_draws_every_patch_in_its_place(batch, tokenizer):
    picture = np.asarray(draw_row(batch, 1, tokenizer, sources=["caption", "text"], scale=SCALE))
    assert picture.shape[1] == 1120 * SCALE
    centres = []
    for colour in COLOURS:
        rows, columns = np.nonzero((picture == colour).all(-1))
        assert len(rows) > 100, f"patch of colour {colour} is missing"
        assert np.ptp(rows) == np.ptp(columns)  # a square tile
        centres.append((rows.mean(), columns.mean()))
    first, second, third, fourth = centres
    assert first[0] == second[0] < third[0] == fourth[0]
    assert first[1] == third[1] < second[1] == fourth[1]


def test_marks_tokens_that_carry_a_loss(batch, tokenizer):
    with_labels = np.asarray(draw_row(batch, 1, tokenizer))
    batch.targets[:] = IGNORE
    without = np.asarray(draw_row(batch, 1, tokenizer))
    blue = (0xCF, 0xE3, 0xF5)
    assert (with_labels == blue).all(-1).sum() > 1000
    assert not (without == blue).all(-1).any()


def test_draws_a_row_of_padding_and_a_long_text(batch, tokenizer):
    empty = draw_row(batch, 0, tokenizer)
    assert isinstance(empty, Image.Image)
    seen = np.asarray(empty)
    assert not (seen[100:400] == CAUSAL).all(-1).any()  # the mask itself; its key lies below
    batch.tokens[1] = 7
    batch.lo[1], batch.hi[1] = 0, torch.arange(14)
    batch.patches, batch.patch_index = batch.patches[:0], batch.patch_index[:0]
    short, long = (draw_row(batch, 1, tokenizer, max_tokens=n) for n in (2, 14))
    assert short.size[0] == long.size[0]


@st.composite
def layouts(draw) -> list[list[tuple[bool, int]]]:
    spans = st.lists(st.integers(1, 5), min_size=1, max_size=4)
    # Images are always kept apart by text: <image_end>.
    return [[(i % 2 == 1, n) for i, n in enumerate(lengths)] for lengths in draw(st.lists(spans, max_size=4))]


@given(layouts(), st.integers(0, 3))
def test_mask_is_the_rule_of_attention(documents, padding):
    document, image, is_image = [], [], []
    for number, spans in enumerate(documents):
        for place, (picture, length) in enumerate(spans):
            document += [number] * length
            image += [(number, place) if picture else None] * length
            is_image += [picture] * length
    size, length = len(document) + padding, len(document)
    lo, hi = np.full(size, length), np.full(size, length - 1)
    for q in range(length):
        lo[q] = document.index(document[q])
        hi[q] = max(k for k in range(length) if image[k] == image[q]) if is_image[q] else q
    drawn = mask_picture(lo, hi, np.array([*is_image, *[False] * padding], bool))
    for q in range(size):
        for k in range(size):
            if q >= length or k >= length or document[q] != document[k]:
                expected = HIDDEN
            elif is_image[q] and image[q] == image[k]:
                expected = WITHIN_IMAGE
            else:
                expected = CAUSAL if k <= q else HIDDEN
            assert tuple(drawn[q, k]) == expected
