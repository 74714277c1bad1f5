"""The estimator: against hand calculation, exact FLOPs, tensors that torch saves, and the contract of its script."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dataset_factory import make_dataset
from megamm_kernels.linear_cross_entropy import GPU_CHUNK_BYTES
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megamm.config import Config, load
from megamm.data.loader import Loader, build_plan, open_sources
from megamm.errors import InputError
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.data import set_gradient_sync, shard_over_data
from megamm.resolve import resolve_config
from megamm.scaling.estimate.memory import kept_activations, rank_memory, rest_parameters
from megamm.scaling.estimate.operations import CHUNK_BYTES, operations
from megamm.scaling.estimate.outputs import to_json, to_text
from megamm.scaling.estimate.step import (
    SHARES,
    Assumptions,
    collective_bandwidth,
    estimate,
    estimated_efficiency,
    traffic,
)
from megamm.scaling.estimate.tokens import resolve_for_estimate, stated_stats, stats_of_sources
from megamm.scaling.flops import TokenStats, count_parameters, exact_flops_per_token
from megamm.scaling.plan.hardware import GPUS

ROOT = Path(__file__).parents[2]
TEXT = TokenStats(patches=0.0, labels=1.0, pairs=512.5)
PAPER = TokenStats(patches=0.544, labels=0.45, pairs=580.0)
NO_REST = Assumptions(reserve=0.0)


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
    # One pass: bf16 blocks twice, float32 rest once, float32 gradients once; a ring sends 255/256 of everything.
    sent = 255 / 256 * (2 * 2 * depth * block + 4 * rest + 4 * params)
    assert sum(item.bytes for item in found.traffic) == pytest.approx(sent)
    assert found.bytes_between_nodes == pytest.approx(sent / 8)
    # Products of the blocks alone at the assumed share of the peak: none is short of operands.
    products = 6 * 2**21 * depth * (4 * width**2 + 3 * width * hidden) / (ranks * 989e12 * 0.6)
    names = ("qkv", "attention output", "gate and up", "down")
    assert sum(found.times[name] for name in names) == pytest.approx(products, rel=1e-9)
    assert found.times["clipping and AdamW"] == pytest.approx(40 * params / ranks / (0.75 * 3.35e12))
    assert found.mfu_6nd == pytest.approx(found.flops / (found.step_time * ranks * 989e12))
    assert sum(found.times.values()) == found.step_time and found.bubble == 0 and not found.warnings


@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_operations_add_up_to_the_exact_count(architecture):
    model = config_of(architecture=architecture, width=768).model
    groups = operations(model, 4096, PAPER)
    counted = sum(work.flops for group in groups for work in (group.forward, group.backward))
    assert counted == pytest.approx(4096 * exact_flops_per_token(model, PAPER), rel=1e-12)
    assert all(work.bytes >= 0 for group in groups for work in (group.forward, group.backward))
    assert CHUNK_BYTES == GPU_CHUNK_BYTES


def test_parameters_outside_blocks():
    for architecture in ("early", "late", "text"):
        model = MultimodalModel(config_of("--model.depth=2", architecture=architecture, width=64).model)
        blocks = [*model.blocks, *getattr(model.vision, "blocks", [])]
        inside = sum(p.numel() for block in blocks for p in block.parameters())
        total = sum(p.numel() for p in model.parameters())
        assert rest_parameters(model.config, count_parameters(model.config)) == total - inside


# --------------------------------------------------------------------------------------- against what torch saves


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "pages", kind="interleaved", num_documents=200)


def small(prepared: Path, architecture: str) -> Config:
    overrides = ["--model.width=128", "--model.depth=3", "--model.head_dim=32", "--model.hidden_multiple=16"]
    overrides += ["--data.row_length=256", "--data.workers=0", "--train.steps=1", "--train.batch_rows=4"]
    overrides += [f"--model.architecture={architecture}", f"--data.sources.pages.path={prepared}"]
    return resolve_config(load(None, overrides))


def batch_of(config: Config):
    datasets = open_sources(config.data, "train")
    plan = build_plan(datasets, [1.0], config.data, num_rows=4)
    return next(iter(Loader(
        plan, datasets, config.data, global_batch_rows=4, rank=0, num_ranks=1, micro_rows=4, start_step=0, end_step=1,
    )))[0]  # fmt: skip


def saved_bytes(model: MultimodalModel, batch, dtype: torch.dtype) -> int:
    """Storages that a forward keeps: without parameters, the head's gradient (a gradient), and the stored masks."""
    kept, plans, plan_attention = [], [], model.plan_attention
    model.plan_attention = lambda *arguments: plans.append(plan_attention(*arguments)) or plans[-1]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(batch, dtype)  # all that was saved lives on in ``kept``, so that no address is used twice
    masks = [x for plan in plans for x in plan if isinstance(x, torch.Tensor)]
    gradient = [x for x in kept if x.shape == model.head.weight.shape]
    left_out = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *masks, *gradient]}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in storages.items() if address not in left_out)


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
        expected += rank_memory(config_with(config, "bfloat16"), 1, stats)["weights in the type of the activations"]
        expected -= 2 * config.model.vocab_size * config.model.width
    measured = saved_bytes(MultimodalModel(config.model), batch, dtype)
    assert expected == pytest.approx(measured, rel=0.03)
    assert sum(kept_activations(config.model, positions, stats, size).values()) < expected


def config_with(config: Config, dtype: str) -> Config:
    return replace(config, train=replace(config.train, dtype=dtype))


# -------------------------------------------------------------------------------------- against what FSDP2 sends


class SentBytes(TorchDispatchMode):
    """Full size in bytes of all tensors gathered and reduced, by kind of collective."""

    def __init__(self):
        super().__init__()
        self.total = {"gather": 0, "reduce": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = {"c10d._allgather_base_.default": "gather", "c10d._reduce_scatter_base_.default": "reduce"}.get(
            str(func)
        )
        if kind:  # of output and input the full tensor is the larger one
            self.total[kind] += max(x.numel() * x.itemsize for x in args if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh():
    """A mesh of four ranks, of which this process is one and the others are imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    dist.destroy_process_group()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("architecture", ["early", "late"])
def test_traffic_against_fsdp(prepared, mesh, architecture, passes):
    """Every collective of a step, but for the padding of small parameters."""
    config = small(prepared, architecture)
    batch, model = batch_of(config), MultimodalModel(config.model)
    shard_over_data(model, mesh, torch.bfloat16)
    with SentBytes() as sent:
        for i in range(passes):
            set_gradient_sync(model, i == passes - 1)
            model(batch, torch.bfloat16).loss.backward()
    expected = traffic(config_with(config, "bfloat16"), 4, passes)
    for kind, total in sent.total.items():
        of_ring = sum(item.bytes for item in expected if item.name.startswith(kind))
        assert of_ring == pytest.approx(3 / 4 * total, rel=2e-3)


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
    once, twice = (estimate(config_of(f"--train.micro_rows={rows}"), 256, GPUS["h100"], PAPER) for rows in (8, 4))
    assert (once.passes, twice.passes) == (1, 2)
    name = "gradients accumulated over passes"
    assert name not in once.memory and twice.memory[name] > 4 * 7e9
    assert twice.memory["activations: blocks"] == pytest.approx(once.memory["activations: blocks"] / 2)
    assert sum(x.bytes for x in twice.traffic) > sum(x.bytes for x in once.traffic)


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
    a = Assumptions(network=1.0)
    assert collective_bandwidth(GPUS["h100"], 8, a) == 450e9
    assert collective_bandwidth(GPUS["h100"], 16, a) == 400e9  # eight cards of 50 GB/s
    assert collective_bandwidth(GPUS["h100"], 16, replace(a, ranks_per_node=1)) == 50e9
    assert collective_bandwidth(GPUS["mi250x"], 8, a) == 200e9  # a rank is one of two dies
    assert traffic(config_of(), 1, 1) == []


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
        ("train.batch_rows: 2048 is not a multiple of the 7 ranks", lambda: attempt(ranks=7)),
        ("not a multiple of the 0 ranks", lambda: attempt(ranks=0)),
        ("--world-size: 8, but parallel.data is 4", lambda: attempt("--parallel.data=4")),
        ("train.dtype: float32", lambda: attempt("--train.dtype=float32")),
        ("--matmul: 1.5", lambda: attempt(matmul=1.5)),
        ("--ranks-per-node: 0", lambda: attempt(ranks_per_node=0)),
        ("--node-bandwidth: nan", lambda: attempt(node_bandwidth=float("nan"))),
        ("--reserve: -1", lambda: attempt(reserve=-1.0)),
    ):
        with pytest.raises(InputError, match=match):
            call()
    crowded = attempt("--train.micro_rows=64")
    assert "do not fit in the 80 GB of a h100: lower train.micro_rows" in crowded.warnings[0]


def test_data_that_are_not_at_hand(tmp_path):
    config = load(ROOT / "examples" / "configs" / "early_275m.yaml")
    config.data.sources["text"].path = str(tmp_path / "none")
    _, stats, source = resolve_for_estimate(config)
    assert stats.patches == 0.544 and "is not prepared here" in source


def test_outputs_say_the_same():
    config = config_of("--train.micro_rows=4")
    found = estimate(config, 256, GPUS["h100"], PAPER)
    efficiency = estimated_efficiency(config, 256, GPUS["h100"], PAPER)
    document, text = to_json(found, efficiency), to_text(found, efficiency)
    json.dumps(document, allow_nan=False)
    assert document["memory"]["total"] == pytest.approx(sum(document["memory"]["parts"].values()))
    assert document["step_time"]["total"] == pytest.approx(sum(document["step_time"]["parts"].values()))
    assert document["measured"] is False and "None of this was measured" in text
    assert f"{document['mfu']['exact']:.1%} by exact operations, {document['mfu']['6nd']:.1%} by 6ND" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_script(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, str(ROOT / "tools" / "estimate.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    config = ["--config", str(ROOT / "examples" / "configs" / "early_275m.yaml"), "--gpu", "H100"]
    out = tmp_path / "made" / "estimate.json"
    good = run(*config, "--world-size", "64", "--train.micro_rows", "8", "--out", str(out))
    assert good.returncode == 0, good.stderr
    assert "memory" in good.stdout and json.loads(out.read_text())["passes"] == 4
    bad = run(*config, "--world-size", "3", "--out", str(tmp_path / "x.json"))
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not (tmp_path / "x.json").exists()
