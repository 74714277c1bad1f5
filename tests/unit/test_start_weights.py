"""Runs that start from other weights: every value where it belongs, the rest as in a new model, and frozen parts."""

import json
from pathlib import Path

import pytest
import torch
from exchange_factory import causal_batch, our_model, text_model
from megamm_laws.runs.collect import collect
from run_factory import make_sources, run_until, trainer

from megamm.errors import InputError
from megamm.exchange.convert import convert
from megamm.exchange.weights import open_weights
from megamm.model.multimodal import MultimodalModel

pytestmark = pytest.mark.xdist_group("exchange")

LLAMA = {
    "model.width": 32,
    "model.depth": 2,
    "model.head_dim": 8,
    "model.key_heads": 2,
    "model.hidden": 40,
    "model.qk_norm": "false",
    "start.first_row": 5,
}
"""Settings of the Llama of exchange_factory."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    text_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run of the default kind of model, text only."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer(data, folder, **{"model.architecture": "text", "model.depth": 2, "model.key_heads": 1}).run()
    return folder


def started(data: Path, folder: Path, **overrides):
    one = trainer(data, folder, **overrides)
    one._begin()
    return one


def test_a_decoder_gets_an_image_input_and_more_tokens(data, llama, tmp_path):
    one = started(data, tmp_path / "run", **LLAMA, **{"start.weights": llama})
    source, fresh = open_weights(llama), MultimodalModel(one.config.model, seed=0)
    new = dict(fresh.named_parameters())
    for name, parameter in one.model.named_parameters():
        if name in ("embedding.weight", "head.weight"):
            assert torch.equal(parameter[5:66], source.read(name))
            rest = torch.cat((parameter[:5], parameter[66:]))
            assert torch.equal(rest, torch.cat((new[name][:5], new[name][66:])))
        elif name == "embedding.projection.weight":
            assert torch.equal(parameter, new[name])
        else:
            assert torch.equal(parameter, source.read(name)), name
    result = one.run()
    assert (result["start"], result["init"]) == (str(llama), "llm")
    (row,), _ = collect([tmp_path / "run"])
    assert row["init"] == "llm"


def test_a_checkpoint_and_what_is_made_of_it_are_one_model(data, run, tmp_path):
    """Run -> Hugging Face -> our names -> a run that starts there."""
    convert(run, "hf", tmp_path / "hf")
    convert(tmp_path / "hf", "megamm", tmp_path / "own")
    models = [
        our_model(place) for place in (run, run / "checkpoints" / "step-00000012", tmp_path / "hf", tmp_path / "own")
    ]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    import transformers

    tokens = torch.randint(5, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        ours = our_model(run).logits(causal_batch(tokens))
        torch.testing.assert_close(theirs(tokens).logits, ours, rtol=1e-5, atol=1e-5)
    settings = {"model.architecture": "text", "model.depth": 2, "model.key_heads": 1, "optimizer.lr": 1e-9}
    again = trainer(data, tmp_path / "again", **settings, **{"start.weights": tmp_path / "own"})
    before = json.loads((run / "result.json").read_text())
    assert again.run()["loss"] == pytest.approx(before["loss"], rel=1e-4)


def test_a_vocabulary_may_have_rows_to_spare(data, llama, tmp_path):
    """Tables of other models are often padded; one that is too small for the data is an error as before."""
    more = LLAMA | {"start.weights": llama, "model.vocab_size": 320}
    one = started(data, tmp_path / "run", **more)
    assert one.model.embedding.weight.shape[0] == 320 and one.run()["steps"] == 12
    with pytest.raises(InputError, match=r"model.vocab_size: 200, but .* was prepared with 300"):
        trainer(data, tmp_path / "small", **{"model.vocab_size": 200})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.qk_norm": "true"},
            "start.weights: .* made with other settings of the model; set --model.qk_norm false",
        ),
        ({"model.depth": 3}, "set --model.depth 2"),
        ({"model.rope_theta": 5e5}, "set --model.rope_theta 10000.0"),
        ({"start.first_row": 250}, "a vocabulary of 61 rows, which does not fit in model.vocab_size 300"),
        (
            {"model.per_modality": "feed_forward"},
            "has blocks.0.feed_forward.gate_up.weight, for which the model has no place",
        ),
        ({"start.weights": "nowhere"}, "nowhere: not a folder"),
        ({"start.vision_weights": "LLAMA", "model.architecture": "late"}, "has no vision tower"),
        ({"start.vision_weights": "LLAMA"}, "model.architecture is early, which has no tower"),
    ],
)
def test_weights_of_another_model(data, llama, tmp_path, changes, message):
    changes = {key: llama if value == "LLAMA" else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        started(data, tmp_path / "run", **(LLAMA | {"start.weights": llama} | changes))


# ---- frozen parts ----------------------------------------------------------------------------------------


def values(one) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}


def test_frozen_parts_stay_and_the_rest_learns(data, tmp_path):
    one = trainer(data, tmp_path / "run", **{"optimizer.freeze": "[blocks., head.]"})
    before = values(one)
    one.run()
    for name, after in values(one).items():
        assert torch.equal(after, before[name]) == name.startswith(("blocks.", "head.")), name


def test_parts_thaw_and_a_resumed_run_is_the_same(data, tmp_path):
    settings = {
        "optimizer.freeze": "[blocks.]",
        "optimizer.freeze_until": 7,
        "checkpoint.steps": "[7]",
        "checkpoint.keep": 9,
    }
    whole = trainer(data, tmp_path / "whole", **settings)
    before, seen, step = values(whole), {}, whole.train_step

    def watch(batches):
        seen[whole.step] = whole.model.blocks["0"].attention.qkv.weight.detach().clone()
        return step(batches)

    whole.train_step = watch
    whole.run()
    start = before["blocks.0.attention.qkv.weight"]
    assert [torch.equal(seen[k], start) for k in range(12)] == [True] * 8 + [False] * 4
    for stop in (6, 8, 11):  # on from a checkpoint before the thaw, at it and after it
        folder = tmp_path / f"stop-{stop}"
        run_until(trainer(data, folder, **settings), stop)
        again = trainer(data, folder, **settings)
        again.run()
        assert all(torch.equal(value, values(whole)[name]) for name, value in values(again).items()), stop


def test_a_tower_thaws_under_a_projector_that_learns_from_the_start(data, tmp_path):
    tower = ("vision.embed.", "vision.blocks.", "vision.norm.")
    settings = {"model.architecture": "late", "model.vision.projector": "mlp", "optimizer.vision_lr_factor": 0.5}
    one = trainer(data, tmp_path, **settings, **{"optimizer.freeze": list(tower), "optimizer.freeze_until": 7})
    seen, step = {0: values(one)}, one.train_step

    def watch(batches):
        norm = step(batches)
        seen[one.step] = values(one)
        return norm

    one.train_step = watch
    one.run()
    for name, first in seen[0].items():
        moved = [not torch.equal(seen[k][name], first) for k in (1, 7, 8)]
        assert moved == ([False, False, True] if name.startswith(tower) else [True] * 3), name


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("[decoder.]", "no parameter's name begins with 'decoder.'; parts: blocks., embedding., head."),
        ("[blocks., head., embedding.]", "names every parameter"),
    ],
)
def test_freeze_names_parameters(data, tmp_path, freeze, message):
    with pytest.raises(InputError, match=message):
        trainer(data, tmp_path / "run", **{"optimizer.freeze": freeze})
