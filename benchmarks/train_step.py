"""Training step of our model against transformers' LlamaForCausalLM, on this machine.

    python benchmarks/train_step.py [--device cpu|cuda] [--dtype float32|bfloat16] [--width 384 ...] [--out DIR]

Two questions:

1. text rows: tokens/s against Llama of equal width, depth, heads, SwiGLU width, vocabulary and rows, eager and
   compiled. Llama gets the same rows under its full causal mask; we keep documents apart. Two kinds of rows:
   packed documents, and one document per row, where our mask saves nothing.
2. 45-45-10 rows (caption, interleaved, text by tokens): our model against itself with logits at every position.

A step is forward, loss, backward, clipping at 1.0 and fused AdamW. The contenders take turns; a ratio is the
median over rounds of (peer's time / our time): above 1 we are faster. Without transformers only the second question
is answered.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megamm.arguments import ArgumentParser
from megamm.config import ModelConfig, OptimizerConfig
from megamm.data.batch import Batch
from megamm.data.tokens import BOS, EOS, IGNORE, IMAGE, IMAGE_END
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import hidden_width, resolve_model
from megamm.training.optimizer import make_optimizer

IMAGE_SIZE, PATCH_SIZE = 224, 14
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def draw_row(rng: np.random.Generator, length: int, kind: str) -> list[list[int]]:
    """Documents that fill a row exactly: lists of spans, n > 0 text tokens, -1 an image."""
    documents, room = [], length
    while room:
        source = kind if kind != "mixed" else rng.choice(["caption", "interleaved", "text"], p=[0.54, 0.27, 0.19])
        words = int(min(room, max(8, rng.lognormal(5.2, 0.7)))) if kind != "one" else room
        if source == "caption" and room >= PATCHES + 40:
            spans = [1, -1, int(rng.integers(12, 40))]
        elif source == "interleaved" and room >= 2 * PATCHES + 100:
            spans = [30, -1, 40, -1, 28]
        else:
            spans = [words]
        used = sum(span if span > 0 else PATCHES for span in spans)
        if room - used < 2:
            spans[-1] += room - used
            used = room
        documents.append(spans)
        room -= used
    return documents


def make_batch(rows: list[list[list[int]]], length: int, vocab_size: int, rng: np.random.Generator) -> Batch:
    """Random tokens and pixels in the given layout."""
    shape = (len(rows), length)
    tokens = rng.integers(5, vocab_size, shape).astype(np.int32)
    positions, lo = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    hi = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    last = np.zeros(shape, bool)
    for r, documents in enumerate(rows):
        p = 0
        for spans in documents:
            start = p
            tokens[r, p] = BOS
            for span in spans:
                n = span if span > 0 else PATCHES
                if span < 0:
                    tokens[r, p : p + n], hi[r, p : p + n] = IMAGE, p + n - 1
                    tokens[r, p + n] = IMAGE_END
                p += n
            tokens[r, p - 1], last[r, p - 1] = EOS, True
            lo[r, start:p], positions[r, start:p] = start, np.arange(p - start)
    following = np.roll(tokens, -1, axis=1)
    unlabelled = last | (tokens == IMAGE) | (following == IMAGE)
    index = np.flatnonzero(tokens == IMAGE)
    targets = np.where(unlabelled, IGNORE, following).astype(np.int32)
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "targets": targets,
        "source": np.zeros(shape, np.uint8),
        "modality": np.zeros(shape, np.uint8),
        "lo": lo,
        "hi": hi,
        "patches": rng.integers(0, 256, (len(index), 3 * PATCH_SIZE**2)).astype(np.uint8),
        "patch_index": index.astype(np.int64),
        "label_index": np.flatnonzero(targets >= 0),
    }
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


class Contender:
    """A model, its optimizer and its loss."""

    def __init__(self, model: torch.nn.Module, loss, args: argparse.Namespace):
        self.model, self.loss = model.to(args.device), loss
        self.optimizer = make_optimizer(self.model, OptimizerConfig(lr=1e-4))

    def step(self, batch: Batch) -> float:
        """One training step; returns seconds."""
        if batch.tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.loss(self.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if batch.tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def ours(args: argparse.Namespace, compiled: bool, everywhere: bool = False) -> Contender:
    """Our model; ``everywhere`` computes logits at every position, as a plain language model does."""
    config = ModelConfig(
        width=args.width, depth=args.depth, head_dim=args.head_dim, vocab_size=args.vocab_size,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    model, dtype = MultimodalModel(resolve_model(config)), getattr(torch, args.dtype)
    if compiled:
        for block in model.blocks:
            block.compile()

    def loss(model: MultimodalModel, batch: Batch) -> torch.Tensor:
        if not everywhere:
            output = model(batch, dtype)
            return output.loss / output.counts.sum()
        logits = model.head(model.hidden_states(batch, dtype)).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten().long(), ignore_index=IGNORE)

    return Contender(model, loss, args)


def llama(args: argparse.Namespace, compiled: bool) -> Contender:
    """transformers' Llama with SDPA attention, its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = args.width // args.head_dim
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.width, intermediate_size=hidden_width(args.width, 256),
        num_hidden_layers=args.depth, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
        tie_word_embeddings=False, max_position_embeddings=args.row_length, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype) if args.device == "cuda" else torch.float32)
    if compiled:
        model.compile()

    def loss(model, batch):
        tokens = batch.tokens.long()
        return model(input_ids=tokens, labels=tokens).loss

    return Contender(model, loss, args)


def compare(first: Contender, second: Contender, batches: list[Batch], rounds: int) -> tuple[float, float, float]:
    """(median seconds of first, of second, median ratio second / first), taking turns."""
    for contender in (first, second):
        for batch in batches[:2]:
            contender.step(batch)
    times = [(first.step(b), second.step(b)) for b in (batches * rounds)[:rounds]]
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in times)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def batches(kind: str) -> list[Batch]:
        made = []
        for _ in range(3):
            rows = [draw_row(rng, args.row_length, kind) for _ in range(args.rows)]
            made.append(make_batch(rows, args.row_length, args.vocab_size, rng).to(args.device))
        return made

    results = []

    def report(rows: str, mode: str, peer: str, first: Contender, second: Contender, kind: str) -> None:
        mine, theirs, ratio = compare(first, second, batches(kind), args.rounds)
        tokens = args.rows * args.row_length
        results.append(
            {"rows": rows, "mode": mode, "peer": peer, "ours_tokens_per_s": round(tokens / mine),
             "peer_tokens_per_s": round(tokens / theirs), "ratio": round(ratio, 3)}
        )  # fmt: skip
        write(results, args)  # each time: a run that is cut off keeps what it has

    report("45-45-10", "eager", "ours, logits everywhere", ours(args, False), ours(args, False, True), "mixed")
    modes = ("eager", "compiled")[: 1 if args.skip_compiled else 2]
    if not find_spec("transformers"):
        modes = ()
        print("transformers is not installed: no comparison with LlamaForCausalLM")
    for mode in modes:
        mine, theirs = ours(args, mode == "compiled"), llama(args, mode == "compiled")
        report("text, packed documents", mode, "LlamaForCausalLM", mine, theirs, "text")
        report("text, one document", mode, "LlamaForCausalLM", mine, theirs, "one")
    show(results, about(args))


def about(args: argparse.Namespace) -> dict[str, str | int]:
    """The machine, versions and settings."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": version("transformers") if find_spec("transformers") else "",
        **{k: str(v) for k, v in vars(args).items() if k != "out"},
    }  # fmt: skip


def write(results: list[dict], args: argparse.Namespace) -> None:
    """CSV and JSON with the machine."""
    facts = about(args)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"train_step_{args.device}"
    stem.with_suffix(".json").write_text(json.dumps({"about": facts, "results": results}, indent=2) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*results[0], "device", "torch", "transformers"])
        writer.writeheader()
        writer.writerows({**r, **{k: facts[k] for k in ("device", "torch", "transformers")}} for r in results)


def show(results: list[dict], facts: dict) -> None:
    """A table on the terminal."""
    table = [[name.replace("_", " ") for name in results[0]], *([str(v) for v in r.values()] for r in results)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"training step on {facts['device']}")
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
