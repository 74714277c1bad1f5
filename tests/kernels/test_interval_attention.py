"""Interval attention against its definition in float64, forward and backward."""

import runpy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checks import assert_as_accurate, assert_matches, assert_repeats, poison_outputs, skip_bf16_under_interpreter
from megamm_kernels import attention_mask, default_backend, dispatch, interval_attention
from megamm_kernels.attention_backends import sdpa
from megamm_kernels.interval_attention import interval_attention_reference as reference
from rows import intervals

LENGTH = 70
ROWS = {  # of queries in tiles of 32 and keys in tiles of 16, in the interpreter
    "one-token documents": [[1]] * LENGTH,
    "all image": [[-LENGTH]],
    "all text": [[LENGTH]],
    "all padding": [],
    "images at tile edges": [[16, -16], [-32], [3]],
    "images across tile edges": [[9], [20, -30, 2]],
    "padding from a tile edge on": [[10, -22]],
    "odd lengths": [[7, -13, 3], [1], [30]],
}
BATCHES = [["one-token documents", "all padding"], ["all image", "odd lengths"], list(ROWS)[2:7:2], list(ROWS)[5:7]]
BY_BATCH = pytest.mark.parametrize("names", BATCHES, ids=lambda names: ", ".join(names))


def batch(rows: list, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = zip(*(intervals(documents, length) for documents in rows), strict=True)
    return torch.stack(lo).to(device), torch.stack(hi).to(device)


def exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cuda" else torch.float64


def random_qkv(lo, heads=(2, 1), head_dim=16, num_keys=None, dtype=None):
    """q, k, v that require gradients."""
    rows, length = lo.shape
    dtype = dtype or exact_dtype(lo.device)
    q = torch.randn(rows, length, heads[0], head_dim, device=lo.device, dtype=dtype)
    k, v = (torch.randn(rows, num_keys or length, heads[1], head_dim, device=lo.device, dtype=dtype) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v)]


def check(attend, qkv, lo, hi):
    """Compare output, log-sum-exp and the gradients of both with the dense definition in float64."""
    tolerance = 5e-5 if lo.is_cuda else 1e-12
    assert_matches(attend, lambda *x: reference(*x, lo, hi, True), qkv, atol=tolerance, rtol=0)
    out, lse = attend(*qkv)
    assert (out[hi < lo] == 0).all()
    assert torch.equal(lse == -torch.inf, (hi < lo)[..., None].expand_as(lse))


def by_default(lo, hi, dtype=None, num_keys=None):
    """The attention that runs where the intervals are."""
    mask = attention_mask(lo, hi, dtype or exact_dtype(lo.device), default_backend(lo), num_keys)
    return lambda q, k, v: interval_attention(q, k, v, mask, return_lse=True)


@BY_BATCH
def test_matches_the_dense_definition(names, device):
    torch.manual_seed(0)
    lo, hi = batch([ROWS[name] for name in names], LENGTH, device)
    check(by_default(lo, hi), random_qkv(lo), lo, hi)


@pytest.mark.parametrize("seed", range(3))
def test_random_rows(seed, device):
    generator = torch.Generator().manual_seed(seed)

    def random_row(length):
        documents = []
        while length > 0:
            spans = torch.randint(-20, 20, (3,), generator=generator).tolist()
            spans = [span for span in spans if span and abs(span) <= length // 3]
            documents.append(spans)
            length -= sum(map(abs, spans)) + 1
        return documents

    lo, hi = batch([random_row(45 + seed) for _ in range(2)], 45 + seed, device)
    check(by_default(lo, hi), random_qkv(lo, heads=(4, 2) if seed else (1, 1), head_dim=8), lo, hi)


@pytest.mark.parametrize("head_dim", [24, 40, 64, 80, 96, 128, 256])
def test_head_widths(head_dim, device):
    lo, hi = batch([[[5, -7], [6]]], 19, device)
    check(by_default(lo, hi), random_qkv(lo, head_dim=head_dim), lo, hi)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_heads_are_cut_into_powers_of_two():
    from megamm_kernels.gpu.interval_attention import MAX_HEAD_DIM, parts

    assert [parts(d) for d in (8, 16, 48, 64, 80, 96, 128)] == [
        (16, 0),
        (16, 0),
        (32, 16),
        (64, 0),
        (64, 16),
        (64, 32),
        (128, 0),
    ]
    for d in range(1, MAX_HEAD_DIM + 1):
        main, rest = parts(d)
        assert main in (16, 32, 64, 128, 256) and rest in (0, 16, 32, 64) and d <= main + rest < max(17, 2 * d)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("limit", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024], ids=["MI300", "RTX", "A100", "H100"])
def test_tiles_fit_into_shared_memory(limit):
    from megamm_kernels.gpu import interval_attention as gpu

    for kernel, tables in gpu.TILES.items():
        for itemsize, table in zip((2, 4), tables, strict=True):
            for width, tiles in table.items():
                if limit == 64 * 1024 and (itemsize, width) == (4, 256):
                    continue  # the least tiles are too large; float32 is for checks
                fitted = gpu.fit(kernel, tiles, width, itemsize, limit)
                assert gpu.shared_bytes(kernel, fitted, width, itemsize) <= limit
                assert fitted == tiles or limit < 227 * 1024


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    "properties, limit",
    [
        ({"shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10}, 227 << 10),
        ({"shared_memory_per_block": 64 << 10}, 64 << 10),
    ],
    ids=["H100", "MI300"],
)
def test_the_limit_of_shared_memory_is_read_on_any_gpu(properties, limit, monkeypatch):
    from megamm_kernels.gpu import interval_attention as gpu

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    assert gpu._shared_memory.__wrapped__(torch.device("cuda")) == limit


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_degenerate_shapes(shape, device):
    lo = torch.zeros(shape, dtype=torch.int64, device=device)
    hi = torch.zeros_like(lo)
    hi[1:] -= 1
    check(by_default(lo, hi), random_qkv(lo), lo, hi)


def test_views_and_expanded_gradients(device):
    """q, k, v as slices of one projection, and the gradient of a sum, whose strides are zero."""
    lo, hi = batch([[[5, -7], [6]]], 19, device)
    qkv = torch.randn(1, 19, 3, 2, 16, device=device, dtype=exact_dtype(device), requires_grad=True)
    out, _ = by_default(lo, hi)(*qkv.unbind(2))
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    expected = reference(*qkv.unbind(2), lo, hi)
    (want,) = torch.autograd.grad(expected.sum(), qkv)
    torch.testing.assert_close(out, expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(grad, want, atol=5e-5, rtol=0)


def test_queries_of_part_of_a_row(device):
    lo, hi = batch([[[7, -13, 3], [30]], [[20, -9]]], 55, device)
    part = slice(18, 41)
    lo, hi = lo[:, part], hi[:, part]
    check(by_default(lo, hi, num_keys=55), random_qkv(lo, num_keys=55), lo, hi)


def test_the_key_side_of_the_plan_is_the_transposed_mask(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("a matter of the Triton kernels")
    lo, hi = batch(list(ROWS.values()), LENGTH, device)
    mask = attention_mask(lo, hi, backend="interval")
    m, n = torch.arange(LENGTH, device=device)[:, None], torch.arange(LENGTH, device=device)
    by_query = (lo[..., None] <= n) & (n <= hi[..., None])
    by_key = (mask.query_lo[:, None] <= m) & (m <= mask.query_hi[:, None])
    assert torch.equal(by_query, by_key)


def test_intervals_that_decrease_are_an_error_where_that_is_checked(device, monkeypatch):
    lo, hi = batch([ROWS[name] for name in ("odd lengths", "all padding")], LENGTH, device)
    monkeypatch.setattr(dispatch, "check_intervals", True)
    by_default(lo, hi)  # rows as they are packed pass
    for name, position, message in (
        ("lo", 24, "lo falls from 23 to 22 at position 24 of row 0"),
        ("hi", 25, "hi falls from 24 to 0 at position 25 of row 0"),
    ):
        wrong = {"lo": lo.clone(), "hi": hi.clone()}
        wrong[name][0, position] = int(message.split()[5])
        with pytest.raises(ValueError, match=message):
            by_default(**wrong)
    monkeypatch.setattr(dispatch, "check_intervals", False)
    by_default(**wrong)


@pytest.mark.parametrize("value, checked", [("1", True), ("0", False), (None, False)])
def test_the_environment_says_whether_intervals_are_checked(value, checked, monkeypatch):
    monkeypatch.delenv("MEGAMM_CHECK_INTERVALS", raising=False)
    if value is not None:
        monkeypatch.setenv("MEGAMM_CHECK_INTERVALS", value)
    assert runpy.run_path(dispatch.__file__)["check_intervals"] is checked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_torch_own(dtype, device):
    skip_bf16_under_interpreter(dtype, device)
    torch.manual_seed(1)
    lo, hi = batch([[[14, -30, 4], [16]]], 64, device)
    keys = torch.arange(64, device=device)
    mask = ((keys >= lo[..., None]) & (keys <= hi[..., None]))[:, None]

    def torch_own(*qkv):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=mask).transpose(1, 2)

    attend = by_default(lo, hi, dtype)
    qkv = random_qkv(lo, heads=(2, 2), head_dim=64)
    assert_as_accurate(lambda *x: attend(*x)[0], torch_own, lambda *x: reference(*x, lo, hi), qkv, dtype)


def test_gradcheck(device):
    if device.type == "cuda":
        pytest.skip("no float64 on CUDA")
    lo, hi = batch([[[2, -3], [1]]], 7, device)
    attend = by_default(lo, hi)
    assert torch.autograd.gradcheck(lambda *x: attend(*x)[0], random_qkv(lo, head_dim=2), fast_mode=True)


def test_every_element_of_the_outputs_is_written(device, monkeypatch):
    lo, hi = batch([ROWS["odd lengths"]], LENGTH, device)
    attend, qkv = by_default(lo, hi), random_qkv(lo, head_dim=12)
    poison_outputs(monkeypatch)
    check(attend, qkv, lo, hi)


def test_runs_are_equal_bit_by_bit(device):
    lo, hi = batch([ROWS["odd lengths"]], LENGTH, device)
    assert_repeats(by_default(lo, hi, torch.float32), random_qkv(lo, dtype=torch.float32))


def test_compiles_to_one_graph_for_all_rows(device):
    def attend(q, k, v, mask):
        return interval_attention(2 * q, k, v, mask).sin()

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    first = batch([[[5, -7], [6]]], 20, device)
    with torch._dynamo.config.patch(error_on_recompile=default_backend(first[0]) == "interval"):
        for lo, hi in (first, batch([[[20]]], 20, device)):
            qkv = random_qkv(lo, dtype=torch.float32)
            mask = attention_mask(lo, hi, backend=default_backend(lo))
            want, got = attend(*qkv, mask), compiled(*qkv, mask)
            torch.testing.assert_close(got, want)
            grads = (torch.autograd.grad(x.sum(), qkv) for x in (got, want))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


def test_operator_checks(device):
    lo, hi = batch([[[2, -3], [1]]], 8, device)
    backend = default_backend(lo)
    mask = attention_mask(lo, hi, backend=backend)
    op = torch.ops.megamm.interval_attention_gpu if backend == "interval" else torch.ops.megamm.interval_attention
    qkv = random_qkv(lo, heads=(1, 1), head_dim=8, dtype=torch.float32)
    torch.library.opcheck(op.default, (*qkv, *mask))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "unstored"])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("names", [["one-token documents", "all padding"], list(ROWS)], ids=["short", "all"])
def test_sdpa_in_blocks(names, block, stored):
    lo, hi = batch([ROWS[name] for name in names], LENGTH, torch.device("cpu"))
    mask = sdpa.make_mask(lo, hi, torch.float64, block, max_stored=2**20 if stored else 0)
    assert stored or not mask.bias.numel()
    check(lambda *x: interval_attention(*x, mask, return_lse=True), random_qkv(lo), lo, hi)
    check(lambda *x: sdpa.attend_in_blocks(*x, mask, return_lse=True), random_qkv(lo, heads=(2, 2)), lo, hi)
