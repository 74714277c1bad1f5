"""QK-norm and rotary embedding in one pass, against its definition in float64."""

import pytest
import torch
from checks import (
    assert_as_accurate,
    assert_compiles,
    assert_matches,
    assert_repeats,
    poison_outputs,
    skip_bf16_under_interpreter,
)
from megamm_kernels import dispatch, qk_norm_rope, rope_table
from megamm_kernels.qk_norm_rope import qk_norm_rope_reference

EPS = 1e-6


def make(device, batch, length, heads, dim, full=False, axes=1, dtype=torch.float64):
    """Packed queries and keys as a slice of a wider qkv, weight, cosines and sines."""
    torch.manual_seed(0)
    qk = torch.randn(batch, length, heads + 2, dim, dtype=dtype)[:, :, :heads] * 2
    weight = torch.rand(heads if full else 2, dim, dtype=dtype) + 0.5
    positions = torch.randint(0, 50, (batch, length, 2) if axes == 2 else (batch, length))
    cos, sin = rope_table(positions, dim, 100.0)
    return qk.to(device), weight.to(device), cos.to(device), sin.to(device)


def pair(cos, sin, query_heads=None):
    """The op and its reference as functions of the differentiable inputs."""

    def ours(qk, weight):
        return qk_norm_rope(qk, weight, cos, sin, EPS, query_heads)

    def reference(qk, weight):
        return qk_norm_rope_reference(qk, weight, cos, sin, EPS, query_heads)

    return ours, reference


@pytest.mark.parametrize("full", [False, True], ids=["per head", "full width"])
@pytest.mark.parametrize(
    ("shape", "query_heads"),
    [((2, 5, 6, 8), 3), ((1, 7, 5, 12), 4), ((2, 3, 2, 2), 1), ((2, 0, 4, 8), 2), ((3, 1, 4, 16), 1)],
    ids=str,
)
def test_matches_the_definition(device, shape, query_heads, full, monkeypatch):
    qk, weight, cos, sin = make(device, *shape, full=full)
    poison_outputs(monkeypatch)
    assert_matches(*pair(cos, sin, query_heads), (qk, weight), atol=1e-9, rtol=1e-9)


def test_two_dimensional_positions(device):
    qk, weight, cos, sin = make(device, 2, 5, 4, 8, axes=2)
    assert_matches(*pair(cos, sin), (qk, weight), atol=1e-9, rtol=1e-9)


def test_five_dimensional_input_and_one_table_for_all_rows(device):
    qk, weight, cos, sin = make(device, 3, 4, 6, 8)
    split = qk.unflatten(2, (2, 3))
    q, k = qk_norm_rope(split, weight, cos[:1], sin[:1], EPS)
    want = qk_norm_rope_reference(split, weight, cos[:1].expand(3, -1, -1, -1), sin[:1].expand(3, -1, -1, -1), EPS)
    torch.testing.assert_close((q, k), want)
    assert q.shape == k.shape == (3, 4, 3, 8)


def test_strided_input(device):
    qk, weight, cos, sin = make(device, 4, 3, 4, 8)
    assert_matches(*pair(cos, sin), (qk.transpose(1, 2).contiguous().transpose(1, 2), weight), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("full", [False, True], ids=["per head", "full width"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_close_as_torch_own(device, dtype, full):
    skip_bf16_under_interpreter(dtype, device)
    qk, weight, cos, sin = make(device, 2, 6, 4, 16, full=full)
    ours, reference = pair(cos, sin)
    assert_as_accurate(ours, reference, reference, (qk, weight), dtype)


@pytest.mark.parametrize("full", [False, True], ids=["per head", "full width"])
def test_gradcheck(device, full):
    qk, weight, cos, sin = make(device, 1, 2, 3, 2, full=full)
    assert torch.autograd.gradcheck(
        pair(cos, sin, 2)[0], (qk.requires_grad_(), weight.requires_grad_()), fast_mode=True
    )


def test_repeats_bitwise_and_compiles(device):
    qk, weight, cos, sin = make(device, 2, 9, 4, 8, dtype=torch.float32)
    ours, _ = pair(cos, sin)
    assert_repeats(ours, (qk, weight))
    assert_compiles(ours, (qk, weight))


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_operator_checks(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("plain torch")
    qk, weight, cos, sin = make(device, 2, 3, 4, 8, dtype=torch.float32)
    args = (qk.requires_grad_(), weight.requires_grad_(), cos, sin, EPS, 2)
    torch.library.opcheck(torch.ops.megamm.qk_norm_rope_gpu.default, args)


def score(head_dim, first, second):
    """Product of a rotated query at one position and a rotated key at another."""
    q, k = torch.randn(2, 1, 1, 1, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    qk = torch.cat((q, k), dim=2).expand(1, 2, 2, head_dim)
    cos, sin = rope_table(torch.tensor([[first, second]]), head_dim, 10000.0)
    q, k = qk_norm_rope(qk, torch.ones(2, head_dim, dtype=torch.float64), cos, sin, 0.0)
    return (q[0, 0] * k[0, 1]).sum()


def test_scores_depend_on_distance_only():
    torch.testing.assert_close(score(16, 5, 2), score(16, 105, 102), atol=1e-4, rtol=0)
    assert abs(score(16, 5, 2) - score(16, 5, 3)) > 1e-3


def test_scores_of_patches_depend_on_both_distances():
    torch.testing.assert_close(score(16, [5, 7], [2, 3]), score(16, [15, 27], [12, 23]), atol=1e-4, rtol=0)
    assert abs(score(16, [5, 7], [2, 3]) - score(16, [5, 7], [3, 3])) > 1e-3
    assert abs(score(16, [5, 7], [2, 3]) - score(16, [5, 7], [2, 4])) > 1e-3


def test_errors_name_the_shapes(device):
    qk, weight, cos, sin = make(device, 2, 3, 6, 8)
    with pytest.raises(ValueError, match=r"\[2, 8\] .per head. or \[6, 8\]"):
        qk_norm_rope(qk, weight[:1], cos, sin, EPS)
    with pytest.raises(ValueError, match=r"\[2 or 1, 3, 1, 4\]"):
        qk_norm_rope(qk, weight, cos[:, :2], sin, EPS)
    with pytest.raises(ValueError, match="query_heads is 6"):
        qk_norm_rope(qk, weight, cos, sin, EPS, 6)
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_table(torch.zeros(1, 1, 2), 6, 100.0)
