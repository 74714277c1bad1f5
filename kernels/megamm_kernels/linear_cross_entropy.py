"""Cross entropy of a linear head on labelled rows, without ever holding all logits.

The gradient is computed together with the loss, a chunk of rows at a time, while a chunk's logits are still
in cache (the idea of Liger-Kernel's fused linear cross entropy). The price: the backward only scales the
stored gradients, so the loss must be used linearly (summed, averaged), which a training loss is.
"""

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_bytes: int = 1 << 26
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log softmax(x W^T)[target] over the rows that have a target.

    Args:
        x: [n, W] hidden states.
        weight: [V, W] head.
        targets: integers [n]; a label in [0, V), or negative: the row has none and meets no matrix product.
        chunk_bytes: size of a chunk's float32 logits.

    Returns:
        loss: float32 scalar, the differentiable sum.
        nll: float32 [n], each row's loss, 0 where there is no label; detached.
    """
    rows = max(16, chunk_bytes // (4 * weight.shape[0]))
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, rows, needs_grad)


def linear_cross_entropy_reference(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with all logits at once."""
    nll = F.cross_entropy(x @ weight.T, targets.long(), reduction="none", ignore_index=-100)
    return nll.sum(), nll.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, rows, needs_grad):
        head = weight.to(x.dtype)
        nll = x.new_zeros(x.shape[0], dtype=torch.float32)
        grad_x = torch.zeros_like(x) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        for index in (targets >= 0).nonzero().squeeze(1).split(rows):
            x_part, label = x[index], targets[index].long()[:, None]
            log_p = F.log_softmax((x_part @ head.T).float(), dim=-1)
            nll[index] = -log_p.gather(1, label).squeeze(1)
            if needs_grad:
                grad_logits = log_p.exp_()
                grad_logits.scatter_add_(1, label, torch.full_like(label, -1, dtype=torch.float32))
                grad_logits = grad_logits.to(x.dtype)
                grad_x[index] = grad_logits @ head
                if x.dtype == weight.dtype:
                    torch.addmm(grad_weight, grad_logits.T, x_part, out=grad_weight)
                else:
                    grad_weight += grad_logits.T @ x_part
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_weight * grad_loss, None, None, None
