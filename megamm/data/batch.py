"""The batch: the one structure that passes from the loader to the model."""

from dataclasses import dataclass, fields

import torch


@dataclass(kw_only=True)
class Batch:
    """Packed rows: B rows of S positions, with P image patches in all.

    Attributes:
        tokens: int32 [B, S]; <image> at image positions, <pad> at padding.
        positions: int32 [B, S]; restart at 0 with each document.
        targets: int32 [B, S]; the next token where it is text, else -100 (IGNORE).
        source: uint8 [B, S]; index of the label's source in the data config's order.
        modality: uint8 [B, S]; index in MODALITIES of the label at this position.
        lo, hi: int32 [B, S]; the query at q sees keys lo[q]..hi[q], both included. Non-decreasing along a
            row; padding has lo = hi + 1 (an empty interval).
        patches: uint8 [P, patch_size * patch_size * 3]; row, column, channel within a patch; the patches of
            an image in raster order, images in row order.
        patch_index: int64 [P]; position of each patch in the flattened [B * S] rows.
        label_index: int64 [num_labels]; positions with a label in the flattened rows, increasing. The loader knows
            them; finding them on a GPU would wait for the device.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    source: torch.Tensor
    modality: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    patches: torch.Tensor
    patch_index: torch.Tensor
    label_index: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device (asynchronously from pinned memory)."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory (called by the PyTorch DataLoader)."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def num_labels(self) -> int:
        """Number of labelled positions."""
        return self.label_index.shape[0]
