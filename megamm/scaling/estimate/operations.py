"""FLOPs and memory traffic of a forward and backward pass, by group of operations.

Bytes are those that a fused kernel must move: each input read and each output written once, in the type of the
activations unless said. The FLOPs that a group counts add up to ``flops.exact_flops_per_token``; what is executed
beyond them (attention computes its scores again in the backward) stands apart.

Letters: n positions, w width of the residual stream, f SwiGLU hidden, v vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megamm.config import ModelConfig
from megamm.model.sizes import hidden_width
from megamm.scaling.flops import TokenStats

CHUNK_BYTES = 2**28
"""Logits that the head holds at a time on a GPU (GPU_CHUNK_BYTES of megamm_kernels.linear_cross_entropy)."""
FLOAT32 = 4


class Work(NamedTuple):
    """Work of one pass: FLOPs as counted for MFU, FLOPs executed beyond these, bytes to and from memory."""

    flops: float = 0.0
    bytes: float = 0.0
    extra: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A group of operations of one micro-batch; ``kind`` (matmul, attention, memory) says which efficiency holds."""

    name: str
    kind: str
    forward: Work
    backward: Work


def operations(model: ModelConfig, positions: float, stats: TokenStats, size: int = 2) -> list[Operation]:
    """All groups of one micro-batch.

    Args:
        model: resolved.
        positions: of the micro-batch.
        stats: per position.
        size: bytes of an activation.
    """
    w, patch_dim = model.width, 3 * model.patch_size**2
    patches = positions * stats.patches
    found = _blocks("", model.depth, w, hidden_width(w, model.hidden_multiple), positions, stats.pairs, size)
    if model.architecture == "early":
        found.append(_linear("patch projection", patches, patch_dim, w, 1, size, input_gradient=False))
    elif model.architecture == "late":
        v, per_image = model.vision, (model.image_size // model.patch_size) ** 2
        hidden = hidden_width(v.width, model.hidden_multiple)
        found += _blocks("vision: ", v.depth, v.width, hidden, patches, per_image, size)
        found.append(_linear("vision: patch projection", patches, patch_dim, v.width, 1, size, input_gradient=False))
        found.append(_linear("vision: projector", patches, v.width, w, 1, size))
    found.append(
        Operation(
            name="embedding",
            kind="memory",
            forward=Work(bytes=positions * w * (FLOAT32 + size)),
            # The gradient of the table is dense: all of it is written.
            backward=Work(bytes=positions * w * size + model.vocab_size * w * FLOAT32),
        )
    )
    return found + _head(model, positions * stats.labels, positions, size)


def _blocks(prefix: str, depth: int, w: int, f: int, n: float, pairs_per_position: float, size: int) -> list[Operation]:
    """``depth`` transformer blocks over n positions."""
    pairs = n * pairs_per_position
    attention = Operation(
        name=f"{prefix}attention",
        kind="attention",
        forward=Work(flops=depth * 4 * pairs * w, bytes=depth * 4 * n * w * size),
        backward=Work(flops=depth * 8 * pairs * w, bytes=depth * 8 * n * w * size, extra=depth * 2 * pairs * w),
    )
    # Widths moved per position, forward: norm 2, QK-norm and rotation 4, residual and norm 4, residual 3; SwiGLU 3f.
    # Backward: norms 3 and 4, QK-norm 6 and joining its gradient with that of v 6, residuals 6; SwiGLU 5f.
    elementwise = Operation(
        name=f"{prefix}norms, rotary, SwiGLU, residuals",
        kind="memory",
        forward=Work(bytes=depth * n * size * (13 * w + 3 * f)),
        backward=Work(bytes=depth * n * size * (25 * w + 5 * f)),
    )
    return [
        _linear(f"{prefix}qkv", n, w, 3 * w, depth, size),
        attention,
        _linear(f"{prefix}attention output", n, w, w, depth, size),
        _linear(f"{prefix}gate and up", n, w, 2 * f, depth, size),
        _linear(f"{prefix}down", n, f, w, depth, size),
        elementwise,
    ]


def _linear(name: str, rows: float, k: int, m: int, count: int, size: int, input_gradient: bool = True) -> Operation:
    """``count`` products of ``rows`` inputs of width k to width m; the backward has two, or one without the input's."""
    moved = size * (rows * (k + m) + k * m)
    products = 1 + input_gradient
    return Operation(
        name=name,
        kind="matmul",
        forward=Work(flops=count * 2 * rows * k * m, bytes=count * moved),
        backward=Work(flops=count * products * 2 * rows * k * m, bytes=count * products * moved),
    )


def _head(model: ModelConfig, labels: float, positions: float, size: int) -> list[Operation]:
    """The head on labelled rows only; its gradients are computed in the forward, chunk by chunk."""
    v, w = model.vocab_size, model.width
    chunks = max(1.0, labels * v * size / CHUNK_BYTES)
    weight = v * w
    products = 3 * size * (labels * (v + w) + weight) + (2 * chunks - 1) * FLOAT32 * weight
    return [
        Operation(
            name="head",
            kind="matmul",
            forward=Work(flops=6 * labels * w * v, bytes=products),
            backward=Work(),
        ),
        Operation(
            name="final norm, softmax, scaling of the head's gradient",
            kind="memory",
            forward=Work(bytes=size * (2 * positions * w + 3 * labels * v)),
            backward=Work(bytes=5 * size * positions * w + 2 * FLOAT32 * weight),
        ),
    ]
