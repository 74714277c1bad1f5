"""AdamW whose moments lie in the host's memory, where its step runs too."""

from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from megamm.parallel.data import share_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW for models whose parameters and gradients fit a device but whose optimizer state does not.

    A step moves 12 bytes per parameter over the bus (weight and gradient to the host, weight back) instead of keeping 8
    on the device. Where the parameters are in the host's memory anyway, it is AdamW, bit by bit.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # One at a time, so that the host never holds a second copy of the model.
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, device="cpu")
        local = share_of(parameter)[0]
        weight, gradient = local.cpu(), share_of(parameter.grad)[0].cpu()
        means, squares = (share_of(state[name])[0] for name in MOMENTS)
        adamw(
            [weight],
            [gradient],
            [means],
            [squares],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if weight is not local:  # on a CPU they are one tensor
            local.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch has moved it to where the parameters are
            for name, value in state.items():
                state[name] = value.cpu()
