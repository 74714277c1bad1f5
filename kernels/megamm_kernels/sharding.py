"""How the norms and SwiGLU act on DTensors: replicated, or sharded over any dimension but the last.

Importing this module registers the rules with torch.distributed, for the Triton ops (sequence parallelism, for one,
shards the residual stream over positions). The plain-torch paths need none. A weight must be a replicated DTensor;
its gradient comes back as a partial sum of each rank, as that of any layer in front of a reduction does.
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


if dispatch.HAS_TRITON:
    for _op, _rule in (
        (torch.ops.megamm.rms_norm_gpu, rms_norm_rule),
        (torch.ops.megamm.add_rms_norm_gpu, add_rms_norm_rule),
        (torch.ops.megamm.rms_norm_backward_gpu, rms_norm_backward_rule),
        (torch.ops.megamm.swiglu_gpu, swiglu_rule),
        (torch.ops.megamm.swiglu_backward_gpu, swiglu_backward_rule),
    ):
        register_sharding(_op.default)(_rule)
