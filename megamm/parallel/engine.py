"""Forward and backward of a step on this rank, however the model is spread."""

from typing import Any

import torch
from torch import nn

from megamm.config import Config
from megamm.model.counts import TokenStats
from megamm.parallel.apply import make_part, whole_or_stages
from megamm.parallel.context import cut_batch, tower_patches
from megamm.parallel.data import set_gradient_sync, shard_unit
from megamm.parallel.mesh import World
from megamm.parallel.pipeline import Pipeline, StageModule
from megamm.sequence import LABEL_KINDS, Batch


class Engine:
    """This rank's part of the model, and how a step passes through it.

    Attributes:
        model: this rank's parameters under the names that they have in the whole model.
    """

    def __init__(self, config: Config, num_sources: int, world: World, stats: TokenStats | None = None):
        """``config``: resolved; ``stats``: what a position of the data holds, by which a pipeline's stages are cut."""
        self.config, self.world = config, world
        self.dtype = getattr(torch, config.train.dtype)
        self.shape = (2, num_sources, len(LABEL_KINDS))
        # Number of the stage -> its part: several for the schedules with two stages a rank.
        parts = {i: make_part(config, num_sources, world, stage) for i, stage in whole_or_stages(config, world, stats)}
        self.parts = list(parts.values())
        self.image_patches = tower_patches(config.model)
        self.on_grid = config.model.image_positions == "grid"
        self.pipeline = None
        self.model: nn.Module
        if world.layout.pipeline == 1:
            (self.model,) = parts.values()
        else:
            modules = {i: StageModule(part, self.dtype) for i, part in parts.items()}
            for module in modules.values():  # schedules steer the FSDP of a stage through its root
                shard_unit(module, world, self.dtype, config.parallel.reshards)
            self.pipeline = Pipeline(modules, world, self._stream_shape())
            # Optimizer and checkpoint want one module with the names of the whole, whatever lies here.
            self.model = _join(self.parts)

    def step(self, batches: list[Batch], scale: float, auxiliary_scale: float = 0.0) -> torch.Tensor:
        """Gradients of ``scale`` times the summed loss of this rank's micro-batches, on the CPU or pinned.

        Args:
            auxiliary_scale: of the summed auxiliary losses of routers, which are part of the gradients.

        Returns:
            float32 [2, num_sources, num_label_kinds]: sums and counts. Their sum over all ranks is that of the batch.
        """
        batches = [self._own(batch) for batch in batches]
        if self.pipeline is not None:
            return self._split(self.pipeline.step(batches, scale, auxiliary_scale))
        outputs = []  # tensors of the device: nothing is waited for until their sum is read
        for i, batch in enumerate(batches):
            set_gradient_sync(self.model, self.config.parallel.reduce_every_pass or i == len(batches) - 1)
            output = self.model(batch, self.dtype)
            # A sum times a factor of the whole batch, not a mean of this pass: how rows are split into passes cannot
            # matter.
            (output.loss * scale + output.auxiliary * auxiliary_scale).backward()
            outputs.append((output.sums, output.counts))
        return self._split(outputs)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> torch.Tensor:
        """The same of :meth:`step` without gradients."""
        batches = [self._own(batch) for batch in batches]
        if self.pipeline is not None:
            return self._split(self.pipeline.evaluate(batches))
        outputs = [self.model(batch, self.dtype) for batch in batches]
        return self._split([(output.sums, output.counts) for output in outputs])

    def take_expert_counts(self) -> torch.Tensor | None:
        """Positions that routers sent to each expert since the last call, int64 [depth, E, 2] over all ranks."""
        if not self.config.model.experts.num:
            return None
        # [depth, E, 2] of each part, with zeros for the blocks of others.
        counts = torch.stack([part.take_expert_counts() for part in self.parts]).sum(0)
        return self.world.all_reduce(counts * (self.world.axis("tensor").rank == 0))  # which route the same positions

    def move_expert_bias(self, counts: torch.Tensor) -> None:
        """After an optimizer step, move the experts' biases by its counts (see take_expert_counts)."""
        for part in self.parts:
            part.move_expert_bias(counts)

    def _own(self, batch: Batch) -> Batch:
        axis = self.world.axis("context")
        if axis.size > 1:
            # On the CPU and before the copy: only this rank's share goes to the device.
            batch = cut_batch(batch, axis, self.image_patches, self.on_grid)
        return batch.to(self.world.device)

    def _split(self, outputs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Tensor ranks have the same sums: the first speaks for all."""
        # Zeros also where a pipeline's rank has no head: every rank takes part in the sum that follows.
        total = torch.zeros(self.shape, device=self.world.device)
        if self.world.axis("tensor").rank == 0:
            for output in outputs:
                total += torch.stack(output)
        return total

    def _stream_shape(self) -> tuple[int, int, int]:
        layout = self.world.layout
        # Between blocks a rank has its own positions only; stages pass on what they have.
        positions = self.config.data.row_length // layout.context // layout.tensor
        return layout.micro_rows, positions, self.config.model.width


def _join(parts: list[Any]) -> nn.Module:
    """One module over the parts of several stages, with the names that they have in the whole model."""
    whole = nn.Module()
    whole.embedding = next((part.embedding for part in parts if part.embedding is not None), None)
    whole.vision = next((part.vision for part in parts if part.vision is not None), None)
    whole.blocks = nn.ModuleDict({name: block for part in parts for name, block in part.blocks.items()})
    whole.head = next((part.head for part in parts if part.head is not None), None)
    return whole
