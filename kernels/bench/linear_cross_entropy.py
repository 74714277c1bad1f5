"""Loss of a linear head on labelled rows, forward and backward, in time and memory.

The peers get every row, as a plain language model's head does, with ignore_index where there is no label; rates count
the labelled rows alone. On 45-45-10 rows (caption, interleaved, text) 46% of the positions have a label.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Case, Provider, UnavailableError, Work, gradients, main
from megamm_kernels import linear_cross_entropy

VOCAB = 50432
LABELLED = {"45-45-10": 0.456, "text": 0.995}


class Inputs(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    label_index: torch.Tensor


def make(rows: int, width: int, vocab: int, labelled: float, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random states and labels at random positions."""
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device=device, dtype=torch.int32)
    targets[torch.rand(rows, device=device) >= labelled] = -100
    return Inputs(x, weight, targets, (targets >= 0).nonzero().squeeze(1))


def cases(quick: bool) -> list[Case]:
    """Four rows of 4096 at widths of the paper's models, and of 1024 at one of them."""
    shapes = [(64, 32)] if quick else [(4 * 4096, 800), (4 * 4096, 2208), (4 * 4096, 5120), (4 * 1024, 2208)]
    vocab = 128 if quick else VOCAB
    return [
        Case(
            f"{rows}x{width} {mixture}",
            Work(flops=3 * 2 * rows * share * width * vocab),
            partial(make, rows, width, vocab, share),
        )
        for rows, width in shapes
        for mixture, share in LABELLED.items()
    ]


def ours(inputs: Inputs, head_dtype: torch.dtype | None = None):
    """``head_dtype`` float32 is how the model trains: a float32 parameter under bfloat16 activations."""
    x, weight, targets, index = inputs
    weight = weight.detach().to(head_dtype or weight.dtype).requires_grad_()
    return gradients(lambda: linear_cross_entropy(x, weight, targets, index).loss, [x, weight])


def full_logits(inputs: Inputs, compiled: bool):
    """All logits at once."""
    x, weight, targets = inputs.x, inputs.weight, inputs.targets.long()

    def loss(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum", ignore_index=-100)

    loss = torch.compile(loss) if compiled else loss
    return gradients(lambda: loss(x, weight, targets), [x, weight])


def liger(inputs: Inputs):
    """Liger-Kernel's fused linear cross entropy."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    x, weight, targets, _ = inputs
    loss, targets = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum"), targets.long()
    return gradients(lambda: loss(weight, x, targets), [x, weight])


def hugging_face(inputs: Inputs):
    """All logits, and the loss of Hugging Face's causal language models; for one item in the batch, it is the sum."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    x, weight, targets = inputs.x, inputs.weight, inputs.targets.long()

    def loss():
        logits = F.linear(x, weight)
        return ForCausalLMLoss(logits, None, len(weight), num_items_in_batch=1, shift_labels=targets)

    return gradients(loss, [x, weight])


def torch_chunked(inputs: Inputs):
    """torch's own, in chunks."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    x, weight, targets, _ = inputs
    targets, options = targets.long(), torch.nn.LinearCrossEntropyOptions()
    loss = partial(F.linear_cross_entropy, x, weight, targets, reduction="sum", ignore_index=-100, options=options)
    return gradients(loss, [x, weight])


PROVIDERS = [
    Provider("megamm", ours),
    Provider("megamm, float32 head", partial(ours, head_dtype=torch.float32)),
    Provider("full logits, eager", partial(full_logits, compiled=False), minor=True),
    Provider("full logits, compiled", partial(full_logits, compiled=True), compiles=True),
    Provider("Liger-Kernel", liger),
    Provider("Hugging Face", hugging_face, minor=True),
    Provider("F.linear_cross_entropy", torch_chunked),
]

if __name__ == "__main__":
    main(op="linear_cross_entropy", cases=cases, providers=PROVIDERS)
