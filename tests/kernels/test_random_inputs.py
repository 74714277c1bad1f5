"""What must hold whatever the rows, with inputs by hypothesis, which a machine with a GPU need not have."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from megamm_kernels import dispatch, interval_attention
from megamm_kernels.attention_backends import sdpa
from megamm_kernels.interval_attention import interval_attention_reference
from rows import intervals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=5), max_size=6),
    st.integers(1, 40),
)
def test_sdpa_on_random_rows(documents, block):
    used = sum(abs(span) for spans in documents for span in spans)
    lo, hi = (x[None] for x in intervals(documents, used + 3))
    q, k, v = torch.randn(3, 1, used + 3, 1, 8, dtype=torch.float64)
    out = interval_attention(q, k, v, sdpa.make_mask(lo, hi, torch.float64, block))
    torch.testing.assert_close(out, interval_attention_reference(q, k, v, lo, hi), atol=1e-12, rtol=0)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), max_size=6), st.integers(0, 9))
def test_table_gradient_of_runs_of_any_length(runs, left_out):
    """Runs end before, at and after the chunks' edges; the last key counts nowhere."""
    from megamm_kernels.gpu.embedding_gradient import table_gradient

    keys = torch.tensor([key for key, length in runs for _ in range(length)] + [5] * left_out, dtype=torch.int32)
    keys = keys[torch.randperm(len(keys))].to(DEVICE)
    grad = torch.randn(len(keys), 3, dtype=torch.float64, device=DEVICE)
    want = torch.zeros(6, 3, dtype=torch.float64, device=DEVICE).index_add(0, keys.long(), grad)[:5]
    torch.testing.assert_close(table_gradient(grad, keys, 5, torch.float64), want, atol=1e-12, rtol=0)
