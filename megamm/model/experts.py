"""Sparse mixture of experts in place of a feed-forward layer: a learned router, dropless experts.

Shape suffixes: n positions of all rows, k experts of each, m = n * k copies, e experts, w width, f hidden units.

A router gives each position a probability of each expert (softmax, float32), and the position meets the k most
probable ones; their outputs are added, each times its probability. Padding is spread over the experts in turn, so that
it crowds none, with probability 0: it changes neither outputs, gradients, losses nor counts.

Experts are the first dimension of their weights and gate and up of a hidden unit lie side by side, so that a slice of
the experts, or of the hidden units, is a smaller layer.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megamm_kernels import grouped_linear, grouped_linear_swiglu, permute_tokens, sort_by_expert, unpermute_tokens
from torch import nn

from megamm.config import ExpertsConfig, ModelConfig
from megamm.model.context import BlockContext
from megamm.model.layers import Block, FeedForward
from megamm.model.modality import ModalityBlock, ModalityFeedForward
from megamm.model.sizes import decoder_hidden, num_heads


class Router(nn.Module):
    """Logits of the experts, in float32 (float64 for such an input): weights are not rounded either."""

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        # Of a normalised stream: logits of about 1, so that no expert is certain at the start.
        self.initial = {"weight": width**-0.5}
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x_nw: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x_nw.dtype, torch.float32)
        return F.linear(x_nw.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """SwiGLU layers side by side."""

    def __init__(self, num_experts: int, width: int, hidden: int, depth: int):
        super().__init__()
        # As in FeedForward: sums of many layers keep their size.
        self.initial = {"gate_up": width**-0.5, "down": hidden**-0.5 / math.sqrt(2 * depth)}
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        # Spread experts are DTensors, the products want plain tensors: what spreads them replaces this.
        self.local: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter  # what of it lies here

    def forward(self, x_mw: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, [m, W] -> [m, W].

        Args:
            offsets: int32 [E], one past each expert's last row.
        """
        h_mf = grouped_linear_swiglu(x_mw, self.local(self.gate_up), offsets)
        return grouped_linear(h_mf, self.local(self.down), offsets)


class MixtureOfExperts(nn.Module):
    """Router and experts of a block.

    Attributes:
        bias: float32 [E], added to the probabilities for the choice alone; only with ``bias_rate``.
        run_experts: (x [n, W], experts int64 [n, k], gates [n, k]) -> [n, W], the weighted sum of the experts'
            outputs; what spreads experts over ranks replaces it.
        whole_rows: copies of the part of each row that lies here, int64 [B, E] -> those of the whole row; what spreads
            the positions of a row over ranks replaces it.
        loss_share: factor of the auxiliary losses; 1 / the number of ranks that route the same positions.
    """

    bias: torch.Tensor | None

    def __init__(self, config: ExpertsConfig, width: int, depth: int):
        super().__init__()
        self.config = config
        self.router = Router(width, config.num)
        self.experts = Experts(config.num, width, config.hidden, depth)
        self.shared = FeedForward(width, config.shared_hidden, depth) if config.shared_hidden else None
        self.register_buffer("bias", torch.zeros(config.num) if config.bias_rate else None)
        self.run_experts = self.run_all_experts
        self.whole_rows: Callable[[torch.Tensor], torch.Tensor] = lambda copies: copies
        self.loss_share = 1.0

    def forward(self, x_blw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """[B, L, W] -> [B, L, W]; leaves losses and counts in ``context.routed``."""
        x_nw, padding = x_blw.flatten(0, 1), context.is_padding.flatten()
        logits = self.router(x_nw)
        probabilities = logits.softmax(-1)
        experts, gates = self.choose(probabilities, padding)
        out = self.run_experts(x_nw, experts, gates)
        if self.shared is not None:
            out = out + self.shared(x_nw)
        # [B, E, 2], by row: the balance loss is one of rows, which every split of a batch keeps together.
        counts = count_copies(experts, context.is_image, context.is_padding, self.config.num)
        # Counts have no gradient: the balance loss moves the router through its probabilities alone.
        rows = self.whole_rows(counts.sum(-1))
        loss = auxiliary_loss(logits, probabilities, context.is_padding, rows, self.config) * self.loss_share
        context.routed.add(loss, counts.sum(0))
        return out.view(x_blw.shape)

    def choose(self, probabilities: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of each position, int64 [n, k], and their gates [n, k]."""
        k, num = self.config.top_k, self.config.num
        # The choice has no gradient; the router learns through the gates, which are without the bias.
        scores = probabilities.detach() if self.bias is None else probabilities.detach() + self.bias
        experts = scores.topk(k).indices
        gates = probabilities.gather(1, experts)
        if self.config.normalise:
            gates = gates / gates.sum(-1, keepdim=True)
        # One place further for each of the k choices: a position's experts are all different, as topk's are.
        places = torch.arange(experts.shape[0], device=experts.device)[:, None] + torch.arange(k, device=experts.device)
        experts = torch.where(padding[:, None], places % num, experts)
        return experts, gates.masked_fill(padding[:, None], 0.0)

    def run_all_experts(self, x_nw: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """``run_experts`` where all experts lie here."""
        routing = sort_by_expert(experts, self.config.num)
        y_mw = self.experts(permute_tokens(x_nw, routing), routing.offsets)
        return unpermute_tokens(y_mw, gates, routing)

    @torch.no_grad()
    def move_bias(self, counts: torch.Tensor) -> None:
        """Raise the bias of experts with less than an even load, lower the others' (arXiv 2408.15664, algorithm 1).

        Args:
            counts: int64 [E, 2], of all positions of the optimizer step just taken.
        """
        if self.bias is not None:
            load = counts.sum(-1).to(self.bias.dtype)  # both modalities
            # The sign alone: how far the load is off does not matter, so a step is never too large.
            self.bias += self.config.bias_rate * (load.mean() - load).sign()


def count_copies(experts: torch.Tensor, is_image: torch.Tensor, padding: torch.Tensor, num: int) -> torch.Tensor:
    """Copies of each row's text and image positions per expert, padding left out: int64 [B, E, 2].

    Args:
        experts: int64 [n, k].
        is_image, padding: bool [B, S].
    """
    batch, length = is_image.shape
    rows = torch.arange(batch, device=experts.device)[:, None].expand(batch, length).reshape(-1, 1)
    # One scatter into flat cells [B, E, 2]: nothing waits for the device to learn sizes.
    cells = (rows * num + experts) * 2 + is_image.view(-1, 1)
    valid = (~padding).view(-1, 1).long().expand_as(cells)  # padding adds 0
    counts = torch.zeros(batch * num * 2, dtype=torch.int64, device=experts.device)
    return counts.scatter_add_(0, cells.flatten(), valid.flatten()).view(batch, num, 2)


def auxiliary_loss(
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    padding: torch.Tensor,
    row_copies: torch.Tensor,
    config: ExpertsConfig,
) -> torch.Tensor:
    """Weighted sum over positions of the balance loss and the z-loss of a layer; a scalar.

    Balance: of a row with T positions, E * sum_e f_e P_e (arXiv 2101.03961, eq. 4; by row: arXiv 2412.19437, eq. 17),
    where f_e is the share of the row's copies that go to e, and P_e the mean probability of e over the row. A row
    weighs T, so that all is a sum over positions of E * sum_e f_e p_e: neither what other rows hold nor how rows are
    split matters. Router z-loss: log-sum-exp of the logits, squared (arXiv 2202.08906, eq. 5).

    Args:
        logits, probabilities: [n, E].
        padding: bool [B, S]; these positions count as nothing.
        row_copies: int64 [B, E], copies of each whole row per expert.
    """
    valid = (~padding).to(logits.dtype)[..., None]
    row_copies = row_copies.to(logits.dtype)
    shares = row_copies / row_copies.sum(-1, keepdim=True).clamp(min=1)  # a row of padding has no copies
    # Sums and not means over the row, which weighs it by its length.
    sums = (probabilities.unflatten(0, padding.shape) * valid).sum(1)
    balance = config.num * (shares * sums).sum()
    z = (logits.logsumexp(-1).square() * valid.flatten()).sum()
    return config.balance_weight * balance + config.z_weight * z


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # In the loss's own dtype: the stream, and so its gradient, may be bfloat16.
        return grad, grad.new_ones((), dtype=ctx.dtype)


def attach_loss(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """``x``; in its backward ``loss`` (a scalar) gets the gradient 1, as if added to what x leads to.

    For the stages of a pipeline that have no loss of their own.
    """
    return _Attach.apply(x, loss)


def make_block(config: ModelConfig) -> Block | ModalityBlock:
    """A block of the decoder, from a resolved config."""
    width, depth = config.width, config.depth
    hidden = decoder_hidden(config)
    sizes = width, config.head_dim, config.key_heads, depth, config.norm_eps
    options = {"heads": num_heads(config), "qk_norm": config.qk_norm, "qkv_bias": config.qkv_bias}
    if config.experts.num:
        return Block(*sizes, MixtureOfExperts(config.experts, width, depth), **options)
    if config.per_modality == "feed_forward":
        return Block(*sizes, ModalityFeedForward(width, hidden, depth), **options)
    if config.per_modality == "block":
        return ModalityBlock(*(Block(*sizes, FeedForward(width, hidden, depth), **options) for _ in range(2)))
    return Block(*sizes, FeedForward(width, hidden, depth), **options)
