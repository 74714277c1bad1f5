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


def make(device, batch, length, groups, queries, dim, axes=1, dtype=torch.float64):
    """A fused qkv of groups of query heads, a key head and a value head; weight, cosines and sines."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, groups, queries + 2, dim, dtype=dtype) * 2
    weight = torch.rand(2, dim, dtype=dtype) + 0.5
    positions = torch.randint(0, 50, (batch, length, 2) if axes == 2 else (batch, length))
    cos, sin = rope_table(positions, dim, 100.0)
    return qkv.to(device), weight.to(device), cos.to(device), sin.to(device)


def pair(cos, sin):
    """The op and its reference as functions of the differentiable inputs."""

    def ours(qkv, weight):
        return qk_norm_rope(qkv, weight, cos, sin, EPS)

    def reference(qkv, weight):
        return qk_norm_rope_reference(qkv, weight, cos, sin, EPS)

    return ours, reference


@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 1, 8), (1, 7, 2, 3, 12), (2, 3, 1, 1, 2), (2, 0, 4, 2, 8), (3, 1, 1, 4, 16)], ids=str
)
def test_matches_the_definition(device, shape, monkeypatch):
    qkv, weight, cos, sin = make(device, *shape)
    poison_outputs(monkeypatch)
    assert_matches(*pair(cos, sin), (qkv, weight), atol=1e-9, rtol=1e-9)


def test_heads_of_queries_follow_their_group(device):
    """By hand: without rotation and weight, head h is the normalised projection row (h // R, h % R)."""
    qkv, weight, cos, sin = make(device, 1, 3, 2, 3, 4)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    q, k, v = qk_norm_rope(qkv, torch.ones_like(weight), cos, sin, EPS)
    unit = qkv / (qkv.square().mean(-1, keepdim=True) + EPS).sqrt()
    for head in range(6):
        torch.testing.assert_close(q[:, :, head], unit[:, :, head // 3, head % 3])
    torch.testing.assert_close(k, unit[..., 3, :])
    assert torch.equal(v, qkv[..., 4, :])


def test_values_are_not_copied(device):
    qkv, weight, cos, sin = make(device, 1, 3, 2, 1, 4)
    assert qk_norm_rope(qkv, weight, cos, sin, EPS)[2].data_ptr() == qkv[..., 2, :].data_ptr()


def test_a_slice_of_groups_is_a_smaller_attention(device):
    qkv, weight, cos, sin = make(device, 2, 5, 4, 2, 8)
    whole = qk_norm_rope(qkv, weight, cos, sin, EPS)
    part = qk_norm_rope(qkv[:, :, 1:3], weight, cos, sin, EPS)
    for a, b, heads in zip(part, whole, (slice(2, 6), slice(1, 3), slice(1, 3)), strict=True):
        torch.testing.assert_close(a, b[:, :, heads], rtol=0, atol=0)


def test_two_dimensional_positions(device):
    qkv, weight, cos, sin = make(device, 2, 5, 2, 1, 8, axes=2)
    assert_matches(*pair(cos, sin), (qkv, weight), atol=1e-9, rtol=1e-9)


def test_one_table_for_all_rows(device):
    qkv, weight, cos, sin = make(device, 3, 4, 3, 1, 8)
    got = qk_norm_rope(qkv, weight, cos[:1], sin[:1], EPS)
    every = (t[:1].expand(3, -1, -1, -1) for t in (cos, sin))
    torch.testing.assert_close(got, qk_norm_rope_reference(qkv, weight, *every, EPS))


@pytest.mark.parametrize("dims", [(0, 1), (2, 3), (1, 2), (3, 4)], ids=str)
def test_strided_input(device, dims):
    qkv, weight, cos, sin = make(device, 4, 3, 2, 2, 8)
    strided = qkv.transpose(*dims).contiguous().transpose(*dims)
    assert_matches(*pair(cos, sin), (strided, weight), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_where_not_all_results_are_used(device, used):
    qkv, weight, cos, sin = make(device, 2, 3, 2, 2, 4)
    ours, reference = (
        lambda *args, f=f: [out for i, out in enumerate(f(*args)) if i in used] + [args[1] * 1] for f in pair(cos, sin)
    )
    assert_matches(ours, reference, (qkv, weight), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_close_as_torch_own(device, dtype):
    skip_bf16_under_interpreter(dtype, device)
    qkv, weight, cos, sin = make(device, 2, 6, 2, 2, 16)
    ours, reference = pair(cos, sin)
    assert_as_accurate(ours, reference, reference, (qkv, weight), dtype)


def test_gradcheck(device):
    qkv, weight, cos, sin = make(device, 1, 2, 2, 2, 2)
    assert torch.autograd.gradcheck(pair(cos, sin)[0], (qkv.requires_grad_(), weight.requires_grad_()), fast_mode=True)


def test_repeats_bitwise_and_compiles(device):
    qkv, weight, cos, sin = make(device, 2, 9, 2, 2, 8, dtype=torch.float32)
    ours, _ = pair(cos, sin)
    assert_repeats(ours, (qkv, weight))
    assert_compiles(ours, (qkv, weight))


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_operator_checks(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("plain torch")
    qkv, weight, cos, sin = make(device, 2, 3, 2, 2, 8, dtype=torch.float32)
    q, k, v = qk_norm_rope(qkv, weight, cos, sin, EPS)
    op, backward = torch.ops.megamm.qk_norm_rope_gpu, torch.ops.megamm.qk_norm_rope_backward_gpu
    torch.library.opcheck(op.default, (qkv, weight, cos, sin, EPS))
    scale = op(qkv, weight, cos, sin, EPS)[2]
    torch.library.opcheck(backward.default, (q, k, v, qkv, weight, cos, sin, scale))


def score(head_dim, first, second):
    """Product of a rotated query at one position and a rotated key at another."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(3, head_dim, dtype=torch.float64, generator=generator).expand(1, 2, 1, 3, head_dim)
    cos, sin = rope_table(torch.tensor([[first, second]]), head_dim, 10000.0)
    q, k, _ = qk_norm_rope(qkv, torch.ones(2, head_dim, dtype=torch.float64), cos, sin, 0.0)
    return (q[0, 0] * k[0, 1]).sum()


def test_scores_depend_on_distance_only():
    torch.testing.assert_close(score(16, 5, 2), score(16, 105, 102), atol=1e-4, rtol=0)
    assert abs(score(16, 5, 2) - score(16, 5, 3)) > 1e-3


def test_scores_of_patches_depend_on_both_distances():
    torch.testing.assert_close(score(16, [5, 7], [2, 3]), score(16, [15, 27], [12, 23]), atol=1e-4, rtol=0)
    assert abs(score(16, [5, 7], [2, 3]) - score(16, [5, 7], [3, 3])) > 1e-3
    assert abs(score(16, [5, 7], [2, 3]) - score(16, [5, 7], [2, 4])) > 1e-3


def test_errors_name_the_shapes(device):
    qkv, weight, cos, sin = make(device, 2, 3, 2, 1, 8)
    with pytest.raises(ValueError, match=r"weight is \[1, 8\]: want \[2, 8\]"):
        qk_norm_rope(qkv, weight[:1], cos, sin, EPS)
    with pytest.raises(ValueError, match=r"\[2 or 1, 3, 1, 4\]"):
        qk_norm_rope(qkv, weight, cos[:, :2], sin, EPS)
    for wrong in (qkv[:, :, :, :2], qkv.flatten(2, 3), qkv[..., :7]):
        with pytest.raises(ValueError, match="query heads of a group"):
            qk_norm_rope(wrong, weight, cos, sin, EPS)
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_table(torch.zeros(1, 1, 2), 6, 100.0)
