"""Norms and SwiGLU on DTensors over two processes, against one process."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megamm_kernels import add_rms_norm, dispatch, rms_norm, swiglu
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


def run(rank: int, port: int, interpret: bool) -> None:
    import megamm_kernels.sharding  # noqa: F401

    store = dist.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for mode in {False, interpret}:
        dispatch.interpret = mode
        for rows in (Replicate(), Shard(0), Shard(1)):
            check(mesh, rows)
    dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one():
    interpret = dispatch.HAS_TRITON and not torch.cuda.is_available()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (port, interpret), nprocs=WORLD)
