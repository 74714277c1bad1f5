"""The expert axis over gloo: outputs, gradients and first values are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from model_factory import model_config, one_row, stack_rows
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from megamm.config import Config, ExpertsConfig, ParallelConfig, TrainConfig
from megamm.model.context import BlockContext
from megamm.model.experts import MixtureOfExperts
from megamm.model.initial import initialise
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.apply import make_part, whole_or_stages
from megamm.parallel.context import cut_batch
from megamm.parallel.data import share_of
from megamm.parallel.experts import spread_experts
from megamm.parallel.layout import Layout, LayoutError, resolve_layout
from megamm.parallel.mesh import World, make_mesh

WIDTH = 16
CASES = {
    "spread": {"rows": [2, 1, 3, 2]},
    "all to the last expert": {"rows": [1, 2, 1, 1], "bias": [0.0] * 7 + [9.0]},
    "two ranks without positions": {"rows": [0, 3, 0, 2]},
    "no positions at all": {"rows": [0, 0, 0, 0]},
}


def layer_of(device: str = "cpu") -> MixtureOfExperts:
    with torch.device(device):
        layer = MixtureOfExperts(ExpertsConfig(num=8, top_k=2, hidden=12, bias_rate=0.1, shared_hidden=4), WIDTH, 2)
    return layer


def rows_of(case: dict) -> list[tuple[torch.Tensor, ...]]:
    """For each of the ranks: inputs, output gradients, image positions and padding of its rows."""
    generator, found = torch.Generator().manual_seed(4), []
    for rows in case["rows"]:
        x, grad = torch.randn(2, rows, 9, WIDTH, generator=generator)
        is_image = torch.rand(rows, 9, generator=generator) < 0.5
        is_padding = (torch.arange(9) >= 7).expand(rows, 9)
        found.append((x, grad, is_image, is_padding))
    return found


def run_layer(layer: MixtureOfExperts, case: dict, rows: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Output, gradients, loss and counts of a layer on some rows."""
    layer.bias.copy_(torch.tensor(case.get("bias", [0.0] * 8)))
    x, grad, is_image, is_padding = rows
    x = x.clone().requires_grad_()
    context = BlockContext(cos=None, sin=None, mask=None, is_image=is_image, is_padding=is_padding)
    out = layer(x, context)
    loss, counts = context.routed.close()
    ((out * grad).sum() + loss).backward()
    found = {"out": out.detach(), "x": x.grad, "loss": loss.detach(), "counts": counts}
    return found | {f"gradient {name}": p.grad for name, p in layer.named_parameters()}


def spread_layer(cases: dict[str, dict], axes: dict[str, int]) -> dict[str, dict[str, torch.Tensor]]:
    """On every rank: its rows through its share of the experts; all that is shared out comes back whole."""
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    found = {}
    for case_name, case in cases.items():
        layer = layer_of("meta")
        spread_experts(layer, mesh)
        layer.to_empty(device="cpu")
        initialise(layer, 3, share_of)
        result = run_layer(layer, case, rows_of(case)[mesh.get_local_rank("expert")])
        for name in ("gate_up", "down"):
            parameter = layer.experts.get_parameter(name)
            assert parameter.to_local().shape[0] == 8 // axes["expert"]
            result[f"value {name}"] = parameter.full_tensor().detach()
            result[f"gradient experts.{name}"] = parameter.grad.full_tensor() * axes["expert"]
        found[case_name] = result
    return found


def run_whole(case: dict) -> tuple[MixtureOfExperts, dict]:
    """The same on one process, with the rows of all ranks."""
    whole = layer_of()
    initialise(whole, 3)
    return whole, run_layer(whole, case, tuple(torch.cat(field) for field in zip(*rows_of(case), strict=True)))


@pytest.mark.parametrize("experts", [2, 4])
def test_experts_spread_over_ranks_are_those_of_one_process(experts):
    cases = {name: case | {"rows": case["rows"][:experts]} for name, case in CASES.items()}
    ranks = run_ranks(spread_layer, experts, cases, {"expert": experts})
    for name, case in cases.items():
        _compare(name, *run_whole(case), [found[name] for found in ranks])


def test_hidden_units_of_experts_are_shared_out_too():
    """Two ranks for the experts times two for their hidden units; outputs of the latter are partial sums."""
    case = CASES["spread"] | {"rows": [2, 1]}
    whole, expected = run_whole(case)
    ranks = [found["case"] for found in run_ranks(spread_layer, 4, {"case": case}, {"expert": 2, "tensor": 2})]
    for rank, rows in enumerate(rows_of(case)):
        with torch.no_grad():
            shared = whole.shared(rows[0])  # each tensor rank has it whole here
        out = ranks[2 * rank]["out"] + ranks[2 * rank + 1]["out"] - shared
        torch.testing.assert_close(out, expected["out"].split(case["rows"])[rank], rtol=1e-6, atol=1e-6)
    for name in ("gate_up", "down"):
        assert torch.equal(ranks[0][f"value {name}"], whole.experts.get_parameter(name))
        key = f"gradient experts.{name}"
        torch.testing.assert_close(ranks[0][key], expected[key], rtol=1e-5, atol=1e-6)


def _compare(name: str, whole: MixtureOfExperts, expected: dict, found: list[dict]) -> None:
    close = {"rtol": 1e-6, "atol": 1e-6, "msg": lambda m: f"{name}: {m}"}
    for key in ("out", "x"):
        torch.testing.assert_close(torch.cat([f[key] for f in found]), expected[key], **close)
    torch.testing.assert_close(sum(f["loss"] for f in found), expected["loss"], **close)
    assert torch.equal(sum(f["counts"] for f in found), expected["counts"])
    for rank in found:
        for key in ("gate_up", "down"):
            assert torch.equal(rank[f"value {key}"], whole.experts.get_parameter(key)), name
            torch.testing.assert_close(rank[f"gradient experts.{key}"], expected[f"gradient experts.{key}"], **close)
    for key in ("gradient router.weight", "gradient shared.gate_up.weight"):
        torch.testing.assert_close(sum(f[key] for f in found), expected[key], **close)


# ---- whole models -----------------------------------------------------------------------------------------

VARIANTS = {
    "experts": {"experts": ExpertsConfig(num=4, top_k=2, hidden=8, shared_hidden=8, z_weight=0.1)},
    "feed-forward per modality": {"per_modality": "feed_forward"},
    "mixture of transformers": {"per_modality": "block"},
}
ROWS = 8


def config_of(variant: str, settings: dict) -> Config:
    train = TrainConfig(batch_rows=ROWS, steps=1, **settings)
    return Config(model=model_config("early", depth=2, **copy.deepcopy(VARIANTS[variant])), train=train)


def documents() -> list:
    generator = torch.Generator().manual_seed(0)
    return [one_row([7 + i % 3, 8, *range(9, 9 + i)], generator) for i in range(ROWS)]


def step(model: MultimodalModel, batches: list, scale: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of the whole batch, and what experts got here."""
    for batch in batches:
        output = model(batch, dtype)
        ((output.loss + output.auxiliary) * scale).backward()
    found = {name: p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for name, p in model.named_parameters()}
    return found | ({"counts": model.take_expert_counts()} if model.config.experts.num else {})


def train_spread(runs: list[tuple[str, dict, dict]]) -> list[tuple[dict, dict]]:
    """First values and gradients of each run, on this rank's share of the rows."""
    found = []
    for variant, sizes, settings in runs:
        layout = Layout(micro_rows=1, **sizes)
        mesh = make_mesh("cpu", layout)
        world = World(rank=dist.get_rank(), size=layout.world_size, device=torch.device("cpu"), layout=layout, **mesh)
        config = config_of(variant, settings)
        (_, stage), *_ = whole_or_stages(config, world, None)
        model = make_part(config, 1, world, stage)
        values = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        batches = [stack_rows([d], 16) for d in documents()[world.data_rank :: world.data_size]]
        if layout.context > 1:
            batches = [cut_batch(batch, world.axis("context"), None) for batch in batches]
        dtype = getattr(torch, config.train.dtype)
        gradients = step(model, batches, layout.dp_replicate * layout.shard_ranks, dtype)
        if "counts" in gradients and world.axis("tensor").rank:
            gradients["counts"].zero_()  # tensor ranks route the same positions
        found.append((values, gradients))
    return found


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        (
            2,
            [
                ("experts", {"dp_shard": 2, "expert": 2}, {}),
                ("experts", {"tensor": 2}, {}),
                ("experts", {"context": 2}, {}),
                ("experts", {"context": 2, "expert": 2}, {"recompute": "full"}),
                ("experts", {"dp_shard": 2}, {"dtype": "bfloat16"}),
                ("feed-forward per modality", {"dp_shard": 2}, {}),
                ("feed-forward per modality", {"tensor": 2}, {}),
                ("mixture of transformers", {"dp_shard": 2}, {"recompute": "per_op"}),
                ("mixture of transformers", {"context": 2}, {}),
            ],
        ),
        (
            4,
            [
                ("experts", {"dp_shard": 4, "expert": 4}, {}),
                ("experts", {"dp_shard": 4, "expert": 2}, {"recompute": "full"}),
                ("experts", {"dp_shard": 2, "expert": 2, "tensor": 2}, {}),
                ("experts", {"dp_replicate": 2, "dp_shard": 2, "expert": 2}, {"dtype": "bfloat16"}),
            ],
        ),
    ],
    ids=["two ranks", "four ranks"],
)
def test_layouts_have_first_values_and_gradients_of_one_process(ranks, runs):
    everywhere = run_ranks(train_spread, ranks, runs, timeout=600)
    for i, (variant, sizes, settings) in enumerate(runs):
        config = config_of(variant, settings)
        whole, dtype = MultimodalModel(config.model, seed=0), getattr(torch, config.train.dtype)
        expected = step(whole, [stack_rows(documents(), 16)], 1.0, dtype)
        found = [results[i] for results in everywhere]
        where = f"{variant} {sizes} {settings}"
        if "counts" in expected and dtype == torch.float32:
            assert torch.equal(sum(gradients["counts"] for _, gradients in found), expected["counts"]), where
        for values, gradients in found:
            for name, parameter in whole.named_parameters():
                assert torch.equal(values[name], parameter), f"{where}: {name}"
                error = (gradients[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
                assert error < (1e-5 if dtype == torch.float32 else 0.1), f"{where}: {name} {error}"


def test_misfits_of_experts_and_layout_are_named():
    experts = {"experts": ExpertsConfig(num=6, hidden=9)}
    for settings, sizes, message in (
        (experts, {"expert": 4, "dp_shard": 4}, "parallel.expert: 4 does not divide model.experts.num 6"),
        (experts, {"tensor": 4}, "parallel.tensor: 4 does not divide model.experts.hidden 9"),
        ({}, {"expert": 4, "dp_shard": 4}, "parallel.expert: 4, but the model has no experts"),
    ):
        config = Config(model=model_config("early", head_dim=8, **settings), parallel=ParallelConfig(**sizes))
        with pytest.raises(LayoutError, match=message):
            resolve_layout(config, 4)
