"""Weights from and to Hugging Face: the same logits, the same bytes after a round trip, and clear errors."""

import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from exchange_factory import LLAMA3, TEXT, causal_batch, our_model, text_model
from model_factory import model_config
from safetensors.torch import load_file, save_file

from megamm.config import ExpertsConfig
from megamm.errors import InputError
from megamm.exchange.convert import convert
from megamm.exchange.families import read_decoder
from megamm.exchange.tensors import TensorGroup, write_tensors
from megamm.exchange.weights import MODEL, FolderSettings, open_weights
from megamm.model.multimodal import MultimodalModel
from megamm.settings import to_yaml

pytestmark = pytest.mark.xdist_group("exchange")  # transformers is slow to import


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each decoder, as transformers writes it."""
    place = tmp_path_factory.mktemp("hf")
    for name in TEXT:
        text_model(name).save_pretrained(place / name)
    return {name: place / name for name in TEXT}


@pytest.fixture(scope="module")
def llama(folders) -> Path:
    return folders["llama"]


def hf_model(folder: Path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, 61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TEXT)
def test_logits_are_those_of_transformers(folders, name, tokens):
    with torch.no_grad():
        theirs = hf_model(folders[name])(tokens).logits
        ours = our_model(folders[name]).logits(causal_batch(tokens))
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_there_and_back_is_exact(folders, name, tokens, tmp_path):
    """Hugging Face -> our names -> Hugging Face, in several files; read by transformers, with the same text."""
    assert convert(folders[name], "megamm", tmp_path / "ours", shard_bytes=3000) == "megamm"
    assert convert(tmp_path / "ours", "hf", tmp_path / "back", shard_bytes=5000) == name.split("-")[0]
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    before, after = hf_model(folders[name]), hf_model(tmp_path / "back")
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    texts = [m.generate(tokens[:, :5], max_new_tokens=12, do_sample=False, pad_token_id=0) for m in (before, after)]
    assert torch.equal(*texts) and texts[0].shape[1] > 6


def test_greedy_text_is_that_of_transformers(llama, tokens):
    theirs = hf_model(llama).generate(tokens[:1, :5], max_new_tokens=12, do_sample=False, eos_token_id=None)
    model, ours = our_model(llama), tokens[:1, :5]
    with torch.no_grad():
        for _ in range(12):
            ours = torch.cat((ours, model.logits(causal_batch(ours))[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ours, theirs)


def test_bfloat16_is_rounded_and_read(llama, tmp_path):
    convert(llama, "hf", tmp_path / "half", dtype="bfloat16")
    old, new = load_file(llama / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(new[key], old[key].bfloat16()) for key in old)
    assert torch.equal(
        open_weights(tmp_path / "half").read("embedding.weight"), old["model.embed_tokens.weight"].bfloat16()
    )


def test_parts_are_parts_of_the_whole(llama):
    weights = open_weights(llama)
    for name, shape in weights.shapes.items():
        part = tuple(slice(size // 4, size // 2) for size in shape)
        assert torch.equal(weights.read(name, part), weights.read(name)[part]), name


# ---- errors ----------------------------------------------------------------------------------------------


def damaged(folder: Path, out: Path, change) -> Path:
    """A copy of a folder, its tensors changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(33)}), r"is \[33\], but \[32\]"),
        (lambda t: t.update({"model.extra": torch.ones(3)}), "model.extra have no place"),
    ],
    ids=["missing", "shape", "left over"],
)
def test_tensors_that_do_not_fit(llama, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        open_weights(damaged(llama, tmp_path / "bad", change))


def test_quantised_weights_are_refused(llama, tmp_path):
    def round_off(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)

    with pytest.raises(InputError, match=r"embed_tokens.weight is torch.int8; quantised weights are not read"):
        our_model(damaged(llama, tmp_path / "bad", round_off))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'"),
        ("attention_bias", True, "attention_bias is True; only False can be read"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("hidden_size", None, "hidden_size is missing"),
        ("num_attention_heads", 0, "num_attention_heads is 0; want a whole number above zero"),
        ("num_hidden_layers", "two", "depth: expected a whole number from 1 to 10,000, found 'two'"),
        ("rms_norm_eps", 7, "norm_eps: expected a number"),
        ("num_key_value_heads", 3, "model.key_heads: 3 does not divide model.heads 4"),
        ("rope_parameters", [1], "its rotary settings are"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rotary scaling 'yarn'"),
    ],
)
def test_configs_that_cannot_be_read(llama, tmp_path, key, value, message):
    shutil.copytree(llama, tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / "bad")


def test_rotary_settings_of_earlier_transformers(llama):
    """Base and scaling stood apart in config.json, and the kind was called ``type``."""
    plain = json.loads((llama / "config.json").read_text())
    del plain["rope_parameters"]
    assert read_decoder(plain | {"rope_theta": 5e5}, "x")["rope_theta"] == 5e5
    scaling = {"rope_type": "llama3"} | {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    found = read_decoder(plain | {"rope_theta": 5e5, "rope_scaling": scaling}, "x")
    assert found["rope_theta"] == 5e5 and found["rope_scaling"]["kind"] == "llama3"
    assert found["rope_scaling"]["original_length"] == 16
    found = read_decoder(plain | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "x")
    assert found["rope_scaling"] == {"kind": "linear", "factor": 2.0}
    with pytest.raises(InputError, match="partial_rotary_factor is"):
        read_decoder(plain | {"partial_rotary_factor": 0.5}, "x")


def test_pickles_are_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    (tmp_path / "bad" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match=r"pytorch_model.bin: pickled weights can run code"):
        open_weights(tmp_path / "bad")


def test_files_of_an_index(llama, tmp_path):
    convert(llama, "hf", tmp_path / "cut", shard_bytes=5000)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    kept = files[1].read_bytes()
    files[1].write_bytes(kept[:-10])
    with pytest.raises(InputError, match=f"{files[1].name}: not a whole safetensors file"):
        open_weights(tmp_path / "cut")
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name}: missing, though the index names it"):
        open_weights(tmp_path / "cut")
    index = tmp_path / "cut" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(InputError, match="names files outside of its folder"):
        open_weights(tmp_path / "cut")


def test_nothing_half_written_stays(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("megamm.exchange.convert.write_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(llama, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="out exists; give a new folder"):
        convert(llama, "hf", tmp_path / "out")


def test_another_family_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="--family: qwen3 is not the layout of this model, llama is"):
        convert(llama, "hf", tmp_path / "out", family="qwen3")


# ---- tokenizers, and the command line ----------------------------------------------------------------------


def test_a_tokenizer_gets_our_special_tokens(llama, tmp_path):
    """Ids of text are those of the other model, moved up; its own special tokens move, too."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    from megamm.data.tokenizer import Tokenizer

    other = HFTokenizer(models.BPE())
    other.pre_tokenizer, other.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = ["the cat sat on the mat", "the dog sat too"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    other.add_special_tokens(["<|begin|>", "<|end|>"])
    begin = other.token_to_id("<|begin|>")
    other.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    folder = shutil.copytree(llama, tmp_path / "hf")
    other.save(str(folder / "tokenizer.json"))
    convert(folder, "megamm", tmp_path / "own")
    ours = Tokenizer(tmp_path / "own" / "tokenizer.json")
    text = "the cat sat <image> on a mat 12\n"
    assert ours.vocab_size == other.get_vocab_size() + 5
    assert ours.encode(text).tolist() == [i + 5 for i in other.encode(text, add_special_tokens=False).ids]
    assert ours.decode(ours.encode(text)) == text and ours.decode([begin + 5]) == "<|begin|>"
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))
    with pytest.raises(InputError, match=r"tokenizer.json: cannot be extended"):
        convert(folder, "megamm", tmp_path / "other")


def run_tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line(llama, tmp_path):
    done = run_tool(llama, "--to", "megamm", "--out", tmp_path / "own")
    assert (done.returncode, done.stdout.strip()) == (0, f"megamm -> {tmp_path / 'own'}")
    assert open_weights(tmp_path / "own").config == open_weights(llama).config
    done = run_tool(tmp_path / "own", "--to", "hf", "--family", "qwen2", "--out", tmp_path / "hf")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "--family: qwen2 is not the layout of this model, llama is" in done.stderr
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "early"}, "model.architecture: early has no Hugging Face layout"),
        ({"experts": ExpertsConfig(num=2)}, "model.experts.num: experts have no Hugging Face layout"),
        ({"per_modality": "feed_forward"}, "model.per_modality: weights per modality"),
        ({"qkv_bias": True}, "model.qk_norm: together with model.qkv_bias"),
        ({"architecture": "late"}, "model.vision.kind: megamm has no place in LLaVA's layout"),
    ],
)
def test_what_has_no_layout_keeps_our_names(settings, message, tmp_path):
    """It is written under our names and read again, though not as Hugging Face's."""
    config = model_config(**({"architecture": "text"} | settings))
    state = MultimodalModel(config, seed=3).state_dict()
    (tmp_path / "own").mkdir()
    groups = [TensorGroup({name: tuple(value.shape)}, partial(tuple, [value])) for name, value in state.items()]
    write_tensors(tmp_path / "own", groups, "float32")
    (tmp_path / "own" / MODEL).write_text(to_yaml(FolderSettings(model=config)))
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "own", "hf", tmp_path / "hf")
    convert(tmp_path / "own", "megamm", tmp_path / "again")
    again = our_model(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())
