"""Training step of our model against transformers' LlamaForCausalLM, on this machine.

    python benchmarks/train_step.py [--device cpu|cuda] [--dtype float32|bfloat16] [--width 384 ...] [--out DIR]

Three questions:

1. text rows: tokens/s against Llama of equal width, depth, heads, SwiGLU width, vocabulary and rows, eager and
   compiled. Llama gets the same rows under its full causal mask; we keep documents apart. Two kinds of rows:
   packed documents, and one document per row, where our mask saves nothing.
2. 45-45-10 rows (caption, interleaved, text by tokens): our model against itself with logits at every position.
3. the same rows: our model with 8 experts, top-1, with a feed-forward layer per modality, and as a mixture of
   transformers, against our dense model of as many active parameters. Aims: at most 1.35 times the dense step with
   experts (a ratio of 0.74), 1.1 times with a feed-forward layer per modality (0.91).

A step is forward, loss, backward, clipping at 1.0 and fused AdamW. The contenders take turns; a ratio is the
median over rounds of (peer's time / our time): above 1 we are faster. Without transformers the first question is left
out. --only picks some of them. --clock cpu counts the CPU time of this process instead, for a machine that others use.
"""

import argparse
import copy
import csv
import json
import math
import platform
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from megamm_laws.arguments import ArgumentParser
from torch import nn

from megamm.config import ExpertsConfig, ModelConfig, OptimizerConfig
from megamm.data.rows import FIELDS, fill_row
from megamm.data.shards import Example
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import hidden_width, resolve_model
from megamm.sequence import BOS, EOS, IGNORE, IMAGE_END, Batch
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


def _example(spans: list[int], vocab_size: int, rng: np.random.Generator) -> Example:
    """A document of random words in the given layout."""
    layout = np.array([span if span > 0 else -PATCHES for span in spans])
    tokens = rng.integers(5, vocab_size, layout[layout > 0].sum()).astype(np.int32)
    after_image = np.cumsum(layout.clip(min=0))[:-1][layout[:-1] < 0]
    tokens[after_image], tokens[0], tokens[-1] = IMAGE_END, BOS, EOS
    return Example(id="", tokens=tokens, layout=layout, images=[])


def make_batch(rows: list[list[list[int]]], length: int, vocab_size: int, rng: np.random.Generator) -> Batch:
    """Random tokens and pixels in the given layout."""
    shape = (len(rows), length)
    arrays = {name: np.full(shape, value, dtype) for name, (dtype, value) in FIELDS.items()}
    is_image = np.zeros(shape, bool)
    for r, documents in enumerate(rows):
        examples = [_example(spans, vocab_size, rng) for spans in documents]
        view = {name: array[r] for name, array in arrays.items()}
        is_image[r] = fill_row(view, examples, np.zeros(len(examples), np.uint8))
    arrays["patch_index"] = np.flatnonzero(is_image)
    arrays["label_index"] = np.flatnonzero(arrays["targets"] >= 0)
    arrays["patches"] = rng.integers(0, 256, (is_image.sum(), 3 * PATCH_SIZE**2)).astype(np.uint8)
    arrays["grids"] = np.full((is_image.sum() // PATCHES, 2), math.isqrt(PATCHES), np.int32)
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


QUESTIONS = ("peers", "everywhere", "experts")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SPARSE = {
    "8 experts, top-1": {"experts": ExpertsConfig(num=8)},
    "feed-forward per modality": {"per_modality": "feed_forward"},
    "mixture of transformers": {"per_modality": "block"},
}


class Contender:
    """A model, its optimizer and its loss."""

    def __init__(self, model: torch.nn.Module, loss, args: argparse.Namespace):
        self.model, self.loss = model.to(args.device), loss
        self.optimizer = make_optimizer(self.model, OptimizerConfig(lr=1e-4))
        self.clock = CLOCKS[args.clock]

    def step(self, batch: Batch) -> float:
        """One training step; returns seconds."""
        if batch.tokens.is_cuda:
            torch.cuda.synchronize()
        start = self.clock()
        self.loss(self.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if batch.tokens.is_cuda:
            torch.cuda.synchronize()
        return self.clock() - start


def ours(args: argparse.Namespace, compiled: bool, everywhere: bool = False, **settings) -> Contender:
    """Our model with further model settings; ``everywhere`` computes logits at every position, as a plain language
    model does."""
    config = ModelConfig(
        width=args.width,
        depth=args.depth,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        **settings,
    )
    model, dtype = MultimodalModel(resolve_model(config), seed=0), getattr(torch, args.dtype)
    if compiled:
        for block in model.all_blocks():
            block.compile()

    def loss(model: MultimodalModel, batch: Batch) -> torch.Tensor:
        if not everywhere:
            output = model(batch, dtype)
            return output.loss / output.counts.sum() + output.auxiliary / batch.tokens.numel()
        logits = model.logits(batch, dtype).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten().long(), ignore_index=IGNORE)

    return Contender(model, loss, args)


def llama_model(*, width: int, depth: int, head_dim: int, vocab_size: int, row_length: int) -> nn.Module:
    """transformers' Llama of the shape of our text model, with SDPA attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=hidden_width(width, 256),
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        use_cache=False,
        tie_word_embeddings=False,
        max_position_embeddings=row_length,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def llama(args: argparse.Namespace, compiled: bool) -> Contender:
    """transformers' Llama, its own loss."""
    shape = {name: getattr(args, name) for name in ("width", "depth", "head_dim", "vocab_size", "row_length")}
    model = llama_model(**shape).to(getattr(torch, args.dtype) if args.device == "cuda" else torch.float32)
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
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS)
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
            {
                "rows": rows,
                "mode": mode,
                "peer": peer,
                "ours_tokens_per_s": round(tokens / mine),
                "peer_tokens_per_s": round(tokens / theirs),
                "ratio": round(ratio, 3),
            }
        )
        write(results, args)  # each time: a run that is cut off keeps what it has

    if "everywhere" in args.only:
        report("45-45-10", "eager", "ours, logits everywhere", ours(args, False), ours(args, False, True), "mixed")
    if "experts" in args.only:
        for name, settings in SPARSE.items():
            sparse = ours(args, False, **copy.deepcopy(settings))
            report(f"45-45-10, {name}", "eager", "ours, dense", sparse, ours(args, False), "mixed")
    modes = ("eager", "compiled")[: 1 if args.skip_compiled else 2]
    if "peers" not in args.only:
        modes = ()
    elif not find_spec("transformers"):
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
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers") if find_spec("transformers") else "",
        **{k: str(v) for k, v in vars(args).items() if k != "out"},
    }


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
