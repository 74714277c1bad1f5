"""The whole model on every rank, for what knows of no ranks: generation."""

import torch
import torch.distributed as dist
from torch import nn

from megamm.config import ModelConfig
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.data import gather_whole
from megamm.parallel.mesh import World


@torch.no_grad()
def gather_model(own: nn.Module, config: ModelConfig, world: World) -> MultimodalModel:
    """A model without axes that has the present values, in float32; called by all ranks.

    What a rank has whole is not copied: of one process it takes no memory. Else it takes 4 bytes per parameter.

    Args:
        own: this rank's parameters under the names of the whole model.
        config: of the whole model.
    """
    with torch.device("meta"):
        whole = MultimodalModel(config)
    # Of FSDP's units, too, which give up what they have gathered.
    values, axis = own.state_dict(), world.axis("pipeline")
    holders: dict[str, int] = {}
    for stage, names in world.gather((axis.rank, list(values))):
        for name in names:
            holders.setdefault(name, stage)
    found = {}
    # In the order of the whole model, which all ranks share: every step of the loop is a collective.
    for name, empty in whole.state_dict().items():
        if holders[name] == axis.rank:
            found[name] = gather_whole(values[name]).contiguous()
        else:
            found[name] = torch.empty_like(empty, device=world.device)
        if axis.size > 1:
            dist.broadcast(found[name], group=axis.group, group_src=holders[name])
    whole.load_state_dict(found, assign=True)
    return whole.requires_grad_(False).eval()
