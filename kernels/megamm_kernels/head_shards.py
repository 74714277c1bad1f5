"""What of a linear cross entropy over DTensors each rank computes on its local tensors."""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def local_arguments(
    x: DTensor, weight: DTensor, targets: DTensor, label_index: DTensor | None, group: DTensor | None
) -> tuple[tuple, dict]:
    """Redistribute the arguments of ``linear_cross_entropy``, all on one mesh, and take the parts that lie here.

    Returns:
        the five local tensors, without ``label_index`` where rows are sharded, since it counts from the first row;
        and what the local head has to know: ``process_group``, ``vocab_start``, ``vocab_size``, if it is a part.
    """
    mesh = weight.device_mesh
    vocab_axis = _vocabulary_axis(weight)
    head = [Shard(0) if axis == vocab_axis else Replicate() for axis in range(mesh.ndim)]
    rows = _row_placements(x, vocab_axis)

    def local(t, placements, grad_placements=None):
        return None if t is None else t.redistribute(mesh, placements).to_local(grad_placements=grad_placements)

    arguments = (
        local(x, rows, rows),
        # Where rows are sharded, a rank's gradient of the head is its own rows' part of the sum.
        local(weight, head, [Partial() if p.is_shard() else q for p, q in zip(rows, head, strict=True)]),
        local(targets, rows),
        # Without it, the rows with a label are searched for among those that lie here.
        None if Shard(0) in rows else local(label_index, [Replicate()] * mesh.ndim),
        local(group, rows),
    )
    if vocab_axis is None:
        return arguments, {}
    # As DTensor shards: every rank but the last has the number of rows, divided by the ranks and rounded up.
    start = mesh.get_local_rank(vocab_axis) * -(-weight.shape[0] // mesh.size(vocab_axis))
    process_group = mesh.get_group(vocab_axis)
    return arguments, {"process_group": process_group, "vocab_start": start, "vocab_size": weight.shape[0]}


def global_results(results: tuple[torch.Tensor, ...], x: DTensor, weight: DTensor) -> list[DTensor]:
    """The local results as DTensors: sums over this rank's rows are partial."""
    rows = _row_placements(x, _vocabulary_axis(weight))
    partial = [Replicate() if p.is_replicate() else Partial() for p in rows]
    return [DTensor.from_local(t, weight.device_mesh, partial, run_check=False) for t in results]


def _row_placements(x: DTensor, vocab_axis: int | None) -> list:
    """Where rows lie during the loss: each axis shards either rows or the vocabulary."""
    return [Shard(0) if p == Shard(0) and axis != vocab_axis else Replicate() for axis, p in enumerate(x.placements)]


def _vocabulary_axis(weight: DTensor) -> int | None:
    """The innermost mesh axis that shards the rows of a head, unless it leaves a rank without any."""
    for axis in reversed(range(weight.device_mesh.ndim)):
        # Parts are rounded up, so the ranks before the last may already take all the rows.
        ranks = weight.device_mesh.size(axis)
        if weight.placements[axis] == Shard(0) and -(-weight.shape[0] // ranks) * (ranks - 1) < weight.shape[0]:
            return axis
    return None
