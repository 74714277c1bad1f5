"""Deal the rows of a global batch to data-parallel ranks so that all have about the same work.

Rows are equally long, but a row of one long document has more query-key pairs than one of many short ones, a row of
images has more patches and fewer labels. Only who computes a row is decided here, never which rows a step has: the
deal is a function of the costs of the batch's rows and the number of ranks. Lengths suffice; no image is read.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megamm.data.pack_plan import PackPlan
from megamm.sequence import labels_of_documents, pairs_of_documents


class RowContents(NamedTuple):
    """What rows hold, each int64 or float64 [num_rows]: image patches, labelled positions, query-key pairs seen, and
    pairs of patches of one image."""

    patches: np.ndarray
    labels: np.ndarray
    pairs: np.ndarray
    image_pairs: np.ndarray


def row_contents(plan: PackPlan, rows: Sequence[int]) -> RowContents:
    """Contents of rows of a pack plan, from the lengths of their documents.

    Args:
        plan: its datasets give each document's text tokens, patches and images.
        rows: numbers of the rows, such as ``range(k * B, (k + 1) * B)``.
    """
    found = [plan.row(i) for i in rows]
    sources = np.concatenate([sources for sources, _ in found])
    documents = np.concatenate([documents for _, documents in found])
    # Source by source: one look-up into each memory-mapped table instead of one for each document.
    sizes = np.empty((4, len(documents)), np.int64)
    for s in range(len(plan.datasets)):
        sizes[:, sources == s] = plan.datasets[s].sizes(documents[sources == s])
    text, patches, images, image_pairs = sizes
    row = np.repeat(np.arange(len(found)), [len(documents) for _, documents in found])

    def per_row(values: np.ndarray) -> np.ndarray:
        # minlength: rows at the end may hold nothing.
        return np.bincount(row, weights=values, minlength=len(found))

    return RowContents(
        patches=per_row(patches),
        labels=per_row(labels_of_documents(text, images)),
        pairs=per_row(pairs_of_documents(text + patches, patches, image_pairs)),
        image_pairs=per_row(image_pairs),
    )


def row_costs(
    contents: RowContents,
    row_length: int,
    *,
    position: float,
    patch: float,
    label: float,
    pair: float,
    image_pair: float,
) -> np.ndarray:
    """Work of rows, float64 [num_rows]; the weights are FLOPs (``megamm.model.counts.flops_weights``) or times."""
    of_images = patch * contents.patches + image_pair * contents.image_pairs
    return position * row_length + of_images + label * contents.labels + pair * contents.pairs


def deal_rows(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rows for each rank, as many for one as for another.

    The costliest row first, each to the rank with the least work that has room (LPT); then rows of the rank that is
    furthest from the mean are exchanged while that evens the work out. With ``num_ranks`` = ranks times micro-batches
    the micro-batches are even as well: reshape the result.

    Args:
        costs: of the batch's rows, [num_rows].
        num_ranks: divides the number of rows.

    Returns:
        int64 [num_ranks, num_rows / num_ranks]: indices into ``costs``, increasing in each rank.

    Raises:
        ValueError: the ranks cannot have equally many rows.
    """
    costs = np.asarray(costs, float)
    if num_ranks < 1 or len(costs) % num_ranks:
        raise ValueError(f"{len(costs)} rows cannot be dealt to {num_ranks} ranks equally")
    room = len(costs) // num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    # A heap: ties of load go to the lowest rank, so the deal is the same wherever it is made.
    open_ranks = [(0.0, rank) for rank in range(num_ranks)]
    for row in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(open_ranks)
        dealt[rank].append(row)
        # A rank that is full does not come back.
        if len(dealt[rank]) < room:
            heapq.heappush(open_ranks, (load + float(costs[row]), rank))
    return np.sort(_even_out(costs, np.array(dealt, np.int64).reshape(num_ranks, room)), axis=1)


def spread(costs: np.ndarray, dealt: np.ndarray) -> float:
    """Work of the busiest rank less that of the idlest, as a share of the mean."""
    loads = np.asarray(costs, float)[dealt].sum(1)
    return float((loads.max() - loads.min()) / loads.mean()) if loads.any() else 0.0


def _even_out(costs: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Exchange rows between the rank furthest from the mean and others, while the sum of squared loads falls."""
    if dealt.size == 0:
        return dealt
    loads = costs[dealt].sum(1)
    # Below this a gain is rounding, and exchanging could go on in circles.
    least = 1e-9 * float(loads.mean()) ** 2
    for _ in range(len(costs)):  # enough in practice, and an end in any case
        rank = int(np.abs(loads - loads.mean()).argmax())
        # Moving ``more`` of work from the rank to another one lowers the sum of squares by 2 more (gap - more).
        more = costs[dealt[rank]][:, None, None] - costs[dealt][None]  # [room, num_ranks, room]
        gain = more * ((loads[rank] - loads)[:, None] - more)
        best = int(gain.argmax())
        i, other, j = np.unravel_index(best, gain.shape)
        if gain[i, other, j] <= least:
            break
        loads[rank] -= more[i, other, j]
        loads[other] += more[i, other, j]
        dealt[rank, i], dealt[other, j] = dealt[other, j], dealt[rank, i]
    return dealt
