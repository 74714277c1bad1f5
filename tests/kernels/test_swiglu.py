"""SwiGLU on pairs of gate and up, with and without the product before it, against its definition in float64."""

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
from megamm_kernels import dispatch, linear_swiglu, swiglu
from megamm_kernels.swiglu import linear_swiglu_reference, swiglu_reference


def make(device, *shape, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(*shape, dtype=dtype) * 3).to(device)


@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 2), (0, 16), (3, 4102)], ids=str)
def test_matches_the_definition(device, shape, monkeypatch):
    x = make(device, *shape)
    poison_outputs(monkeypatch)
    assert_matches(swiglu, swiglu_reference, [x], atol=1e-12, rtol=1e-12)


def test_gate_and_up_stand_side_by_side(device):
    x = make(device, 3, 8)
    torch.testing.assert_close(swiglu(x), F.silu(x[:, ::2]) * x[:, 1::2])
    torch.testing.assert_close(swiglu(x[:, 2:6]), swiglu(x)[:, 1:3])


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, in the interpreter
def test_strided_input_and_large_gates(device):
    x = make(device, 4, 6, 10, dtype=torch.float32).transpose(0, 1)
    assert_matches(swiglu, swiglu_reference, [x], atol=1e-5, rtol=1e-5)
    gate_up = torch.tensor([[-200.0, 2.0, 200.0, 3.0]], device=device, requires_grad=True)
    out = swiglu(gate_up)
    assert out.tolist() == [[0.0, 600.0]]
    assert torch.autograd.grad(out.sum(), gate_up)[0].tolist() == [[0.0, 0.0, 3.0, 200.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_close_as_torch_own(device, dtype):
    skip_bf16_under_interpreter(dtype, device)
    assert_as_accurate(swiglu, swiglu_reference, swiglu_reference, [make(device, 16, 96)], dtype)


def test_gradcheck(device):
    assert torch.autograd.gradcheck(swiglu, make(device, 3, 6).requires_grad_())


def test_repeats_bitwise_and_compiles(device):
    x = make(device, 5, 40, dtype=torch.float32)
    assert_repeats(swiglu, [x])
    assert_compiles(swiglu, [x])


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_operator_checks(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("plain torch")
    x = make(device, 3, 8, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.megamm.swiglu_gpu.default, (x,))


def test_odd_width_is_an_error(device):
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        swiglu(make(device, 2, 3))


def layer(device, *shape, hidden, dtype=torch.float64):
    """Input and weight of the product before the gating."""
    x = make(device, *shape, dtype=dtype)
    return x, make(device, 2 * hidden, shape[-1], dtype=dtype) / 6


@pytest.mark.parametrize("shape, hidden", [((2, 5, 6), 12), ((1, 3), 1), ((0, 4), 8), ((7, 1), 35)], ids=str)
def test_linear_matches_the_definition(device, shape, hidden, monkeypatch):
    x, weight = layer(device, *shape, hidden=hidden)
    poison_outputs(monkeypatch)
    assert_matches(linear_swiglu, linear_swiglu_reference, [x, weight], atol=1e-12, rtol=1e-12)


def test_linear_of_a_slice_of_rows(device):
    x, weight = layer(device, 3, 5, hidden=6)
    torch.testing.assert_close(linear_swiglu(x, weight[4:8]), linear_swiglu(x, weight)[:, 2:4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_in_half_precision_is_as_close_as_torch_own(device, dtype):
    skip_bf16_under_interpreter(dtype, device)
    tensors = layer(device, 16, 40, hidden=48)
    assert_as_accurate(linear_swiglu, linear_swiglu_reference, linear_swiglu_reference, tensors, dtype)


def test_linear_casts_the_weight(device):
    x, weight = layer(device, 4, 6, hidden=3, dtype=torch.float32)
    weight.requires_grad_()
    out = linear_swiglu(x.half(), weight)
    assert (out.dtype, torch.autograd.grad(out.sum(), weight)[0].dtype) == (torch.float16, torch.float32)


def test_linear_repeats_bitwise_and_compiles(device):
    tensors = layer(device, 5, 12, hidden=20, dtype=torch.float32)
    assert_repeats(linear_swiglu, tensors)
    assert_compiles(linear_swiglu, tensors)


def test_linear_does_not_copy_the_weight():
    """On the CPU the rows of gate and of up are read where they lie."""
    x, weight = layer(torch.device("cpu"), 4, 6, hidden=3)
    with torch.profiler.profile() as profile:
        linear_swiglu(x, weight)
    calls = {event.key for event in profile.key_averages()}
    assert "aten::mm" in calls
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & calls


def test_linear_with_a_wrong_width_is_an_error(device):
    with pytest.raises(ValueError, match=r"weight is \[4, 5\]: want \[2 \* hidden, 3\]"):
        linear_swiglu(make(device, 2, 3), make(device, 4, 5))
    with pytest.raises(ValueError, match=r"weight is \[5, 3\]"):
        linear_swiglu(make(device, 2, 3), make(device, 5, 3))
