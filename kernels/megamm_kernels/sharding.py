"""How the ops act on DTensors.

What may be sharded without communication:

- norms and SwiGLU: any dimension but the last (sequence parallelism, for one, shards the residual stream over
  positions);
- attention: rows, the plan with them, or heads, the plan replicated;
- QK-norm and RoPE: rows or positions, cos and sin with them;
- multimodal embedding: the width of table, features and projection, or the positions of a batch without images;
- experts: the outputs or the inputs of each expert's matrix, the width of tokens; copies may be partial sums;
- linear cross entropy: rows, or the head's vocabulary.

Anything else is redistributed to the nearest of these. Weights of norms are replicated. A weight's gradient comes back
as a partial sum of each rank where rows are sharded, as that of any layer in front of a reduction does.

Not expressible, so gathered first:

- heads of the joint queries and keys: an equal slice of them holds unequal shares of the two;
- rows and positions of a batch with images, and tokens of experts: their indices count over the whole batch;
- experts: the place of a rank's rows depends on how many tokens the experts before it got;
- the vocabulary of an embedding table: the kernels do not skip the rows of other ranks.

Importing this module registers the rules with torch.distributed. The plain-torch paths of norms, SwiGLU and QK-norm
need none.
"""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from megamm_kernels import dispatch
from megamm_kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy


def _row_placements(ndim: int) -> list:
    """Placements that keep rows whole."""
    return [Replicate(), *(Shard(dim) for dim in range(ndim - 1))]


def _summed(rows) -> Replicate | Partial:
    """What a sum over rows with this placement is."""
    return Replicate() if rows.is_replicate() else Partial()


def rms_norm_rule(x, weight, eps):
    """(out, scale) <- (x, weight, eps)."""
    return [([p, p], [p, Replicate(), None]) for p in _row_placements(x.ndim)]


def add_rms_norm_rule(x, residual, weight, eps):
    """(out, new residual, scale) <- (x, residual, weight, eps)."""
    return [([p, p, p], [p, p, Replicate(), None]) for p in _row_placements(x.ndim)]


def rms_norm_backward_rule(grad, grad_total, x, weight, scale):
    """(grad_x, grad_weight) <- (grad, grad_total or None, x, weight, scale)."""
    return [
        ([p, _summed(p)], [p, None if grad_total is None else p, p, Replicate(), p]) for p in _row_placements(x.ndim)
    ]


def swiglu_rule(gate_up):
    """out <- gate_up."""
    return [([p], [p]) for p in _row_placements(gate_up.ndim)]


def swiglu_backward_rule(grad, gate_up):
    """grad_gate_up <- (grad, gate_up)."""
    return [([p], [p, p]) for p in _row_placements(gate_up.ndim)]


def _attention_placements(k) -> list[tuple]:
    """Placements of [B, S, H, D], of [B, H, S] and of the intervals that go together."""
    found = [(Replicate(), Replicate(), Replicate()), (Shard(0), Shard(0), Shard(0))]
    if k.shape[2] % k.mesh.size() == 0:  # query heads stay with the key head that serves them
        found.append((Shard(2), Shard(1), Replicate()))
    return found


def interval_attention_rule(q, k, v, *plan):
    """(out, lse) <- (q, k, v, lo, hi, query_lo, query_hi)."""
    return [([x, stat], [x] * 3 + [interval] * 4) for x, stat, interval in _attention_placements(k)]


def interval_attention_backward_rule(grad, grad_lse, q, k, *others):
    """(grad_q, grad_k, grad_v) <- (grad, grad_lse or None, q, k, v, out, lse, lo, hi, query_lo, query_hi)."""
    return [
        ([x] * 3, [x, None if grad_lse is None else stat] + [x] * 4 + [stat] + [interval] * 4)
        for x, stat, interval in _attention_placements(k)
    ]


def _sequence_placements(qk, cos, sin) -> list[tuple]:
    """Placements of [B, L, ...], of cos and of sin that go together.

    None over heads: equal slices of the joint heads are not equal shares of the queries and of the keys.
    """
    found = [(Replicate(), Replicate(), Replicate()), (Shard(1), Shard(1), Shard(1))]
    if qk.shape[0] > 1:
        found.append((Shard(0), *(Replicate() if table.shape[0] == 1 else Shard(0) for table in (cos, sin))))
    return found


def qk_norm_rope_rule(qk, weight, cos, sin, eps, query_heads):
    """(q, k, scale) <- (qk, weight, cos, sin, eps, query_heads)."""
    return [([p] * 3, [p, Replicate(), c, s, None, None]) for p, c, s in _sequence_placements(qk, cos, sin)]


def qk_norm_rope_backward_rule(grad_q, grad_k, qk, weight, cos, sin, scale):
    """(grad_qk, grad_weight) <- (grad_q, grad_k, qk, weight, cos, sin, scale)."""
    return [([p, _summed(p)], [p, p, p, Replicate(), c, s, p]) for p, c, s in _sequence_placements(qk, cos, sin)]


def multimodal_embedding_rule(tokens, table, features, feature_index, dtype):
    """(out, slot) <- (tokens, table, features or None, feature_index or None, dtype)."""
    whole = Replicate()
    if features is None:
        positions = [([p, p], [p, whole, None, None, None]) for p in (whole, Shard(0), Shard(1))]
        return [*positions, ([Shard(2), whole], [whole, Shard(1), None, None, None])]
    return [([out, whole], [whole, width, width, whole, None]) for out, width in ((whole, whole), (Shard(2), Shard(1)))]


def place_features_rule(x, features, index):
    """out <- (x, features, index)."""
    return [([Replicate()], [Replicate()] * 3), ([Shard(2)], [Shard(2), Shard(1), Replicate()])]


def multimodal_patch_embedding_rule(tokens, table, patches, projection, patch_index, dtype):
    """(out, slot) <- (tokens, table, patches, projection, patch_index, dtype)."""
    whole = Replicate()
    return [
        ([whole, whole], [whole, whole, whole, whole, whole, None]),
        ([Shard(2), whole], [whole, Shard(1), whole, Shard(0), whole, None]),
    ]


def embedding_table_backward_rule(grad, tokens, slot, vocabulary, dtype):
    """grad_table <- (grad, tokens, slot, vocabulary, dtype)."""
    positions = [([_summed(p)], [p, p, p, None, None]) for p in (Replicate(), Shard(0), Shard(1))]
    return [*positions, ([Shard(1)], [Shard(2), Replicate(), Replicate(), None, None])]


def patch_projection_backward_rule(grad, patches, projection, patch_index):
    """grad_projection <- (grad, patches, projection, patch_index)."""
    whole = Replicate()
    return [([whole], [whole] * 4), ([Shard(0)], [Shard(2), whole, Shard(0), whole])]


def sort_by_expert_rule(experts, num_experts):
    """(order, places, offsets) <- (experts, num_experts)."""
    return [([Replicate()] * 3, [Replicate(), None])]


def gather_copies_rule(x, order, places):
    """out <- (x, order, places)."""
    return [([p], [p, Replicate(), Replicate()]) for p in (Replicate(), Shard(1), Partial())]


def sum_copies_rule(y, places, order, weights):
    """out <- (y, places, order, weights or None)."""
    rest = [Replicate(), Replicate(), None if weights is None else Replicate()]
    return [([p], [p, *rest]) for p in (Replicate(), Shard(1), Partial())]


def sum_copies_backward_rule(grad, y, weights, order):
    """(grad_y, grad_weights) <- (grad, y, weights, order); the latter is a product of ``grad`` and ``y``."""
    whole = Replicate()
    return [
        ([whole, whole], [whole, whole, whole, whole]),
        ([Shard(1), Partial()], [Shard(1), Shard(1), whole, whole]),
        ([whole, Partial()], [whole, Partial(), whole, whole]),
        ([Partial(), Partial()], [Partial(), whole, whole, whole]),
    ]


def grouped_linear_rule(x, weight, offsets):
    """out <- (x, weight, offsets); each expert's matrix may be sharded over its outputs or over its inputs."""
    whole = Replicate()
    return [
        ([whole], [whole, whole, whole]),
        ([Shard(1)], [whole, Shard(1), whole]),
        ([Partial()], [Shard(1), Shard(2), whole]),
    ]


def grouped_linear_backward_rule(grad, x, weight, offsets):
    """(grad_x, grad_weight) <- (grad, x, weight, offsets)."""
    whole = Replicate()
    return [
        ([whole, whole], [whole, whole, whole, whole]),
        ([Partial(), Shard(1)], [Shard(1), whole, Shard(1), whole]),
        ([Shard(1), Shard(2)], [whole, Shard(1), Shard(2), whole]),
    ]


def linear_cross_entropy_of_shards(
    x: DTensor,
    weight: DTensor,
    targets: DTensor,
    label_index: DTensor | None = None,
    group: DTensor | None = None,
    **options,
) -> LinearCrossEntropyOutput:
    """What ``linear_cross_entropy`` does with DTensors.

    A rule cannot say it: local shards need to know their process group, and row numbers count from the first row.
    """
    mesh = weight.device_mesh
    vocab_dim = _vocabulary_dimension(weight)
    head = [Shard(0) if dim == vocab_dim else Replicate() for dim in range(mesh.ndim)]
    rows = [Shard(0) if p == Shard(0) and dim != vocab_dim else Replicate() for dim, p in enumerate(x.placements)]
    partial = [_summed(p) for p in rows]
    if Shard(0) in rows:
        label_index = None
    if vocab_dim is not None:
        process_group, size = mesh.get_group(vocab_dim), weight.shape[0]
        start = mesh.get_local_rank(vocab_dim) * -(-size // mesh.size(vocab_dim))
        options |= {"process_group": process_group, "vocab_start": start, "vocab_size": size}

    def local(t, placements, grad_placements=None):
        return None if t is None else t.redistribute(mesh, placements).to_local(grad_placements=grad_placements)

    out = linear_cross_entropy(
        local(x, rows, rows),
        local(weight, head, [Partial() if p.is_shard() else q for p, q in zip(rows, head, strict=True)]),
        local(targets, rows),
        local(label_index, [Replicate()] * mesh.ndim),
        local(group, rows),
        **options,
    )
    return LinearCrossEntropyOutput(*(DTensor.from_local(t, mesh, partial, run_check=False) for t in out))


def _vocabulary_dimension(weight: DTensor) -> int | None:
    """The innermost mesh dimension that shards the rows of a head, unless it leaves a rank without any."""
    for dim in reversed(range(weight.device_mesh.ndim)):
        ranks = weight.device_mesh.size(dim)
        if weight.placements[dim] == Shard(0) and -(-weight.shape[0] // ranks) * (ranks - 1) < weight.shape[0]:
            return dim
    return None


_RULES = {
    "place_features": place_features_rule,
    "sort_by_expert": sort_by_expert_rule,
    "gather_copies": gather_copies_rule,
    "sum_copies": sum_copies_rule,
    "sum_copies_backward": sum_copies_backward_rule,
    "grouped_linear": grouped_linear_rule,
    "grouped_linear_backward": grouped_linear_backward_rule,
}
if dispatch.HAS_TRITON:
    _RULES |= {
        "rms_norm_gpu": rms_norm_rule,
        "add_rms_norm_gpu": add_rms_norm_rule,
        "rms_norm_backward_gpu": rms_norm_backward_rule,
        "swiglu_gpu": swiglu_rule,
        "swiglu_backward_gpu": swiglu_backward_rule,
        "interval_attention_gpu": interval_attention_rule,
        "interval_attention_backward_gpu": interval_attention_backward_rule,
        "qk_norm_rope_gpu": qk_norm_rope_rule,
        "qk_norm_rope_backward_gpu": qk_norm_rope_backward_rule,
        "multimodal_embedding_gpu": multimodal_embedding_rule,
        "multimodal_patch_embedding_gpu": multimodal_patch_embedding_rule,
        "embedding_table_backward_gpu": embedding_table_backward_rule,
        "patch_projection_backward_gpu": patch_projection_backward_rule,
    }
for _name, _rule in _RULES.items():
    register_sharding(getattr(torch.ops.megamm, _name).default)(_rule)
