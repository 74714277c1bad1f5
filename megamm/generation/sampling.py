"""Which token comes next: the most probable one, or a draw."""

import hashlib
from dataclasses import dataclass

import torch

from megamm.errors import InputError
from megamm.sequence import BOS, IMAGE, IMAGE_END, PAD

NEVER = (PAD, BOS, IMAGE, IMAGE_END)
"""Tokens that no label ever was."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: by which logits are divided; 0 = always the most probable token.
        top_p: tokens are drawn from the fewest whose probabilities sum up to this (nucleus sampling, arXiv 1904.09751).
        seed: of the draws; each row has draws of its own, whatever rows stand beside it.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature: {self.temperature:g} is not a number from 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: {self.top_p:g} is not above 0 and up to 1")


class Sampler:
    """Chooses the next tokens of rows.

    Args:
        numbers: of the rows among all that are asked for; they decide the draws.
    """

    def __init__(self, sampling: Sampling, numbers: list[int]):
        self.sampling = sampling
        self._generators = []
        for number in numbers:
            # 7 bytes, which as a signed 64-bit seed stay above zero.
            digest = hashlib.blake2b(f"{sampling.seed} {number}".encode(), digest_size=7).digest()
            self._generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """int64 [B] on the CPU, from logits [B, V]."""
        # The generators are the CPU's, so that draws do not depend on the device.
        logits = logits.float().cpu()
        logits[:, list(NEVER)] = -torch.inf
        if self.sampling.temperature == 0:
            return logits.argmax(1)
        probabilities, order = (logits / self.sampling.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        # What comes before a token decides: the one that crosses top_p is kept, and so there is always one.
        before = probabilities.double().cumsum(1) - probabilities
        kept = probabilities.double().masked_fill(before >= self.sampling.top_p, 0.0)
        ends = kept.cumsum(1)
        draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])
        # Times the last end: what is kept does not sum up to 1.
        drawn = torch.searchsorted(ends, (draws * ends[:, -1])[:, None], right=True)
        last = (kept > 0).sum(1, keepdim=True) - 1  # a draw next to 1 must not leave the kept ones
        return order.gather(1, drawn.minimum(last))[:, 0]
