"""Where the ranks of one start find each other."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The key-value store that the ranks of this start share, this one's rank, and their number.

    Torchrun's agent lends the ranks its own store, which outlives them: after ``--max-restarts`` has started them
    anew, gloo finds the addresses of dead ranks there and waits for nobody until the timeout. Whether the store is
    lent is decided in the agent (by TORCH_DISABLE_SHARE_RDZV_TCP_STORE, which ``python -m megamm.launch`` sets), too
    early for the ranks to change. On one node they can tell one start from the next by the agent's count of restarts,
    and so keep to keys of their own. Over several nodes the counts differ
    (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        ValueError: torchrun's variables are incomplete.
        RuntimeError: some rank did not come in time.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store, rank, size
    if environment.get("GROUP_WORLD_SIZE", "1") == "1":  # number of nodes
        return dist.PrefixStore(f"start-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, size
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and rank == 0:
        print(
            "warning: --max-restarts over several nodes would hang after a rank has died; start with "
            "python -m megamm.launch in place of torchrun, or export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            file=sys.stderr,
        )
    return store, rank, size
