"""Mixture-of-experts routing and grouped products against loops over experts in float64."""

import importlib

import pytest
import torch
from megamm_kernels import (
    dispatch,
    grouped_experts,
    grouped_linear,
    grouped_linear_swiglu,
    permute_tokens,
    sort_by_expert,
    unpermute_tokens,
)
from megamm_kernels.grouped_experts import grouped_experts_reference, grouped_linear_reference

module = importlib.import_module("megamm_kernels.grouped_experts")  # the package has a function of this name
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
DTYPES = [torch.float64, torch.float32, torch.float16]
SIZES = {
    "ragged": [5, 0, 17, 1, 20],
    "one expert": [21],
    "all to the last": [0, 0, 18],
    "all to the first": [16, 0, 0],
    "no rows": [0, 0],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def leaf(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def skip_bfloat16(dtype):
    if dtype == torch.bfloat16 and dispatch.interpret:
        pytest.skip("the interpreter truncates casts to bfloat16")


def compare(run, reference, leaves, dtype):
    """Output and gradients of ``run`` against those of ``reference`` in float64 from the same rounded inputs."""
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, want = run(*leaves), reference(*exact)
    grad = torch.randn_like(want)
    got = [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
    expected = [want, *torch.autograd.grad(want, exact, grad.to(out.dtype).double())]
    for a, b, like in zip(got, expected, [leaves[0], *leaves], strict=True):
        assert a.dtype == like.dtype
        scale = max(1.0, b.abs().max().item() if b.numel() else 1.0)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * scale)


# ---- routing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, k, num_experts", [(0, 1, 3), (1, 1, 1), (13, 1, 4), (29, 3, 5), (6, 2, 40)])
def test_routing_is_a_stable_sort(device, tokens, k, num_experts):
    experts = torch.rand(tokens, num_experts).topk(k).indices.to(device)
    routing = sort_by_expert(experts, num_experts)
    assert torch.equal(routing.order, experts.flatten().argsort(stable=True))
    assert torch.equal(routing.order[routing.places.flatten()], torch.arange(tokens * k, device=device))
    assert torch.equal(routing.offsets.long(), experts.flatten().bincount(minlength=num_experts).cumsum(0))
    assert routing.offsets.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, k, width", [(0, 2, 8), (1, 1, 1), (13, 1, 33), (9, 3, 70)])
def test_permute_and_unpermute(device, tokens, k, width, dtype):
    experts = torch.rand(tokens, 4).topk(k).indices.to(device)
    routing = sort_by_expert(experts, 4)
    x = leaf(tokens, width, dtype=dtype, device=device)
    compare(lambda t: permute_tokens(t, routing), lambda t: t[routing.order // k], [x], dtype)
    y = leaf(tokens * k, width, dtype=dtype, device=device)
    weights = leaf(tokens, k, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device)

    def weighted_sum(rows, w):
        return (rows[routing.places] * w[..., None]).sum(1)

    compare(lambda rows, w: unpermute_tokens(rows, w, routing), weighted_sum, [y, weights], dtype)


# ---- grouped products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("inner, width", [(24, 40), (17, 5)])
def test_grouped_linear(device, sizes, inner, width, dtype):
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    x = leaf(sum(sizes), inner, dtype=dtype, device=device)
    weight = leaf(len(sizes), width, inner, dtype=dtype, device=device)
    compare(
        lambda a, w: grouped_linear(a, w, offsets),
        lambda a, w: grouped_linear_reference(a, w, offsets),
        [x, weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner, width", [(48, 40), (51, 37)], ids=["aligned", "odd"])
def test_low_precision_error_is_at_most_that_of_torch(device, inner, width, dtype):
    skip_bfloat16(dtype)
    sizes = SIZES["ragged"]
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    x, weight = (leaf(*s, dtype=dtype, device=device) for s in [(sum(sizes), inner), (len(sizes), width, inner)])
    grad = torch.randn(sum(sizes), width).to(device, dtype)

    def results(function, *leaves):
        out = function(*leaves, offsets)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = results(grouped_linear_reference, *(t.detach().double().requires_grad_() for t in (x, weight)))
    ours, theirs = results(grouped_linear, x, weight), results(grouped_linear_reference, x, weight)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).abs().max() <= 1.5 * (b - c).abs().max()


def test_float32_weights_and_strided_inputs(device):
    offsets = torch.tensor([3, 3, 9], device=device, dtype=torch.int32)
    x = leaf(12, 9, dtype=torch.float16, device=device)
    weight = leaf(3, 12, 16, dtype=torch.float32, device=device)
    out = grouped_linear(x.T, weight.mT, offsets)
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert (out.dtype, *(g.dtype for g in grads)) == (torch.float16, torch.float16, torch.float32)
    want = grouped_linear_reference(x.T.double(), weight.half().mT.double(), offsets)
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"do not fit: \(4, 3\), \(2, 5, 4\), \(2,\)"):
        grouped_linear(torch.ones(4, 3), torch.ones(2, 5, 4), torch.tensor([1, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[2, 5, 3\]: want \[E, 2 \* hidden, W\]"):
        grouped_linear_swiglu(torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([1, 4], dtype=torch.int32))


# ---- whole ----------------------------------------------------------------------------------------------


def moe(tokens, k, num_experts, width, hidden, dtype, device):
    experts = torch.rand(tokens, num_experts).topk(k).indices.to(device)
    shapes = [(tokens, width), (tokens, k), (num_experts, 2 * hidden, width), (num_experts, width, hidden)]
    return experts, [leaf(*s, dtype=dtype, device=device) for s in shapes]


@pytest.mark.parametrize("tokens, k, num_experts", [(11, 1, 3), (7, 2, 6)])
def test_experts_match_the_loop(device, tokens, k, num_experts):
    experts, leaves = moe(tokens, k, num_experts, 8, 12, torch.float64, device)
    compare(
        lambda x, *rest: grouped_experts(x, experts, *rest),
        lambda x, *rest: grouped_experts_reference(x, experts, *rest),
        leaves,
        torch.float64,
    )


def test_gate_and_up_of_an_expert_stand_side_by_side(device):
    """Written out, and a slice of the pairs is a share of every expert."""
    experts, (x, weights, gate_up, down) = moe(7, 2, 3, 8, 6, torch.float64, device)
    got = grouped_experts(x, experts, weights, gate_up, down)
    gate, up = x @ gate_up[:, ::2].mT, x @ gate_up[:, 1::2].mT  # [E, n, hidden]
    every = (torch.nn.functional.silu(gate) * up) @ down.mT
    chosen = every.transpose(0, 1).gather(1, experts[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(got, (chosen * weights[..., None]).sum(1))
    shares = [
        grouped_experts(x, experts, weights, gate_up[:, 2 * a : 2 * b], down[..., a:b]) for a, b in ((0, 2), (2, 6))
    ]
    torch.testing.assert_close(sum(shares), got)


def test_gradcheck(device):
    experts, leaves = moe(3, 2, 3, 4, 2, torch.float64, device)
    assert torch.autograd.gradcheck(lambda x, *rest: grouped_experts(x, experts, *rest), leaves, fast_mode=True)


def test_is_deterministic_and_untouched_by_what_memory_held(device, monkeypatch):
    experts, leaves = moe(21, 2, 5, 24, 16, torch.float32, device)

    def run():
        out = grouped_experts(leaves[0], experts, *leaves[1:])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = run()
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)


def test_operator_checks(device):
    experts, (x, weights, gate_up, _) = moe(5, 2, 3, 8, 4, torch.float32, device)
    routing = sort_by_expert(experts, 3)
    y = permute_tokens(x, routing).detach().requires_grad_()
    ops = torch.ops.megamm
    torch.library.opcheck(ops.gather_copies.default, (x, routing.order, routing.places))
    torch.library.opcheck(ops.sum_copies.default, (y, routing.places, routing.order, weights))
    torch.library.opcheck(ops.sum_copies.default, (y, routing.places, routing.order, None))
    torch.library.opcheck(ops.grouped_linear.default, (y, gate_up, routing.offsets))


def test_compiles_without_a_graph_break(device):
    experts, leaves = moe(9, 2, 4, 8, 4, torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    out, want = (f(leaves[0], experts, *leaves[1:]) for f in (compiled, grouped_experts))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), leaves) for o in (out, want)))


def test_torchs_newer_precision_setting_is_understood():
    """Once it has been used, torch's older getters raise."""
    if not dispatch.HAS_TRITON:
        pytest.skip("needs Triton")
    from megamm_kernels.gpu.launch import float32_precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert float32_precision() == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert float32_precision() == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize(
    "name, capability, hip, fast",
    [
        ("A100", (8, 0), None, False),
        ("H100", (9, 0), None, True),
        ("B200", (10, 0), None, True),
        ("RTX PRO 6000", (12, 0), None, False),
        ("MI300, gfx942", (9, 4), "6.4", False),
        ("MI350, gfx950", (9, 5), "7.0", False),
    ],
)
def test_only_hopper_and_blackwell_use_the_grouped_product_of_torch(name, capability, hip, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    x = torch.zeros(8, 16, dtype=torch.bfloat16).as_subclass(OnGpu)
    assert module._torch_is_fast(x, 16, 32) is fast
    assert dispatch.nvidia_generation(x.device) == (None if hip else capability[0])
    assert not module._torch_is_fast(x, 12)
