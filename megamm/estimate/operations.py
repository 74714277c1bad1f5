"""FLOPs and memory traffic of a forward and backward pass, by group of operations.

Bytes are those that a fused kernel must move: each input read and each output written once, in the type of the
activations unless said. The FLOPs that a group counts add up to ``flops.exact_flops_per_token``; what is executed
beyond them (attention computes its scores again in the backward) stands apart.

Letters: n positions, w width of the residual stream, f SwiGLU hidden, v vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from megamm.config import ModelConfig
from megamm.model.counts import TokenStats, feed_forward_width, image_pairs, key_width, query_width, tower_work
from megamm.model.sizes import shuffle_ratio

CHUNK_BYTES = 2**28
"""Logits that the head holds at a time on a GPU (GPU_CHUNK_BYTES of megamm_kernels.linear_cross_entropy)."""
CPU_CHUNK_BYTES = 2**26
"""The same on a CPU."""
FLOAT32 = 4


class Work(NamedTuple):
    """Work of one pass: FLOPs as counted for MFU, bytes to and from memory, FLOPs executed beyond these, kernels."""

    flops: float = 0.0
    bytes: float = 0.0
    extra: float = 0.0
    kernels: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A group of operations of one micro-batch; ``kind`` (matmul, attention, memory) says which efficiency holds."""

    name: str
    kind: str
    forward: Work
    backward: Work


def operations(model: ModelConfig, positions: float, stats: TokenStats, size: int = 2) -> list[Operation]:
    """All groups of one micro-batch on one rank; see :func:`part_operations`."""
    parts = part_operations(model, positions, stats, size)
    blocks = [repeated(group, model.depth) for group in parts["block"]]
    return blocks + parts["inputs"] + parts["head"]


def repeated(group: Operation, times: float) -> Operation:
    """The group ``times`` times."""
    forward, backward = (Work(*(times * x for x in work)) for work in (group.forward, group.backward))
    return replace(group, forward=forward, backward=backward)


def part_operations(
    model: ModelConfig, positions: float, stats: TokenStats, size: int = 2, tensor: int = 1
) -> dict[str, list[Operation]]:
    """The groups of one micro-batch, forward and backward, in ``inputs``, one ``block`` and ``head``.

    Args:
        model: resolved.
        positions: of the micro-batch, as far as its context ranks do not share them.
        stats: per position.
        size: bytes of an activation.
        tensor: ranks that share each matrix product, the heads and, between products, the positions.
    """
    w, patch_dim = model.width, 3 * model.patch_size**2
    patches = positions * stats.patches
    keys, queries = key_width(model), query_width(model)
    block = _block("", w, keys, feed_forward_width(model), positions, stats.pairs, size, tensor, queries)
    if model.experts.num:
        block += _routing(model, positions, size, tensor)
    inputs = []
    if model.architecture == "early":
        inputs.append(_linear("patch projection", patches, patch_dim, w / tensor, size, input_gradient=False))
    elif model.architecture == "late":
        v, per_patch = model.vision, image_pairs(model, stats) / max(stats.patches, 1e-30)
        hidden, longer = tower_work(model)
        tower = _block("vision: ", v.width, v.width, hidden, patches * longer, per_patch * longer, size, tensor)
        inputs += [repeated(group, v.depth) for group in tower]
        share = v.width / tensor
        more = shuffle_ratio(model) ** 2  # patches of the tower in one of the model's
        sizes = patches * more, patch_dim / more, share, size
        inputs.append(_linear("vision: patch projection", *sizes, input_gradient=False))
        inputs.append(_linear("vision: projector", patches, v.width * more, w / tensor, size))
        if v.projector == "mlp":
            inputs.append(_linear("vision: second matrix of the projector", patches, w, w, size))
    inputs.append(
        Operation(
            name="embedding",
            kind="memory",
            # Rows are read from the float32 table and written in the type of the activations.
            forward=Work(bytes=positions * w * (FLOAT32 + size) / tensor, kernels=2),
            # The gradient of the table is dense: all of it is written.
            backward=Work(bytes=(positions * w * size + model.vocab_size * w * FLOAT32) / tensor, kernels=2),
        )
    )
    head = _head(model.vocab_size / tensor, w, positions * stats.labels, positions / tensor, size)
    return {"inputs": inputs, "block": block, "head": head}


def _routing(model: ModelConfig, n: float, size: int, tensor: int) -> list[Operation]:
    """What experts add to a block: the router, copies of positions to their experts and back, weights of all experts.

    The load is taken as even. What of a product's weights is read beyond those of one expert is counted here.
    """
    e, w = model.experts, model.width
    weights = size * (e.num - e.top_k) * 3 * w * e.hidden / tensor
    copies = n * e.top_k * w * size
    return [
        _linear("router", n, w, e.num, FLOAT32),
        Operation(
            name="copies of positions for experts",
            kind="memory",
            forward=Work(bytes=4 * copies + weights, kernels=6),
            backward=Work(bytes=5 * copies + 2 * weights, kernels=6),
        ),
    ]


def _block(
    prefix: str,
    w: int,
    keys: int,
    f: float,
    n: float,
    pairs_per_position: float,
    size: int,
    tensor: int,
    queries: int | None = None,
) -> list[Operation]:
    """A transformer block over n positions; ``keys``, ``queries``: width of all of them (queries: w by default)."""
    pairs, t, q = n * pairs_per_position, tensor, queries or w
    moved = n * 2 * (q + keys) * size / t
    # Forward: two products of 2 FLOPs for each pair and entry. Backward: four, and the scores once more.
    attention = Operation(
        name=f"{prefix}attention",
        kind="attention",
        forward=Work(flops=4 * pairs * q / t, bytes=moved, kernels=1),
        backward=Work(flops=8 * pairs * q / t, bytes=2 * moved, extra=2 * pairs * q / t, kernels=2),
    )
    # Widths moved per position, forward: norm 2, QK-norm and rotation 4, residual and norm 4, residual 3; SwiGLU 3f.
    # Backward: norms 3 and 4, QK-norm 6 and joining its gradient with that of v 6, residuals 6; SwiGLU 5f.
    elementwise = Operation(
        name=f"{prefix}norms, rotary, SwiGLU, residuals",
        kind="memory",
        forward=Work(bytes=n * size * (9 * w + 4 * q + 3 * f) / t, kernels=5),
        backward=Work(bytes=n * size * (13 * w + 12 * q + 5 * f) / t, kernels=7),
    )
    return [
        _linear(f"{prefix}qkv", n, w, (q + 2 * keys) / t, size),
        attention,
        _linear(f"{prefix}attention output", n, q / t, w, size),
        _linear(f"{prefix}gate and up", n, w, 2 * f / t, size),
        _linear(f"{prefix}down", n, f / t, w, size),
        elementwise,
    ]


def _linear(name: str, rows: float, k: float, m: float, size: int, input_gradient: bool = True) -> Operation:
    """A product of ``rows`` inputs of width k to width m; the backward has two, or one without the input's."""
    moved = size * (rows * (k + m) + k * m)
    products = 1 + input_gradient
    return Operation(
        name=name,
        kind="matmul",
        forward=Work(flops=2 * rows * k * m, bytes=moved, kernels=1),
        backward=Work(flops=products * 2 * rows * k * m, bytes=products * moved, kernels=products),
    )


def _head(v: float, w: int, labels: float, positions: float, size: int) -> list[Operation]:
    """The head on labelled rows only, v entries wide; its gradients are computed in the forward, chunk by chunk."""
    chunks = max(1.0, labels * v * size / CHUNK_BYTES)
    weight = v * w
    # The weight's gradient is read and written with every chunk, and only written with the first.
    products = 3 * size * (labels * (v + w) + weight) + (2 * chunks - 1) * FLOAT32 * weight
    return [
        Operation(
            name="head",
            kind="matmul",
            forward=Work(flops=6 * labels * w * v, bytes=products, kernels=3 * chunks),
            backward=Work(),
        ),
        Operation(
            name="final norm, softmax, scaling of the head's gradient",
            kind="memory",
            forward=Work(bytes=size * (2 * positions * w + 3 * labels * v), kernels=1 + chunks),
            backward=Work(bytes=5 * size * positions * w + 2 * FLOAT32 * weight, kernels=3),
        ),
    ]
