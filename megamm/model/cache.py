"""Keys and values of positions already seen: a further position costs one position, not the whole document.

A row is one document. Positions enter in any pieces, but an image always whole, since its positions see each other;
the position of a token is also its slot in the cache, so that rows of a batch may be of any length.

Shapes: B rows, T new positions of each, K keys that any of them may see, G heads of keys, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megamm_kernels import interval_attention

from megamm.model.context import BlockContext, ends_seen, position_kinds, rotary_positions
from megamm.model.multimodal import MultimodalModel
from megamm.model.rotary import rotary_table
from megamm.sequence import Batch


@dataclass(frozen=True, kw_only=True)
class CacheMask:
    """Which keys of the cache new positions see, and where their own go.

    Attributes:
        slots: int64 [B, T].
        num_keys: K.
        visible: bool [B, 1, T, K]; None where all see all.
    """

    slots: torch.Tensor
    num_keys: int
    visible: torch.Tensor | None


class KeyValueCache:
    """Keys and values [depth, B, G, capacity, D] of the rows of a batch.

    Args:
        model: whose blocks are served.
        num_rows: B.
        capacity: positions of a row.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, model: MultimodalModel, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ):
        config = model.config
        self.model, self.capacity, self.dtype = model, capacity, dtype
        # Keys of padding need a place, too: one slot more, which nobody sees.
        shape = (2, config.depth, num_rows, config.key_heads, capacity + 1, config.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.keys.nbytes + self.values.nbytes

    def logits(self, batch: Batch) -> torch.Tensor:
        """Take in further positions; returns the logits [B, V] after the last of each row, float32.

        Args:
            batch: ``positions``, ``lo`` and ``hi`` count from the beginning of the document; rows end with padding.
        """
        with self._attached():
            # The model does not know of the cache: whatever its blocks are, they attend through what is put in their
            # place.
            x_btw = self.model.residual_stream(batch, self.dtype)
        # Rows may end in padding, so the last position differs; a row of padding alone gives logits that nobody reads.
        last = ((batch.lo <= batch.hi).sum(1) - 1).clamp(min=0)
        x_b1w = x_btw[torch.arange(len(last), device=last.device), last][:, None]
        return self.model.head.logits(x_b1w, self.model.tied_table)[:, 0].float()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Let the blocks of the model attend to the cache."""
        model: Any = self.model
        layers: list[Any] = [getattr(block, "attention", block) for block in model.blocks.values()]
        for number, layer in enumerate(layers):  # per modality the block itself attends
            layer.attend = partial(self._attend, number)
        # On the instance, where it hides the method of the class until it is deleted.
        model.context = self._context
        try:
            yield
        finally:
            for layer in layers:
                layer.attend = interval_attention
            del model.context

    def _context(self, batch: Batch, dtype: torch.dtype) -> BlockContext:
        """As MultimodalModel.context; the mask is over the cache."""
        config = self.model.config
        cos, sin = rotary_table(
            rotary_positions(config, batch), config.head_dim, config.rope_theta, config.rope_scaling
        )
        padding = batch.lo > batch.hi
        # Waits for the device, once for all blocks: attention then reads the filled part of the cache alone.
        num_keys = int(batch.hi.max()) + 1
        # Padding of all rows goes to the one slot more, beyond num_keys.
        slots = batch.positions.long().masked_fill(padding, self.capacity)
        # [B, T, K], dense: new positions are few once a document has begun.
        key = torch.arange(num_keys, device=batch.lo.device)
        visible = (batch.lo[..., None] <= key) & (key <= ends_seen(config, batch)[..., None])
        visible[..., 0] |= padding  # softmax over nothing would be NaN
        # Without a mask torch may take a faster kernel: the case of one new position in each of equally long rows.
        mask: Any = CacheMask(slots=slots, num_keys=num_keys, visible=None if visible.all() else visible[:, None])
        return BlockContext(cos=cos, sin=sin, mask=mask, **position_kinds(config, batch))

    def _attend(
        self, number: int, q_bthd: torch.Tensor, k_btgd: torch.Tensor, v_btgd: torch.Tensor, mask: CacheMask
    ) -> torch.Tensor:
        rows = torch.arange(len(mask.slots), device=mask.slots.device)[:, None]
        keys, values = self.keys[number], self.values[number]
        # Indices around a slice: their dims come first, [B, T, G, D], as new keys lie. Written before they are read,
        # since new positions see each other.
        keys[rows, :, mask.slots], values[rows, :, mask.slots] = k_btgd, v_btgd
        out_bhtd = F.scaled_dot_product_attention(
            q_bthd.transpose(1, 2),
            keys[:, :, : mask.num_keys],
            values[:, :, : mask.num_keys],
            attn_mask=mask.visible,
            # Only where it is needed: not every kernel of torch can do it.
            enable_gqa=q_bthd.shape[2] != k_btgd.shape[2],
        )
        return out_bhtd.transpose(1, 2)
