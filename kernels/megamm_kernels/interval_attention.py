"""Attention in which query q sees exactly the keys lo[q]..hi[q].

Both vectors are non-decreasing along a row, so a tile of queries needs one contiguous range of keys and, in the
backward, a tile of keys one contiguous range of queries. Two int32 vectors thus stand for the mask of packed rows of
documents, causal on text and bidirectional inside an image; no block mask is built and padding is an empty interval.

What depends on the intervals alone is found once per batch and shared by all layers: the mask, whose type names the
backend. No backend is ever chosen in place of the one asked for:

    interval    our Triton flash attention (the tiling of arXiv 2307.08691), on CUDA
    flex        FlexAttention; flex_flash is its FLASH backend (package flash-attn-4)
    flash       flash-attn's varlen kernels (package flash-attn), for rows that they can express
    sdpa        torch's attention over blocks of queries, exact, on every device
"""

from typing import Literal, NamedTuple, get_args, overload

import torch

from megamm_kernels import dispatch
from megamm_kernels.attention_backends import flash, flex, sdpa

if dispatch.HAS_TRITON:
    from megamm_kernels.gpu.interval_attention import MAX_HEAD_DIM, interval_attention_gpu

Backend = Literal["interval", "flex", "flex_flash", "flash", "sdpa"]


class IntervalMask(NamedTuple):
    """The mask from both sides.

    Attributes:
        lo, hi: int32 [B, S], the keys that each query sees.
        query_lo, query_hi: int32 [B, num_keys], the queries that see each key.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    query_lo: torch.Tensor
    query_hi: torch.Tensor


AttentionMask = IntervalMask | flex.FlexMask | flash.FlashMask | sdpa.SdpaMask


def default_backend(x: torch.Tensor) -> Backend:
    """``interval`` where the Triton kernels run, ``sdpa`` elsewhere."""
    return "interval" if dispatch.use_triton(x) else "sdpa"


def attention_mask(
    lo: torch.Tensor,
    hi: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "sdpa",
    num_keys: int | None = None,
) -> AttentionMask:
    """Prepare a batch for :func:`interval_attention`.

    Args:
        lo, hi: integers [B, S], the interval of keys of each query, both ends included; hi < lo is empty. Both
            are non-decreasing along the row, or gradients of keys and values are silently wrong. Checking it would
            wait for the device, so it is done only with MEGAMM_CHECK_INTERVALS=1 in the environment.
        dtype: dtype of queries and keys.
        backend: who computes. ``sdpa`` and ``flash`` wait for the device here, the others do not.
        num_keys: keys of a row, by default as many as queries.

    Raises:
        ValueError: unknown backend, shapes that differ, ``interval`` away from CUDA, rows that the backend cannot
            express (``flash``), or intervals that decrease, if that is checked.
        ImportError: the backend's package is not installed; the message names it.
    """
    if lo.shape != hi.shape or lo.dim() != 2:
        raise ValueError(f"lo and hi must both be [B, S], not {list(lo.shape)} and {list(hi.shape)}")
    if dispatch.check_intervals:
        _check_order(lo=lo, hi=hi)
    num_keys = lo.shape[1] if num_keys is None else num_keys
    if backend == "interval":
        return _interval_mask(lo, hi, num_keys)
    if backend in ("flex", "flex_flash"):
        return flex.make_mask(lo, hi, num_keys, flash=backend == "flex_flash")
    if backend == "flash":
        return flash.make_mask(lo, hi, dtype, num_keys)
    if backend == "sdpa":
        return sdpa.make_mask(lo, hi, dtype)
    raise ValueError(f"unknown attention backend {backend!r}; known are {', '.join(get_args(Backend))}")


@overload
def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, return_lse: Literal[False] = False
) -> torch.Tensor: ...


@overload
def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, return_lse: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention over the mask's intervals; queries with an empty interval give zero.

    Args:
        q: [B, S, H, D]. ``interval`` takes D up to 256, float16, bfloat16 and float32 (whose products use TF32
            where torch's matrix products do).
        k, v: [B, num_keys, Hkv, D]; Hkv divides H, and each head of keys serves H / Hkv consecutive query heads.
        mask: from :func:`attention_mask`, for the same rows.
        return_lse: also return the log-sum-exp of the scaled scores, differentiable except with ``flash``.

    Returns:
        [B, S, H, D] in the dtype of ``q``; with ``return_lse`` also [B, S, H] in float32 (float64 of float64), -inf
        for an empty interval.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k, v of shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)} do not fit together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries")
    if isinstance(mask, IntervalMask):
        out, lse = _interval_attend(q, k, v, mask)
    elif isinstance(mask, flex.FlexMask):
        out, lse = flex.attend(q, k, v, mask, return_lse)
    elif isinstance(mask, flash.FlashMask):
        out, lse = flash.attend(q, k, v, mask, return_lse)
    else:
        out, lse = sdpa.attend(q, k, v, mask, return_lse)
    return (out, lse) if return_lse else out


def interval_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, return_lse: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition, with a dense mask."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    keys = torch.arange(k.shape[1], device=q.device)
    seen = (keys >= lo[..., None]) & (keys <= hi[..., None])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    # The softmax of an empty interval is 0 / 0.
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return (out, scores.logsumexp(-1).transpose(1, 2)) if return_lse else out


def _check_order(**bounds: torch.Tensor) -> None:
    for name, bound in bounds.items():
        for row, position in (bound.diff(dim=1) < 0).nonzero().tolist()[:1]:
            before, after = bound[row, position : position + 2].tolist()
            raise ValueError(
                f"{name} falls from {before} to {after} at position {position + 1} of row {row}: "
                "attention takes intervals that are non-decreasing along a row; sort the row's documents"
            )


def _interval_mask(lo: torch.Tensor, hi: torch.Tensor, num_keys: int) -> IntervalMask:
    """Turn the intervals around: key n is seen by the queries from the first with hi >= n to the last with lo <= n."""
    if not dispatch.use_triton(lo):
        raise ValueError(f"attention backend 'interval' runs on CUDA, not on {lo.device}: use backend 'sdpa' there")
    # The kernels take the intervals as packed rows of int32.
    lo, hi = (x.to(torch.int32).contiguous() for x in (lo, hi))
    # Not only expanded: searchsorted warns of values that do not lie together.
    keys = torch.arange(num_keys, device=lo.device, dtype=torch.int32).expand(lo.shape[0], -1).contiguous()
    # No query with an empty interval lies between the two: hi >= n and lo <= n make it one that sees n.
    query_lo = torch.searchsorted(hi, keys, out_int32=True)
    query_hi = torch.searchsorted(lo, keys, out_int32=True, right=True) - 1
    return IntervalMask(lo, hi, query_lo, query_hi)


def _interval_attend(q, k, v, mask):
    if q.shape[1] != mask.lo.shape[1] or k.shape[1] != mask.query_lo.shape[1] or q.shape[0] != mask.lo.shape[0]:
        raise ValueError(
            f"the mask is for {mask.lo.shape[0]} rows of {mask.lo.shape[1]} queries and {mask.query_lo.shape[1]} keys, "
            f"not for q {list(q.shape)} and k {list(k.shape)}"
        )
    if q.is_cuda and q.dtype == torch.float64:
        raise ValueError("attention backend 'interval' takes no float64 on CUDA: use 'sdpa'")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"attention backend 'interval' takes heads up to {MAX_HEAD_DIM} wide, not {q.shape[3]}")
    out, lse = interval_attention_gpu(q, k, v, *mask)
    # The kernels write [B, H, S], where the numbers of a tile of queries lie side by side.
    return out, lse.transpose(1, 2)
