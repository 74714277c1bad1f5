"""Interval attention against FlexAttention, SDPA and the dense definition.

Floating-point operations are those of the pairs that the mask admits: 4 D H a pair forward, 2.5 times as many
backward. A name that ends in "+ mask" makes its mask, ours too, anew in every call, as a one-layer model would;
in the others it is made once, as if shared by very many layers.
"""

from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import FORWARD, TRAINING, Case, Provider, UnavailableError, Work, gradients, main
from megamm_kernels import attention_mask, default_backend, interval_attention
from megamm_kernels.interval_attention import interval_attention_reference

TOKENS = 16384
"""Positions in a batch."""
IMAGE = 256
"""Patches of an image: 224 x 224 pixels in patches of 14."""
MIXTURES = {"45-45-10": (0.45, 0.45, 0.10), "text": (0.0, 0.0, 1.0)}
"""Shares of tokens: image-caption pairs, interleaved pages, text."""


def random_document(kind: int, generator: torch.Generator) -> list[int]:
    """Spans of a document: n > 0 text tokens, n < 0 image patches."""

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    if kind == 0:
        return [2, -IMAGE, between(20, 120)]
    if kind == 1:
        return [n for _ in range(between(1, 4)) for n in (between(60, 400), -IMAGE)] + [between(40, 200)]
    length = float(torch.randn((), generator=generator).mul(1.0).add(6.2).exp())
    return [max(16, min(int(length), 8192))]


def random_row(length: int, mixture: str, generator: torch.Generator) -> list[list[int]]:
    """Documents that fill a row of ``length`` up to a few percent; a text longer than the room left is cut."""
    means = torch.tensor([330.0, 1100.0, 800.0])  # mean lengths: shares are of tokens, draws are of documents
    weights = torch.tensor(MIXTURES[mixture]) / means
    documents, room = [], length
    for _ in range(200):
        document = random_document(int(torch.multinomial(weights, 1, generator=generator)), generator)
        if len(document) == 1:
            document = [min(document[0], room)]
        size = sum(map(abs, document))
        if size <= room:
            documents.append(document)
            room -= size
        if room < 16:
            break
    return documents


def intervals(documents: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi, int32 [length], of one row."""
    lo = torch.arange(length, dtype=torch.int32)
    hi = lo - 1
    position = 0
    for spans in documents:
        start = position
        for span in spans:
            end = position + abs(span)
            lo[position:end] = start
            hi[position:end] = end - 1 if span < 0 else torch.arange(position, end, dtype=torch.int32)
            position = end
    return lo, hi


def random_intervals(rows: int, length: int, mixture: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi, int32 [rows, length]; ``one document`` as a mixture is a causal row of text."""
    generator = torch.Generator().manual_seed(seed)
    if mixture == "one document":
        drawn = [[[length]]] * rows
    else:
        drawn = [random_row(length, mixture, generator) for _ in range(rows)]
    lo, hi = zip(*(intervals(documents, length) for documents in drawn), strict=True)
    return torch.stack(lo), torch.stack(hi)


class Inputs(NamedTuple):
    """Queries, keys and values [B, S, H, D], the gradient of the output, the intervals [B, S]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor


def make_case(width: int, head_dim: int, length: int, mixture: str, rows: int | None = None) -> Case:
    rows = rows or TOKENS // length
    lo, hi = random_intervals(rows, length, mixture)
    pairs = int((hi - lo + 1).sum())
    shape = (rows, length, width // head_dim, head_dim)

    def make(device, dtype):
        q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
        return Inputs(*(x.requires_grad_() for x in (q, k, v)), grad, lo.to(device), hi.to(device))

    forward = 4.0 * width * pairs
    return Case(f"w{width} d{head_dim} {length} {mixture}", Work(flops=3.5 * forward), make, Work(flops=forward))


def cases(quick: bool) -> list[Case]:
    """Heads of the paper's models, in order of weight; single documents are what FlashAttention is made for."""
    if quick:
        return [make_case(32, 16, 384, "45-45-10", rows=2), make_case(32, 16, 64, "one document", rows=1)]
    return [
        make_case(2624, 64, 4096, "45-45-10"),
        make_case(800, 80, 4096, "45-45-10"),
        make_case(2048, 64, 4096, "one document"),
        make_case(2048, 128, 4096, "one document"),
        make_case(800, 80, 1024, "45-45-10"),
        make_case(2624, 64, 4096, "text"),
        make_case(5120, 64, 1024, "45-45-10"),
        make_case(2624, 64, 1024, "text"),
    ]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def timed(inputs: Inputs, attend, mode: str):
    """``attend(q, k, v)`` alone or with its backward."""
    qkv = inputs[:3]
    if mode == TRAINING:
        return gradients(lambda: attend(*qkv), qkv, inputs.grad)
    return torch.no_grad()(lambda: attend(*qkv))


def ours(mode: str, backend: str | None = None, mask_each_time: bool = False):
    def setup(inputs: Inputs):
        def make_ours():
            return attention_mask(inputs.lo, inputs.hi, inputs.q.dtype, backend or default_backend(inputs.lo))

        mask = make_ours()
        return timed(
            inputs,
            lambda q, k, v: interval_attention(q, k, v, make_ours() if mask_each_time else mask),
            mode,
        )

    return setup


def flex(mode: str, mask_each_time: bool = False):
    """FlexAttention as its authors recommend it: both it and the mask's creation compiled."""

    def setup(inputs: Inputs):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attend, create = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
        (rows, length), lo, hi = inputs.lo.shape, inputs.lo, inputs.hi

        def make_mask():
            def mask_mod(b, h, q, kv):
                return (lo[b, q] <= kv) & (kv <= hi[b, q])

            return create(mask_mod, rows, None, length, length, device=lo.device)

        mask = make_mask()

        def run(q, k, v):
            block_mask = make_mask() if mask_each_time else mask
            return heads_first(attend(*map(heads_first, (q, k, v)), block_mask=block_mask))

        return timed(inputs, run, mode)

    return setup


def dense_mask(inputs: Inputs) -> torch.Tensor:
    """bool [B, 1, S, S]; a padding query sees itself, lest its softmax be 0/0."""
    position = torch.arange(inputs.lo.shape[1], device=inputs.lo.device)
    seen = (inputs.lo[..., None] <= position) & (position <= inputs.hi[..., None])
    return (seen | torch.eye(len(position), dtype=torch.bool, device=seen.device))[:, None]


def sdpa_dense(mode: str):
    def setup(inputs: Inputs):
        mask = dense_mask(inputs)
        return timed(
            inputs,
            lambda q, k, v: heads_first(F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), attn_mask=mask)),
            mode,
        )

    return setup


def sdpa_flash(mode: str):
    """FlashAttention in torch, on rows that are one causal document."""

    def setup(inputs: Inputs):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        position = torch.arange(inputs.lo.shape[1], device=inputs.lo.device)
        if bool((inputs.lo != 0).any()) or bool((inputs.hi != position).any()):
            raise UnavailableError("takes no mask but the causal one")

        def run(q, k, v):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), is_causal=True)
            return heads_first(out)

        return timed(inputs, run, mode)

    return setup


def torch_varlen(mode: str):
    """FlashAttention in torch over documents end to end, on rows of text alone; a padding position is a document."""

    def setup(inputs: Inputs):
        from torch.nn.attention.varlen import varlen_attn

        (rows, length), lo, hi = inputs.lo.shape, inputs.lo, inputs.hi
        position = torch.arange(length, device=lo.device)
        empty = hi < lo
        if not inputs.q.is_cuda or bool((~empty & (hi != position)).any()):
            raise UnavailableError("takes rows of text alone, on CUDA")
        first = empty | (lo == position)
        first[:, 0] = True
        end = torch.tensor([rows * length], device=lo.device)
        starts = torch.cat([first.flatten().nonzero().flatten(), end]).int()
        longest = int(starts.diff().max())
        # Older versions had a flag of its own for the causal mask.
        names = signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}

        def run(q, k, v):
            qkv = (x.flatten(0, 1) for x in (q, k, v))
            return varlen_attn(*qkv, starts, starts, longest, longest, **causal).view(q.shape)

        return timed(inputs, run, mode)

    return setup


def reference(mode: str, compiled: bool = False):
    def setup(inputs: Inputs):
        if inputs.lo.shape[1] > 1024:
            raise UnavailableError("left out: scores of all pairs take too much memory")
        attend = (
            torch.compile(interval_attention_reference, dynamic=False) if compiled else interval_attention_reference
        )
        return timed(inputs, lambda q, k, v: attend(q, k, v, inputs.lo, inputs.hi), mode)

    return setup


PROVIDERS = [
    Provider("megamm", ours(TRAINING)),
    Provider("megamm + mask", ours(TRAINING, mask_each_time=True)),
    Provider("megamm", ours(FORWARD), FORWARD),
    Provider("sdpa flash", sdpa_flash(TRAINING)),
    Provider("sdpa flash", sdpa_flash(FORWARD), FORWARD),
    Provider("torch varlen", torch_varlen(TRAINING)),
    Provider("torch varlen", torch_varlen(FORWARD), FORWARD),
    Provider("flash-attn varlen + mask", ours(TRAINING, "flash", mask_each_time=True)),
    Provider("sdpa dense mask", sdpa_dense(TRAINING), minor=True),
    Provider("eager", reference(TRAINING), minor=True),
    Provider("flex + mask", flex(TRAINING, mask_each_time=True), compiles=True),
    Provider("flex", flex(TRAINING), compiles=True),
    Provider("flex, our mask", ours(TRAINING, "flex", mask_each_time=True), compiles=True, minor=True),
    Provider("torch.compile", reference(TRAINING, compiled=True), compiles=True, minor=True),
]

if __name__ == "__main__":
    main("interval_attention", cases, PROVIDERS)
