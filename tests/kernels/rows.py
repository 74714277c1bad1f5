"""Rows of packed documents as interval vectors."""

import torch


def intervals(documents: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi int32 [length] of one row; a document is a list of spans: n > 0 text tokens, n < 0 image patches."""
    lo, hi = torch.arange(length), torch.arange(length) - 1
    position = 0
    for spans in documents:
        start = position
        for span in spans:
            part = slice(position, position + abs(span))
            lo[part] = start
            hi[part] = torch.arange(part.start, part.stop) if span > 0 else part.stop - 1
            position += abs(span)
    return lo.int(), hi.int()
