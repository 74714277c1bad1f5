"""Every operation against its definition in float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megamm_kernels import (
    attention_plan,
    interval_attention,
)
from megamm_kernels.interval_attention import _sdpa_blocks, interval_attention_reference


def intervals(documents: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi [length] of one row; a document is a list of spans: n > 0 text tokens, n < 0 image patches."""
    lo, hi = torch.arange(length), torch.arange(length) - 1
    position = 0
    for spans in documents:
        start = position
        for span in spans:
            part = slice(position, position + abs(span))
            lo[part] = start
            hi[part] = torch.arange(part.start, part.stop) if span > 0 else part.stop - 1
            position += abs(span)
    return lo.int(), hi.int()


ROWS = {
    "one-token documents": [[1]] * 12,
    "all image": [[-40]],
    "all text": [[300]],
    "all padding": [],
    "image across a block edge": [[100], [20, -30, 9, -120, 2], [5]],
    "odd length": [[7, -13, 3], [1], [60]],
}


@pytest.mark.parametrize("attend", [interval_attention, _sdpa_blocks], ids=["fused", "sdpa"])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("names", [["one-token documents", "all padding"], ["all image", "odd length"], list(ROWS)])
def test_interval_attention_matches_the_dense_definition(names, block, attend):
    torch.manual_seed(0)
    length = 307
    lo, hi = (torch.stack(x) for x in zip(*(intervals(ROWS[n], length) for n in names), strict=True))
    q, k, v = (torch.randn(len(names), length, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, attention_plan(lo, hi, torch.float64, block))
    expected = interval_attention_reference(q, k, v, lo, hi)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert (out[hi < lo] == 0).all()
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=5), max_size=6),
    st.integers(1, 40),
)
def test_interval_attention_on_random_rows(documents, block):
    used = sum(abs(span) for spans in documents for span in spans)
    lo, hi = (x[None] for x in intervals(documents, used + 3))
    q, k, v = (torch.randn(1, used + 3, 1, 8, dtype=torch.float64) for _ in range(3))
    out = interval_attention(q, k, v, attention_plan(lo, hi, torch.float64, block))
    torch.testing.assert_close(out, interval_attention_reference(q, k, v, lo, hi), atol=1e-12, rtol=0)


def test_interval_attention_passes_the_operator_checks():
    lo, hi = (x[None] for x in intervals([[3, -4, 2], [5]], 16))
    plan = attention_plan(lo, hi)
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.megamm.interval_attention.default, (q, k, v, *plan))


def test_bf16_attention_is_as_close_as_torch_own():
    torch.manual_seed(1)
    lo, hi = (x[None] for x in intervals([[64]], 64))
    q, k, v = (torch.randn(1, 64, 2, 16, dtype=torch.float64) for _ in range(3))
    exact = interval_attention_reference(q, k, v, lo, hi)
    b = [x.bfloat16() for x in (q, k, v)]
    ours = interval_attention(*b, attention_plan(lo, hi, torch.bfloat16))
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in b), is_causal=True)
    error, peer = (ours - exact).abs().max(), (theirs.transpose(1, 2) - exact).abs().max()
    assert error <= 1.5 * peer
