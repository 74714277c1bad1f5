"""Packed rows of documents drawn at random, as the packer makes them: interval vectors for benchmarks."""

import torch

IMAGE = 256
"""Patches of an image: 224 x 224 pixels in patches of 14."""
MIXTURES = {"45-45-10": (0.45, 0.45, 0.10), "text": (0.0, 0.0, 1.0)}
"""Shares of tokens: image-caption pairs, interleaved pages, text."""


def random_document(kind: int, generator: torch.Generator) -> list[int]:
    """Spans of a document: n > 0 text tokens, n < 0 image patches."""

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    if kind == 0:
        return [2, -IMAGE, between(20, 120)]
    if kind == 1:
        return [n for _ in range(between(1, 4)) for n in (between(60, 400), -IMAGE)] + [between(40, 200)]
    length = float(torch.randn((), generator=generator).mul(1.0).add(6.2).exp())
    return [max(16, min(int(length), 8192))]


def random_row(length: int, mixture: str, generator: torch.Generator) -> list[list[int]]:
    """Documents that fill a row of ``length`` up to a few percent; a text longer than the room left is cut."""
    means = torch.tensor([330.0, 1100.0, 800.0])  # mean lengths: shares are of tokens, draws are of documents
    weights = torch.tensor(MIXTURES[mixture]) / means
    documents, room = [], length
    for _ in range(200):
        document = random_document(int(torch.multinomial(weights, 1, generator=generator)), generator)
        if len(document) == 1:
            document = [min(document[0], room)]
        size = sum(map(abs, document))
        if size <= room:
            documents.append(document)
            room -= size
        if room < 16:
            break
    return documents


def intervals(documents: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi, int32 [length], of one row."""
    lo = torch.arange(length, dtype=torch.int32)
    hi = lo - 1
    position = 0
    for spans in documents:
        start = position
        for span in spans:
            end = position + abs(span)
            lo[position:end] = start
            hi[position:end] = end - 1 if span < 0 else torch.arange(position, end, dtype=torch.int32)
            position = end
    return lo, hi


def random_intervals(rows: int, length: int, mixture: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi, int32 [rows, length]; ``one document`` as a mixture is a causal row of text."""
    generator = torch.Generator().manual_seed(seed)
    if mixture == "one document":
        drawn = [[[length]]] * rows
    else:
        drawn = [random_row(length, mixture, generator) for _ in range(rows)]
    lo, hi = zip(*(intervals(documents, length) for documents in drawn), strict=True)
    return torch.stack(lo), torch.stack(hi)
