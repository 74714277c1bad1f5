"""What every block needs besides the residual stream, made once per batch."""

from dataclasses import dataclass, field, replace

import torch
from megamm_kernels import (
    AttentionMask,
    Routing,
    attention_mask,
    default_backend,
    permute_tokens,
    sort_by_expert,
)

from megamm.config import ModelConfig
from megamm.errors import InputError
from megamm.model.rotary import rotary_table
from megamm.sequence import IMAGE, Batch, causal_ends, grid_positions

Positions = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Integers [B, S], or rows and columns of a grid."""


@dataclass(frozen=True, kw_only=True)
class Modalities:
    """How to take the positions of text and of images apart, and together again.

    Attributes:
        routing: sorts the flattened positions: text and padding, then images, each in their order.
        num_images: image positions; the host knows it, so that nothing waits for the device.
    """

    routing: Routing
    num_images: int

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, ...] -> text [1, n, ...] and images [1, num_images, ...]."""
        # The routing of experts serves here as well: a modality is an expert, and every position goes to one.
        rows = permute_tokens(x.flatten(0, 1).flatten(1), self.routing).unflatten(1, x.shape[2:])[None]
        return rows.split((rows.shape[1] - self.num_images, self.num_images), dim=1)

    def join(self, text: torch.Tensor, images: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse of :meth:`split`; ``shape``: (B, S)."""
        rows = torch.cat((text, images), dim=1).squeeze(0)
        # With one expert for each position the two are inverses of each other.
        order, places, _ = self.routing
        inverse = self.routing._replace(order=places.flatten(), places=order[:, None])
        return permute_tokens(rows.flatten(1), inverse).view(*shape, *rows.shape[1:])


class RoutingRecord:
    """What the routers of a forward pass leave behind: losses and counts, a layer after the other.

    Closed after the last block: a block whose activations are computed again in the backward adds nothing twice, and
    keeps nothing alive.
    """

    def __init__(self):
        self.losses: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self.closed = False

    def add(self, loss: torch.Tensor, counts: torch.Tensor) -> None:
        """Note a layer's auxiliary loss (a scalar) and its positions per expert and modality, int64 [E, 2]."""
        if not self.closed:
            self.losses.append(loss)
            self.counts.append(counts)

    def close(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The sum of the losses and the counts [layers, E, 2]; None where no layer has a router."""
        losses, counts, self.losses, self.counts, self.closed = self.losses, self.counts, [], [], True
        # In the order of layers, since blocks run in their order.
        return (torch.stack(losses).sum(), torch.stack(counts)) if losses else None


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """The bookkeeping of rows that travels past all blocks.

    Attributes:
        cos, sin: float32 [B or 1, S, 1, D / 2], rotary table.
        mask: who sees whom, as the attention backend takes it.
        is_image, is_padding: bool [B, S]; None in the vision tower.
        modalities: where the blocks have weights per modality.
        routed: what routers leave behind.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: AttentionMask
    is_image: torch.Tensor | None = None
    is_padding: torch.Tensor | None = None
    modalities: Modalities | None = None
    routed: RoutingRecord = field(default_factory=RoutingRecord)

    def with_mask(self, mask) -> "BlockContext":
        """The same with another mask, for an attention that takes its own kind."""
        return replace(self, mask=mask)


def make_context(
    config: ModelConfig,
    positions: Positions,
    lo: torch.Tensor,
    hi: torch.Tensor,
    head_dim: int,
    dtype: torch.dtype,
    num_keys: int | None = None,
    **kinds,
) -> BlockContext:
    """The context of rows.

    Args:
        config: names the attention backend and the rotary embedding's base and scaling.
        positions: integers [B or 1, S]; or rows and columns, from :func:`rotary_positions`.
        lo, hi: int32 [B, S], the interval of keys of each query.
        head_dim: width of a head.
        dtype: of queries and keys.
        num_keys: keys of a row; by default as many as queries.
        kinds: of positions, from :func:`position_kinds`.

    Raises:
        InputError: the backend cannot run here, or not on these rows.
    """
    cos, sin = rotary_table(positions, head_dim, config.rope_theta, config.rope_scaling)
    return BlockContext(cos=cos, sin=sin, mask=build_mask(config, lo, hi, dtype, num_keys), **kinds)


def rotary_positions(config: ModelConfig, batch: Batch) -> Positions:
    """A batch's positions, as ``model.image_positions`` has them."""
    if config.image_positions == "sequence":
        return batch.positions
    return grid_positions(batch.positions, batch.patch_index, batch.grids)


def ends_seen(config: ModelConfig, batch: Batch) -> torch.Tensor:
    """``hi`` of a batch, as ``model.image_mask`` has it."""
    return batch.hi if config.image_mask == "bidirectional" else causal_ends(batch.lo, batch.hi, batch.positions)


def position_kinds(config: ModelConfig, batch: Batch) -> dict:
    """``is_image``, ``is_padding`` and ``modalities`` of a batch, as far as the decoder's blocks need them."""
    kinds: dict = {"is_image": batch.tokens == IMAGE, "is_padding": batch.hi < batch.lo}
    if config.per_modality != "none":
        routing = sort_by_expert(kinds["is_image"].view(-1, 1).int(), 2)
        kinds["modalities"] = Modalities(routing=routing, num_images=batch.patch_index.shape[0])
    return kinds


def build_mask(
    config: ModelConfig, lo: torch.Tensor, hi: torch.Tensor, dtype: torch.dtype, num_keys: int | None = None
) -> AttentionMask:
    """The mask of rows (lo, hi) for the configured backend; see :func:`make_context`."""
    # By the device where the rows lie.
    backend = config.attention.backend or default_backend(lo)
    try:
        return attention_mask(lo, hi, dtype, backend, num_keys)
    except (ImportError, ValueError) as error:
        # The kernels do not know of settings: a package that is missing, or rows that a backend cannot express.
        raise InputError(f"model.attention.backend: {error}") from error


def check_backend(config: ModelConfig, device: str) -> None:
    """Check that the configured attention backend can train on ``cpu`` or ``cuda``, before any data is read.

    Raises:
        InputError: it cannot, or its package is missing.
    """
    if device == "cpu" and config.attention.backend in ("flex", "flex_flash"):
        raise InputError(
            f"model.attention.backend: {config.attention.backend} has no backward pass on a CPU; take sdpa, or leave "
            "it out"
        )
    # A row of one document; what a backend refuses, it refuses when the mask is made.
    ends = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    build_mask(config, torch.zeros_like(ends), ends, torch.bfloat16)
