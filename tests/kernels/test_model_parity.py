"""The model against a naive one in float64, shares of its layers, and kernels against plain torch over 50 steps.

The naive model keeps its weights apart, queries, keys and values, gate and up; reordered into the layouts of ours they
must give the same loss and gradients. So whatever layout weights lie in, the function is the same.

The runs over 50 steps are float32, from the same weights, on the same batches. Rounding differs, and AdamW feeds it
back: plain torch in float32 strays from itself in float64 by 1.3e-6 of a loss here. Errors stray further: 1% in the
gradient of a layer's output (attention, SwiGLU) moves a loss by 1.6e-5 to 7e-3 in 50 steps, 1e-4 in the output of
SwiGLU by 1.7e-5, a patch that the projection's gradient misses by 2e-3. So 1e-5 is allowed; on a GPU, whose
exponentials are approximate and whose rows are longer here, 1e-4.
"""

import pytest
import torch
import torch.nn.functional as F
from megamm_kernels import attention_mask, default_backend, dispatch, rope_table
from rows import intervals

from megamm.config import ModelConfig, OptimizerConfig, VisionConfig
from megamm.model.context import BlockContext
from megamm.model.initial import initialise
from megamm.model.layers import Attention, FeedForward
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import resolve_model
from megamm.sequence import IGNORE, IMAGE, Batch
from megamm.training.optimizer import make_optimizer

STEPS = 50
VOCABULARY = 40
PATCHES = 4
"""Of an image: 8 x 8 pixels in patches of 4."""
ROWS = (
    [[[1, -PATCHES, 2], [2]]],
    [[[2], [1]], [[-PATCHES, 1]]],
    [[[4], [2]]],  # no image
)
"""Batches of rows of documents of spans: n > 0 text tokens, n < 0 image patches; what is left of a row is padding."""


def make_row(documents: list[list[int]], length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One packed row; the first document is source 0, the others source 1."""
    row = {name: torch.zeros(length, dtype=torch.int32) for name in ("tokens", "positions", "source", "label_kind")}
    row["targets"] = torch.full((length,), IGNORE, dtype=torch.int32)
    row["lo"], row["hi"] = intervals(documents, length)
    start = 0
    for number, spans in enumerate(documents):
        tokens = torch.cat(
            [
                torch.randint(5, VOCABULARY, (n,), generator=generator) if n > 0 else torch.full((-n,), IMAGE)
                for n in spans
            ]
        )
        part = slice(start, start + len(tokens))
        is_image = tokens == IMAGE
        row["tokens"][part] = tokens
        row["positions"][part] = torch.arange(len(tokens))
        row["source"][part] = min(number, 1)
        row["label_kind"][part] = is_image.cumsum(0) > 0
        following = tokens.roll(-1)
        unlabelled = is_image | (following == IMAGE) | (torch.arange(len(tokens)) == len(tokens) - 1)
        row["targets"][part] = torch.where(unlabelled, IGNORE, following)
        start = part.stop
    return row


def make_batch(rows: list, copies: int, generator: torch.Generator) -> Batch:
    """A batch as the loader makes it; every row holds its documents ``copies`` times."""
    rows = [documents * copies for documents in rows]
    length = max(sum(abs(n) for spans in documents for n in spans) for documents in rows) + 1
    made = [make_row(documents, length, generator) for documents in rows]
    arrays = {name: torch.stack([row[name] for row in made]) for name in made[0]}
    patch_index = (arrays["tokens"] == IMAGE).flatten().nonzero().squeeze(1)
    pixels = torch.randint(256, (len(patch_index), 48), generator=generator)
    return Batch(
        **arrays | {"source": arrays["source"].byte(), "label_kind": arrays["label_kind"].byte()},
        patches=pixels.byte(),
        patch_index=patch_index,
        grids=torch.tensor([[-n, 1] for documents in rows for spans in documents for n in spans if n < 0]).view(-1, 2),
        label_index=(arrays["targets"] >= 0).flatten().nonzero().squeeze(1),
    )


def naive_loss(p: dict[str, torch.Tensor], batch: Batch, config: ModelConfig) -> torch.Tensor:
    """Summed loss of an early-fusion model, one row at a time, from weights [heads, D, W] and [hidden, W]."""
    x = p["embedding.weight"][batch.tokens.long()]
    pixels = (batch.patches.double() / 127.5 - 1) @ p["embedding.projection.weight"].T
    x = x.flatten(0, 1).index_copy(0, batch.patch_index, pixels).view_as(x)
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    total = torch.zeros((), dtype=torch.float64)
    for row, h in enumerate(x):
        angle = batch.positions[row, :, None].double() * config.rope_theta**-pairs
        keys = torch.arange(len(h))
        seen = (keys >= batch.lo[row, :, None]) & (keys <= batch.hi[row, :, None])

        def norm(y, scale):
            return y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * scale

        def rotate(y, angle=angle):
            a, b = y.chunk(2, dim=-1)
            return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

        for i in range(config.depth):
            b = {name.removeprefix(f"blocks.{i}."): t for name, t in p.items() if name.startswith(f"blocks.{i}.")}
            n, heads = norm(h, b["attention_norm.weight"]), []
            for wq, wk, wv in zip(b["queries"], b["keys"], b["values"], strict=True):
                q, k = (rotate(norm(n @ w.T, s)) for w, s in zip((wq, wk), b["attention.qk_norm"], strict=True))
                scores = (q @ k.T * config.head_dim**-0.5).masked_fill(~seen, -torch.inf)
                heads.append(scores.softmax(-1).nan_to_num(0.0) @ (n @ wv.T))
            h = h + torch.cat(heads, dim=-1) @ b["attention.out.weight"].T
            n = norm(h, b["feed_forward_norm.weight"])
            h = h + (F.silu(n @ b["gate"].T) * (n @ b["up"].T)) @ b["feed_forward.down.weight"].T
        logits = norm(h, p["head.norm.weight"]) @ p["head.weight"].T
        total = total + F.cross_entropy(logits, batch.targets[row].long(), ignore_index=IGNORE, reduction="sum")
    return total


def laid_out(p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the naive model as ours holds them: qkv [heads, 3, D], gate and up [hidden, 2]."""
    ours = dict(p)
    for prefix in [name.removesuffix("queries") for name in p if name.endswith("queries")]:
        qkv = torch.stack([ours.pop(prefix + name) for name in ("queries", "keys", "values")], dim=1)
        gate_up = torch.stack([ours.pop(prefix + name) for name in ("gate", "up")], dim=1)
        ours[prefix + "attention.qkv.weight"] = qkv.flatten(0, 2)
        ours[prefix + "feed_forward.gate_up.weight"] = gate_up.flatten(0, 1)
    return ours


def test_loss_and_gradients_are_those_of_a_naive_model():
    config = resolve_model(
        ModelConfig(width=24, depth=2, head_dim=8, hidden_multiple=8, vocab_size=VOCABULARY, image_size=8, patch_size=4)
    )
    model = MultimodalModel(config, num_sources=2, seed=0).double()
    generator = torch.Generator().manual_seed(2)
    batch = make_batch(ROWS[1], 1, generator)
    naive = {name: torch.randn(t.shape, generator=generator).double() / 3 for name, t in model.state_dict().items()}
    for i in range(config.depth):
        hidden = naive.pop(f"blocks.{i}.feed_forward.gate_up.weight").shape[0] // 2
        del naive[f"blocks.{i}.attention.qkv.weight"]
        for name, shape in (("queries", (3, 8, 24)), ("keys", (3, 8, 24)), ("values", (3, 8, 24))):
            naive[f"blocks.{i}.{name}"] = torch.randn(shape, generator=generator).double() / 3
        for name in ("gate", "up"):
            naive[f"blocks.{i}.{name}"] = torch.randn(hidden, 24, generator=generator).double() / 3
    model.load_state_dict(laid_out(naive))
    leaves = {name: t.requires_grad_() for name, t in naive.items()}
    want = naive_loss(leaves, batch, config)
    got = model(batch, torch.float64).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = dict(zip(leaves, torch.autograd.grad(want, leaves.values()), strict=True))
    got.backward()
    for name, expected in laid_out(gradients).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize("key_heads", [8, 4], ids=["multi-head", "grouped-query"])
def test_shares_of_layers_add_up_to_the_whole(device, shares, key_heads):
    """Equal slices of rows, with the columns that belong to them, are layers whose outputs add up."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 6, 64, device=device), torch.arange(6, device=device).expand(2, -1)
    mask = attention_mask(torch.zeros_like(positions), positions, backend=default_backend(x))
    cos, sin = rope_table(positions, 8, 100.0)
    context = BlockContext(cos=cos, sin=sin, mask=mask)
    attention, feed_forward = Attention(64, 8, key_heads, 1, 1e-6).to(device), FeedForward(64, 24, 1).to(device)
    for layer in (attention, feed_forward):
        initialise(layer, 0)
    for layer, first, last, args in (
        (attention, attention.qkv, attention.out, (context,)),
        (feed_forward, feed_forward.gate_up, feed_forward.down, ()),
    ):
        want, total = layer(x, *args), 0
        slices = zip(first.weight.detach().chunk(shares), last.weight.detach().chunk(shares, dim=1), strict=True)
        for rows, columns in slices:
            first.weight, last.weight = torch.nn.Parameter(rows), torch.nn.Parameter(columns)
            total = total + layer(x, *args)
        torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-5)


def train(architecture: str, device: torch.device, copies: int) -> torch.Tensor:
    """Mean loss of every step."""
    config = ModelConfig(
        architecture=architecture,
        width=32,
        depth=1,
        head_dim=32,
        hidden_multiple=8,
        vocab_size=VOCABULARY,
        image_size=8,
        patch_size=4,
        vision=VisionConfig(width=16, head_dim=16, depth=1),
    )
    model = MultimodalModel(resolve_model(config), num_sources=2, seed=0).to(device)
    optimizer = make_optimizer(model, OptimizerConfig(lr=3e-3, vision_lr_factor=1.0))
    generator = torch.Generator().manual_seed(1)
    batches = [make_batch(rows, copies, generator).to(device) for rows in ROWS]
    losses = []
    for step in range(STEPS):
        output = model(batches[step % len(batches)])
        loss = output.loss / output.counts.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("architecture", ["early", "late"])
def test_losses_of_50_steps_agree(architecture, device, monkeypatch):
    copies, tolerance = (1, 1e-5) if device.type == "cpu" else (16, 1e-4)  # the interpreter needs 30 ms a position
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "interpret", False)
        expected = train(architecture, torch.device("cpu"), copies)
    assert expected[-1] < 0.8 * expected[1]
    torch.testing.assert_close(train(architecture, device, copies), expected, rtol=tolerance, atol=0)
