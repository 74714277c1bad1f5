"""How a model is spread, in one visible order: tensor, experts, context, inputs, fp8, recompute, compile, data."""

import torch

from megamm.config import Config
from megamm.model.counts import TokenStats
from megamm.model.float8 import use_float8
from megamm.model.initial import initialise
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.context import apply_context
from megamm.parallel.data import shard_over_data, share_of
from megamm.parallel.experts import apply_experts
from megamm.parallel.inputs import apply_inputs
from megamm.parallel.mesh import World
from megamm.parallel.recompute import recompute_blocks
from megamm.parallel.stages import Stage, cut_stages
from megamm.parallel.tensor import apply_tensor


def whole_or_stages(config: Config, world: World, stats: TokenStats | None) -> list[tuple[int, Stage]]:
    """The numbered stages of this rank; without a pipeline one that is the whole model, whatever ``stats``."""
    layout, axis = world.layout, world.axis("pipeline")
    if stats is None or layout.num_stages == 1:
        # Nobody asks a stage that is the whole model for its cost.
        return [(0, Stage(first_block=0, last_block=config.model.depth - 1, inputs=True, head=True, cost=0.0))]
    stages = cut_stages(config.model, stats, layout.num_stages)
    # Stages go round the ranks: the looped schedules of torch want stage i on rank i % ranks.
    return [(i, stage) for i, stage in enumerate(stages) if i % axis.size == axis.rank]


def make_part(config: Config, num_sources: int, world: World, stage: Stage) -> MultimodalModel:
    """Build this rank's part of the model and give it its first values; nothing is ever held whole.

    Args:
        config: resolved.
        num_sources: by which losses are split.
        world: this process among all.
        stage: the blocks that it has, and whether inputs and head.
    """
    dtype = getattr(torch, config.train.dtype)
    # Shapes without values: a model that fits on no device is cut before any of it is allocated.
    with torch.device("meta"):
        model = MultimodalModel(config.model, num_sources, blocks=stage.blocks, inputs=stage.inputs, head=stage.head)
    # FSDP comes last, since it cuts what the other axes have left of a parameter once more. Experts follow the tensor
    # axis, which passes over them; recomputation lies inside of what is compiled.
    apply_tensor(model, world)
    apply_experts(model, world)
    apply_context(model, world, config.parallel.context_method)
    apply_inputs(model, world)
    if config.train.fp8:
        for block in model.all_blocks():
            use_float8(block, world.device)
    recompute_blocks(model, config.train.recompute)
    if config.train.compile:
        for block in model.all_blocks():
            block.compile()
    shard_over_data(model, world, dtype, config.parallel.reshards)
    # Memory for this rank's shares only. What is in it is arbitrary until the next line.
    model.to_empty(device=world.device)
    initialise(model, config.train.seed, share_of)
    return model
