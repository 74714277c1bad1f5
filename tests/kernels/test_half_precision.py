"""Attention in 16-bit types at the sizes of real rows, position by position, against float64.

The error that rounding causes is known: an operand of a product is off by up to half of the type's epsilon, each in a
direction of its own, so that errors add up as the root of the sum of squares. A key left out stands out of that, among
500 in bfloat16 and among thousands in float16; it would not stand out of a bound that adds the errors themselves.
"""

import pytest
import torch
from megamm_kernels import attention_mask, dispatch, interval_attention
from megamm_kernels.interval_attention import interval_attention_reference
from rows import intervals

MARGIN = 1.0
"""Times epsilon. The root mean square of a rounding error is .29 epsilon at most; the worst of thousands of positions
is about .4 in the emulation below."""
LSE_STEPS = 64
"""Epsilons of float32 that a log-sum-exp may be off."""
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")
WIDTHS = [48, 64, 80, 96, 128, 256]


def mixed_row(length: int) -> list[list[int]]:
    """Captions, pages with images, documents of one token and of text; the last eighth is padding.

    An image has a quarter of the row's positions, but 256 at most.
    """
    image = min(256, length // 4)
    documents = [[2, -image, length // 16], [1], [1], [length // 10], [5, -image // 2, 7, -image // 3, 3], [1]]
    used = sum(abs(span) for spans in documents for span in spans)
    return [*documents, [7 * length // 8 - used]]


def rounding(x: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Norm [B, S, H] of the error to expect of results ``x`` [B, S, H, D], times epsilon: ``terms`` are the squares of
    what was rounded on the way, summed, and the result is rounded, too."""
    # Below the smallest normal number the steps are equal, so that small terms lose more than epsilon.
    floor = torch.finfo(dtype).smallest_normal * x.shape[1] ** 0.5
    return (terms + x.square() + floor**2).sum(-1).sqrt()


def exact(q, k, v, grad, lo, hi, dtype):
    """In float64 from the same numbers: log-sum-exp, and of each of NAMES the result and its error to expect."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    keys = torch.arange(k.shape[1], device=k.device)
    seen = ((keys >= lo[..., None]) & (keys <= hi[..., None]))[:, None]
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1).transpose(1, 2)
    p = scores.softmax(-1).nan_to_num(0.0)
    del scores

    def of_keys(weights, x):
        """[B, S, H, D]: a sum over keys for each query."""
        return torch.einsum("bhqk,bkhd->bqhd", weights, x)

    def of_queries(weights, x):
        """[B, S, key heads, D]: a sum over queries, and over the query heads of a key head."""
        return torch.einsum("bhqk,bqhd->bkhd", weights, x).unflatten(2, (-1, group)).sum(3)

    out = of_keys(p, v)
    out_terms = of_keys(p.square(), v.square())
    # The backward subtracts the sum of grad * out, which has the errors of the output as stored.
    delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
    delta_terms = (grad.square() * (out_terms + out.square())).sum(-1)
    dv, dv_terms = of_queries(p, grad), of_queries(p.square(), grad.square())
    ds = p * (torch.einsum("bqhd,bkhd->bhqk", grad, v) - delta)
    dq, dk = scale * of_keys(ds, k), scale * of_queries(ds, q)
    dq_terms = of_keys(ds.square(), k.square()) + delta_terms[..., None] * of_keys(p, k).square()
    squares = ds.square_() + p.square_() * delta_terms.transpose(1, 2)[..., None]
    dk_terms = of_queries(squares, q.square())
    pairs = ((out, out_terms), (dq, scale**2 * dq_terms), (dk, scale**2 * dk_terms), (dv, dv_terms))
    return lse, [(x, rounding(x, terms, dtype)) for x, terms in pairs]


def draw(length: int, head_dim: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device):
    """q, k, v, the output's gradient, lo and hi of a mixed row and of a row that is one text."""
    generator = torch.Generator().manual_seed(0)

    def normal(num_heads: int) -> torch.Tensor:
        return torch.randn(2, length, num_heads, head_dim, generator=generator).to(device, dtype)

    lo, hi = zip(intervals(mixed_row(length), length), intervals([[length]], length), strict=True)
    q, k, v, grad = normal(heads[0]), normal(heads[1]), normal(heads[1]), normal(heads[0])
    return q, k, v, grad, torch.stack(lo).to(device), torch.stack(hi).to(device)


def check(length: int, head_dim: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Output, log-sum-exp and all gradients of the Triton kernels."""
    q, k, v, grad, lo, hi = draw(length, head_dim, heads, dtype, device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = interval_attention(*leaves, attention_mask(lo, hi, dtype, "interval"), return_lse=True)
    got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    want_lse, want = exact(q, k, v, grad, lo, hi, dtype)
    some = (lo <= hi)[..., None].expand_as(lse)
    error = (lse.double() - want_lse)[some].abs() / (1 + want_lse[some].abs())
    assert error.max() <= LSE_STEPS * torch.finfo(torch.float32).eps, "log-sum-exp"
    assert (lse[~some] == -torch.inf).all()
    for name, x, (expected, norm) in zip(NAMES, got, want, strict=True):
        ratio = (x.double() - expected).norm(dim=-1) / (norm * torch.finfo(dtype).eps)
        worst = ratio.argmax().item()
        row, position, head = (int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
        where = f"{name}: row {row}, position {position}, head {head}"
        assert ratio.max() <= MARGIN, f"{where}: {ratio.max():.3g} times the error of rounding"


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_every_head_width_at_a_thousand_positions(head_dim, dtype, cuda):
    check(1000, head_dim, (4, 2), dtype, cuda)


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=["each its keys", "four on one"])
@pytest.mark.parametrize("length, head_dim", [(1024, 80), (2047, 64), (4096, 64), (4096, 128)])
def test_long_rows(length, head_dim, heads, dtype, cuda):
    check(length, head_dim, heads, dtype, cuda)


@pytest.mark.skipif(not dispatch.HAS_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter")
def test_the_same_check_in_the_interpreter(monkeypatch):
    """Small, in float16, whose products the interpreter gets right."""
    monkeypatch.setattr(dispatch, "interpret", True)
    check(80, 48, (2, 1), torch.float16, torch.device("cpu"))


def test_the_exact_gradients_are_those_of_the_definition():
    q, k, v, grad, lo, hi = draw(64, 8, (4, 2), torch.float64, torch.device("cpu"))
    _, results = exact(q, k, v, grad, lo, hi, torch.float16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = interval_attention_reference(*leaves, lo, hi)
    for (got, _), want in zip(results, (out, *torch.autograd.grad(out, leaves, grad)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lost", [False, True], ids=["rounded", "a key is lost"])
def test_the_bound_lets_rounding_pass_and_sees_a_lost_key(dtype, lost):
    """Flash attention's arithmetic in plain torch: 16-bit operands of products, float32 sums."""
    q, k, v, grad, lo, hi = draw(512, 64, (1, 1), dtype, torch.device("cpu"))
    _, want = exact(q, k, v, grad, lo, hi, dtype)
    keys = torch.arange(512)
    seen = ((keys >= lo[..., None]) & (keys <= hi[..., None]))[:, None]
    if lost:
        seen[1, 0, 511, 100] = False
    wide = [x.float() for x in (q, k, v, grad)]
    scores = torch.einsum("bqhd,bkhd->bhqk", *wide[:2]) / 8
    scores = scores.masked_fill(~seen, -torch.inf)
    high = scores.amax(-1, keepdim=True).clamp(min=-1e9)
    weights = (scores - high).exp()
    sums = weights.sum(-1).transpose(1, 2)[..., None]
    out = torch.einsum("bhqk,bkhd->bqhd", weights.to(dtype).float(), wide[2]) / sums.clamp(min=1e-30)
    p = weights / sums.transpose(1, 2).clamp(min=1e-30)
    out = out.to(dtype).float()
    delta = (wide[3] * out).sum(-1).transpose(1, 2)[..., None]
    ds = (p * (torch.einsum("bqhd,bkhd->bhqk", wide[3], wide[2]) - delta)).to(dtype).float()
    results = [
        out,
        torch.einsum("bhqk,bkhd->bqhd", ds, wide[1]) / 8,
        torch.einsum("bhqk,bqhd->bkhd", ds, wide[0]) / 8,
        torch.einsum("bhqk,bqhd->bkhd", p.to(dtype).float(), wide[3]),
    ]
    worst = [
        ((x.to(dtype).double() - exactly).norm(dim=-1) / (norm * torch.finfo(dtype).eps)).max().item()
        for x, (exactly, norm) in zip(results, want, strict=True)
    ]
    assert (max(worst[:2]) > MARGIN) if lost else (max(worst) < MARGIN), worst
