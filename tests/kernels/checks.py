"""Checks that the tests of several ops share."""

from collections.abc import Callable, Sequence

import pytest
import torch


def outputs_and_gradients(function: Callable, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and the gradients of all inputs for output gradients that depend on the shapes only."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, grads))


def assert_matches(function: Callable, reference: Callable, inputs: Sequence[torch.Tensor], **tolerance) -> None:
    """``function`` on ``inputs`` against ``reference`` on the same numbers in float64, forward and backward."""
    got = outputs_and_gradients(function, inputs)
    want = outputs_and_gradients(reference, [x.double() for x in inputs])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a.double(), b, msg=lambda text, i=i: f"result {i}: {text}", **tolerance)


def assert_as_accurate(
    function: Callable, peer: Callable, reference: Callable, inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    """In ``dtype``, no output or gradient is further from float64 than 1.5 times the peer's."""
    inputs = [x.to(dtype) for x in inputs]
    want = outputs_and_gradients(reference, [x.double() for x in inputs])
    ours, theirs = (outputs_and_gradients(f, inputs) for f in (function, peer))
    for i, (a, b, exact) in enumerate(zip(ours, theirs, want, strict=True)):
        error, allowed = ((x.double() - exact).abs().max().item() for x in (a, b))
        assert error <= 1.5 * allowed, f"result {i}: error {error:.3g}, the peer's {allowed:.3g}"


def assert_repeats(function: Callable, inputs: Sequence[torch.Tensor]) -> None:
    """Two runs give the same bits."""
    first, second = (outputs_and_gradients(function, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_compiles(function: Callable, inputs: Sequence[torch.Tensor]) -> None:
    """No graph break, and the same result."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


def poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and torch.empty_like holds NaN, so that what a kernel leaves unwritten shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(111)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def skip_bf16_under_interpreter(dtype: torch.dtype, device: torch.device) -> None:
    """Triton's interpreter gets bf16 wrong."""
    from megamm_kernels import dispatch

    if dispatch.interpret and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter truncates to bf16")
