"""Near repeats: texts and pictures that differ a little.

A text is known by MinHash over runs of its tokens (Broder, "On the resemblance and containment of documents", 1997),
in bands. Two texts are near where a band is equal: so are 99% of pairs that share nine tenths of their runs, 12% of
those that share half, and under 1% of those that share three tenths. A picture is known by the signs of differences
between neighbouring pixels of its 9 x 8 miniature in grey ("dHash"): near are those that differ in few bits.
"""

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megamm.data.permutation import hash64

RUN = 5
"""Tokens of a run."""
MIN_RUNS = 20
"""A text of fewer runs has no bands: short texts are alike by chance."""
BANDS, BAND_HASHES = 8, 6
IMAGE_BITS = 3
"""Pictures differ in at most so many of 64 bits."""
FLAT_BITS = 6
"""A picture with fewer signs of one kind is nearly of one colour, and near to every other one of that sort."""
NEIGHBOURS = 32
"""Pictures compared with each one: those next to it in the order of their bits."""

# Odd factors of a multiplicative hash; part of what bands mean.
_FACTORS = hash64(np.arange(BANDS * BAND_HASHES), 1) | np.uint64(1)
_CHUNK = 1024


def text_bands(tokens: np.ndarray) -> np.ndarray:
    """MinHash bands of a text.

    Args:
        tokens: ids, [num_tokens].

    Returns:
        uint64 [BANDS], or [0] for a short text.
    """
    count = len(tokens) - RUN + 1
    if count < MIN_RUNS:
        return np.zeros(0, np.uint64)
    ids = np.asarray(tokens, np.uint64)
    runs = np.zeros(count, np.uint64)
    for k in range(RUN):
        runs = hash64(runs ^ ids[k : k + count], k)
    # Minima go by the high bits, which are random; the low ones of a product are not. In chunks that fit into a cache.
    least = [(_FACTORS[:, None] * runs[i : i + _CHUNK]).min(1) for i in range(0, count, _CHUNK)]
    bands = np.min(least, axis=0).reshape(BANDS, BAND_HASHES)
    keys = np.arange(BANDS, dtype=np.uint64)
    for k in range(BAND_HASHES):
        keys = hash64(keys ^ bands[:, k], k)
    return keys


def image_bits(pixels: np.ndarray) -> int:
    """dHash of a picture, uint8 [H, W, 3]: 64 bits; 0 for one of nearly one colour."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    # First by a whole factor, which is several times faster; a few pixels of the edges do not matter.
    factor = min(grey.shape) // 32
    if factor > 1:
        height, width = (side // factor for side in grey.shape)
        grey = cv2.resize(grey[: height * factor, : width * factor], (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    signs = (small[:, 1:] > small[:, :-1]).ravel()
    if not FLAT_BITS <= signs.sum() <= 64 - FLAT_BITS:
        return 0
    return int.from_bytes(np.packbits(signs).tobytes(), "big")


def groups(num_documents: int, edges: np.ndarray) -> np.ndarray:
    """Group of each document, int64 [num_documents], where edges, [n, 2], join documents."""
    ones = np.ones(len(edges), bool)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(num_documents, num_documents))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def equal(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Edges between documents with equal keys: [n, 2]; each key [num_keys] belongs to a document."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.stack([documents[order][:-1][same], documents[order][1:][same]], axis=1)


def near_texts(bands: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Edges between documents with an equal band: [n, 2].

    Args:
        bands: uint64 [num_texts, BANDS].
        documents: int64 [num_texts].
    """
    return np.concatenate([equal(bands[:, b], documents) for b in range(BANDS)])


def near_images(bits: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Edges between documents with near pictures: [n, 2].

    Args:
        bits: uint64 [num_images], of :func:`image_bits`.
        documents: int64 [num_images].
    """
    documents, bits = documents[bits != 0], bits[bits != 0]
    found = [np.zeros((0, 2), np.int64)]
    # Of four quarters one at least is equal where three bits differ: sorted by it, near pictures lie together.
    for quarter in range(IMAGE_BITS + 1):
        turn = np.uint64(16 * quarter)
        turned = (bits << turn) | (bits >> (np.uint64(64) - turn)) if quarter else bits
        order = np.argsort(turned, kind="stable")
        ranked = turned[order]
        for step in range(1, min(NEIGHBOURS, len(bits) - 1) + 1):
            near = np.bitwise_count(ranked[step:] ^ ranked[:-step]) <= IMAGE_BITS
            found.append(np.stack([documents[order][:-step][near], documents[order][step:][near]], axis=1))
    return np.concatenate(found)
