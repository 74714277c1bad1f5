"""The estimator's memory beside the storages that the real model holds, on one rank of 64 to 1,024.

    python benchmarks/memory.py [--out FILE]

The ranks are imagined: torch's fake process groups, which send nothing. Model, FSDP2, pipelines and optimizer are the
real ones, on the CPU's path of the operators (rank_memory with fused=False). Matrix products and attention only give
tensors of the right shape: their numbers do not matter here. A dispatch mode notes every storage and asks after each
operation how many bytes are alive; the largest sum of the second step is compared.
"""

import argparse
import csv
import math
import time
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megamm_laws.arguments import ArgumentParser
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from megamm.config import Config, load
from megamm.errors import exit_on_error
from megamm.estimate.memory import rank_memory
from megamm.model.counts import TokenStats
from megamm.parallel import apply
from megamm.parallel.engine import Engine
from megamm.parallel.layout import Layout, resolve_layout
from megamm.parallel.mesh import World, make_mesh
from megamm.resolve import resolve_config
from megamm.sequence import IGNORE, IMAGE, PAD, Batch, patches_per_image, row_positions
from megamm.training.optimizer import make_optimizer

TEXT = 64
"""Text tokens of a document beside its image."""
HOLLOW = ("aten.mm.", "aten.addmm.", "aten.bmm.", "megamm.interval", "megamm.linear_cross", "megamm.grouped")
"""Beginnings of the names of operations that are not computed."""
EXPERTS = {"model.experts.num": 8, "model.experts.top_k": 2}
CASES: list[tuple[str, int, dict]] = [
    ("early", 64, {}),
    ("early", 1024, {"train.batch_rows": 2048}),
    ("early", 64, {"reshard_after_forward": "false"}),
    ("early", 64, {"train.micro_rows": 1, "reduce_every_pass": "false"}),
    ("early", 64, {"train.recompute": "full"}),
    ("early", 64, {"train.recompute": "per_op"}),
    ("text", 256, {"dp_replicate": 4, "train.batch_rows": 512}),
    ("late", 64, {}),
    ("early", 256, {"tensor": 4}),
    ("late", 256, {"tensor": 4}),
    ("early", 256, {"context": 4}),
    ("early", 256, {"context": 4, "context_method": "ring"}),
    ("early", 256, {"context": 2, "tensor": 2}),
    ("early", 64, {"pipeline": 4, "train.batch_rows": 256}),
    ("early", 64, {"pipeline": 2, "pipeline_schedule": "interleaved", "train.batch_rows": 256}),
    ("early", 64, {"pipeline": 2, "pipeline_schedule": "zero_bubble", "train.batch_rows": 256}),
    ("early", 64, EXPERTS),
    ("early", 64, EXPERTS | {"expert": 8}),
    ("early", 128, EXPERTS | {"expert": 8, "tensor": 2}),
    ("early", 64, {"model.per_modality": "block"}),
    ("early", 64, {"optimizer.name": "muon"}),
]
"""Architecture, ranks, settings (of ``parallel`` where they have no dot)."""


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that are alive: now, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = _shape_only(func, args, kwargs) if str(func).startswith(HOLLOW) else func(*args, **kwargs)
        large = 0
        for x in tree_iter(found):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                # Of a DTensor this mode sees the whole alone; what lies here is its local part.
                storage = getattr(x, "_local_tensor", x).untyped_storage()
                known = self.storages.get(storage._cdata)
                if known is None or known() is None:
                    self.storages[storage._cdata] = weakref.ref(storage)
                    large = max(large, storage.nbytes())
        if large > 2**18:  # a peak is one of large tensors
            self.most = max(self.most, self.now())
        return found

    def now(self) -> int:
        """FSDP frees by resizing to nothing, so every storage is asked anew."""
        alive = {key: storage for key, known in self.storages.items() if (storage := known()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())


def _shape_only(func, args, kwargs):
    if "out" in kwargs:
        return kwargs["out"]
    args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))
    found = func(*args, **kwargs)

    def real(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, torch.Tensor) else x

    return tree_map(real, found)


@contextmanager
def imagined_world(layout: Layout, rank: int = 0):
    """A world of which this process is one rank and the others are imagined; without values, and without peers."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)

    def exchange(out, sent, *_, **__):
        if out.shape == sent.shape:  # counts of experts: this rank's own stand for what comes
            out.copy_(sent)

    def shapes_are_known(_, stages, *__):
        from torch.distributed.pipelining.stage import InferenceMode

        for stage in stages:  # torch would ask the ranks of the other stages
            stage._inference_mode = InferenceMode.STATIC

    try:
        with ExitStack() as patched:
            patched.enter_context(mock.patch.object(dist, "all_to_all_single", exchange))
            patched.enter_context(mock.patch.object(apply, "initialise", lambda *_: None))
            kind = schedules._PipelineSchedule
            patched.enter_context(mock.patch.object(kind, "_warmup_p2p", shapes_are_known, create=True))
            device = torch.device("cpu")
            yield World(rank=rank, size=layout.world_size, device=device, layout=layout, **make_mesh("cpu", layout))
    finally:
        dist.destroy_process_group()


def rows_of(config: Config, num_rows: int) -> Batch:
    """Rows of equal documents: an image (of models that have them) and some text."""
    model, length = config.model, config.data.row_length
    patches = patches_per_image(model.image_size, model.patch_size)
    document = [patches + TEXT] if model.architecture == "text" else [3, -patches, TEXT - 3]
    places = row_positions([np.array(document)] * (length // (patches + TEXT)), length)
    is_image, padding = (torch.from_numpy(x) for x in (places.is_image, places.hi < places.lo))
    labelled = ~is_image & ~padding
    tokens = torch.where(is_image, IMAGE, 7).masked_fill(padding, PAD)

    def repeated(x, dtype=torch.int32):
        return torch.as_tensor(x).to(dtype).expand(num_rows, -1).contiguous()

    image_index = repeated(is_image, torch.bool).flatten().nonzero().flatten()
    return Batch(
        tokens=repeated(tokens),
        positions=repeated(np.arange(length) - places.start),
        targets=repeated(torch.where(labelled, 7, IGNORE)),
        source=repeated(torch.zeros(length), torch.uint8),
        label_kind=repeated(torch.zeros(length), torch.uint8),
        lo=repeated(places.lo),
        hi=repeated(places.hi),
        patches=torch.zeros(len(image_index), 3 * model.patch_size**2, dtype=torch.uint8),
        patch_index=image_index,
        grids=torch.full((len(image_index) // patches, 2), math.isqrt(patches), dtype=torch.int32),
        label_index=repeated(labelled, torch.bool).flatten().nonzero().flatten(),
    )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Bytes of the fullest rank: counted, and estimated."""

    layout: Layout
    measured: float
    estimated: float

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured


def compare(config: Config, num_ranks: int) -> Compared:
    """Two steps of a config on rank 0 of each pipeline stage, against ``rank_memory``."""
    layout = resolve_layout(config, num_ranks)
    batch = rows_of(config, layout.micro_rows)
    positions = batch.tokens.numel()
    stats = TokenStats(patches=len(batch.patches) / positions, labels=batch.num_labels() / positions, pairs=300.0)
    stride = num_ranks // layout.pipeline
    measured = max(most_alive(config, layout, batch, stats, stage * stride) for stage in range(layout.pipeline))
    estimated = sum(rank_memory(config, layout, stats, fused=False).values())
    return Compared(layout=layout, measured=measured, estimated=estimated)


def most_alive(config: Config, layout: Layout, batch: Batch, stats: TokenStats, rank: int) -> int:
    """The most bytes that are alive in the second step, once the optimizer has its state."""
    with imagined_world(layout, rank) as world, LiveStorages() as live:
        engine = Engine(config, 1, world, stats)
        optimizer = make_optimizer(engine.model, config.optimizer, engine.dtype)
        for _ in range(2):
            live.most = 0
            engine.step([batch] * layout.micro_batches, 1.0, 0.01)
            most = live.most
            optimizer.step()
            optimizer.zero_grad()
    return most


def config_of(architecture: str, settings: dict, width: int = 1024, depth: int = 4) -> Config:
    """A model of some width, rows of 1,024 positions, two a micro-batch."""
    values = {
        "model.architecture": architecture,
        "model.vocab_size": 16 * width,
        "model.image_size": 224,
        "model.patch_size": 14,
        "model.width": width,
        "model.depth": depth,
        "data.row_length": 1024,
        "train.dtype": "bfloat16",
        "train.steps": 1000,
        "train.batch_rows": 128,
        "train.micro_rows": 2,
    }
    values |= {name if "." in name else f"parallel.{name}": value for name, value in settings.items()}
    return resolve_config(load(None, [f"--{name}={value}" for name, value in values.items()]))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a CSV file of the same")
    args = parser.parse_args()
    rows = []
    for architecture, num_ranks, settings in CASES:
        began = time.monotonic()
        found = compare(config_of(architecture, settings), num_ranks)
        more = ", ".join(f"{name} {value}" for name, value in settings.items() if "." in name and "rows" not in name)
        text = f"{architecture}: {found.layout}" + (f", {more}" if more else "")
        rows.append(
            (text, num_ranks, f"{found.measured / 1e6:.1f}", f"{found.estimated / 1e6:.1f}", f"{found.ratio:.3f}")
        )
        print(
            "{:84} {:>5} ranks {:>7} MB counted {:>7} estimated {}".format(*rows[-1]),
            f"{time.monotonic() - began:.0f} s",
        )
    if args.out:
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows([("what", "ranks", "counted MB", "estimated MB", "ratio"), *rows])


if __name__ == "__main__":
    exit_on_error(main)
