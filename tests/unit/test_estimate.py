"""The estimator: against hand calculation, exact FLOPs, tensors that torch saves, and the contract of its script."""

import json
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dataset_factory import make_dataset
from megamm_kernels.linear_cross_entropy import GPU_CHUNK_BYTES
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megamm.config import Config, load
from megamm.data.loader import Loader, build_pack_plan, open_sources
from megamm.errors import InputError
from megamm.estimate.assumptions import SHARES, Assumptions
from megamm.estimate.communication import RankGroup, data_traffic, latency, link_rate, stage_traffic
from megamm.estimate.hardware import GPUS
from megamm.estimate.memory import kept_activations, rank_memory, units_of, whole_parameters
from megamm.estimate.operations import CHUNK_BYTES, operations
from megamm.estimate.outputs import to_json, to_text
from megamm.estimate.step import estimate, estimated_efficiency
from megamm.estimate.tokens import resolve_for_estimate, stated_stats, stats_of_sources
from megamm.model import context
from megamm.model.counts import TokenStats, exact_flops_per_token
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.engine import Engine
from megamm.parallel.layout import Layout, resolve_layout
from megamm.parallel.mesh import World, make_mesh
from megamm.parallel.stages import Stage, cut_stages
from megamm.resolve import resolve_config

ROOT = Path(__file__).parents[2]
TEXT = TokenStats(patches=0.0, labels=1.0, pairs=512.5)
PAPER = TokenStats(patches=0.544, labels=0.45, pairs=580.0)
NO_REST = Assumptions(reserve=0.0, launch=0.0)


def config_of(*overrides: str, architecture: str = "early", width: int = 5120) -> Config:
    """The paper's 8.13B model, or another of its shape."""
    sizes = ["--model.vocab_size=50432", "--model.image_size=224", "--model.patch_size=14", "--train.dtype=bfloat16"]
    shape = [f"--model.architecture={architecture}", f"--model.width={width}", "--train.steps=1000"]
    return resolve_config(load(None, [*sizes, *shape, "--train.micro_rows=1", *overrides]))


# ------------------------------------------------------------------------------------------ by hand, by identity


def test_paper_8b_by_hand():
    """8.13B parameters (arXiv 2504.07951), 2048 rows of 1024 on 256 H100: figures worked out apart from the code."""
    width, depth, hidden, vocabulary, ranks = 5120, 24, 13824, 50432, 256
    block = 4 * width**2 + 3 * width * hidden + 2 * width + 2 * 64
    rest = 2 * vocabulary * width + width + 588 * width
    params = depth * block + rest
    assert params == pytest.approx(8.13e9, rel=0.005)
    config = config_of("--train.micro_rows=8")
    found = estimate(config, ranks, GPUS["h100"], TEXT, NO_REST)
    assert found.params == params and found.tokens_per_step == 2**21
    assert found.flops == 6 * params * 2**21
    state = sum(found.memory[name] for name in ("parameters", "gradients", "optimizer state"))
    assert state == pytest.approx(16 * params / ranks)
    # One pass: bf16 parameters twice, float32 gradients once; a ring sends 255/256 of everything.
    sent = 255 / 256 * (2 * 2 + 4) * params
    assert sum(item.bytes for item in found.traffic) == pytest.approx(sent)
    assert found.bytes_between_nodes == pytest.approx(sent / 8)
    # Products of the blocks alone at the assumed share of the peak: none is short of operands.
    products = 6 * 2**21 * depth * (4 * width**2 + 3 * width * hidden) / (ranks * 989e12 * 0.54)
    names = ("qkv", "attention output", "gate and up", "down")
    assert sum(found.times[name] for name in names) == pytest.approx(products, rel=1e-9)
    assert found.times["clipping and AdamW"] == pytest.approx(40 * params / ranks / (0.75 * 3.35e12))
    assert found.mfu_6nd == pytest.approx(found.flops / (found.step_time * ranks * 989e12))
    assert sum(found.times.values()) == found.step_time and found.bubble == 0 and not found.warnings


@pytest.mark.parametrize(
    "more",
    ["--model.key_heads=4", "--model.experts.num=8", "--model={heads: 20, head_dim: 32, key_heads: 5, hidden: 999}"],
)
@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_operations_add_up_to_the_exact_count(architecture, more):
    model = config_of(more, architecture=architecture, width=768).model
    groups = operations(model, 4096, PAPER)
    counted = sum(work.flops for group in groups for work in (group.forward, group.backward))
    assert counted == pytest.approx(4096 * exact_flops_per_token(model, PAPER), rel=1e-12)
    assert all(work.bytes >= 0 for group in groups for work in (group.forward, group.backward))
    assert CHUNK_BYTES == GPU_CHUNK_BYTES


@pytest.mark.parametrize("architecture", ["early", "late", "text"])
@pytest.mark.parametrize(
    "more",
    [
        ["--model.key_heads=1"],
        ["--model.experts.num=4", "--model.experts.shared_hidden=32"],
        ["--model={heads: 6, head_dim: 16, key_heads: 2, hidden: 40, qk_norm: false, qkv_bias: true}"],
        ["--model.tied_embeddings=true"],
        ["--model.vision={final_norm: false, hidden: 40, norm_eps: 1e-5}"],
        ["--model.per_modality=feed_forward"],
        ["--model.per_modality=block"],
    ],
)
def test_units_are_those_of_the_model(architecture, more):
    config = config_of("--model.depth=2", *more, architecture=architecture, width=64)
    model = MultimodalModel(config.model, seed=0)
    whole = Stage(first_block=0, last_block=1, inputs=True, head=True, cost=0.0)
    units = units_of(config.model, Layout(), [whole])
    assert sum(unit.size for unit in units) == sum(p.numel() for p in model.parameters())
    assert [unit.size for unit in units if unit.name == "head"] == [sum(p.numel() for p in model.head.parameters())]
    # Cut by two tensor ranks: all but what is whole, twice.
    cut = units_of(config.model, Layout(tensor=2), [whole])
    assert 2 * sum(unit.size for unit in cut) == sum(unit.size for unit in units) + sum(
        whole_parameters(config.model, whole)
    )


# --------------------------------------------------------------------------------------- against what torch saves


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "pages", kind="interleaved", num_documents=200)


def small(prepared: Path, architecture: str, *more: str) -> Config:
    overrides = ["--model.width=128", "--model.depth=3", "--model.head_dim=32", "--model.hidden_multiple=16"]
    overrides += ["--data.row_length=256", "--data.workers=0", "--train.steps=1", "--train.batch_rows=4"]
    overrides += [f"--model.architecture={architecture}", f"--data.sources.pages.path={prepared}"]
    return resolve_config(load(None, [*overrides, *more]))


def batch_of(config: Config):
    datasets = open_sources(config.data, "train")
    plan = build_pack_plan(datasets, [1.0], config.data, num_rows=4)
    return next(
        iter(
            Loader(
                plan,
                datasets,
                config.data,
                global_batch_rows=4,
                rank=0,
                num_ranks=1,
                micro_rows=4,
                start_step=0,
                end_step=1,
            )
        )
    )[0]


def saved_bytes(model: MultimodalModel, batch, dtype: torch.dtype) -> int:
    """Storages that a forward keeps: without parameters, the head's gradient (a gradient), and the stored masks."""
    kept, made, build_mask = [], [], context.build_mask
    remembered = mock.patch.object(context, "build_mask", lambda *a: made.append(build_mask(*a)) or made[-1])
    with remembered, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(batch, dtype)  # all that was saved lives on in ``kept``, so that no address is used twice
    masks = [x for mask in made for x in mask if isinstance(x, torch.Tensor)]
    gradient = [x for x in kept if x.shape == model.head.weight.shape]
    left_out = {storage_of(x) for x in [*model.parameters(), *masks, *gradient]}
    storages = {storage_of(x): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in storages.items() if address not in left_out)


def storage_of(x: torch.Tensor) -> int:
    """Which storage a tensor lies in; fake ones have no address."""
    return x.untyped_storage()._cdata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_activations_against_saved_tensors(prepared, architecture, dtype):
    """The plain-torch path on the CPU, within 3%; kernels keep less, by what ``fused`` leaves out."""
    config, size = small(prepared, architecture), dtype.itemsize
    batch = batch_of(config)
    positions = batch.tokens.numel()
    stats = TokenStats(patches=len(batch.patches) / positions, labels=batch.num_labels() / positions, pairs=0.0)
    expected = sum(kept_activations(config.model, positions, stats, size, fused=False).values())
    if dtype == torch.bfloat16:  # one process keeps its bf16 copies of the weights, but for table and head
        expected += rank_memory(config_with(config, "bfloat16"), Layout(), stats)[
            "weights in the type of the activations"
        ]
        expected -= 2 * config.model.vocab_size * config.model.width  # the head's is made in pieces
    measured = saved_bytes(MultimodalModel(config.model, seed=0), batch, dtype)
    assert expected == pytest.approx(measured, rel=0.03)
    assert sum(kept_activations(config.model, positions, stats, size).values()) < expected


def config_with(config: Config, dtype: str) -> Config:
    return replace(config, train=replace(config.train, dtype=dtype))


# -------------------------------------------------------------------------------------- against what FSDP2 sends


class SentBytes(TorchDispatchMode):
    """Bytes that a rank of a ring sends in all collectives, by the axis that they run over."""

    RINGS = ("allgather", "all_gather", "reduce_scatter")

    def __init__(self, groups: dict):
        super().__init__()
        self.names = {group.group_name: name for group, name in groups.items() if group is not None}
        self.total = dict.fromkeys(groups.values(), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found, name = func(*args, **(kwargs or {})), str(func)
        if name.startswith(("c10d", "_c10d_functional")) and "wait" not in name:
            size, axis = self._group(args)
            if axis and (any(ring in name for ring in self.RINGS) or ("all" in name and "reduce" in name)):
                # Of output and input the whole is the larger one; a sum of everything goes around twice.
                tensors = [x for x in (*flatten(args), found) if isinstance(x, torch.Tensor)]
                whole = max(x.numel() * x.itemsize for x in tensors)
                twice = 1 if any(ring in name for ring in self.RINGS) else 2
                if whole > SCALAR:
                    self.total[axis] += twice * (size - 1) / size * whole
        return found

    def inside_operators(self):
        """Count the sums inside of custom operators as well, which dispatch does not see."""
        reduce = dist.all_reduce

        def counted(x, *args, group=None, **kwargs):
            if x.numel() * x.itemsize > SCALAR and torch.utils._python_dispatch._get_current_dispatch_mode() is None:
                size, name = group.size(), self.names[group.group_name]
                self.total[name] += 2 * (size - 1) / size * x.numel() * x.itemsize
            return reduce(x, *args, group=group, **kwargs)

        return mock.patch.object(dist, "all_reduce", counted)

    def _group(self, args: tuple) -> tuple[int, str | None]:
        for x in flatten(args):
            if isinstance(x, str) and x in self.names:
                return dist.distributed_c10d._resolve_process_group(x).size(), self.names[x]
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
                group = dist.ProcessGroup.unbox(x)
                return group.size(), self.names.get(group.group_name)
        return 0, None


SCALAR = 64
"""Bytes up to which a collective is one of numbers, such as losses and norms."""


def flatten(args) -> list:
    return [y for x in args for y in (flatten(x) if isinstance(x, (list, tuple)) else [x])]


@contextmanager
def imagined_world(layout: Layout, rank: int = 0):
    """A world of which this process is one rank and the others are imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        device = torch.device("cpu")
        yield World(rank=rank, size=layout.world_size, device=device, layout=layout, **make_mesh("cpu", layout))
    finally:
        dist.destroy_process_group()


LAYOUTS = (
    ["early", {}, 4],
    ["early", {"train.micro_rows": 1}, 2],
    ["early", {"train.micro_rows": 1, "parallel.reduce_every_pass": "false"}, 2],
    ["early", {"parallel.reshard_after_forward": "false"}, 4],
    ["early", {"parallel.dp_replicate": 2}, 4],
    ["early", {"parallel.tensor": 2, "model.key_heads": 2}, 4],
    ["early", {"parallel.context": 2}, 4],
    ["early", {"parallel.tensor": 2, "parallel.context": 2}, 8],
    ["early", {"model.experts.num": 4, "parallel.tensor": 2}, 4],
    ["early", {"model.per_modality": "block"}, 2],
    ["early", {"model.per_modality": "block", "parallel.tensor": 2}, 4],
    ["late", {}, 4],
    ["late", {"parallel.tensor": 2}, 2],
    ["text", {"parallel.tensor": 4}, 4],
)


@pytest.mark.parametrize(("architecture", "settings", "world_size"), LAYOUTS)
def test_traffic_against_counted_collectives(prepared, architecture, settings, world_size):
    """Bytes of every collective of a step, by the group that it runs over, but for the padding of small parameters.

    A pipeline's schedule is compared with torch's order for order; here is what stands inside of a stage.
    """
    config = small(prepared, architecture, *(f"--{name}={value}" for name, value in settings.items()))
    config = config_with(config, "bfloat16")
    layout = resolve_layout(config, world_size)
    with imagined_world(layout) as world:
        engine = Engine(config, 1, world)
        batches = next(iter(loader_of(config, layout)))
        groups = {world.axis(name).group: name for name in ("shard", "dp_replicate", "tensor", "context")}
        with SentBytes(groups) as sent, sent.inside_operators():
            engine.step(batches, 1.0)
    whole = cut_stages(config.model, PAPER, 1)
    positions = sum(batch.tokens.numel() for batch in batches)
    patches, labels = sum(len(batch.patches) for batch in batches), sum(batch.num_labels() for batch in batches)
    stats = TokenStats(patches=patches / positions, labels=labels / positions, pairs=0.0)
    expected = defaultdict(float)
    for item in [*data_traffic(config, layout, whole)]:
        expected[item.axis] += item.bytes
    for forward in (True, False):
        for item in stage_traffic(config, layout, whole[0], stats, forward):
            expected[item.axis] += item.bytes * layout.micro_batches
    assert set(expected) == {name for name, total in sent.total.items() if total}
    for name, total in expected.items():
        # Of context ranks this one may have more of the labels than another; else FSDP pads small parameters.
        assert sent.total[name] == pytest.approx(total, rel=1e-2 if layout.context > 1 else 2e-3), name


def loader_of(config: Config, layout: Layout) -> Loader:
    datasets = open_sources(config.data, "train")
    plan = build_pack_plan(datasets, [1.0], config.data, num_rows=4)
    return Loader(
        plan,
        datasets,
        config.data,
        global_batch_rows=4,
        rank=0,
        num_ranks=layout.data_ranks,
        micro_rows=layout.micro_rows,
        start_step=0,
        end_step=1,
    )


def test_statistics_of_prepared_data(prepared):
    """Against a batch: rows are not quite full, so shares per position are a few percent lower there."""
    config = small(prepared, "early")
    batch, stats = batch_of(config), stats_of_sources(config)
    seen = (batch.hi - batch.lo + 1).clamp(min=0)
    positions = int((seen > 0).sum())
    assert stats.patches == pytest.approx(len(batch.patches) / positions, rel=0.15)
    assert stats.labels == pytest.approx(batch.num_labels() / positions, rel=0.05)
    assert stats.pairs == pytest.approx(float(seen.sum()) / positions, rel=0.15)


def test_stated_statistics():
    model = config_of().model
    whole = stated_stats(model, 1024, image_share=0.5)
    # A causal row of 1024, and two images of 256 patches that see the rest of themselves.
    assert whole.pairs == pytest.approx((1024 * 1025 / 2 + 2 * 256 * 255 / 2) / 1024)
    assert whole.labels == pytest.approx((512 - 2 - 1) / 1024)
    assert stated_stats(model, 1024, image_share=0.5, document_length=512).pairs < whole.pairs
    assert stated_stats(config_of(architecture="text").model, 1024).patches == 0
    with pytest.raises(InputError, match="--document-length: 2048"):
        stated_stats(model, 1024, document_length=2048)


# ------------------------------------------------------------------------------------------------- monotonicity


def test_more_ranks_take_less_memory_and_time():
    found = [estimate(config_of(), n, GPUS["h100"], PAPER, NO_REST) for n in (2, 8, 64, 512)]
    assert np.diff([x.memory_total for x in found]).max() < 0
    assert np.diff([x.step_time for x in found]).max() < 0
    assert np.diff([x.mfu for x in found]).max() < 1e-9
    alone = estimate(config_of(width=800), 1, GPUS["h100"], PAPER, NO_REST)
    assert not alone.traffic and "communication not hidden" not in alone.times


def test_accumulation_costs_memory_and_gathers():
    policy = "--parallel.reduce_every_pass=false"
    once, twice = (
        estimate(config_of(f"--train.micro_rows={rows}", policy), 256, GPUS["h100"], PAPER) for rows in (8, 4)
    )
    assert (once.layout.micro_batches, twice.layout.micro_batches) == (1, 2)
    name = "gradients accumulated over passes"
    assert name not in once.memory and twice.memory[name] > 4 * 7e9
    assert twice.memory["activations: blocks"] == pytest.approx(once.memory["activations: blocks"] / 2)
    assert sum(x.bytes for x in twice.traffic) > sum(x.bytes for x in once.traffic)
    each = estimate(config_of("--train.micro_rows=4"), 256, GPUS["h100"], PAPER)
    assert name not in each.memory and sum(x.bytes for x in each.traffic) > sum(x.bytes for x in twice.traffic)


def test_slower_links_and_lower_shares_only_slow_down():
    config = config_of("--train.micro_rows=4")
    base = estimate(config, 512, GPUS["h100"], PAPER)
    worse = [replace(Assumptions(), **{name: ends[0]}) for name, ends in SHARES.items()]
    worse.append(Assumptions(node_bandwidth=1e9))
    for assumptions in worse:
        assert estimate(config, 512, GPUS["h100"], PAPER, assumptions).step_time >= base.step_time
    assert estimate(config, 512, GPUS["h100"], PAPER, worse[-1]).step_time > 2 * base.step_time
    assert estimate(config, 512, GPUS["b200"], PAPER).step_time < base.step_time


def test_rings_share_the_cards_of_a_node():
    a, h100 = Assumptions(network=1.0), GPUS["h100"]
    assert link_rate(RankGroup(size=8, stride=1), h100, a) == 450e9
    assert link_rate(RankGroup(size=16, stride=1), h100, a) == 400e9  # eight cards of 50 GB/s
    assert link_rate(RankGroup(size=16, stride=4), h100, a) == 100e9  # two ranks of the group on a node
    assert link_rate(RankGroup(size=4, stride=8), h100, a) == 50e9
    assert link_rate(RankGroup(size=16, stride=1), h100, replace(a, ranks_per_node=1)) == 50e9
    assert link_rate(RankGroup(size=8, stride=1), GPUS["mi250x"], a) == 200e9  # a rank is one of two dies


def test_latency_of_many_ranks():
    """A ring of 1,024 ranks on 128 nodes: 896 hops inside nodes and 127 between; a tree has seven levels."""
    group, a = RankGroup(size=1024, stride=1), Assumptions()
    assert latency(group, "ring", a) == pytest.approx(14e-6 + 896 * 1.9e-6 + 127 * 4e-6)
    assert latency(group, "all-reduce", a) == pytest.approx(14e-6 + 2 * (7 * 1.9e-6 + 7 * 8.5e-6))
    small = config_of(width=800)
    found = estimate(small, 1024, GPUS["h100"], PAPER)
    replicas = estimate(config_of("--parallel.dp_replicate=128", width=800), 1024, GPUS["h100"], PAPER)
    assert found.step_time > 0.1 > 2 * replicas.step_time and found.times["communication not hidden"] > 0.1


def test_interval_of_the_mfu_holds_it():
    config = config_of("--train.micro_rows=4")
    found = estimated_efficiency(config, 256, GPUS["h100"], PAPER)
    assert found.interval[0] < found.mfu < found.interval[1] < 0.75
    assert "256 ranks of h100" in found.source and "nothing measured" in found.source
    sure = estimated_efficiency(config, 256, GPUS["h100"], PAPER, Assumptions(matmul=0.9))
    assert sure.interval[0] < sure.mfu < sure.interval[1]


# ---------------------------------------------------------------------------------------------------- the errors


def test_what_cannot_be_is_said():
    def attempt(*overrides: str, ranks: int = 8, **assumed):
        return estimate(config_of(*overrides), ranks, GPUS["h100"], PAPER, Assumptions(**assumed))

    for match, call in (
        ("train.batch_rows: 2048 is not a multiple of the 7 data-parallel ranks", lambda: attempt(ranks=7)),
        ("world size: 0 is not positive", lambda: attempt(ranks=0)),
        ("world size: 8 ranks, but dp_shard 4", lambda: attempt("--parallel.dp_shard=4")),
        ("train.dtype: float32", lambda: attempt("--train.dtype=float32")),
        ("--matmul: 1.5", lambda: attempt(matmul=1.5)),
        ("--ranks-per-node: 0", lambda: attempt(ranks_per_node=0)),
        ("--node-bandwidth: nan", lambda: attempt(node_bandwidth=float("nan"))),
        ("--reserve: -1", lambda: attempt(reserve=-1.0)),
        ("--launch: inf", lambda: attempt(launch=float("inf"))),
    ):
        with pytest.raises(InputError, match=match):
            call()
    crowded = attempt("--train.micro_rows=64")
    assert "do not fit in the 80 GB of a h100: lower train.micro_rows" in crowded.warnings[0]


def test_data_that_are_not_at_hand(tmp_path):
    config = load(ROOT / "examples" / "nmm" / "early-275m.yaml")
    config.data.sources["text"].path = str(tmp_path / "none")
    _, stats, source = resolve_for_estimate(config)
    assert stats.patches == 0.544 and "is not prepared here" in source


def test_outputs_say_the_same():
    config = config_of("--train.micro_rows=4")
    found = estimate(config, 256, GPUS["h100"], PAPER)
    efficiency = estimated_efficiency(config, 256, GPUS["h100"], PAPER)
    document, text = to_json(found, efficiency.interval), to_text(found, efficiency.interval)
    json.dumps(document, allow_nan=False)
    assert document["memory"]["total"] == pytest.approx(sum(document["memory"]["parts"].values()))
    assert document["step_time"]["total"] == pytest.approx(sum(document["step_time"]["parts"].values()))
    assert document["measured"] is False and "None of this was measured" in text
    assert f"{document['mfu']['exact']:.1%} by exact operations, {document['mfu']['6nd']:.1%} by 6ND" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_script(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "tools" / "estimate.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    config = ["--config", str(ROOT / "examples" / "nmm" / "early-275m.yaml"), "--gpu", "H100"]
    out = tmp_path / "made" / "estimate.json"
    good = run(*config, "--world-size", "64", "--train.micro_rows", "8", "--out", str(out))
    assert good.returncode == 0, good.stderr
    assert "memory" in good.stdout and json.loads(out.read_text())["layout"]["micro_batches"] == 4
    bad = run(*config, "--world-size", "3", "--out", str(tmp_path / "x.json"))
    assert bad.returncode == 2 and "--train.batch_rows 2049" in bad.stderr and not (tmp_path / "x.json").exists()
