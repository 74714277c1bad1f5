"""Collectives that gradients pass through, over one axis of the mesh. Each is the transpose of another."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.autograd.function import once_differentiable


def gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' parts, end to end along ``dim``; the gradient is summed over ranks and each takes its part."""
    return _WithTranspose.apply(x, _gathered, _scattered, (dim, group))


def scatter_sum(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks, of which each keeps its part along ``dim``; the gradient is gathered."""
    return _WithTranspose.apply(x, _scattered, _gathered, (dim, group))


def gather_shared(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """As :func:`gather`, where what follows is the same on all ranks: each takes its part of the one gradient."""
    return _WithTranspose.apply(x, _gathered, _own_part, (dim, group))


def shift(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What the rank before has (the first: what the last has); the gradient goes back the same way."""
    return _WithTranspose.apply(x, _from_before, _from_behind, (group,))


# Which gradient is right is not a matter of the collective alone: ranks that go on differently each know a part of it,
# to be summed; ranks that all go on alike each know the whole.
class _WithTranspose(torch.autograd.Function):
    """A linear operation over ranks, whose gradient passes through its transpose."""

    @staticmethod
    def forward(ctx, x, operation, transpose, arguments):
        ctx.transpose, ctx.arguments = transpose, arguments
        return operation(x, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.transpose(grad, *ctx.arguments), None, None, None


def _gathered(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    # Functional collectives, since blocks may be compiled. They return before they are done, so each is waited for.
    return functional.wait_tensor(functional.all_gather_tensor(x.contiguous(), dim, group)).contiguous()


def _scattered(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    return functional.wait_tensor(functional.reduce_scatter_tensor(x.contiguous(), "sum", dim, group)).contiguous()


def _own_part(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    # No collective: the gradient is already the same on all ranks.
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _from_before(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return _sent(x, group, 1)


def _from_behind(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return _sent(x, group, -1)


def _sent(x: torch.Tensor, group: dist.ProcessGroup, step: int) -> torch.Tensor:
    """Send ``x`` to the rank ``step`` further on; returns what comes in."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Transfers name ranks by their global number, also within a group.
    to, source = (dist.get_global_rank(group, (rank + s) % size) for s in (step, -step))
    # As one batch: if every rank sent first and then received, all could wait for each other.
    work = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x.contiguous(), to, group), dist.P2POp(dist.irecv, received, source, group)]
    )
    for request in work:
        request.wait()
    return received
