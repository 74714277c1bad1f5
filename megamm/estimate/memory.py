"""Bytes that a rank holds at the fullest moment of a step: in the head, or in the first backward of a block.

Activations are counted by what the autograd functions of megamm_kernels save, each storage once; a test compares them
with the tensors that torch saves. Parameters, gradients and optimizer state are sharded over ``dp_shard x context``
ranks (FSDP2), after tensor ranks have taken their share of every matrix and pipeline ranks their blocks. Tensor ranks
keep the gathered inputs of matrix products, context ranks the gathered keys and values.
"""

from dataclasses import dataclass

from megamm.config import Config, ModelConfig
from megamm.estimate.operations import CHUNK_BYTES, CPU_CHUNK_BYTES, FLOAT32
from megamm.estimate.schedules import held_at_most, orders
from megamm.model.counts import (
    TokenStats,
    decoder_block_parameters,
    feed_forward_width,
    key_width,
    projector_parameters,
    query_width,
    small_parameters,
    tower_block_parameters,
    tower_parameters,
    tower_work,
)
from megamm.parallel.layout import Layout
from megamm.parallel.stages import Stage, cut_stages

BATCH_BYTES = 7 * 4 + 2
"""Per position: tokens, positions, targets, the mask from both sides (int32), source and label kind."""
MUON_UNITS = ("block", "experts")
"""What holds the matrices that Muon steps; the few vectors there are counted like them."""
SIZES = {"bfloat16": 2, "float32": 4}
GONE = "activations that are gone"
"""Of a moment: what is subtracted from the activations of blocks."""


def rank_memory(config: Config, layout: Layout, stats: TokenStats, fused: bool = True) -> dict[str, float]:
    """Bytes of each kind on the fullest rank.

    Args:
        config: resolved.
        layout: see ``megamm.parallel.layout.resolve_layout``.
        stats: per position.
        fused: see :func:`kept_by_part`.
    """
    stages = cut_stages(config.model, stats, layout.num_stages)
    ranks = [_pipeline_rank(config, layout, stats, stages, rank, fused) for rank in range(layout.pipeline)]
    return max(ranks, key=lambda held: sum(held.values()))


def _pipeline_rank(
    config: Config, layout: Layout, stats: TokenStats, stages: list[Stage], rank: int, fused: bool
) -> dict[str, float]:
    """What a rank of the pipeline holds: stages ``rank``, ``rank + pipeline``, ..."""
    model, size, t = config.model, SIZES[config.train.dtype], layout.tensor
    mine = stages[rank :: layout.pipeline]
    units = units_of(model, layout, mine)
    share = sum(unit.share for unit in units)
    # Two moments of AdamW; one of Muon, which steps the matrices of blocks and experts.
    one = sum(unit.share for unit in units if unit.name in MUON_UNITS) if config.optimizer.name == "muon" else 0.0
    positions = layout.micro_rows * config.data.row_length / layout.context
    recompute, ring = config.train.recompute, config.parallel.context_method == "ring"
    parts = kept_by_part(model, positions, stats, size, layout, fused=fused, recompute=recompute, ring=ring)
    kept = _kept(parts, layout, stages, rank)
    moments = _moments(config, layout, mine, stats, fused, parts["block"], rank)
    fullest: dict[str, float] = max(moments, key=lambda held: sum(held.values()) - 2 * held.get(GONE, 0.0))
    found = {
        "parameters": FLOAT32 * share,
        "gradients": FLOAT32 * share,
        "optimizer state": 0.0 if config.optimizer.offload else FLOAT32 * (2 * share - one),
        **{f"activations: {name}": value for name, value in kept.items()},
        **fullest,
    }
    found["activations: blocks"] -= found.pop(GONE, 0.0)
    if layout.pipeline > 1:
        # torch keeps a buffer for each micro-batch that comes from another stage, and for each gradient.
        edges = sum((not stage.inputs) + (not stage.head) for stage in mine) * layout.micro_batches
        found["streams and gradients of other stages"] = edges * positions * model.width * size / t
    return {name: value for name, value in found.items() if value}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What FSDP gathers and reduces at once.

    Attributes:
        name: block, experts, router, tower (its ends), inputs or head.
        size: parameters of a rank, all of the ranks that shard them together.
        shard: how many ranks these are.
        gathered: bytes of an element as it is gathered; None: those of an activation.
    """

    name: str
    size: float
    shard: int
    gathered: int | None = None

    @property
    def share(self) -> float:
        """Parameters that lie on this rank."""
        return self.size / self.shard


def units_of(model: ModelConfig, layout: Layout, stages: list[Stage]) -> list[Unit]:
    """The units of some stages, in the order of the forward; matrices in shares of the tensor ranks, the rest whole."""
    t, w, found = layout.tensor, model.width, []
    table, patch_dim = model.vocab_size * w / t, 3 * model.patch_size**2

    def add(name: str, size: float, times: int = 1, shard: int = layout.shard_ranks, gathered: int | None = None):
        found.extend([Unit(name=name, size=size, shard=shard, gathered=gathered)] * times)

    if any(stage.inputs for stage in stages):
        if model.architecture == "late":
            v = model.vision
            whole = 2 * v.width + 2 * v.head_dim
            block = tower_block_parameters(model)
            add("block", (block - whole) / t + whole, v.depth)  # towers of other kinds are not cut: t is 1
            add("tower", tower_parameters(model) - v.depth * block + projector_parameters(model))
        add("inputs", table + (patch_dim * w if model.architecture == "early" else 0))
    num_blocks = sum(len(stage.blocks) for stage in stages)
    whole = sum(small_parameters(model)) * (2 if model.per_modality == "block" else 1)
    router, experts = model.experts.num * w, expert_parameters(model)
    cut = decoder_block_parameters(model)[0] - whole - router - (experts if layout.expert > 1 else 0)
    # Expert ranks have each taken whole experts, so that so many fewer ranks share one.
    if layout.expert > 1:  # else the block's
        add("experts", experts / layout.expert / t, num_blocks, layout.shard_ranks // layout.expert)
    if router:
        add("router", router, num_blocks, gathered=FLOAT32)
    add("block", cut / t + whole, num_blocks)
    if any(stage.head for stage in stages):
        add("head", w if model.tied_embeddings else table + w)
    return found


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of all experts of a block; none without."""
    return model.experts.num * 3 * model.width * model.experts.hidden if model.experts.num else 0


def whole_parameters(model: ModelConfig, stage: Stage) -> list[int]:
    """Parameters of a stage that every tensor rank has whole: norms, router, patch projection, the tower's ends."""
    w, patch_dim = model.width, 3 * model.patch_size**2
    block = small_parameters(model) * (2 if model.per_modality == "block" else 1)
    block += [model.experts.num * w] * bool(model.experts.num)
    found = len(stage.blocks) * block + stage.head * [w]
    if stage.inputs and model.architecture == "early":
        found.append(patch_dim * w)
    elif stage.inputs and model.architecture == "late":
        v = model.vision
        found += v.depth * [v.width, v.width, 2 * v.head_dim]
        found += [patch_dim * v.width, v.width * v.final_norm, v.width * w]
    return found


def _moments(
    config: Config, layout: Layout, stages: list[Stage], stats: TokenStats, fused: bool, kept_of_block: float, rank: int
) -> list[dict[str, float]]:
    """What is held beside shards and activations in the head's forward, in its backward, and in that of a block."""
    model, size, t = config.model, SIZES[config.train.dtype], layout.tensor
    units = units_of(model, layout, stages)
    has_head, whole = any(stage.head for stage in stages), sum(unit.size for unit in units)
    head = sum(unit.size for unit in units if unit.name == "head")
    if model.tied_embeddings and has_head:  # its matrix is counted with the inputs
        head += model.vocab_size * model.width / t
    block = sum(max((u.size for u in units if u.name == name), default=0.0) for name in ("block", "experts", "router"))
    positions = layout.micro_rows * config.data.row_length / layout.context
    chunk = CHUNK_BYTES if fused else CPU_CHUNK_BYTES
    logits = positions * stats.labels * model.vocab_size / t * (size if fused else FLOAT32)
    # Summed in float32, whatever the type of the activations (megamm_kernels.linear_cross_entropy).
    ahead = {"gradient that the head computes ahead": FLOAT32 * head}
    in_block = {"working tensors of a block's backward": _working(model, positions, size, config.train.recompute, t)}
    in_head = {"logits, a chunk": min(chunk, logits)}
    # Both gradients of the head are multiplied by the loss's, into tensors of their own type.
    after_head = {"working tensors of the head's backward": size * model.width * positions * (size < FLOAT32)}
    if layout.world_size == 1:
        # Each matrix is cast where it is used, and the cast kept for the backward; the table of the embedding is not.
        table = model.vocab_size * model.width * any(stage.inputs for stage in stages)
        casts = {"weights in the type of the activations": size * (whole - table) if size < FLOAT32 else 0.0}
        return [casts | in_block] + [casts | ahead | more for more in (in_head, after_head)] * has_head
    piped = layout.pipeline > 1
    adds_up = layout.micro_batches > 1 and (piped or not config.parallel.reduce_every_pass)
    # A schedule keeps gathered weights after a backward.
    drops = config.parallel.reshards and not piped

    def weights(in_use: float, to_reduce: float) -> dict[str, float]:
        return {
            "gathered weights": size * (in_use if drops else whole),
            "gradients before they are reduced": to_reduce,
            # Passes before a step's last only add up, unsharded and in float32 (set_requires_gradient_sync).
            "gradients accumulated over passes": FLOAT32 * whole if adds_up else 0.0,
        }

    if layout.schedule == "zero_bubble" and piped:
        # Between a stage's two backwards lie the gradients of all products, and nothing that it keeps is freed. Rank r
        # puts the second ones of r micro-batches off.
        put_off = rank + 1
        hidden, qkv = feed_forward_width(model), query_width(model) + 2 * key_width(model)
        most = max(len(stage.blocks) for stage in stages)
        later = (put_off * most * (2 * hidden + qkv) - hidden) / t + put_off * most * 2 * model.width
        # One block's gate and up are among its working tensors.
        in_block["gradients of products until those of weights"] = size * positions * later
        in_block["gradient that the head computes ahead"] = FLOAT32 * head * put_off
    # FSDP gathers the next block while one computes, and frees what it reduces when the next unit has its gradient. In
    # a pipeline nothing is reduced while many micro-batches are under way.
    found = [weights(2 * block, size * block if piped else FLOAT32 * head) | in_block]
    # When a block's gradients are reduced, its activations are gone, all that it keeps.
    found.append(weights(2 * block, (size + FLOAT32) * block) | {GONE: kept_of_block})
    if has_head:
        found.append(weights(head, 0.0) | ahead | in_head)
        found.append(weights(head + block, size * head * (size < FLOAT32)) | ahead | after_head)
    return found


def kept_activations(
    model: ModelConfig, positions: float, stats: TokenStats, size: int, fused: bool = True
) -> dict[str, float]:
    """Bytes that the forward of one micro-batch of the whole model keeps for the backward, by part of the model."""
    parts = kept_by_part(model, positions, stats, size, Layout(), fused=fused)
    found = {"blocks": model.depth * parts.pop("block")} | parts
    return {name: value for name, value in found.items() if value or name != "vision tower"}


def kept_by_part(
    model: ModelConfig,
    positions: float,
    stats: TokenStats,
    size: int,
    layout: Layout,
    *,
    fused: bool = True,
    recompute: str = "none",
    ring: bool = False,
) -> dict[str, float]:
    """Bytes that one micro-batch keeps on a rank, of one ``block`` and of each other part of the model.

    Args:
        positions: of the micro-batch on the rank (context ranks share them).
        fused: as the Triton kernels save; False: as the plain-torch path does, which also keeps the SiLU of the gate,
            and pixels as floats rather than bytes.
        ring: whether context ranks pass keys around (``parallel.context_method``).
    """
    patches, t = positions * stats.patches, layout.tensor
    patch_dim = 3 * model.patch_size**2
    pixels = patches * patch_dim * (1 if fused else size)

    def block(width: int, queries: int, keys: int, hidden: float, head_dim: int, context: int) -> float:
        return _kept_of_block(_BlockSizes(width, queries, keys, hidden, head_dim, context, t), size, fused, recompute)

    widths = model.width, query_width(model), key_width(model), feed_forward_width(model)
    decoder = block(*widths, model.head_dim, layout.context)
    if ring and layout.context > 1 and recompute == "none":
        # The attention of each part, and in float32 both sides of every merge.
        merges = layout.context - 1
        decoder += query_width(model) * (layout.context * size + 2 * merges * FLOAT32) / t
    if model.experts.num and recompute == "none":
        # Copies for the chosen experts and what these give, and three tables of the router.
        decoder += 2 * model.experts.top_k * model.width * size + 3 * FLOAT32 * model.experts.num
    found = {
        "block": positions * decoder,
        # Input of the last norm and its reciprocal norm, and the gradient of it that the head computes ahead: tensor
        # ranks have all of that.
        "last norm and head": positions * (model.width * size * (1 + 1 / t) + FLOAT32 / t),
        "rotary tables, batch": positions * (FLOAT32 * model.head_dim + BATCH_BYTES),
        "pixels": 0.0 if model.architecture == "text" else pixels,
        "vision tower": 0.0,
    }
    if model.architecture == "late":
        v = model.vision
        hidden, longer = tower_work(model)
        found["vision tower"] = v.depth * patches * longer * block(v.width, v.width, v.width, hidden, v.head_dim, 1)
        found["vision tower"] += patches * (2 * v.width * size + FLOAT32) / t
    return found


@dataclass(frozen=True)
class _BlockSizes:
    """Widths of a block: stream, all queries, all keys, SwiGLU, a head; context ranks and tensor ranks."""

    width: int
    queries: int
    keys: int
    hidden: float
    head_dim: int
    context: int
    tensor: int


def _kept_of_block(b: _BlockSizes, size: int, fused: bool, recompute: str) -> float:
    """Bytes per position that one block keeps.

    In widths: its input, the normalised input, queries, keys and values before and after rotation (values once), the
    attention's output, the residual stream after it and its norm. In hidden widths: gate and up (2), their product,
    unfused also the SiLU. In float32: reciprocal norms (two of rows, one of each head of queries and keys) and the
    attention's log-sum-exp. Tensor ranks share all but the two normalised inputs, which they gather. Context ranks keep
    keys and values of all, gathered.
    """
    t, w, q = b.tensor, b.width, b.queries
    if recompute == "full":
        return size * w / t
    qkv = q + 2 * b.keys
    statistics = FLOAT32 * (q + b.keys + q) / b.head_dim / t
    gathered = 2 * b.keys * b.context if b.context > 1 else 0
    if recompute == "per_op":
        # Block input, and what products and attention give: qkv, attention, its output; gate and up.
        return size * (w + qkv + gathered + q + w + 2 * b.hidden) / t + FLOAT32 * q / b.head_dim / t
    rotated = q + (gathered or b.keys)
    hidden = (3 if fused else 4) * b.hidden
    return size * (2 * w + (2 * w + q + qkv + rotated + hidden) / t) + statistics + FLOAT32 * 2 / t


def _kept(parts: dict[str, float], layout: Layout, stages: list[Stage], rank: int) -> dict[str, float]:
    """What all micro-batches that a pipeline rank has under way keep, by part."""
    held: dict[str, list[float]] = {
        "blocks": [len(stage.blocks) * parts["block"] for stage in stages],
        "last norm and head": [stage.head * parts["last norm and head"] for stage in stages],
        "rotary tables, batch": [parts["rotary tables, batch"] for _ in stages],
        "pixels": [stage.inputs * parts["pixels"] for stage in stages],
        "vision tower": [stage.inputs * parts["vision tower"] for stage in stages],
    }
    if layout.pipeline == 1:
        return {name: sum(values) for name, values in held.items()}
    order = orders(layout.schedule, layout.pipeline, layout.micro_batches)[rank]
    under_way = held_at_most(order, [sum(values) for values in zip(*held.values(), strict=True)])
    return {name: sum(values[s] * n for s, n in under_way.items()) for name, values in held.items()}


def _working(model: ModelConfig, positions: float, size: int, recompute: str, tensor: int) -> float:
    """Gradients alive at once inside the widest part of a block: of gate and up, and of the stream.

    That of the product takes the place of the product. With recompute also what a block computes again.
    """
    hidden = feed_forward_width(model)
    found = positions * size * (2 * hidden / tensor + 2 * model.width)
    if recompute != "none":
        sizes = _BlockSizes(model.width, query_width(model), key_width(model), hidden, model.head_dim, 1, tensor)
        kept, rest = (_kept_of_block(sizes, size, True, which) for which in ("none", recompute))
        found += positions * (kept - rest)
    return found
