"""Bytes that a rank holds at the fullest moment of a step: the end of the forward and the start of the backward.

Activations are counted by what the autograd functions of megamm_kernels save, each storage once; a test compares them
with the tensors that torch saves. Parameters, gradients and optimizer state are sharded over all ranks (FSDP2).
"""

from megamm.config import Config, ModelConfig
from megamm.errors import InputError
from megamm.model.sizes import hidden_width
from megamm.scaling.estimate.operations import CHUNK_BYTES, FLOAT32
from megamm.scaling.flops import ParameterCounts, TokenStats, block_parameters, count_parameters

BATCH_BYTES = 7 * 4 + 2
"""Per position: tokens, positions, targets, the mask from both sides (int32), source and modality."""
SIZES = {"bfloat16": 2, "float32": 4}


def rank_memory(config: Config, world_size: int, stats: TokenStats) -> dict[str, float]:
    """Bytes of each kind on one rank.

    Args:
        config: resolved.
        world_size: ranks that the state is spread over.
    """
    model, size = config.model, SIZES[config.train.dtype]
    rows, passes = micro_batches(config, world_size)
    counts = count_parameters(model)
    positions = rows * config.data.row_length
    share = counts.total / world_size
    found = {
        "parameters": FLOAT32 * share,
        "gradients": FLOAT32 * share,
        "optimizer state": 2 * FLOAT32 * share,
        **_weights_in_use(model, counts, world_size, passes, size),
        **{f"activations: {name}": x for name, x in kept_activations(model, positions, stats, size).items()},
        "working tensors of a block's backward": _working(model, positions, size),
        "logits, a chunk": min(CHUNK_BYTES, positions * stats.labels * model.vocab_size * size),
    }
    return {name: value for name, value in found.items() if value}


def micro_batches(config: Config, world_size: int) -> tuple[int, int]:
    """Rows of one pass of a rank, and passes per step.

    Raises:
        InputError: the ranks cannot share the batch.
    """
    if world_size < 1 or config.train.batch_rows % world_size:
        raise InputError(f"train.batch_rows: {config.train.batch_rows} is not a multiple of the {world_size} ranks")
    rank_rows = config.train.batch_rows // world_size
    rows = min(config.train.micro_rows or rank_rows, rank_rows)
    return rows, -(-rank_rows // rows)


def largest_block(model: ModelConfig) -> int:
    """Parameters of one block of the decoder, the unit that FSDP gathers."""
    return block_parameters(model.width, hidden_width(model.width, model.hidden_multiple), model.head_dim)


def rest_parameters(model: ModelConfig, counts: ParameterCounts) -> int:
    """Parameters in no block (both tables, front end, last norm): one unit, gathered in float32."""
    blocks = model.depth * largest_block(model)
    if model.architecture == "late":
        v = model.vision
        blocks += v.depth * block_parameters(v.width, hidden_width(v.width, model.hidden_multiple), v.head_dim)
    return counts.total - blocks


def _weights_in_use(
    model: ModelConfig, counts: ParameterCounts, world_size: int, passes: int, size: int
) -> dict[str, float]:
    """Weights beside the float32 shards: gathered ones, or one process's copies in the type of the activations."""
    block, rest = largest_block(model), rest_parameters(model, counts)
    if world_size == 1:
        # Each matrix is cast where it is used, and the cast kept for the backward; the table of the embedding is not.
        cast = counts.total - model.vocab_size * model.width
        return {"weights in the type of the activations": size * cast if size < FLOAT32 else 0}
    return {
        "gathered weights: two blocks": 2 * size * block,
        "gathered weights: tables, front end": FLOAT32 * rest + (size * model.vocab_size * model.width),
        "gradients before they are reduced": FLOAT32 * rest + (size + FLOAT32) * block,
        # Passes before a step's last only add up, unsharded and in float32 (set_requires_gradient_sync).
        "gradients accumulated over passes": FLOAT32 * (counts.total - rest) if passes > 1 else 0,
    }


def kept_activations(
    model: ModelConfig, positions: float, stats: TokenStats, size: int, fused: bool = True
) -> dict[str, float]:
    """Bytes that the forward of one micro-batch keeps for the backward, by part of the model.

    Args:
        fused: as the Triton kernels save; False: as the plain-torch path does, which also keeps the SiLU of the gate,
            and pixels as floats rather than bytes.
    """
    patches = positions * stats.patches
    patch_dim = 3 * model.patch_size**2
    pixels = patches * patch_dim * (1 if fused else size)
    found = {
        "blocks": model.depth * positions * _block(model.width, model.hidden_multiple, model.head_dim, size, fused),
        # Input of the last norm and its reciprocal norm, and the gradient that the head computes ahead.
        "last norm and head": positions * (2 * model.width * size + FLOAT32),
        "rotary tables, batch": positions * (FLOAT32 * model.head_dim + BATCH_BYTES),
        "pixels": 0.0 if model.architecture == "text" else pixels,
    }
    if model.architecture == "late":
        v = model.vision
        found["vision tower"] = v.depth * patches * _block(v.width, model.hidden_multiple, v.head_dim, size, fused)
        found["vision tower"] += patches * (2 * v.width * size + FLOAT32)
    return found


def _block(width: int, hidden_multiple: int, head_dim: int, size: int, fused: bool) -> float:
    """Bytes per position that one block keeps.

    In widths: its input, the normalised input, qkv (3), rotated queries and keys (2), the attention's output, the
    residual stream after it and its norm. In hidden widths: gate and up (2), their product, unfused also the SiLU.
    In float32: reciprocal norms (two of rows, one of each head of queries and keys) and the attention's log-sum-exp.
    """
    hidden, heads = hidden_width(width, hidden_multiple), width // head_dim
    return size * (10 * width + (3 if fused else 4) * hidden) + FLOAT32 * (3 * heads + 2)


def _working(model: ModelConfig, positions: float, size: int) -> float:
    """Gradients alive at once inside the widest part of a block: of gate and up, of their product, of the stream."""
    hidden = hidden_width(model.width, model.hidden_multiple)
    return positions * size * (3 * hidden + 2 * model.width)
