"""Dropless mixture of experts: tokens sorted by expert, one grouped matrix product over all experts, and back.

    routing = sort_by_expert(experts, num_experts)
    h = grouped_linear_swiglu(permute_tokens(x, routing), gate_up, routing.offsets)
    out = unpermute_tokens(grouped_linear(h, down, routing.offsets), probabilities, routing)

Every expert takes exactly the tokens routed to it (MegaBlocks, arXiv 2211.15841): none is dropped, none padded, and the
host never learns how many there are. A token's k copies are added in a fixed order, forward and backward, so two
runs agree bitwise.

On NVIDIA GPUs of compute capability 9.x and 10.x bfloat16 products go to torch's grouped GEMM (CUTLASS); all others,
which torch would loop over after waiting for the device, to our Triton kernel. Shapes: n tokens, k experts per token,
E experts, m = n * k copies.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from megamm_kernels import dispatch
from megamm_kernels.swiglu import linear_swiglu_reference, swiglu

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu import grouped_experts as gpu


class Routing(NamedTuple):
    """Where each copy of a token goes.

    Attributes:
        order: int64 [m], copy t * k + j (token t, its j-th expert) at each place of the sorted rows.
        places: int64 [n, k], the place of each copy: the inverse of ``order``.
        offsets: int32 [E], one past each expert's last place.
    """

    order: torch.Tensor
    places: torch.Tensor
    offsets: torch.Tensor


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> Routing:
    """Sort copies by expert, those of one expert by token; nothing waits for the device.

    Args:
        experts: integers [n, k] in [0, num_experts), the experts of each token.
        num_experts: E.
    """
    return Routing(*_sort_by_expert(experts, num_experts))


def permute_tokens(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Copy each token to its experts' rows: [n, W] -> [m, W]."""
    return _gather_copies(x, routing.order, routing.places)


def unpermute_tokens(y: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Weighted sum of each token's k outputs, added in float32.

    Args:
        y: [m, W], rows in the order of ``permute_tokens``.
        weights: [n, k], of any float dtype; gets a gradient.

    Returns:
        [n, W], dtype of ``y``.
    """
    return _sum_copies(y, routing.places, routing.order, weights)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x[rows of e] @ weight[e]^T for each expert e.

    Args:
        x: [m, K], rows sorted by expert.
        weight: [E, N, K]; cast to the dtype of ``x``.
        offsets: int32 [E], one past each expert's last row; the last one is m. Equal neighbours: no rows.

    Returns:
        [m, N], dtype of ``x``. float64 on a GPU loops over the experts and waits for the device.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, offsets))
        raise ValueError(f"x [m, K], weight [E, N, K] and offsets [E] do not fit: {shapes}")
    # Cast outside of the op: autograd then casts the gradient back to the weight's own dtype.
    return _grouped_linear(x, weight.to(x.dtype), offsets)


def grouped_linear_swiglu(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """swiglu(x[rows of e] @ weight[e]^T) for each expert e; on the CPU two products, as in ``linear_swiglu``.

    Args:
        x: [m, W], rows sorted by expert.
        weight: [E, 2 * hidden, W], of each expert rows of gate, up, gate, up and so on; cast to the dtype of ``x``.
        offsets: as in :func:`grouped_linear`.

    Returns:
        [m, hidden], dtype of ``x``.

    Raises:
        ValueError: shapes do not fit.
    """
    if weight.dim() == 3 and weight.shape[1] % 2:
        raise ValueError(f"weight is {list(weight.shape)}: want [E, 2 * hidden, W]")
    # A weight that is no stack of matrices goes on to grouped_linear, which refuses it. In 16 bits two products would
    # give a gradient of x that is the sum of two rounded ones.
    if weight.dim() != 3 or dispatch.use_triton(x) or x.dtype.itemsize < 4:
        return swiglu(grouped_linear(x, weight, offsets))
    gate, up = weight.unflatten(1, (-1, 2)).unbind(2)
    return F.silu(grouped_linear(x, gate, offsets)) * grouped_linear(x, up, offsets)


def grouped_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """SwiGLU experts: the weighted sum over a token's experts of down_e(swiglu(gate_up_e(x))).

    Args:
        x: [n, W].
        experts: integers [n, k] in [0, E).
        weights: [n, k].
        gate_up: [E, 2 * hidden, W], of each expert rows of gate, up, gate, up and so on.
        down: [E, W, hidden].
    """
    routing = sort_by_expert(experts, gate_up.shape[0])
    h = grouped_linear_swiglu(permute_tokens(x, routing), gate_up, routing.offsets)
    return unpermute_tokens(grouped_linear(h, down, routing.offsets), weights, routing)


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The definition, a loop over experts."""
    ends = offsets.tolist()
    parts = [x[a:b] @ w.T for a, b, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat(parts)


def grouped_experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The definition, a loop over experts."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, choice = (experts == e).nonzero(as_tuple=True)
        y = linear_swiglu_reference(x[token], gate_up[e]) @ down[e].T
        out = out.index_add(0, token, y * weights[token, choice, None].to(y.dtype))
    return out


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- copies of tokens -----------------------------------------------------------------------------------


@torch.library.custom_op("megamm::sort_by_expert", mutates_args=())
def _sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Stable, so that two runs put equal experts in the same order. int32, as the ids below: searchsorted takes one
    # dtype.
    sorted_experts, order = experts.flatten().int().sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    ids = torch.arange(num_experts, dtype=torch.int32, device=order.device)
    # Not bincount, which on a GPU reads the largest value back and so waits for the device.
    offsets = torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)
    return order, places.view(experts.shape), offsets


@_sort_by_expert.register_fake
def _(experts, num_experts):
    order = experts.new_empty(experts.numel(), dtype=torch.int64)
    return order, order.new_empty(experts.shape), order.new_empty(num_experts, dtype=torch.int32)


@torch.library.custom_op("megamm::gather_copies", mutates_args=())
def _gather_copies(x: torch.Tensor, order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if dispatch.use_triton(x):
        return gpu.gather_copies(x, order, places.shape[1])
    return x.index_select(0, order // places.shape[1])


@_gather_copies.register_fake
def _(x, order, places):
    return x.new_empty(order.shape[0], x.shape[1])


@torch.library.custom_op("megamm::sum_copies", mutates_args=())
def _sum_copies(
    y: torch.Tensor, places: torch.Tensor, order: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    # ``order`` is not read here: the backward needs it, and an op saves what it was given.
    if dispatch.use_triton(y):
        return gpu.sum_copies(y, places, weights)
    wide = _wide(y.dtype)
    copies = y.index_select(0, places.flatten()).view(*places.shape, y.shape[1])
    if weights is None:
        return copies.sum(1, dtype=wide).to(y.dtype)
    # [n, 1, k] @ [n, k, W]
    return (weights.to(wide)[:, None] @ copies.to(wide)).squeeze(1).to(y.dtype)


@_sum_copies.register_fake
def _(y, places, order, weights):
    return y.new_empty(places.shape[0], y.shape[1])


@torch.library.custom_op("megamm::sum_copies_backward", mutates_args=())
def _sum_copies_backward(
    grad: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if dispatch.use_triton(y):
        return gpu.sum_copies_backward(grad, y, weights, order)
    wide, k = _wide(y.dtype), weights.shape[1]
    # A tensor of its own, so that it can be scaled in place, after the dot products have read it.
    rows = grad.index_select(0, order // k).to(wide)
    dots = torch.linalg.vecdot(rows, y.to(wide)).to(weights.dtype)
    grad_y = rows.mul_(weights.flatten()[order, None]).to(y.dtype)
    return grad_y, torch.empty_like(dots).scatter_(0, order, dots).view(weights.shape)


@_sum_copies_backward.register_fake
def _(grad, y, weights, order):
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _gather_copies_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gather_copies_backward(ctx, grad):
    order, places = ctx.saved_tensors
    # A copy's gradient goes back to its token: the other op, without weights.
    return _sum_copies(grad, places, order, None), None, None


def _sum_copies_context(ctx, inputs, output):
    y, places, order, weights = inputs
    # Only the gradient of the weights reads y.
    ctx.save_for_backward(y if weights is not None else None, places, order, weights)


def _sum_copies_gradients(ctx, grad):
    y, places, order, weights = ctx.saved_tensors
    if weights is None:
        return _gather_copies(grad, order, places), None, None, None
    grad_y, grad_weights = _sum_copies_backward(grad, y, weights, order)
    return grad_y, None, None, grad_weights


_gather_copies.register_autograd(_gather_copies_backward, setup_context=_gather_copies_context)
_sum_copies.register_autograd(_sum_copies_gradients, setup_context=_sum_copies_context)


# ---- grouped products -----------------------------------------------------------------------------------


@torch.library.custom_op("megamm::grouped_linear", mutates_args=())
def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return _rows_product(x, _packed(weight).transpose(1, 2), offsets)


@_grouped_linear.register_fake
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("megamm::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = grad.contiguous()
    return _rows_product(grad, _packed(weight), offsets), _weight_gradient(grad, x, offsets)


@_grouped_linear_backward.register_fake
def _(grad, x, weight, offsets):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _grouped_linear_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_linear_gradients(ctx, grad):
    return *_grouped_linear_backward(grad, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_grouped_linear_gradients, setup_context=_grouped_linear_context)


@register_flop_formula(torch.ops.megamm.grouped_linear)
def _flops(x_shape, weight_shape, offsets_shape, *_, out_shape=None, **__):
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.megamm.grouped_linear_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, offsets_shape, *_, out_shape=None, **__):
    # Two products, for x and for the weight, each of the forward's size.
    return 4 * x_shape[0] * weight_shape[1] * weight_shape[2]


def _rows_product(a, b, offsets):
    """[m, K] times each expert's [K, N] of ``b`` [E, K, N] -> [m, N]."""
    a = a.contiguous()
    if a.shape[0] == 0:
        return a.new_empty(0, b.shape[2])
    if _torch_is_fast(a, b.shape[1], b.shape[2]):
        return F.grouped_mm(a, b, offs=offsets)
    if dispatch.use_triton(a) and _triton_takes(a):
        return gpu.rows_product(a, b, offsets)
    out = a.new_empty(a.shape[0], b.shape[2])
    for rows, matrix in zip(_groups(offsets), b, strict=True):
        # Into its place: a list of parts would have to be copied together afterwards.
        torch.mm(a[rows], matrix, out=out[rows])
    return out


def _weight_gradient(grad, x, offsets):
    """grad[rows of e]^T @ x[rows of e] -> [E, N, K]."""
    x = x.contiguous()
    if x.shape[0] == 0:
        return x.new_zeros(offsets.shape[0], grad.shape[1], x.shape[1])
    if _torch_is_fast(x, grad.shape[1], x.shape[1]):
        out = F.grouped_mm(grad.T, x, offs=offsets)
        # On sm_100 torch may leave an empty expert's part unwritten (pytorch issue 172439).
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        return out.masked_fill(empty[:, None, None], 0)
    if dispatch.use_triton(x) and _triton_takes(x):
        return gpu.weight_gradient(grad, x, offsets)
    out = x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])
    for rows, matrix in zip(_groups(offsets), out, strict=True):
        torch.mm(grad[rows].T, x[rows], out=matrix)
    return out


def _packed(weight):
    """Torch's grouped GEMM wants packed matrices; products on the CPU take every other row where it lies."""
    return weight.contiguous() if weight.is_cuda else weight


def _groups(offsets):
    """The rows of each expert; waits for the device."""
    ends = offsets.tolist()
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _torch_is_fast(x, *widths):
    """Whether torch's grouped GEMM runs as one kernel: bfloat16, 16-byte rows, and hardware it was written for."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return dispatch.nvidia_generation(x.device) in (9, 10)


def _triton_takes(x):
    return x.dtype != torch.float64 or dispatch.interpret
