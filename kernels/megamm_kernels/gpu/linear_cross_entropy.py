"""Loss of a row of logits and its gradient, written over the logits.

One program per row, in two sweeps over the vocabulary: the first finds the log-sum-exp (running maximum and sum), the
second writes softmax - one-hot. A row of 50k bf16 logits is 100 KB, so the second sweep finds it in the L2 cache.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from megamm_kernels import dispatch
from megamm_kernels.gpu.launch import launch


def softmax_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    needs_grad: bool,
    combine: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss [rows] and log-sum-exp [rows] of each row, and the gradient of the summed loss (None if not needed).

    Args:
        logits: [rows, V]; overwritten by the gradient.
        labels: int64 [rows]. Outside [0, V): the loss is NaN, or with ``combine`` the label is another rank's.
        z_loss: coefficient of log-sum-exp^2.
        combine: (log-sum-exp, label's logit) of this part of the vocabulary -> those of the whole.
    """
    num_rows, vocab_size = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lse, picked = torch.empty(2, num_rows, dtype=wide, device=logits.device)

    # Narrow under the interpreter, so that tests go round the loop more than once.
    block = 128 if dispatch.interpret else min(8192, triton.next_power_of_2(vocab_size))

    def sweep(find_lse: bool, write_grad: bool) -> None:
        launch(
            _softmax_gradient,
            (num_rows,),
            logits,
            labels,
            lse,
            picked,
            logits.stride(0),
            vocab_size,
            z_loss,
            FIND_LSE=find_lse,
            WRITE_GRAD=write_grad,
            SHARDED=combine is not None,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )

    if combine is None:
        sweep(True, needs_grad)
    else:
        sweep(True, False)
        # ``sweep`` sees these: the second sweep divides by the sum over the whole vocabulary.
        lse, picked = combine(lse, picked)
        if needs_grad:
            sweep(False, True)
    return lse - picked, lse, logits if needs_grad else None


@triton.jit
def _softmax_gradient(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    picked_ptr,
    stride,
    vocab_size,
    z_loss,
    FIND_LSE: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    # In 64 bits: rows times vocabulary may pass 2^31.
    logits_ptr += row.to(tl.int64) * stride
    wide: tl.constexpr = lse_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    cols = tl.arange(0, BLOCK)
    if FIND_LSE:
        top = tl.full([], -float("inf"), wide)
        # A sum per lane, added up after the loop: inside it, only the maximum is a reduction.
        sums = tl.zeros([BLOCK], wide)
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(logits_ptr + start + cols, mask=start + cols < vocab_size, other=-float("inf")).to(wide)
            new_top = tl.maximum(top, tl.max(x, 0))
            sums = sums * tl.exp(top - new_top) + tl.exp(x - new_top)
            top = new_top
        lse = top + tl.log(tl.sum(sums, 0))
        inside = (label >= 0) & (label < vocab_size)
        # A label of another rank must add nothing to the sum over ranks; one beyond the vocabulary must not go
        # unnoticed.
        picked = tl.load(logits_ptr + label, mask=inside, other=0.0 if SHARDED else float("nan")).to(wide)
        tl.store(lse_ptr + row, lse)
        tl.store(picked_ptr + row, picked)
    else:
        lse = tl.load(lse_ptr + row)
    if WRITE_GRAD:
        tl.debug_barrier()  # all have read the label's logit before one overwrites it
        # The derivative of lse + z_loss * lse^2 is the softmax times this.
        scale = 1 + 2 * z_loss * lse
        for start in range(0, vocab_size, BLOCK):
            mask = start + cols < vocab_size
            x = tl.load(logits_ptr + start + cols, mask=mask, other=0.0).to(wide)
            grad = tl.exp(x - lse) * scale - tl.where(start + cols == label, 1.0, 0.0)
            tl.store(logits_ptr + start + cols, grad.to(logits_ptr.dtype.element_ty), mask=mask)
