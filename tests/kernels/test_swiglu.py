"""SwiGLU on a fused gate-up product, against its definition in float64."""

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
from megamm_kernels import dispatch, swiglu
from megamm_kernels.swiglu import swiglu_reference


def make(device, *shape, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(*shape, dtype=dtype) * 3).to(device)


@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 2), (0, 16), (3, 4102)], ids=str)
def test_matches_the_definition(device, shape, monkeypatch):
    x = make(device, *shape)
    poison_outputs(monkeypatch)
    assert_matches(swiglu, swiglu_reference, [x], atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, in the interpreter
def test_strided_input_and_large_gates(device):
    x = make(device, 4, 6, 10, dtype=torch.float32).transpose(0, 1)
    assert_matches(swiglu, swiglu_reference, [x], atol=1e-5, rtol=1e-5)
    gate_up = torch.tensor([[-200.0, 200.0, 2.0, 3.0]], device=device, requires_grad=True)
    out = swiglu(gate_up)
    assert out.tolist() == [[0.0, 600.0]]
    assert torch.autograd.grad(out.sum(), gate_up)[0].tolist() == [[0.0, 3.0, 0.0, 200.0]]


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
