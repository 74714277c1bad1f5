"""Expert parallelism: the experts of a layer spread over ranks, positions sent to where their experts are.

    rows of this rank, sorted by expert
        -> sent to the ranks of their experts      uneven all-to-all; the counts go ahead
        -> sorted by expert among all that came    grouped products on the experts that lie here
        -> sent back, weighted and added

Every position's own rank routes it, so that gates, losses and counts are those of one process. A rank that gets no
rows takes part in every exchange all the same. Under tensor parallelism the hidden units of each expert are shared
out too; what comes back is then a partial sum over the tensor ranks.
"""

from functools import partial

import torch
import torch.distributed as dist
from megamm_kernels import Routing, permute_tokens, sort_by_expert, unpermute_tokens
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megamm.model.experts import MixtureOfExperts
from megamm.parallel.mesh import World

PLACEMENTS = {
    "expert": {"gate_up": Shard(0), "down": Shard(0)},
    "tensor": {"gate_up": Shard(1), "down": Shard(2)},
}
"""What each mesh axis cuts of the experts' weights [E, 2F, W] and [E, W, F]."""


def expert_layers(model: nn.Module) -> list[MixtureOfExperts]:
    """The layers of a model that have a router, in order."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def apply_experts(model: nn.Module, world: World) -> None:
    """Spread the experts of a model on the meta device over the expert and tensor axes, in place.

    Tensor ranks route the same positions, so each accounts for its share of the auxiliary losses. Context ranks hold
    parts of the same rows, so they add up how often each expert was chosen.
    """
    # Pipeline and data ranks need nothing here: their positions are of other layers or rows.
    tensor, context = world.axis("tensor"), world.axis("context")
    for layer in expert_layers(model):
        layer.loss_share = 1 / tensor.size
        if context.size > 1:
            layer.whole_rows = partial(_sum_over, group=context.group)
    if world.expert_mesh is not None:
        spread_experts(model, world.expert_mesh["expert", "tensor"] if tensor.size > 1 else world.expert_mesh["expert"])
    elif tensor.size > 1:
        # Without an expert axis the hidden units alone are shared out.
        spread_experts(model, tensor.mesh)


def spread_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this rank's share of each layer's experts, in place; the parameters become DTensors.

    The gradient of an expert gathers the positions of all ranks of the expert axis. It is divided by their number,
    as if averaged over them, since that is what data parallelism does to all other gradients.

    Args:
        model: on the meta device, or with equal values on all ranks.
        mesh: axes named ``expert``, ``tensor`` or both, in this order.

    Raises:
        ValueError: experts or hidden units cannot be shared out equally.
    """
    for layer in expert_layers(model):
        for name, parameter in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, nn.Parameter(_share(name, parameter, mesh)))
        # The tensor axis needs no division: its ranks hold different hidden units and see the same positions.
        ranks = mesh["expert"].size() if "expert" in mesh.mesh_dim_names else 1
        layer.experts.local = partial(_local, ranks=ranks)
        if ranks > 1:
            # The tensor axis needs no exchange either: each rank has its share of every expert.
            layer.run_experts = partial(run_spread_experts, layer, mesh.get_group("expert"))


def shard_spread_experts(model: nn.Module, world: World, dtype: torch.dtype, reshard_after_forward: bool) -> None:
    """Shard experts that are spread over ranks over those that hold the same ones (FSDP2), in place.

    Comes before the blocks are sharded, which then leave these experts alone.
    """
    if world.expert_mesh is None:
        return
    replicas = world.layout.dp_replicate > 1
    mesh = world.expert_mesh[("dp_replicate", "expert_shard") if replicas else ("expert_shard",)]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    cut = partial(dim_of_shares, num_ranks=world.expert_mesh["expert_shard"].size())
    for layer in expert_layers(model):
        fully_shard(
            layer.experts,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=cut,
            reshard_after_forward=reshard_after_forward,
        )


def dim_of_shares(parameter: torch.Tensor, num_ranks: int) -> Shard | None:
    """The dim along which FSDP shares out the experts of a layer; None, its own choice, for all other parameters.

    By experts where each rank gets as many, otherwise by the next dim where that can be: FSDP cuts unequal shares along
    the first dim alone, and fills them up to the largest.
    """
    num, *rest = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    if len(rest) < 2:
        return None
    return Shard(1 if num % num_ranks and rest[0] % num_ranks == 0 else 0)


def run_spread_experts(
    layer: MixtureOfExperts,
    group: dist.ProcessGroup,
    x_nw: torch.Tensor,
    experts: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    """``MixtureOfExperts.run_experts`` where the experts are spread over the ranks of ``group``.

    The host waits for the counts once: it must know how many rows come.
    """
    ranks, num = dist.get_world_size(group), layer.config.num
    # By expert is also by rank, as each rank holds a run of experts: what goes to one rank lies together.
    routing = sort_by_expert(experts, num)
    # [ranks, experts of each]: of this rank's copies how many go where; afterwards, who sends how many to each expert
    # here.
    counts = routing.offsets.diff(prepend=routing.offsets.new_zeros(1)).view(ranks, -1)
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts, group=group)
    # Uneven transfers take their sizes from the host: one wait for both.
    sent, received = torch.stack((counts.sum(1), incoming.sum(1))).tolist()
    x_rw = _Exchange.apply(permute_tokens(x_nw, routing), received, sent, group)
    each = num // ranks
    # What came is sorted by sender, and by expert within each; the grouped products want it by expert alone.
    owners = torch.arange(each, device=x_nw.device).repeat(ranks)
    # The size is known on the host by now; without it repeat_interleave would wait for the device again.
    owners = owners.repeat_interleave(incoming.flatten(), output_size=sum(received))
    by_expert = sort_by_expert(owners[:, None], each)
    y_rw = layer.experts(permute_tokens(x_rw, by_expert), by_expert.offsets)
    # Back in the order of arrival, so that every row returns to the place it was sent from.
    y_mw = _Exchange.apply(permute_tokens(y_rw, _inverse(by_expert)), sent, received, group)
    return unpermute_tokens(y_mw, gates, routing)


def _inverse(routing: Routing) -> Routing:
    """Back to where rows came from; of a routing with one expert per row."""
    return routing._replace(order=routing.places.flatten(), places=routing.order[:, None])


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: ``sent[r]`` of them, in order, to rank r, and ``received[r]`` from it."""

    @staticmethod
    def forward(ctx, x, received, sent, group):
        ctx.splits, ctx.group = (received, sent), group
        return _exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx, grad):
        received, sent = ctx.splits
        # Every rank gets here, also one without rows: its empty gradients keep the others from waiting.
        return _exchange(grad, sent, received, ctx.group), None, None, None


def _exchange(x: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def _share(name: str, parameter: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    placements = [PLACEMENTS[axis][name] for axis in mesh.mesh_dim_names]
    local = parameter.detach()
    for axis, placement in enumerate(placements):
        whole, size = parameter.shape[placement.dim], mesh.size(axis)
        # Rows of gate and up come in pairs, one for each hidden unit, and a pair must not be parted.
        pairs = 2 if (name, placement.dim) == ("gate_up", 1) else 1
        if whole // pairs % size:
            what = "experts" if placement.dim == 0 else "hidden units of an expert"
            raise ValueError(f"{mesh.mesh_dim_names[axis]}: {size} ranks cannot share {whole // pairs} {what} equally")
        local = local.narrow(placement.dim, mesh.get_local_rank(axis) * (whole // size), whole // size)
    # A clone and the strides of the whole: with one expert a rank the cut's own strides look contiguous and are not.
    local = local.clone(memory_format=torch.contiguous_format)
    shape, stride = parameter.shape, parameter.stride()
    # The check would be a collective, over values that the meta device does not have.
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _local(parameter: torch.Tensor, ranks: int) -> torch.Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return _DivideGradient.apply(local, ranks) if ranks > 1 else local


def _sum_over(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    dist.all_reduce(counts, group=group)
    return counts


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, divisor):
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.divisor, None
