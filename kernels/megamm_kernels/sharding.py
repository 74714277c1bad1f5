"""How the Triton ops act on DTensors.

Norms and SwiGLU may be replicated, or sharded over any dimension but the last (sequence parallelism, for one, shards
the residual stream over positions). A weight must be a replicated DTensor; its gradient comes back as a partial sum of
each rank, as that of any layer in front of a reduction does. Attention may be sharded over rows, its plan too, or over
heads, its plan replicated.

Importing this module registers the rules with torch.distributed. The plain-torch paths of norms and SwiGLU need none.
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


if dispatch.HAS_TRITON:
    for _op, _rule in (
        (torch.ops.megamm.rms_norm_gpu, rms_norm_rule),
        (torch.ops.megamm.add_rms_norm_gpu, add_rms_norm_rule),
        (torch.ops.megamm.rms_norm_backward_gpu, rms_norm_backward_rule),
        (torch.ops.megamm.swiglu_gpu, swiglu_rule),
        (torch.ops.megamm.swiglu_backward_gpu, swiglu_backward_rule),
        (torch.ops.megamm.interval_attention_gpu, interval_attention_rule),
        (torch.ops.megamm.interval_attention_backward_gpu, interval_attention_backward_rule),
    ):
        register_sharding(_op.default)(_rule)
