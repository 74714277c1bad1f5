"""The backends beside our kernel: the same numbers, what they refuse, and what they say."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from megamm_kernels import attention_mask, dispatch, interval_attention
from megamm_kernels.attention_backends import flex
from megamm_kernels.interval_attention import interval_attention_reference
from rows import intervals

TEXT = [[[9], [1], [20]], [[33]], []]
IMAGES = [[[-9], [-1], [-20]], [[-33]], []]
MIXED = [[[4, -9, 2], [1], [-12, 3]], [[33]], []]
LENGTH = 37


def batch(rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = zip(*(intervals(documents, LENGTH) for documents in rows), strict=True)
    return torch.stack(lo), torch.stack(hi)


def qkv(dtype=torch.float64, heads=4, requires_grad=False):
    return [
        torch.randn(3, LENGTH, h, 8, dtype=dtype).requires_grad_(requires_grad) for h in (heads, heads // 2, heads // 2)
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows", [TEXT, IMAGES, MIXED], ids=["text", "images", "mixed"])
@pytest.mark.parametrize("block", [8, 128])
def test_flex_gives_the_same_numbers(rows, block, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", block)
    lo, hi = batch(rows)
    inputs = qkv()
    out, lse = interval_attention(*inputs, attention_mask(lo, hi, backend="flex"), return_lse=True)
    want, want_lse = interval_attention_reference(*inputs, lo, hi, return_lse=True)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)


def test_flex_compiles_to_one_graph_for_all_rows():
    torch.compiler.reset()
    compiled = torch.compile(interval_attention, fullgraph=True, backend="aot_eager")
    inputs = qkv()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (TEXT, MIXED):
            lo, hi = batch(rows)
            out = compiled(*inputs, attention_mask(lo, hi, backend="flex"))
            torch.testing.assert_close(out, interval_attention_reference(*inputs, lo, hi), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_keys", [LENGTH, 50])
def test_blocks_of_flex_match_the_dense_mask(num_keys):
    lo, hi = batch(MIXED)
    some, whole = flex.seen_blocks(lo, hi, num_keys, 4)
    n = torch.arange(num_keys)
    seen = (lo[..., None] <= n) & (n <= hi[..., None])
    pad = (0, -num_keys % 4, 0, -LENGTH % 4)
    tiles = F.pad(seen, pad).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
    assert torch.equal(some, tiles.any(4).any(2))
    # Past the end of the row no query is asked; a block that reaches past the last key is never whole.
    tiles = F.pad(F.pad(seen, (0, pad[1])), (0, 0, 0, pad[3]), value=True).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
    assert torch.equal(whole, tiles.all(4).all(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_backends_on_a_gpu_match_the_definition(backend):
    lo, hi = (x.cuda() for x in batch(MIXED))
    inputs = [F.pad(x, (0, 8)).float().cuda().requires_grad_() for x in qkv()]
    out = interval_attention(*inputs, attention_mask(lo, hi, backend=backend))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = interval_attention_reference(*wide, lo, hi)
    torch.testing.assert_close(out.double(), want, atol=5e-5, rtol=0)
    grads = torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(want.square().sum(), wide)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=5e-4, rtol=0)


@pytest.fixture
def fake_flash_attn(monkeypatch):
    """A stand-in for the package: the contract of its varlen function in plain torch."""

    def flash_attn_varlen_func(
        q, k, v, starts, key_starts, longest, longest_key, *, causal, deterministic, return_attn_probs
    ):
        assert torch.equal(starts, key_starts) and starts.dtype == torch.int32 and deterministic
        assert int(starts.diff().max()) == longest == longest_key
        outs, lses = [], []
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            position = torch.arange(end - start)
            last = position if causal else torch.full_like(position, end - start - 1)
            out, lse = interval_attention_reference(
                *(x[None, start:end].float() for x in (q, k, v)), torch.zeros(1, end - start), last[None], True
            )
            outs.append(out[0].to(q.dtype))
            lses.append(lse[0])
        return (torch.cat(outs), torch.cat(lses).T, None) if return_attn_probs else torch.cat(outs)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("rows", [TEXT, IMAGES], ids=["text", "images"])
def test_flash_gives_the_same_numbers(rows, fake_flash_attn):
    lo, hi = batch(rows)
    inputs = qkv(torch.float16, requires_grad=True)
    mask = attention_mask(lo, hi, torch.float16, "flash")
    assert mask.causal == (rows is TEXT)
    out, lse = interval_attention(*inputs, mask, return_lse=True)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want, want_lse = interval_attention_reference(*wide, lo, hi, return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)
    assert torch.equal(interval_attention(*inputs, mask), out)
    grads = torch.autograd.grad(out.float().sum(), inputs), torch.autograd.grad(want.sum(), wide)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=0)


def test_flash_says_why_it_refuses(fake_flash_attn):
    lo, hi = batch(MIXED)
    with pytest.raises(ValueError, match=r"images among text.*'interval'"):
        attention_mask(lo, hi, torch.bfloat16, "flash")
    with pytest.raises(ValueError, match="from the start of their document"):
        attention_mask(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 2]]), torch.bfloat16, "flash")
    with pytest.raises(ValueError, match=r"float16 and bfloat16, not torch\.float32"):
        attention_mask(lo, hi, torch.float32, "flash")
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention_mask(lo, hi, torch.bfloat16, "flash", num_keys=99)


@pytest.mark.parametrize(("backend", "package"), [("flash", "flash-attn"), ("flex_flash", "flash-attn-4")])
def test_missing_packages_are_named(backend, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=f"'{backend}' needs the package {package}:"):
        attention_mask(*batch(TEXT), torch.bfloat16, backend)


def test_what_cannot_run_is_an_error_and_never_replaced(monkeypatch):
    lo, hi = batch(TEXT)
    with pytest.raises(ValueError, match=r"runs on CUDA, not on cpu.*'sdpa'"):
        attention_mask(lo, hi, backend="interval")
    with pytest.raises(ValueError, match=r"unknown attention backend 'fast'; known are interval, flex"):
        attention_mask(lo, hi, backend="fast")
    with pytest.raises(ValueError, match=r"both be \[B, S\]"):
        attention_mask(lo, hi[0])
    mask = attention_mask(lo, hi, torch.float64)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="do not fit together"):
        interval_attention(q, k, v[:, 1:], mask)
    with pytest.raises(ValueError, match="2 heads of keys do not divide 3"):
        interval_attention(q[:, :, :3], k, v, mask)
    if not dispatch.HAS_TRITON:
        return
    monkeypatch.setattr(dispatch, "interpret", True)
    mask = attention_mask(lo, hi, backend="interval")
    with pytest.raises(ValueError, match=r"the mask is for 3 rows of 37 queries and 37 keys"):
        interval_attention(q[:, 1:], k, v, mask)
    with pytest.raises(ValueError, match="up to 256 wide, not 264"):
        interval_attention(*(x.repeat(1, 1, 1, 33) for x in (q, k, v)), mask)
