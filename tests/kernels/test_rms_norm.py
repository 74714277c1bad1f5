"""RMS norm with and without residual addition, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_as_accurate,
    assert_compiles,
    assert_matches,
    assert_repeats,
    poison_outputs,
    skip_bf16_under_interpreter,
)
from megamm_kernels import add_rms_norm, dispatch, rms_norm
from megamm_kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

EPS = 1e-6


def norm(x, weight):
    return rms_norm(x, weight, EPS)


def norm_reference(x, weight):
    return rms_norm_reference(x, weight, EPS)


def add_norm(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def add_norm_reference(x, residual, weight):
    return add_rms_norm_reference(x, residual, weight, EPS)


def make(device, *shape, dtype=torch.float64):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, dtype=dtype) * 3
    return x.to(device), residual.to(device), (torch.rand(shape[-1], dtype=dtype) + 0.5).to(device)


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 8), (13, 1), (0, 16), (3, 130)], ids=str)
def test_matches_the_definition(device, shape, monkeypatch):
    x, residual, weight = make(device, *shape)
    poison_outputs(monkeypatch)
    assert_matches(norm, norm_reference, (x, weight), atol=1e-9, rtol=1e-9)
    assert_matches(add_norm, add_norm_reference, (x, residual, weight), atol=1e-9, rtol=1e-9)


def test_strided_input_and_weight_of_another_dtype(device):
    x, residual, weight = make(device, 5, 6, 16, dtype=torch.float32)
    x, residual = x.transpose(0, 1), residual.transpose(0, 1)
    weight = weight.double()
    assert_matches(norm, norm_reference, (x, weight), atol=1e-5, rtol=1e-5)
    assert_matches(add_norm, add_norm_reference, (x, residual, weight), atol=1e-5, rtol=1e-5)
    assert norm(x, weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_close_as_torch_own(device, dtype):
    skip_bf16_under_interpreter(dtype, device)
    x, residual, weight = make(device, 40, 48)

    def peer(x, weight):
        return F.rms_norm(x, weight.shape, weight, EPS)

    def add_peer(x, residual, weight):
        return peer(x + residual, weight), x + residual

    assert_as_accurate(norm, peer, norm_reference, (x, weight), dtype)
    assert_as_accurate(add_norm, add_peer, add_norm_reference, (x, residual, weight), dtype)


def test_gradcheck(device):
    inputs = [t.requires_grad_() for t in make(device, 3, 5)]
    assert torch.autograd.gradcheck(norm, (inputs[0], inputs[2]))
    assert torch.autograd.gradcheck(add_norm, inputs)


def test_one_gradient_is_enough(device):
    x, residual, weight = make(device, 4, 8)
    for wanted in (0, 1):
        leaf = x.clone().requires_grad_()
        out = add_norm(leaf, residual, weight)[wanted].sum()
        want = add_norm_reference(leaf, residual, weight)[wanted].sum()
        torch.testing.assert_close(*(torch.autograd.grad(o, leaf)[0] for o in (out, want)))


def test_repeats_bitwise_and_compiles(device):
    x, residual, weight = make(device, 30, 40, dtype=torch.float32)
    assert_repeats(add_norm, (x, residual, weight))
    assert_compiles(norm, (x, weight))
    assert_compiles(add_norm, (x, residual, weight))


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_operator_checks(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("plain torch")
    x, residual, weight = (t.requires_grad_() for t in make(device, 3, 8, dtype=torch.float32))
    torch.library.opcheck(torch.ops.megamm.rms_norm_gpu.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.megamm.add_rms_norm_gpu.default, (x, residual, weight, EPS))


def test_errors_name_the_shapes(device):
    x, residual, weight = make(device, 3, 8)
    with pytest.raises(ValueError, match=r"\[7\].*\[3, 8\]"):
        norm(x, weight[:7])
    with pytest.raises(ValueError, match="float32"):
        add_norm(x, residual.float(), weight)


def test_cuda_without_triton_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "interpret", True)
    with pytest.raises(RuntimeError, match="pip install triton"):
        norm(torch.ones(2, 4), torch.ones(4))
