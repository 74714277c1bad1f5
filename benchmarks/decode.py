"""Tokens per second of generation: with the cache, without it, and Hugging Face's generate on the same weights.

    python benchmarks/decode.py [--width 512] [--depth 6] [--tokens 512] [--batch 1 4]

A text decoder in Llama's layout with random weights, so that transformers runs the very same model; greedy, after a
prompt of 16 tokens. The runs take turns, the best of --repeats counts; cache or not, answers must be equal.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from megamm_laws.arguments import ArgumentParser

from megamm.config import ModelConfig
from megamm.data.shards import Example
from megamm.errors import RunError, exit_on_error
from megamm.exchange.convert import convert
from megamm.exchange.tensors import TensorGroup, write_tensors
from megamm.exchange.weights import MODEL, FolderSettings
from megamm.files import write_text
from megamm.generation.generate import generate
from megamm.generation.prompts import Prompt
from megamm.model.cache import KeyValueCache
from megamm.model.multimodal import MultimodalModel
from megamm.model.sizes import resolve_model
from megamm.sequence import BOS
from megamm.settings import to_yaml

PROMPT = 16


def make_model(args: argparse.Namespace) -> MultimodalModel:
    config = ModelConfig(
        architecture="text", width=args.width, depth=args.depth, vocab_size=args.vocab_size, qk_norm=False
    )
    return MultimodalModel(resolve_model(config), seed=0).requires_grad_(False)


def as_llama(model: MultimodalModel, folder: Path, length: int):
    """The same weights in transformers' LlamaForCausalLM."""
    from transformers import AutoModelForCausalLM

    own = folder / "own"
    own.mkdir()
    groups = [TensorGroup({n: tuple(p.shape)}, lambda p=p: (p.detach(),)) for n, p in model.named_parameters()]
    write_tensors(own, groups, "float32", 10**12)
    write_text(own / MODEL, to_yaml(FolderSettings(model=model.config, row_length=length)))
    convert(own, "hf", folder / "hf")
    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512, help="generated per row")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows at a time")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, length = make_model(args), PROMPT + args.tokens
    with tempfile.TemporaryDirectory() as folder:
        llama = as_llama(model, Path(folder), length)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, width {args.width}, depth {args.depth}")
    print("rows  program                 tokens/s   against transformers")
    for rows in args.batch:
        compare(model, llama, rows, args)
    cache = KeyValueCache(model, 1, length, torch.float32, "cpu")
    print(f"cache: {cache.num_bytes / length / 1024:.0f} KiB a position and row")


def compare(model: MultimodalModel, llama, rows: int, args: argparse.Namespace) -> None:
    generator = np.random.default_rng(0)
    ids = np.concatenate([np.full((rows, 1), BOS), generator.integers(5, args.vocab_size, (rows, PROMPT - 1))], 1)
    prompts = [
        Prompt(
            example=Example(id="", tokens=row.astype(np.int32), layout=np.array([PROMPT], np.int32), images=[]),
            patches=np.zeros((0, 3), np.uint8),
        )
        for row in ids
    ]
    options = {"max_length": PROMPT + args.tokens, "stop": ()}

    def theirs() -> list[list[int]]:
        inputs = torch.from_numpy(ids)
        found = llama.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            do_sample=False,
            suppress_tokens=[0, 1, 3, 4],
            pad_token_id=0,
        )
        return found[:, PROMPT:].tolist()

    programs = {
        "megamm": lambda: generate(model, prompts, args.tokens, **options),
        "megamm without cache": lambda: generate(model, prompts, args.tokens, cache=False, **options),
        "transformers": theirs,
    }
    best, answers = dict.fromkeys(programs, float("inf")), {}
    for repeat in range(args.repeats):
        for name, run in programs.items():
            if name == "megamm without cache" and repeat:
                continue  # slow enough to be timed once
            began = time.perf_counter()
            answers[name] = run()
            best[name] = min(best[name], time.perf_counter() - began)
    if answers["megamm"] != answers["megamm without cache"]:
        raise RunError("the cache changes the answer")
    same = answers["megamm"] == answers["transformers"]
    for name, seconds in best.items():
        rate = rows * args.tokens / seconds
        print(f"{rows:<5} {name:<22} {rate:>9.1f}   {best['transformers'] / seconds:.2f}x")
    print(f"      with cache {best['megamm without cache'] / best['megamm']:.1f}x the speed without; ", end="")
    print("transformers gives the same tokens" if same else "transformers gives other tokens")


if __name__ == "__main__":
    exit_on_error(main)
