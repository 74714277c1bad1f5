"""Ops on DTensors over two processes, against one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megamm_kernels import (
    add_rms_norm,
    attention_mask,
    dispatch,
    grouped_experts,
    interval_attention,
    linear_cross_entropy,
    linear_swiglu,
    multimodal_embedding,
    multimodal_patch_embedding,
    qk_norm_rope,
    rms_norm,
    rope_table,
    swiglu,
)
from ranks import free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

WORLD = 2
WHOLE, PARTIAL = Replicate(), Partial()


def layer(x, residual, weight):
    """All three ops in a row, on the stream of a block."""
    normed, residual = add_rms_norm(x, residual, weight, 1e-6)
    return rms_norm(residual, weight, 1e-6) + torch.cat((swiglu(normed), swiglu(residual)), dim=-1)


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.rand(8) + 0.5, torch.randn(2, 6, 8)


def check(mesh, rows) -> None:
    """The layer on tensors whose rows lie as ``rows`` says."""
    *leaves, grad = inputs()
    leaves = [t.requires_grad_() for t in leaves]
    want = layer(*leaves)
    shards = [
        distribute_tensor(t.detach(), mesh, [p]).requires_grad_()
        for t, p in zip(leaves, (rows, rows, Replicate()), strict=True)
    ]
    out = layer(*shards)
    assert out.placements == (rows,)
    torch.testing.assert_close(out.full_tensor(), want)
    grads = torch.autograd.grad(out, shards, distribute_tensor(grad, mesh, [rows]))
    for got, expected in zip(grads, torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(got.full_tensor(), expected)


def check_attention(mesh, placement, mask_placement) -> None:
    """Attention with its log-sum-exp, on rows or heads that lie as the placements say."""
    torch.manual_seed(0)
    position = torch.arange(6).expand(2, -1)
    mask = attention_mask(torch.zeros_like(position), position.clamp(min=2), backend="interval")
    leaves = [torch.randn(2, 6, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    shards = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in leaves]
    sharded_mask = type(mask)(*(distribute_tensor(t, mesh, [mask_placement]) for t in mask))
    out, lse = interval_attention(*leaves, mask, return_lse=True)
    got, got_lse = interval_attention(*shards, sharded_mask, return_lse=True)
    assert got.placements == (placement,)
    torch.testing.assert_close(got.full_tensor(), out)
    torch.testing.assert_close(got_lse.full_tensor(), lse)
    grads = torch.autograd.grad(got.sum() + got_lse.sum(), shards)
    for a, b in zip(grads, torch.autograd.grad(out.sum() + lse.sum(), leaves), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)


def parameter(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def check_op(mesh, op, tensors, placements, expected=None) -> None:
    """Values and gradients of ``op``, whose result (the first of several) lies as ``expected`` says, if it does."""
    shards = [
        distribute_tensor(t.detach(), mesh, [p]).requires_grad_(t.requires_grad)
        for t, p in zip(tensors, placements, strict=True)
    ]
    want, got = op(*tensors), op(*shards)
    assert expected is None or got[0].placements == (expected,), (placements, got[0].placements)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.full_tensor(), b)
    grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for t in want]
    leaves, shards = ([t for t in side if t.requires_grad] for side in (tensors, shards))
    total = sum((t * g).sum() for t, g in zip(want, grads, strict=True))
    sharded = sum((t * distribute_tensor(g, mesh, [WHOLE])).sum() for t, g in zip(got, grads, strict=True))
    wanted = torch.autograd.grad(total, leaves)
    for a, b in zip(torch.autograd.grad(sharded, shards), wanted, strict=True):
        torch.testing.assert_close(a.full_tensor(), b)


def check_qk_norm_rope(mesh) -> None:
    """Rows, positions, groups of heads; entries of heads, which are gathered; tables for all rows or for each."""
    torch.manual_seed(0)
    qkv, weight = parameter(3, 3, 2, 4, 4), parameter(2, 4)

    def op(*args):
        return qk_norm_rope(*args, 1e-6)

    for rows, layouts in (
        (1, ((WHOLE, WHOLE), (Shard(0), WHOLE), (Shard(1), WHOLE), (Shard(2), WHOLE), (Shard(4), WHOLE))),
        (3, ((Shard(0), Shard(0)), (Shard(1), Shard(1)), (Shard(3), WHOLE))),
    ):
        tables = rope_table(torch.arange(3).expand(rows, -1), 4, 100.0)
        for x, table in layouts:
            expected = x if x in (WHOLE, Shard(0), Shard(1), Shard(2)) else None
            check_op(mesh, op, (qkv, weight, *tables), (x, WHOLE, table, table), expected)
    for used in (slice(1), slice(2, 3)):
        check_op(
            mesh,
            lambda *args, used=used: op(*args)[used],
            (qkv, weight, *tables),
            (Shard(0), WHOLE, Shard(0), Shard(0)),
        )


def check_swiglu(mesh) -> None:
    """A feed-forward layer in slices of hidden entries: no gather until its partial sums."""
    torch.manual_seed(0)
    x, gate_up, down = parameter(3, 6), parameter(8, 6), parameter(6, 4)

    def op(x, gate_up, down):
        hidden = linear_swiglu(x, gate_up)
        return hidden @ down.mT, hidden, swiglu(x @ gate_up.mT)

    check_op(mesh, op, (x, gate_up, down), (WHOLE, Shard(0), Shard(1)), PARTIAL)
    sharded = [distribute_tensor(t.detach(), mesh, [p]) for t, p in ((x, WHOLE), (gate_up, Shard(0)), (down, Shard(1)))]
    assert all(t.placements == (Shard(1),) for t in op(*sharded)[1:])
    if dispatch.interpret:  # three pairs for two ranks: gathered; in plain torch an error
        check_op(mesh, lambda t: (swiglu(t),), (parameter(3, 6),), (Shard(1),))


def check_embedding(mesh) -> None:
    """The width of the result, or the positions of text; other placements are gathered."""
    torch.manual_seed(0)
    tokens, table, index = torch.randint(0, 7, (3, 5)), parameter(7, 5), torch.tensor([3, 0, 9])
    features, projection = parameter(3, 5), parameter(5, 6)
    patches = torch.randint(0, 256, (3, 6), dtype=torch.uint8)

    def text(*args):
        return (multimodal_embedding(*args, None, None),)

    def with_features(*args):
        return (multimodal_embedding(*args),)

    def with_patches(*args):
        return (multimodal_patch_embedding(*args),)

    for placement in (WHOLE, Shard(0), Shard(1)):
        check_op(mesh, text, (tokens, table), (placement, WHOLE), placement)
    check_op(mesh, text, (tokens, table), (WHOLE, Shard(1)), Shard(2))
    args = tokens, table, features, index
    check_op(mesh, with_features, args, (WHOLE, WHOLE, WHOLE, WHOLE), WHOLE)
    check_op(mesh, with_features, args, (WHOLE, Shard(1), Shard(1), WHOLE), Shard(2))
    check_op(mesh, with_features, args, (Shard(0), Shard(0), Shard(0), Shard(0)))
    args = tokens, table, patches, projection, index
    check_op(mesh, with_patches, args, (WHOLE, WHOLE, WHOLE, WHOLE, WHOLE), WHOLE)
    check_op(mesh, with_patches, args, (WHOLE, Shard(1), WHOLE, Shard(0), WHOLE), Shard(2))
    check_op(mesh, with_patches, args, (Shard(0), WHOLE, Shard(0), Shard(1), WHOLE))


def check_experts(mesh) -> None:
    """Matrices sharded over outputs, over inputs, and over experts, which are gathered."""
    torch.manual_seed(0)
    experts = torch.tensor([[0, 1], [1, 0], [1, 0]])
    args = parameter(3, 6), experts, parameter(3, 2), parameter(2, 8, 6), parameter(2, 6, 4)

    def op(*args):
        return (grouped_experts(*args),)

    check_op(mesh, op, args, (WHOLE, WHOLE, WHOLE, WHOLE, WHOLE), WHOLE)
    check_op(mesh, op, args, (WHOLE, WHOLE, WHOLE, Shard(1), Shard(1)), Shard(1))
    check_op(mesh, op, args, (Shard(1), WHOLE, WHOLE, Shard(2), Shard(2)), PARTIAL)
    check_op(mesh, op, args, (Shard(0), Shard(0), Shard(0), Shard(0), Shard(0)))


def check_linear_cross_entropy(mesh) -> None:
    """Rows, vocabulary, both at once, and a width that is gathered; with and without ``label_index``."""
    torch.manual_seed(0)
    x, weight, group = parameter(7, 6), parameter(9, 6), torch.randint(0, 3, (7,))
    targets = torch.tensor([3, 0, -100, 8, 5, -1, 8])
    index = (targets >= 0).nonzero().squeeze(1)

    def op(x, weight, targets, group, index=None):
        out = linear_cross_entropy(x, weight, targets, index, group, 3, z_loss=1e-2, chunk_bytes=1)
        return out.loss / out.counts.sum(), out.loss, out.sums, out.z

    def loss(*args):
        return op(*args)[:2]

    for rows, head, expected in (
        (WHOLE, WHOLE, WHOLE),
        (WHOLE, Shard(0), WHOLE),
        (Shard(0), WHOLE, PARTIAL),
        (Shard(0), Shard(0), WHOLE),
        (Shard(1), Shard(1), WHOLE),
    ):
        labels = Shard(0) if rows == Shard(0) else WHOLE
        args, placements = (x, weight, targets, group), (rows, head, labels, WHOLE)
        check_op(mesh, loss, args, placements)
        check_op(mesh, loss, (*args, index), (*placements, WHOLE))
        sharded = [distribute_tensor(t.detach(), mesh, [p]) for t, p in zip(args, placements, strict=True)]
        got, want = op(*sharded), op(*args)
        assert got[1].placements == (expected,)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
    few = parameter(1, 6)  # a rank has no row of the head
    check_op(mesh, loss, (x, few, targets.clamp(max=0), group), (WHOLE, Shard(0), WHOLE, WHOLE))


def run(rank: int, port: int, interpret: bool) -> None:
    import megamm_kernels.sharding  # noqa: F401

    store = dist.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for mode in {False, interpret}:
        dispatch.interpret = mode
        for rows in (Replicate(), Shard(0), Shard(1)):
            check(mesh, rows)
        check_qk_norm_rope(mesh)
        check_swiglu(mesh)
        check_embedding(mesh)
        check_experts(mesh)
        check_linear_cross_entropy(mesh)
    if interpret:
        for placement, mask_placement in ((Replicate(), Replicate()), (Shard(0), Shard(0)), (Shard(2), Replicate())):
            check_attention(mesh, placement, mask_placement)
    dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one():
    interpret = dispatch.HAS_TRITON and not torch.cuda.is_available()
    mp.spawn(run, (free_port(), interpret), nprocs=WORLD)
