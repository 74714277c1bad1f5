"""Triton ops on DTensors over two processes, against one process."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megamm_kernels import add_rms_norm, attention_plan, dispatch, interval_attention, rms_norm, swiglu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WORLD = 2


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


def check_attention(mesh, placement, plan_placement) -> None:
    """Attention with its log-sum-exp, on rows or heads that lie as the placements say."""
    torch.manual_seed(0)
    position = torch.arange(6).expand(2, -1)
    plan = attention_plan(torch.zeros_like(position), position.clamp(min=2), backend="interval")
    leaves = [torch.randn(2, 6, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    shards = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in leaves]
    sharded_plan = type(plan)(*(distribute_tensor(t, mesh, [plan_placement]) for t in plan))
    out, lse = interval_attention(*leaves, plan, return_lse=True)
    got, got_lse = interval_attention(*shards, sharded_plan, return_lse=True)
    assert got.placements == (placement,)
    torch.testing.assert_close(got.full_tensor(), out)
    torch.testing.assert_close(got_lse.full_tensor(), lse)
    grads = torch.autograd.grad(got.sum() + got_lse.sum(), shards)
    for a, b in zip(grads, torch.autograd.grad(out.sum() + lse.sum(), leaves), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)


def run(rank: int, port: int, interpret: bool) -> None:
    import megamm_kernels.sharding  # noqa: F401

    store = dist.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for mode in {False, interpret}:
        dispatch.interpret = mode
        for rows in (Replicate(), Shard(0), Shard(1)):
            check(mesh, rows)
    if interpret:
        for placement, plan_placement in ((Replicate(), Replicate()), (Shard(0), Shard(0)), (Shard(2), Replicate())):
            check_attention(mesh, placement, plan_placement)
    dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one():
    interpret = dispatch.HAS_TRITON and not torch.cuda.is_available()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (port, interpret), nprocs=WORLD)
