"""How the ops act on DTensors.

What may be sharded without communication:

- norms: any dimension but the last (sequence parallelism, for one, shards the residual stream over positions);
- SwiGLU: any dimension, the last by equal numbers of pairs; the product before it: rows, or pairs of the weight;
- attention: rows, the mask with them, or heads, the mask replicated;
- QK-norm and RoPE: rows or positions, cos and sin with them, or groups of heads;
- multimodal embedding: the width of table, features and projection, or the positions of a batch without images;
- experts: the outputs or the inputs of each expert's matrix, the width of tokens; copies may be partial sums;
- linear cross entropy: rows, or the head's vocabulary (head_shards.py: local shards need to know their process group,
  which a rule cannot say).

Anything else is redistributed to the nearest of these, except that plain torch refuses pairs of gate and up that are
sharded unevenly. Weights of norms are replicated. A weight's gradient comes back as a partial sum of each rank where
rows are sharded, as that of any layer in front of a reduction does.

Not expressible, so gathered first:

- rows and positions of a batch with images, and tokens of experts: their indices count over the whole batch;
- experts: the place of a rank's rows depends on how many tokens the experts before it got;
- the vocabulary of an embedding table: the kernels do not skip the rows of other ranks.

Importing this module registers the rules with torch.distributed. The plain-torch paths of norms, SwiGLU and QK-norm
need none.
"""

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from megamm_kernels import dispatch


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


def _pair_placements(gate_up) -> list:
    """Placements of [..., 2 * hidden] that keep gate and up of an entry together."""
    # DTensor cuts 2 * hidden inputs and hidden outputs each for itself: both cuts match only where parts are equal.
    hidden = gate_up.shape[-1] // 2
    return _row_placements(gate_up.ndim) + [Shard(gate_up.ndim - 1)] * (hidden % gate_up.mesh.size() == 0)


def swiglu_rule(gate_up):
    """out <- gate_up."""
    return [([p], [p]) for p in _pair_placements(gate_up)]


def swiglu_backward_rule(grad, gate_up):
    """grad_gate_up <- (grad, gate_up)."""
    return [([p], [p, p]) for p in _pair_placements(gate_up)]


def _attention_placements(k) -> list[tuple]:
    """Placements of [B, S, H, D], of [B, H, S] and of the intervals that go together."""
    found = [(Replicate(), Replicate(), Replicate()), (Shard(0), Shard(0), Shard(0))]
    if k.shape[2] % k.mesh.size() == 0:  # query heads stay with the key head that serves them
        found.append((Shard(2), Shard(1), Replicate()))
    return found


def interval_attention_rule(q, k, v, *mask):
    """(out, lse) <- (q, k, v, lo, hi, query_lo, query_hi)."""
    return [([x, stat], [x] * 3 + [interval] * 4) for x, stat, interval in _attention_placements(k)]


def interval_attention_backward_rule(grad, grad_lse, q, k, *others):
    """(grad_q, grad_k, grad_v) <- (grad, grad_lse or None, q, k, v, out, lse, lo, hi, query_lo, query_hi)."""
    return [
        ([x] * 3, [x, None if grad_lse is None else stat] + [x] * 4 + [stat] + [interval] * 4)
        for x, stat, interval in _attention_placements(k)
    ]


def _qkv_placements(qkv, cos, sin) -> list[tuple]:
    """Placements of [B, L, G, ...], of cos and of sin that go together."""
    found: list[tuple] = [(Replicate(), Replicate(), Replicate()), (Shard(1), Shard(1), Shard(1))]
    if qkv.shape[0] > 1:
        found.append((Shard(0), *(Replicate() if table.shape[0] == 1 else Shard(0) for table in (cos, sin))))
    if qkv.shape[2] % qkv.mesh.size() == 0:  # or heads and groups would be cut at different places
        found.append((Shard(2), Replicate(), Replicate()))
    return found


def qk_norm_rope_rule(qkv, weight, cos, sin, eps):
    """(q, k, scale) <- (qkv, weight, cos, sin, eps)."""
    return [([p] * 3, [p, Replicate(), c, s, None]) for p, c, s in _qkv_placements(qkv, cos, sin)]


def qk_norm_rope_backward_rule(grad_q, grad_k, grad_v, qkv, weight, cos, sin, scale):
    """(grad_qkv, grad_weight) <- (grad_q, grad_k, grad_v, qkv, weight, cos, sin, scale)."""
    return [([p, _summed(p)], [p, p, p, p, Replicate(), c, s, p]) for p, c, s in _qkv_placements(qkv, cos, sin)]


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
    # Copying is linear, so copies of partial sums are partial sums of the copies; so with sums of copies, below.
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


_RULES = {
    "place_features": place_features_rule,
    "sort_by_expert": sort_by_expert_rule,
    "gather_copies": gather_copies_rule,
    "sum_copies": sum_copies_rule,
    "sum_copies_backward": sum_copies_backward_rule,
    "grouped_linear": grouped_linear_rule,
    "grouped_linear_backward": grouped_linear_backward_rule,
}
# These are defined by modules that import triton, so without it there is nothing to register.
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
