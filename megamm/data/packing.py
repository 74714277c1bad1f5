"""Put whole documents into rows of fixed length with little padding.

Two heuristics, of which the one with fewer rows wins. Best-fit-decreasing is fast and good where rows hold two
or three long documents. Filling one row after another as exactly as the documents left allow ("minimum bin
slack", Gupta and Ho, Production Planning & Control 10, 1999) is several times slower, and mostly ends within
one row of the fewest possible where best-fit-decreasing pads 1 to 3%. Padding costs training compute, packing a
few tens of milliseconds per million tokens of a loader process (benchmarks/packing.py has the figures).
"""

from bisect import bisect_left, bisect_right

import numpy as np


def pack_documents(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Assign documents to rows.

    Args:
        lengths: integers [num_documents], each from 1 to ``row_length``.
        row_length: positions in a row.

    Returns:
        int64 [num_documents]: the row of each document; rows are numbered from 0 without gaps.
    """
    lengths = np.asarray(lengths, np.int64)
    rows = best_fit_decreasing(lengths, row_length)
    # Only if there could be fewer rows at all: the second way is several times slower.
    if num_rows(rows) > -(-int(lengths.sum()) // row_length):
        rows = min(rows, fill_exactly(lengths, row_length), key=num_rows)
    return rows


def num_rows(rows: np.ndarray) -> int:
    """Number of rows of an assignment."""
    return int(rows.max(initial=-1)) + 1


def padding_share(lengths: np.ndarray, rows: int, row_length: int) -> float:
    """Share of the positions of ``rows`` rows that hold no document."""
    return 1 - float(np.sum(lengths)) / (rows * row_length)


def best_fit_decreasing(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The longest document first, each into the fullest row with room for it; see :func:`pack_documents`."""
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by room left
    rooms = 0  # bit c is set where open_rows[c] is not empty: the best fit is the lowest set bit >= length
    opened = 0
    # Stable: the rows of a plan must not depend on how numpy sorts equal lengths.
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        # One large integer as a set: shifts find the best fit in all rows at once.
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()  # any of them: they have equal room
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, opened
            opened += 1
        rows[document] = row
        open_rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def fill_exactly(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Each row the longest document left and those that fill it best; see :func:`pack_documents`."""
    # Equal lengths are interchangeable: rows are filled with lengths, and documents are put in their places at the end.
    by_length = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    first = (np.cumsum(counts) - counts).tolist()
    left = counts.tolist()
    distinct = np.flatnonzero(counts).tolist()
    order, row_sizes = [], []
    while distinct:
        longest = distinct[-1]
        row = [longest, *_best_filling(distinct, left, row_length - longest, longest)]
        for length in row:
            left[length] -= 1
            order.append(first[length] + left[length])  # of equal lengths the last one first
            if not left[length]:
                del distinct[bisect_left(distinct, length)]
        row_sizes.append(len(row))
    rows = np.empty(len(lengths), np.int64)
    rows[by_length[order]] = np.repeat(np.arange(len(row_sizes)), row_sizes)
    return rows


def _best_filling(distinct: list[int], left: list[int], room: int, taken: int) -> list[int]:
    """Lengths with the largest sum up to ``room``: a bounded subset sum.

    Args:
        distinct: the lengths that are left, ascending; ``left[n]`` documents have length n.
        taken: a length of which one document is already in the row.
    """
    within = (1 << (room + 1)) - 1  # sums above the room are of no use
    sums = 1  # bit n is set where some documents seen so far sum to n
    history = []
    # Long ones first: if the row can be filled with few long documents, none of the short ones is used up.
    for i in range(bisect_right(distinct, room) - 1, -1, -1):
        length = distinct[i]
        history.append((length, sums))
        for _ in range(min(left[length] - (length == taken), room // length)):
            more = sums | (sums << length) & within
            if more == sums:  # further copies reach no new sum
                break
            sums = more
        if sums >> room & 1:  # filled exactly: keep the shorter documents, which fit more easily, for later
            break
    chosen = []
    rest = sums.bit_length() - 1  # the largest sum that can be reached
    # Back through the steps: as long as the sum could not be reached before a length came in, that length is part of
    # it.
    for length, before in reversed(history):
        while not before >> rest & 1:
            chosen.append(length)
            rest -= length
    return chosen
