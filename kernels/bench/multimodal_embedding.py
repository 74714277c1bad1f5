"""Embedding of text and image patches, at the paper's widths and patch size.

    python kernels/bench/multimodal_embedding.py [--device cuda] [--dtype bfloat16] [--quick] [--out DIR]

The table is float32, as parameters are, and its gradient dense. Rows of the 45-45-10 mixture hold 54% patches. The
work of a case: rows of the sequence and of its gradient, table rows, pixels and the table's gradient, moved once;
and the flops of the projection.
"""

from typing import NamedTuple

import torch
from harness import FORWARD, Case, Provider, Work, gradients, main
from megamm_kernels.multimodal_embedding import (
    multimodal_embedding,
    multimodal_embedding_reference,
    multimodal_patch_embedding,
    multimodal_patch_embedding_reference,
)

NUM_TOKENS = 32768 if torch.cuda.is_available() else 4096  # rows of 1024 or 4096, end to end
VOCABULARY, CHANNELS = 50432, 3 * 14 * 14
IMAGE_SHARE = 0.544


class Inputs(NamedTuple):
    """Raw patches (early fusion), or features (late fusion)."""

    tokens: torch.Tensor
    table: torch.Tensor
    features: torch.Tensor | None
    patches: torch.Tensor
    projection: torch.Tensor
    index: torch.Tensor
    grad: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.table, self.projection if self.features is None else self.features]


def case(name: str, tokens: int, width: int, vocabulary: int, share: float, raw: bool) -> Case:
    """One shape; ``share`` of the positions are patches."""
    num_patches = int(share * tokens)

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        # Word frequencies fall like 1 / rank: the runs of equal tokens that the table's gradient sums are uneven.
        rank = torch.rand(tokens, device=device).mul(torch.tensor(float(vocabulary)).log()).exp().long()
        parts = 16
        index = torch.randperm(tokens // parts, device=device)[: num_patches // parts].sort().values
        index = (index[:, None] * parts + torch.arange(parts, device=device)).flatten()
        table = torch.randn(vocabulary, width, device=device, requires_grad=True)
        projection = torch.randn(width, CHANNELS, device=device, requires_grad=True)
        features = None if raw else torch.randn(len(index), width, device=device, dtype=dtype, requires_grad=True)
        patches = torch.randint(256, (len(index), CHANNELS), device=device).byte()
        grad = torch.randn(4, tokens // 4, width, device=device, dtype=dtype)
        rank = rank.clamp_max(vocabulary - 1).view(4, -1).int()
        return Inputs(rank, table, features, patches, projection, index, grad)

    product = 2 * num_patches * width * CHANNELS if raw else 0
    rows = 4 * (tokens - num_patches) * width
    pixels = num_patches * CHANNELS if raw else 0
    extra = 0 if raw else num_patches * width
    forward = Work(product, rows + pixels, tokens * width + extra)
    both = Work(2 * product, rows + 2 * pixels + 4 * vocabulary * width, 2 * (tokens * width + extra))
    return Case(name, both, make, forward)


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case(f"tiny, {kind}", 64, 16, 50, 0.5, kind == "patches") for kind in ("patches", "features")]
    made = []
    for width in (800, 2208, 5120):
        made.append(case(f"width {width}, 45-45-10", NUM_TOKENS, width, VOCABULARY, IMAGE_SHARE, True))
    made.append(case("width 2208, text only", NUM_TOKENS, 2208, VOCABULARY, 0, True))
    made.append(case("width 2208, features", NUM_TOKENS, 2208, VOCABULARY, IMAGE_SHARE, False))
    return made


def call(patch_op, feature_op, i: Inputs) -> torch.Tensor:
    """The op that the inputs ask for, in the dtype of the run."""
    if i.features is not None:
        return feature_op(i.tokens, i.table, i.features, i.index, i.grad.dtype)
    return patch_op(i.tokens, i.table, i.patches, i.projection, i.index, i.grad.dtype)


def training(patch_op, feature_op):
    return lambda inputs: gradients(lambda: call(patch_op, feature_op, inputs), inputs.leaves(), inputs.grad)


def forward(patch_op, feature_op):
    return lambda inputs: torch.no_grad()(lambda: call(patch_op, feature_op, inputs))


def compiled(inputs: Inputs):
    references = multimodal_patch_embedding_reference, multimodal_embedding_reference
    return training(*(torch.compile(op) for op in references))(inputs)


PROVIDERS = [
    Provider("megamm", training(multimodal_patch_embedding, multimodal_embedding)),
    Provider("megamm", forward(multimodal_patch_embedding, multimodal_embedding), FORWARD),
    Provider("eager", training(multimodal_patch_embedding_reference, multimodal_embedding_reference), minor=True),
    Provider("torch.compile", compiled, compiles=True),
]

if __name__ == "__main__":
    main("multimodal_embedding", cases, PROVIDERS)
