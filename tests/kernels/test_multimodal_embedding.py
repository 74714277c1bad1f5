"""Text rows, features and raw patches in one sequence, against the definition in float64."""

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
from megamm_kernels import dispatch, multimodal_embedding, multimodal_patch_embedding
from megamm_kernels.multimodal_embedding import multimodal_embedding_reference, multimodal_patch_embedding_reference

VOCABULARY = 11


def make(device, shape, num_images, width, channels=5, dtype=torch.float64, token=None):
    """Tokens, table, features, patches, projection and where images go; ``token`` makes all tokens alike."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, shape) if token is None else torch.full(shape, token)
    index = torch.randperm(tokens.numel())[:num_images]
    tensors = (
        tokens.int(),
        torch.randn(VOCABULARY, width, dtype=dtype),
        torch.randn(num_images, width, dtype=dtype),
        torch.randint(256, (num_images, channels)).byte(),
        torch.randn(width, channels, dtype=dtype),
        index,
    )
    return [t.to(device) for t in tensors]


def with_features(tokens, index, op=multimodal_embedding):
    return lambda table, features: op(tokens, table, features, index)


def with_patches(tokens, patches, index, op=multimodal_patch_embedding):
    return lambda table, projection: op(tokens, table, patches, projection, index)


CASES = [
    ((2, 9), 5, 20, None),  # ragged width
    ((1, 40), 0, 8, None),  # no image
    ((3, 7), 21, 8, None),  # nothing but images
    ((2, 160), 9, 8, 3),  # one token everywhere: its run spans more chunks than are added in one step
    ((0, 4), 0, 8, None),  # no row
    ((1, 33), 17, 17, None),
]


@pytest.mark.parametrize(("shape", "num_images", "width", "token"), CASES, ids=str)
def test_matches_the_definition(device, shape, num_images, width, token, monkeypatch):
    tokens, table, features, patches, projection, index = make(device, shape, num_images, width, token=token)
    poison_outputs(monkeypatch)
    tolerance = {"atol": 1e-12, "rtol": 1e-12}
    assert_matches(
        with_features(tokens, index),
        with_features(tokens, index, multimodal_embedding_reference),
        (table, features),
        **tolerance,
    )
    assert_matches(
        with_patches(tokens, patches, index),
        with_patches(tokens, patches, index, multimodal_patch_embedding_reference),
        (table, projection),
        **tolerance,
    )


def test_without_features(device):
    tokens, table, *_ = make(device, (2, 30), 0, 8, token=4)
    assert_matches(
        lambda t: multimodal_embedding(tokens, t, None, None),
        lambda t: multimodal_embedding_reference(tokens, t, None, None),
        [table],
        atol=1e-12,
        rtol=1e-12,
    )
    assert torch.equal(multimodal_embedding(tokens, table, None, None), table[tokens.long()])


def test_patches_wider_than_a_tile(device):
    tokens, table, _, patches, projection, index = make(device, (2, 40), 37, 20, channels=70)
    assert_matches(
        with_patches(tokens, patches, index),
        with_patches(tokens, patches, index, multimodal_patch_embedding_reference),
        (table, projection),
        atol=1e-11,
        rtol=1e-11,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_close_as_torch_own(device, dtype):
    skip_bf16_under_interpreter(dtype, device)
    tokens, table, features, patches, projection, index = make(device, (2, 20), 15, 16, channels=30)
    for ours, peer, inputs in (
        (with_features(tokens, index), with_features(tokens, index, multimodal_embedding_reference), features),
        (
            with_patches(tokens, patches, index),
            with_patches(tokens, patches, index, multimodal_patch_embedding_reference),
            projection,
        ),
    ):
        assert_as_accurate(ours, peer, peer, (table, inputs), dtype)


def test_float32_table_gives_half_precision_rows(device):
    tokens, table, features, patches, projection, index = make(device, (2, 9), 5, 16, dtype=torch.float32)
    table.requires_grad_()
    for out in (
        multimodal_embedding(tokens, table, features, index, torch.float16),
        multimodal_patch_embedding(tokens, table, patches, projection, index, torch.float16),
    ):
        assert out.dtype == torch.float16
        grad = torch.autograd.grad(out.float().sum(), table)[0]
        text = torch.ones(18, device=device).index_fill(0, index, 0).bool()
        counts = torch.bincount(tokens.flatten()[text], minlength=VOCABULARY).float()
        assert torch.equal(grad, counts[:, None].expand_as(grad))


def test_gradcheck(device):
    tokens, table, features, patches, projection, index = make(device, (1, 6), 3, 2, channels=2)
    for leaf in (table, features, projection):
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(with_features(tokens, index), (table, features), fast_mode=True)
    assert torch.autograd.gradcheck(with_patches(tokens, patches, index), (table, projection), fast_mode=True)


def test_repeats_bitwise_and_compiles(device):
    tokens, table, features, patches, projection, index = make(device, (2, 40), 9, 16, dtype=torch.float32)
    assert_repeats(with_features(tokens, index), (table, features))
    assert_repeats(with_patches(tokens, patches, index), (table, projection))
    assert_compiles(with_features(tokens, index), (table, features))
    assert_compiles(with_patches(tokens, patches, index), (table, projection))


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_operator_checks(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("plain torch")
    tokens, table, features, patches, projection, index = make(device, (1, 6), 3, 8, dtype=torch.float32)
    for leaf in (table, features, projection):
        leaf.requires_grad_()
    ops = torch.ops.megamm
    torch.library.opcheck(ops.multimodal_embedding_gpu.default, (tokens, table, features, index, torch.float32))
    torch.library.opcheck(
        ops.multimodal_patch_embedding_gpu.default, (tokens, table, patches, projection, index, torch.float32)
    )


def test_errors_name_the_shapes(device):
    tokens, table, features, patches, projection, index = make(device, (1, 6), 3, 8)
    with pytest.raises(ValueError, match=r"\[3, 7\]: want \[3, 8\]"):
        multimodal_embedding(tokens, table, features[:, :7], index)
    with pytest.raises(ValueError, match="uint8"):
        multimodal_patch_embedding(tokens, table, patches.float(), projection, index)
    with pytest.raises(ValueError, match=r"\[8, 4\]: want \[8, 5\]"):
        multimodal_patch_embedding(tokens, table, patches, projection[:, :4], index)
