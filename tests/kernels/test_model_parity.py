"""Training with the Triton kernels against training in plain torch: the same losses over 50 steps.

Both runs are float32, from the same weights, on the same batches. Rounding differs, and AdamW feeds it back: plain
torch in float32 strays from itself in float64 by 1.3e-6 of a loss here. Errors stray further: 1% in the gradient of a
layer's output (attention, SwiGLU) moves a loss by 1.6e-5 to 7e-3 in 50 steps, 1e-4 in the output of SwiGLU by 1.7e-5,
a patch that the projection's gradient misses by 2e-3. So 1e-5 is allowed; on a GPU, whose exponentials are approximate
and whose rows are longer here, 1e-4.
"""

import pytest
import torch
from megamm_kernels import dispatch
from rows import intervals

from megamm.config import ModelConfig, OptimizerConfig, VisionConfig
from megamm.data.batch import Batch
from megamm.data.tokens import IGNORE, IMAGE
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import resolve_model
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
    row = {name: torch.zeros(length, dtype=torch.int32) for name in ("tokens", "positions", "source", "modality")}
    row["targets"] = torch.full((length,), IGNORE, dtype=torch.int32)
    row["lo"], row["hi"] = intervals(documents, length)
    start = 0
    for number, spans in enumerate(documents):
        tokens = torch.cat([
            torch.randint(5, VOCABULARY, (n,), generator=generator) if n > 0 else torch.full((-n,), IMAGE)
            for n in spans
        ])  # fmt: skip
        part = slice(start, start + len(tokens))
        is_image = tokens == IMAGE
        row["tokens"][part] = tokens
        row["positions"][part] = torch.arange(len(tokens))
        row["source"][part] = min(number, 1)
        row["modality"][part] = is_image.cumsum(0) > 0
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
        **arrays | {"source": arrays["source"].byte(), "modality": arrays["modality"].byte()},
        patches=pixels.byte(),
        patch_index=patch_index,
        label_index=(arrays["targets"] >= 0).flatten().nonzero().squeeze(1),
    )


def train(architecture: str, device: torch.device, copies: int) -> torch.Tensor:
    """Mean loss of every step."""
    torch.manual_seed(0)
    config = ModelConfig(
        architecture=architecture, width=32, depth=1, head_dim=32, hidden_multiple=8, vocab_size=VOCABULARY,
        image_size=8, patch_size=4, vision=VisionConfig(width=16, head_dim=16, depth=1),
    )  # fmt: skip
    model = MultimodalModel(resolve_model(config), num_sources=2).to(device)
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
