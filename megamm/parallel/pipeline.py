"""Pipeline parallelism: stages of blocks on ranks of their own, micro-batches one after another.

The schedules are torch's. They cut tensors along a dimension, which packed rows with their patches and labels do not
allow; so what is cut is a list of numbers, and each stage looks its micro-batch up. Only the residual stream travels.
"""

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from megamm.model.multimodal import MultimodalModel
from megamm.parallel.mesh import World
from megamm.sequence import Batch

SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class StageModule(nn.Module):
    """A stage as the schedule calls it: with the number of a micro-batch."""

    def __init__(self, model: MultimodalModel, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.batches: list[Batch] = []
        self.scale, self.auxiliary_scale = 1.0, 0.0
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x_bsw: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """The residual stream after this stage, or of the last one the loss.

        Args:
            x_bsw: the residual stream before it; the first stage makes its own from the batch.
            number: int64 [1] on the CPU.
        """
        batch = self.batches[int(number)]  # on the CPU: nothing is waited for
        output = self.model(batch, self.dtype, x_bsw, self.auxiliary_scale)
        if self.model.head is None:
            # The auxiliary losses of this stage are in it, as a gradient (see attach_loss).
            return output
        self.outputs.append((output.sums, output.counts))
        loss = output.loss + output.auxiliary * (self.auxiliary_scale / self.scale)  # the schedule multiplies by scale
        return loss[None]  # what a schedule gives back it joins along a dim


class Pipeline:
    """The stages of this rank and the schedule that they follow.

    Args:
        modules: stage number -> its module, those of this rank.
        stream_shape: of the residual stream between stages.
    """

    def __init__(self, modules: dict[int, StageModule], world: World, stream_shape: tuple[int, ...]):
        axis, layout = world.axis("pipeline"), world.layout
        self.modules, self.schedule_class = modules, SCHEDULES[layout.schedule]
        self.device, self.scale = world.device, 1.0
        dtype = next(iter(modules.values())).dtype
        # With shapes given for all stages, torch need not run a first micro-batch to find them out. The stream asks for
        # gradients, as it carries them back.
        stream = torch.empty(stream_shape, dtype=dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        last = layout.num_stages - 1
        self.stages = [
            PipelineStage(
                module,
                index,
                layout.num_stages,
                world.device,
                input_args=(number,) if index == 0 else (stream,),
                output_args=(loss,) if index == last else (stream,),
                group=axis.group,
            )
            for index, module in modules.items()
        ]
        self.is_first, self.is_last = 0 in modules, last in modules
        # By number of micro-batches, which a schedule fixes.
        self._schedules: dict[int, object] = {}

    def step(
        self, batches: list[Batch], scale: float, auxiliary_scale: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Forward and backward of every micro-batch; sums and counts of each where the last stage is here."""
        self.scale = scale
        for module in self.modules.values():
            module.scale, module.auxiliary_scale = scale, auxiliary_scale
        return self._run(self._schedule(len(batches)).step, batches)

    def evaluate(self, batches: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The same without gradients."""
        return self._run(self._schedule(len(batches)).eval, batches)

    def _run(self, run, batches: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        for module in self.modules.values():
            # Every stage has all micro-batches of its rows: labels for the last, masks and positions for each.
            module.batches, module.outputs = batches, []
        numbers = torch.arange(len(batches))
        # Only the first stage is given its input; the others get theirs from the stage before.
        arguments = (numbers,) if self.is_first else ()
        # A loss is only computed with a piece of a target for each micro-batch. The batches have the real labels, so
        # anything will do.
        options = {"target": numbers, "losses": []} if self.is_last else {}
        run(*arguments, number=numbers, **options)
        found = [output for module in self.modules.values() for output in module.outputs]
        for module in self.modules.values():
            module.batches, module.outputs = [], []  # lets go of the batches before the optimizer's step
        return found

    def _schedule(self, num_batches: int):
        if num_batches not in self._schedules:
            # The schedules of several stages on a rank take a list, this one a stage.
            single = self.schedule_class is Schedule1F1B
            self._schedules[num_batches] = self.schedule_class(
                self.stages[0] if single else self.stages,
                n_microbatches=num_batches,
                loss_fn=lambda loss, _: loss.sum() * self.scale,
                # The loss is a sum and has its scale; by default torch would divide by the number of micro-batches.
                scale_grads=False,
            )
        return self._schedules[num_batches]
