"""What it costs to spread a training step over two processes of one machine, at equal work on the same two cores.

    python benchmarks/two_processes.py [--rounds 5] [--width 256] [--out FILE]

One process with two threads against two processes with one thread each, on the same rows: our model sharded (FSDP),
tensor parallel and as a pipeline; and transformers' LlamaForCausalLM of equal sizes, sharded by torch's fully_shard
and cut by plain parallelize_module (it has no pipeline). All take turns in one run. The overhead is the median over
rounds of (time spread / time of one process of the same model) - 1. A step is forward, loss, backward, clipping and
fused AdamW, in float32 over gloo.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from megamm_laws.arguments import ArgumentParser
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from train_step import draw_row, llama_model, make_batch

from megamm.config import OptimizerConfig, load
from megamm.errors import exit_on_error
from megamm.model.counts import TokenStats
from megamm.parallel.data import clip_gradients
from megamm.parallel.engine import Engine
from megamm.parallel.layout import resolve_layout
from megamm.parallel.mesh import World, make_mesh
from megamm.resolve import resolve_config
from megamm.sequence import Batch
from megamm.training.optimizer import make_optimizer

VOCABULARY, HEAD_DIM, THREADS = 8192, 64, 2
LAYOUTS = {
    "FSDP": {"dp_shard": 2},
    "tensor parallel": {"tensor": 2},
    "pipeline (1F1B, 4 micro-batches)": {"pipeline": 2, "micro_batches": 4},
}
Step = Callable[[], None]


def batches_of(args: argparse.Namespace, rows: int) -> Batch:
    """Rows of packed documents, the same on all ranks."""
    rng = np.random.default_rng(0)
    documents = [draw_row(rng, args.row_length, "text") for _ in range(args.rows)]
    return make_batch(documents[:rows], args.row_length, VOCABULARY, rng)


def ours(args: argparse.Namespace, layout: dict[str, int], rank: int, size: int) -> Step:
    """A step of our model on some ranks."""
    values = {
        "model.architecture": "text",
        "model.vocab_size": VOCABULARY,
        "model.image_size": 224,
        "model.patch_size": 14,
        "model.width": args.width,
        "model.depth": args.depth,
        "model.head_dim": HEAD_DIM,
        "model.hidden_multiple": 256,
        "data.row_length": args.row_length,
        "train.steps": 1,
        "train.batch_rows": args.rows,
    }
    values |= {f"parallel.{name}": value for name, value in layout.items()}
    config = resolve_config(load(None, [f"--{name}={value}" for name, value in values.items()]))
    found = resolve_layout(config, size)
    mesh = make_mesh("cpu", found) if size > 1 else {}
    world = World(rank=rank, size=size, device=torch.device("cpu"), layout=found, **mesh)
    engine = Engine(config, 1, world, TokenStats(patches=0.0, labels=1.0, pairs=args.row_length / 4))
    optimizer = make_optimizer(engine.model, OptimizerConfig(lr=1e-4))
    batches = [batches_of(args, found.micro_rows)] * found.micro_batches

    def step() -> None:
        engine.step(batches, 1 / (args.rows * args.row_length))
        clip_gradients(engine.model.parameters(), 1.0, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def llama(args: argparse.Namespace, how: str | None) -> Step:
    """A step of transformers' Llama: of one process, or on the default group by FSDP or tensor parallel."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    shape = {"head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "row_length": args.row_length}
    model, rows = llama_model(width=args.width, depth=args.depth, **shape), args.rows
    if how == "FSDP":
        rows //= 2
        mesh = init_device_mesh("cpu", (2,))
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh)
    elif how:
        cut_llama(model)
    tokens = batches_of(args, rows).tokens.long()

    # torch clips and steps no list of cut and whole parameters: each kind by itself, which takes as long.
    kinds = [
        found for cut in (True, False) if (found := [p for p in model.parameters() if isinstance(p, DTensor) is cut])
    ]
    optimizer = torch.optim.AdamW([{"params": kind} for kind in kinds], lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        for parameters in kinds:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def cut_llama(model: nn.Module) -> None:
    """The usual plan: columns, then rows, in attention and feed-forward layers; embedding and head by vocabulary."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)


def timed(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def run_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """All contenders on this rank, round by round; rank 0 leaves their times in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    spread = {("megamm", name): ours(args, layout, rank, 2) for name, layout in LAYOUTS.items()}
    alone = {"megamm": ours(args, {}, 0, 1)} if rank == 0 else {}
    if find_spec("transformers"):
        spread |= {("Llama", name): llama(args, name) for name in ("FSDP", "tensor parallel")}
        alone |= {"Llama": llama(args, None)} if rank == 0 else {}
    times: dict[str | tuple[str, str], list[float]] = {name: [] for name in (*spread, *alone)}
    for i in range(args.rounds + 1):  # the first is a warm-up
        torch.set_num_threads(THREADS)
        for model, step in alone.items():  # the other rank waits
            times[model] += [timed(step)] * (i > 0)
        torch.set_num_threads(1)
        for name, step in spread.items():
            dist.barrier()
            times[name] += [timed(step)] * (i > 0)
        dist.barrier()
    if rank == 0:
        torch.save(times, f"{folder}/times")
    dist.barrier()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="of a step, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_processes.csv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run_rank, (args, folder), nprocs=2)
        times = torch.load(f"{folder}/times")
    if not find_spec("transformers"):
        print("transformers is not installed: no comparison with LlamaForCausalLM")
    tokens = args.rows * args.row_length
    rows: list[tuple] = [("model", "spread by", "tokens_per_s", "overhead")]
    for name, spent in times.items():
        model, how = (name, "one process") if isinstance(name, str) else name
        ratio = statistics.median(a / b for a, b in zip(spent, times[model], strict=True))
        rows.append((model, how, round(tokens / statistics.median(spent)), f"{ratio - 1:+.1%}"))
    for row in rows:
        print("{:<10}{:<36}{:>14}{:>12}".format(*row))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    exit_on_error(main)
