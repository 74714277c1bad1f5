"""Cross entropy of a linear head on labelled rows, without ever holding all logits.

The gradient is computed together with the loss, a chunk of rows at a time, and written over the chunk's logits
(the idea of Liger-Kernel's fused linear cross entropy, arXiv 2410.10989). The price: the backward only scales
stored gradients, so the loss must be used linearly (summed, averaged), which a training loss is.

A vocabulary-parallel head (Megatron-LM, arXiv 1909.08053) keeps its rows spread over a process group: per chunk the
ranks exchange two numbers per row, the log-sum-exp over their part and the label's logit.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.flop_counter import register_flop_formula

from megamm_kernels import dispatch

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.linear_cross_entropy import softmax_gradient

CPU_CHUNK_BYTES = 1 << 26
"""Logits of a chunk on the CPU: small enough to stay near the caches."""
GPU_CHUNK_BYTES = 1 << 28
"""Logits of a chunk on a GPU: large enough for products at full speed."""


class LinearCrossEntropyOutput(NamedTuple):
    """Statistics are float32, or float64 for float64 inputs.

    Attributes:
        loss: scalar, differentiable: sum over the labelled rows of -log softmax(x W^T)[label], plus ``z``.
        sums: [num_groups], the first part of ``loss`` split by group, detached.
        counts: [num_groups], number of labels, detached.
        z: scalar, z_loss * sum of log-sum-exp^2, detached.
    """

    loss: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    z: torch.Tensor


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    label_index: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    num_groups: int = 1,
    *,
    z_loss: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> LinearCrossEntropyOutput:
    """Next-token loss over the rows that have a label; the others meet no matrix product.

    Args:
        x: [n, W] hidden states.
        weight: [V, W] head; cast to the dtype of ``x`` for the products, its gradient is summed in float32.
        targets: integers [n]; a label in [0, V), or negative where there is none. A label beyond the vocabulary is
            an error on the CPU and a NaN loss on a GPU, where a check would wait for the device, and in parallel.
        label_index: int64 [num_labels], the rows with a label, each once. Without it they are searched for, and a
            GPU has to be waited for: the loader should pass it.
        group: integers [n] in [0, num_groups), by which the sums are split.
        num_groups: number of groups.
        z_loss: coefficient of log-sum-exp^2 (PaLM, arXiv 2204.02311), which keeps logits from drifting.
        process_group: ranks that hold one part each of the head's rows; ``x``, targets and indices are equal on
            all of them, and so is the gradient of ``x``.
        vocab_start: first row of the whole head that ``weight`` holds.
        vocab_size: rows of the whole head; needed with ``process_group``.
        chunk_bytes: size of a chunk's logits on one rank; None: as suits the device.

    All tensors may be DTensors on one mesh, and then need no ``process_group``: over a mesh axis that shards the
    head's rows the head is vocabulary-parallel; over another that shards rows of ``x``, each rank takes the labels of
    its own rows, without ``label_index``, and losses and sums are partial. All else is gathered first.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x, weight, targets, group, num_groups)
    if hasattr(x, "device_mesh"):  # a DTensor, whose module takes a second to import
        from megamm_kernels.head_shards import global_results, local_arguments

        if process_group is not None:
            raise ValueError("DTensors carry their process group: process_group must be None")
        given: Any = (x, weight, targets, label_index, group)
        arguments, part = local_arguments(*given)
        options: dict[str, Any] = {"num_groups": num_groups, "z_loss": z_loss, "chunk_bytes": chunk_bytes, **part}
        out = linear_cross_entropy(*arguments, **options)
        return LinearCrossEntropyOutput(*global_results(out, *given[:2]))
    if process_group is not None and vocab_size is None:
        raise ValueError("a head spread over process_group needs vocab_size, the rows of the whole head")
    if label_index is None:
        label_index = (targets >= 0).nonzero().squeeze(1)
    # Gradients are computed in the forward, so an evaluation must say that it wants none.
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if chunk_bytes is None:
        chunk_bytes = GPU_CHUNK_BYTES if x.is_cuda else CPU_CHUNK_BYTES
    # An op cannot be given a process group, only the name that it is registered under.
    name = "" if process_group is None else process_group.group_name
    loss, nll, z, *_ = _linear_cross_entropy(
        x, weight, targets, label_index, z_loss, needs_grad, chunk_bytes, name, vocab_start, vocab_size or 0
    )
    if group is not None:
        group = group.index_select(0, label_index)
    sums, counts = _group_sums(nll.detach(), group, num_groups)
    return LinearCrossEntropyOutput(loss, sums, counts, z.detach())


def linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: torch.Tensor | None = None,
    num_groups: int = 1,
    z_loss: float = 0.0,
) -> LinearCrossEntropyOutput:
    """The definition, with all logits at once."""
    labelled = targets >= 0
    logits = x @ weight.T
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    nll = F.cross_entropy(logits, targets.long(), reduction="none", ignore_index=-100)
    z = z_loss * (logits.logsumexp(-1).square() * labelled).sum()
    group = torch.zeros_like(targets) if group is None else group
    member = F.one_hot(group.long(), num_groups).to(nll.dtype) * labelled[:, None]
    sums, counts = nll.detach() @ member, member.sum(0)
    return LinearCrossEntropyOutput(nll.sum() + z, sums, counts, z.detach())


def _check(x, weight, targets, group, num_groups):
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x [n, W] and weight [V, W] do not fit: {tuple(x.shape)}, {tuple(weight.shape)}")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets must have shape {tuple(x.shape[:1])}, not {tuple(targets.shape)}")
    if group is None and num_groups != 1:
        raise ValueError(f"num_groups={num_groups} needs group, the group of each row")
    if group is not None and group.shape != targets.shape:
        raise ValueError(f"group must have shape {tuple(targets.shape)}, not {tuple(group.shape)}")


def _group_sums(nll, group, num_groups):
    """Sums and counts of each group: a masked reduction, because index_add on a GPU varies from run to run."""
    if group is None:
        return nll.sum()[None], nll.new_full((1,), nll.shape[0])
    member = group == torch.arange(num_groups, device=group.device)[:, None]
    return torch.where(member, nll, 0.0).sum(1), member.sum(1, dtype=nll.dtype)


def _wide(dtype):
    """The dtype of statistics and of sums over rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("megamm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    label_index: torch.Tensor,
    z_loss: float,
    needs_grad: bool,
    chunk_bytes: int,
    process_group: str,
    vocab_start: int,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss, each label's own loss, the z-loss, and the gradients of the loss to x and weight."""
    # Once for all chunks.
    head = weight.to(x.dtype)
    labels = targets.index_select(0, label_index).long() - vocab_start
    num_labels = labels.shape[0]
    nll, lse = torch.empty(2, num_labels, dtype=_wide(x.dtype), device=x.device)
    grad_x = grad_weight = None
    if needs_grad:
        grad_x = torch.empty(num_labels, x.shape[1], dtype=x.dtype, device=x.device)
        # The first chunk writes over whatever is there (beta 0); without labels there is no chunk.
        make = torch.empty if num_labels else torch.zeros
        grad_weight = make(weight.shape, dtype=_wide(weight.dtype), device=x.device)
    combine, columns, ranks = None, weight.shape[0], None
    if process_group:
        ranks = _resolve_process_group(process_group)  # type: ignore[arg-type]  # a name is a str at run time
        columns = -(-vocab_size // ranks.size())  # ranks must agree on the chunks, whatever they hold
    rows = _chunk_rows(num_labels, columns, x, chunk_bytes)
    for start in range(0, num_labels, rows):
        part = slice(start, start + rows)
        if process_group:
            # Labels count from vocab_start here, so the end of the whole vocabulary does, too.
            combine = partial(_combine, labels[part] < vocab_size - vocab_start, ranks)
        x_part = x.index_select(0, label_index[part])
        logits = x_part @ head.T
        nll[part], lse[part], grad_logits = _chunk_losses(logits, labels[part], z_loss, needs_grad, combine)
        # The CPU path returns the gradient in a tensor of its own: its logits are not needed for the products.
        del logits
        if needs_grad:
            torch.mm(grad_logits, head, out=grad_x[part])
            _add_product(grad_weight, grad_logits.T, x_part, beta=0 if start == 0 else 1)
        del grad_logits  # or two chunks' logits would be alive
    z = z_loss * lse.square().sum()
    # An op returns tensors only, never None: empty ones stand for gradients that nobody wants.
    if not needs_grad:
        return nll.sum() + z, nll, z, x.new_empty(0), weight.new_empty(0)
    if process_group:
        # Each rank has the part that came through its rows of the head. Before rows without a label join: fewer to
        # send.
        dist.all_reduce(grad_x, group=ranks)
    grad_x = torch.zeros_like(x).index_copy_(0, label_index, grad_x)
    return nll.sum() + z, nll, z, grad_x, grad_weight


@_linear_cross_entropy.register_fake
def _(x, weight, targets, label_index, z_loss, needs_grad, chunk_bytes, process_group, vocab_start, vocab_size):
    loss, z = (x.new_empty((), dtype=_wide(x.dtype)) for _ in range(2))
    nll = x.new_empty(label_index.shape, dtype=_wide(x.dtype))
    if not needs_grad:
        return loss, nll, z, x.new_empty(0), weight.new_empty(0)
    return loss, nll, z, torch.empty_like(x), torch.empty(weight.shape, dtype=_wide(weight.dtype), device=x.device)


@register_flop_formula(torch.ops.megamm.linear_cross_entropy)
def _flops(x_shape, weight_shape, targets_shape, index_shape, z_loss, needs_grad, *_, out_shape=None, **__):
    # One product for the logits; with a gradient, one more for x and one for the head.
    return 2 * index_shape[0] * weight_shape[0] * weight_shape[1] * (3 if needs_grad else 1)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    # The head's stored gradient may be wider than the head.
    ctx.dtypes = [t.dtype for t in inputs[:2]]
    ctx.save_for_backward(*output[3:])


def _backward(ctx, grad_loss, *_):
    grads = [None, None]
    if grad_loss is not None:
        stored = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        grads = [_scaled(grad, grad_loss, dtype) if needed else None for grad, dtype, needed in stored]
    return *grads, *[None] * 8


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _scaled(grad, factor, dtype):
    """grad * factor, multiplied in the wider of the two dtypes and rounded once.

    Written over ``grad`` unless the graph is kept for another backward or is being traced: the head's gradient is
    large, and this is the moment at which a step holds the most memory.
    """
    traced = torch._C._len_torch_dispatch_stack() > 0  # by torch.compile, make_fx, fake tensors
    kept = traced or torch._C._autograd._get_current_graph_task_keep_graph()
    out = torch.empty_like(grad, dtype=dtype) if kept or grad.dtype != dtype else grad
    # A factor of no dimension would have no say in the dtype of the product; one of shape [1] has.
    return torch.mul(grad, factor.view(1), out=out)


def _chunk_rows(num_labels, vocab_size, x, chunk_bytes):
    """Rows per chunk: chunks of equal size, so that the last product is not a sliver."""
    # Plain torch widens the logits to float32, the kernel works on them as they are.
    itemsize = x.dtype.itemsize if dispatch.use_triton(x) else 4
    most = max(16, chunk_bytes // (itemsize * vocab_size))
    num_chunks = max(1, -(-num_labels // most))
    rows = -(-num_labels // num_chunks)
    return max(16, min(most, -(-rows // 64) * 64))


def _chunk_losses(logits, labels, z_loss, needs_grad, combine):
    """Loss and log-sum-exp of each row, and the gradient of the summed loss to the logits (or None).

    Args:
        logits: [rows, V]; overwritten.
        labels: int64 [rows]; with ``combine`` those of other ranks lie outside [0, V).
        combine: (log-sum-exp, label's logit) of this part of the vocabulary -> those of the whole; None: it is whole.
    """
    if dispatch.use_triton(logits):
        return softmax_gradient(logits, labels, z_loss, needs_grad, combine)
    dtype, label = logits.dtype, labels[:, None]
    if combine:
        inside = (label >= 0) & (label < logits.shape[1])
        # gather needs an index that exists; what it finds for a label of another rank is not used.
        label = label.clamp(0, logits.shape[1] - 1)
    logits = logits.to(_wide(dtype))
    log_p = F.log_softmax(logits, dim=-1)
    picked = logits.gather(1, label)
    nll = -log_p.gather(1, label)
    # log_softmax has found it already: no pass of its own over the vocabulary.
    lse = picked + nll
    if combine:
        part_lse, picked = lse, torch.where(inside, picked, 0.0)
        lse, picked = combine(part_lse, picked)
        nll = lse - picked
        # It was normalised over this rank's part only.
        log_p += part_lse - lse
    if not needs_grad:
        return nll[:, 0], lse[:, 0], None
    grad = log_p.exp_()
    if z_loss:
        # The derivative of lse + z_loss * lse^2 is the softmax times this.
        grad *= 1 + 2 * z_loss * lse
    grad.scatter_add_(1, label, -inside.to(grad.dtype) if combine else torch.full_like(lse, -1.0))
    return nll[:, 0], lse[:, 0], grad.to(dtype)


def _combine(exists, group, lse, picked):
    """Log-sum-exp over all parts of the vocabulary, and the label's logit (NaN unless the label exists)."""
    # A sum that gathers: of each number one rank has it, and all others have zero. Added up in the order of ranks, so
    # that all of them get the same bits.
    parts = torch.zeros(group.size(), 2, *lse.shape, dtype=lse.dtype, device=lse.device)
    parts[group.rank()] = torch.stack((lse, picked))
    dist.all_reduce(parts, group=group)
    picked = parts[:, 1].sum(0)
    return parts[:, 0].logsumexp(0), picked.where(exists.view(picked.shape), torch.nan)


def _add_product(total, a, b, beta):
    """total = beta * total + a @ b; beta 0: whatever total held."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and a.dtype.itemsize == 2:  # torch widens only 16-bit products
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif beta:
        total += a @ b
    else:
        total.copy_(a @ b)
