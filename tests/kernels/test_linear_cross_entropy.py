"""Linear cross entropy against its definition in float64, whole and spread over the vocabulary."""

import functools
import importlib
import itertools

import pytest
import torch
import torch.multiprocessing as mp
from megamm_kernels import dispatch, linear_cross_entropy
from megamm_kernels.linear_cross_entropy import linear_cross_entropy_reference
from ranks import free_port

module = importlib.import_module("megamm_kernels.linear_cross_entropy")  # the package has a function of this name
WIDTH, VOCAB = 24, 301
# Triton takes z_loss as a float32, whatever the logits are.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def make(rows=50, labelled=37, dtype=torch.float32, device="cpu", vocab=VOCAB, groups=3):
    """Hidden states, head, targets, sorted positions of the labels, and a group for each row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64) / 2
    index = torch.randperm(rows, generator=generator)[:labelled].sort().values
    targets = torch.full((rows,), -100, dtype=torch.int32)
    targets[index] = torch.randint(0, vocab, (labelled,), generator=generator, dtype=torch.int32)
    group = torch.randint(0, groups, (rows,), generator=generator)
    x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    return x, weight, targets.to(device), index.to(device), group.to(device)


def exact(x, weight, targets, group=None, num_groups=1, z_loss=0.0, scale=1.0):
    """The reference's outputs and gradients of ``scale * loss``, in float64 from the same rounded inputs."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    out = linear_cross_entropy_reference(*leaves, targets, group, num_groups, z_loss)
    return out, torch.autograd.grad(out.loss * scale, leaves)


def assert_close(got, want, dtype):
    tolerance = TOLERANCE[dtype] * max(1.0, want.abs().max().item() if want.numel() else 1.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("rows, labelled", [(0, 0), (1, 1), (50, 0), (50, 37), (33, 33)])
def test_matches_the_definition(device, rows, labelled, dtype):
    x, weight, targets, index, group = make(rows, labelled, dtype, device)
    out = linear_cross_entropy(x, weight, targets, index, group, 3, z_loss=1e-2, chunk_bytes=16 * 8 * VOCAB)
    grads = torch.autograd.grad(out.loss / 7, (x, weight))
    want, want_grads = exact(x, weight, targets, group, 3, 1e-2, 1 / 7)
    for got, expected in zip([*out, *grads], [*want, *want_grads], strict=True):
        assert_close(got, expected, dtype)
    assert torch.equal(out.counts.double(), want.counts)
    assert [g.dtype for g in grads] == [dtype, dtype]


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_16_bits_are_summed_in_float32(dtype, beta, device):
    """Torch's widened product, which it has for CUDA alone: right, and added to a float32 sum without rounding."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((40, 256), (256, 72)))
    total = torch.randn(40, 72, generator=generator).to(device) if beta else torch.full((40, 72), torch.nan).to(device)
    want = a.double() @ b.double() + (total.double() if beta else 0)
    size = a.double().abs() @ b.double().abs() + 1
    module._add_product(total, a, b, beta)
    # Elsewhere the product is rounded once, to its own type.
    widened = device.type == "cuda" or dtype == torch.float32
    eps = torch.finfo(torch.float32).eps * 16 if widened else torch.finfo(dtype).eps
    assert total.dtype == torch.float32
    assert ((total.double() - want).abs() <= eps * size).all()


def test_torch_has_the_widened_product():
    """Of every version that is allowed; whether it is right, the test above tells on a GPU."""
    assert "dtype_out" in torch.ops.aten.addmm.overloads()


@pytest.mark.parametrize("vocab", [1, 127, 128, 129])
def test_odd_vocabularies_and_no_options(device, vocab):
    x, weight, targets, _, _ = make(9, 7, torch.float64, device, vocab)
    out = linear_cross_entropy(x, weight, targets)
    want, want_grads = exact(x, weight, targets)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (x, weight)), want_grads)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets), want)


def test_gradcheck(device):
    x, weight, targets, index, _ = make(6, 4, torch.float64, device, vocab=11)
    loss = lambda a, w: linear_cross_entropy(a, w, targets, index, z_loss=0.1).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, weight), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_error_is_at_most_that_of_torch(device, dtype):
    if dtype == torch.bfloat16 and dispatch.interpret:
        pytest.skip("the interpreter truncates casts to bfloat16")
    x, weight, targets, index, _ = make(64, 50, dtype, device)
    _, want = exact(x, weight, targets, scale=1 / 50)
    ours = torch.autograd.grad(linear_cross_entropy(x, weight, targets, index).loss / 50, (x, weight))
    logits = torch.nn.functional.linear(x, weight).float()
    peer = torch.nn.functional.cross_entropy(logits, targets.long())
    for got, theirs, exactly in zip(ours, torch.autograd.grad(peer, (x, weight)), want, strict=True):
        assert (got - exactly).abs().max() <= 1.5 * (theirs - exactly).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_head_keeps_a_float32_gradient(device, dtype):
    if dtype == torch.bfloat16 and dispatch.interpret:
        pytest.skip("the interpreter truncates casts to bfloat16")
    x, weight, targets, index, _ = make(50, 37, dtype, device)
    head = weight.detach().float().requires_grad_()
    grad_x, grad_head = torch.autograd.grad(
        linear_cross_entropy(x, head, targets, index, chunk_bytes=1).loss, (x, head)
    )
    assert (grad_x.dtype, grad_head.dtype) == (dtype, torch.float32)
    _, want = exact(x, head, targets)
    assert_close(grad_x, want[0], dtype)
    assert_close(grad_head, want[1], dtype)


def test_is_deterministic_and_untouched_by_what_memory_held(device, monkeypatch):
    x, weight, targets, index, group = make(device=device)

    def run():
        out = linear_cross_entropy(x, weight, targets, index, group, 3, z_loss=1e-3, chunk_bytes=16 * 4 * VOCAB)
        return [*out, *torch.autograd.grad(out.loss, (x, weight))]

    first = run()
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)


def test_a_kept_graph_can_be_run_again(device):
    x, weight, targets, index, _ = make(device=device)
    loss = linear_cross_entropy(x, weight, targets, index).loss / 3
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(loss, (x, weight))
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, weight))


def test_labels_beyond_the_vocabulary_do_not_pass_unseen(device):
    x, weight, targets, index, _ = make(device=device)
    targets[index[3]] = VOCAB
    if dispatch.use_triton(x):
        assert linear_cross_entropy(x, weight, targets, index).loss.isnan()
    else:
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            linear_cross_entropy(x, weight, targets, index)


def test_errors_name_the_shapes():
    x, weight, targets, index, group = make()
    with pytest.raises(ValueError, match=r"do not fit: \(50, 24\), \(301, 23\)"):
        linear_cross_entropy(x, weight[:, 1:], targets, index)
    with pytest.raises(ValueError, match="targets must have shape"):
        linear_cross_entropy(x, weight, targets[1:], index)
    with pytest.raises(ValueError, match="needs group"):
        linear_cross_entropy(x, weight, targets, index, None, 3)
    with pytest.raises(ValueError, match="needs vocab_size"):
        linear_cross_entropy(x, weight, targets, index, process_group=object())
    with pytest.raises(ValueError, match="group must have shape"):
        linear_cross_entropy(x, weight, targets, index, group[1:], 3)


def test_operator_checks(device):
    x, weight, targets, index, _ = make(12, 7, device=device, vocab=20)
    op = torch.ops.megamm.linear_cross_entropy.default
    torch.library.opcheck(op, (x, weight, targets, index, 1e-3, True, 1 << 20, "", 0, 0))
    torch.library.opcheck(op, (x.detach(), weight.detach(), targets, index, 0.0, False, 1 << 20, "", 0, 0))


def test_compiles_without_a_graph_break(device):
    x, weight, targets, index, group = make(12, 7, device=device, vocab=20)

    def run(a, w, i):
        return linear_cross_entropy(a, w, targets, i, group, 3, z_loss=1e-3)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for i in (index, index[:3]):
        out, want = compiled(x, weight, i), run(x, weight, i)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(*(torch.autograd.grad(o.loss, (x, weight)) for o in (out, want)))


# ---- vocabulary-parallel --------------------------------------------------------------------------------


CUTS = [151, 40]


def rank_main(rank: int, port: int, modes: list[bool], directory: str) -> None:
    """One of two ranks, each with its part of the head; results go to files."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        x, weight, targets, index, group = make()
        for interpret, cut in itertools.product(modes, CUTS):
            dispatch.interpret = interpret
            part = (slice(0, cut), slice(cut, None))[rank]
            head = weight.detach()[part].clone().requires_grad_()
            run = functools.partial(
                linear_cross_entropy,
                group=group,
                num_groups=3,
                z_loss=1e-2,
                chunk_bytes=16 * 4 * 151,
                process_group=torch.distributed.group.WORLD,
                vocab_start=part.start or 0,
                vocab_size=VOCAB,
            )
            out = run(x, head, targets, index)
            grads = torch.autograd.grad(out.loss / 7, (x, head))
            with torch.no_grad():
                torch.testing.assert_close(run(x, head, targets, index), out)
                beyond = targets.index_fill(0, index[:1], VOCAB)
                assert run(x, head, beyond, index).loss.isnan()
            torch.save([t.detach() for t in (*out, *grads)], f"{directory}/{interpret}-{cut}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def second_rank(_: int, *args) -> None:
    torch.set_num_threads(1)
    rank_main(1, *args)


def test_vocabulary_parallel_matches_one_process(tmp_path, monkeypatch):
    modes = [False] if torch.cuda.is_available() or not dispatch.HAS_TRITON else [False, True]
    monkeypatch.setattr(dispatch, "interpret", False)
    args = free_port(), modes, str(tmp_path)
    other = mp.start_processes(second_rank, args, nprocs=1, join=False, start_method="spawn")
    rank_main(0, *args)
    assert other.join(60)
    x, weight, targets, _, group = make()
    want, (want_x, want_weight) = exact(x, weight, targets, group, 3, 1e-2, 1 / 7)
    for interpret, cut in itertools.product(modes, CUTS):
        first, second = (torch.load(tmp_path / f"{interpret}-{cut}-{rank}.pt") for rank in range(2))
        for a, b, expected in zip(first[:5], second[:5], [*want, want_x], strict=True):
            assert torch.equal(a, b)
            assert_close(a, expected, torch.float32)
        assert_close(torch.cat((first[5], second[5])), want_weight, torch.float32)
