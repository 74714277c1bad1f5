"""What a layout must satisfy: every misfit of a config and a number of ranks, in words. No torch in here."""

import math
from dataclasses import dataclass

from megamm.config import Config, ModelConfig
from megamm.model.sizes import decoder_hidden, num_heads, shuffle_ratio, tower_hidden
from megamm.sequence import patches_per_image

AXES = ("pipeline", "dp_replicate", "dp_shard", "context", "tensor")
"""Axes of the mesh, outermost first; their sizes multiply to the number of ranks."""
STAGES_PER_RANK = {"1f1b": 1, "interleaved": 2, "zero_bubble": 2}
"""Stages that a pipeline rank holds, by schedule: rank r holds stages r, r + pipeline, ..."""


def layout_problems(config: Config, world_size: int) -> list[str]:
    """Every misfit of a config and a number of ranks, a line each."""
    if world_size < 1:
        return [f"world size: {world_size} is not positive"]
    wanted = Wanted.of(config, world_size)
    found = _axis_problems(config, wanted, world_size) + _model_problems(config.model, wanted)
    if wanted.pipeline > 1 and config.optimizer.freeze and config.optimizer.freeze_until is None:
        found.append(
            f"parallel.pipeline: {wanted.pipeline}, but optimizer.freeze may leave a stage nothing to train; set it to "
            "1, or optimizer.freeze_until"
        )
    # All problems at once, but for those that only follow from a size that cannot be.
    if not any(line.startswith("parallel.") and "not positive" in line for line in found):
        found += _row_problems(config, wanted)
    return found


@dataclass(kw_only=True)
class Wanted:
    """What is asked for: the axes, and what suggestions may change beside them; ``micro_batches`` None: the default."""

    dp_replicate: int
    dp_shard: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    schedule: str
    micro_batches: int | None
    micro_rows: int | None
    batch_rows: int
    row_length: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> "Wanted":
        p = config.parallel
        shard, rest = p.dp_shard, p.dp_replicate * p.tensor * p.pipeline * p.context
        if shard == -1:
            # Rounded: if it does not divide, the product tells, and all other rules can still be checked.
            shard = max(1, world_size // rest) if rest > 0 else 1
        return cls(
            dp_replicate=p.dp_replicate,
            dp_shard=shard,
            tensor=p.tensor,
            pipeline=p.pipeline,
            context=p.context,
            expert=p.expert,
            schedule=p.pipeline_schedule,
            micro_batches=p.micro_batches,
            micro_rows=config.train.micro_rows,
            batch_rows=config.train.batch_rows,
            row_length=config.data.row_length,
        )

    @property
    def product(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def num_stages(self) -> int:
        return self.pipeline * (STAGES_PER_RANK[self.schedule] if self.pipeline > 1 else 1)

    @property
    def data_ranks(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def passes(self) -> int:
        """Micro-batches of a step in a pipeline: as set, or by ``train.micro_rows``, or twice the stages' ranks."""
        if self.micro_batches is not None:
            return self.micro_batches
        if self.micro_rows is not None:
            return max(1, self.batch_rows // self.data_ranks // self.micro_rows)
        return 2 * self.pipeline


def _axis_problems(config: Config, wanted: Wanted, world_size: int) -> list[str]:
    """Sizes that cannot be, and their product."""
    sizes = {axis: getattr(wanted, axis) for axis in (*AXES, "expert")} | {"dp_shard": config.parallel.dp_shard}
    least = {"dp_shard": (-1,)}
    found = [
        f"parallel.{axis}: {size} is not positive" + (" (-1: all that the other axes leave)" if axis in least else "")
        for axis, size in sizes.items()
        if size < 1 and size not in least.get(axis, ())
    ]
    if found:
        return found
    if wanted.product != world_size:
        axes = " x ".join(f"{axis} {getattr(wanted, axis)}" for axis in AXES if sizes[axis] not in (1, -1))
        rest = wanted.product // wanted.dp_shard
        if sizes["dp_shard"] == -1:
            found.append(f"world size: {world_size} ranks are not a multiple of {axes} = {rest}")
        else:
            found.append(f"world size: {world_size} ranks, but {axes or 'all axes'} = {wanted.product}")
    if wanted.dp_shard * wanted.context % wanted.expert:
        found.append(
            f"parallel.expert: {wanted.expert} does not divide dp_shard {wanted.dp_shard} x context {wanted.context}, "
            "whose ranks it takes"
        )
    return found


def _model_problems(model: ModelConfig, wanted: Wanted) -> list[str]:
    """What the model cannot share out."""
    found, t = [], wanted.tensor
    if t > 1:
        found = [
            f"parallel.tensor: {t} does not divide {name} {size}"
            for name, size in _tensor_shares(model).items()
            if size % t
        ]
        if model.architecture == "late" and not is_plain_tower(model):
            found.append(
                f"parallel.tensor: {t}, but towers other than model.vision.kind megamm, and projectors other than "
                "model.vision.projector linear without pixel shuffle, are not cut; set it to 1"
            )
    if wanted.pipeline > 1 and model.tied_embeddings:
        found.append(
            f"parallel.pipeline: {wanted.pipeline}, but the first and the last stage would share one table "
            "(model.tied_embeddings); set it to 1"
        )
    if wanted.pipeline > 1 and wanted.num_stages > model.depth:
        per_rank = STAGES_PER_RANK[wanted.schedule]
        how = f"{wanted.pipeline} x {per_rank} stages of {wanted.schedule}" if per_rank > 1 else f"{wanted.pipeline}"
        found.append(f"parallel.pipeline: {how} for {model.depth} blocks (model.depth); each stage needs one")
    if wanted.expert > 1 and not model.experts.num:
        found.append(f"parallel.expert: {wanted.expert}, but the model has no experts (model.experts.num)")
    elif wanted.expert > 1 and model.experts.num % wanted.expert:
        found.append(f"parallel.expert: {wanted.expert} does not divide model.experts.num {model.experts.num}")
    return found


def is_plain_tower(model: ModelConfig) -> bool:
    """Whether tensor ranks can share the tower: each makes the features of its own patches."""
    vision = model.vision
    return vision.kind == "megamm" and vision.projector == "linear" and shuffle_ratio(model) == 1


def _tensor_shares(model: ModelConfig) -> dict[str, int]:
    """What tensor ranks share out in whole parts, by what it is called."""
    # Each is cut into runs of whole heads, hidden units or rows, so it must divide; key heads too, since qkv is cut by
    # groups.
    found = {"the heads": num_heads(model)}
    if model.key_heads is not None:
        found["model.key_heads"] = model.key_heads
    which = "model.hidden_multiple" if model.hidden is None else "model.hidden"
    found[f"the SwiGLU width ({which})"] = decoder_hidden(model)
    if model.experts.num:
        found["model.experts.hidden"] = model.experts.hidden
        found["model.experts.shared_hidden"] = model.experts.shared_hidden
    found["model.vocab_size"] = model.vocab_size
    if model.architecture == "late":
        v = model.vision
        found["the vision tower's heads"] = v.width // v.head_dim
        found["the vision tower's SwiGLU width"] = tower_hidden(model)
        if model.image_size and model.patch_size:  # else not known before the data is
            size = patches_per_image(model.image_size, model.patch_size)
            found["the patches of an image (model.image_size, model.patch_size)"] = size
    return found


def _row_problems(config: Config, wanted: Wanted) -> list[str]:
    """Rows that ranks and micro-batches cannot share, and positions of a row likewise."""
    found, ranks, rows = [], wanted.data_ranks, wanted.batch_rows
    if rows % ranks:
        found.append(f"train.batch_rows: {rows} is not a multiple of the {ranks} data-parallel ranks")
    if wanted.pipeline > 1:
        found += _pipeline_problems(wanted)
        # Only where the rows divide among the ranks: that problem is told already.
        if not rows % ranks and wanted.passes > 0 and rows // ranks % wanted.passes:
            by_rows = wanted.micro_batches is None and wanted.micro_rows is not None
            name, size = (
                ("train.micro_rows", wanted.micro_rows) if by_rows else ("parallel.micro_batches", wanted.passes)
            )
            found.append(
                f"{name}: {size} does not divide the {rows // ranks} rows of a data-parallel rank (train.batch_rows "
                f"{rows}) into equal micro-batches"
            )
    elif wanted.micro_batches is not None:
        found.append(f"parallel.micro_batches: {wanted.micro_batches} without a pipeline; set train.micro_rows instead")
    unit = row_unit(wanted)
    if wanted.row_length % unit:
        reasons = [f"context {wanted.context} x 2"] if wanted.context > 1 else []
        reasons += [f"tensor {wanted.tensor}"] if wanted.tensor > 1 else []
        found.append(
            f"data.row_length: {wanted.row_length} is not a multiple of {unit}, into which {' and '.join(reasons)} "
            "ranks cut a row"
        )
    return found


def _pipeline_problems(wanted: Wanted) -> list[str]:
    """Numbers of micro-batches that the schedule cannot take."""
    stages, n, found = wanted.pipeline, wanted.passes, []
    if n < 1:
        return [f"parallel.micro_batches: {n} is not positive"]
    both = wanted.micro_batches is not None and wanted.micro_rows is not None
    if both and n * wanted.micro_rows * wanted.data_ranks != wanted.batch_rows:
        found.append(
            f"parallel.micro_batches: {n} of train.micro_rows {wanted.micro_rows} on {wanted.data_ranks} "
            f"data-parallel ranks are not train.batch_rows {wanted.batch_rows}; set one of the two"
        )
    if n < stages:
        found.append(
            f"parallel.micro_batches: {n} leave some of the {stages} stages empty; take {stages} or more"
            + (" (or smaller train.micro_rows)" if wanted.micro_rows is not None else "")
        )
    elif not may_pass(wanted, n):
        found.append(
            f"parallel.micro_batches: {n} do not make {n // stages} equal rounds over {stages} ranks, which "
            f"{wanted.schedule} needs; take a multiple of {stages}"
        )
    return found


def may_pass(wanted: Wanted, n: int) -> bool:
    """Whether a schedule can take n micro-batches; rounds of equally many go through a rank's stages in turn."""
    stages = wanted.pipeline
    return n >= stages and (wanted.schedule == "1f1b" or n % (n // stages) == 0)


def row_unit(wanted: Wanted) -> int:
    """A row's length is a multiple of this: context ranks take two pieces each, tensor ranks share what one has."""
    return math.lcm(2 * wanted.context if wanted.context > 1 else 1, wanted.context * wanted.tensor)
