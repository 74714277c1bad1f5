"""CLIP, SigLIP and LLaVA: the features and logits of transformers, there and back, and grafts on a decoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exchange_factory import causal_batch, llava_model, our_model, randomise, text_model, vision_config
from model_factory import model_config, one_row
from run_factory import make_sources, trainer
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamm.config import Config, VisionConfig
from megamm.errors import InputError
from megamm.estimate.memory import units_of
from megamm.estimate.operations import operations
from megamm.exchange.convert import convert
from megamm.exchange.weights import open_weights
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token
from megamm.model.multimodal import MultimodalModel
from megamm.model.pretrained_vision import PIXELS, PretrainedTower
from megamm.parallel.layout import Layout
from megamm.parallel.layout_rules import layout_problems
from megamm.parallel.stages import Stage

pytestmark = pytest.mark.xdist_group("exchange")

KINDS = ["clip", "siglip"]
ACTIVATIONS = {"clip": "gelu", "siglip": "gelu_pytorch_tanh"}  # quick_gelu, CLIP's default, is in the LLaVA


def patches_of(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images [n, H, W, 3] as patches [n * L, size * size * 3] in raster order."""
    side = images.shape[1] // size
    cut = images.unflatten(2, (side, size)).unflatten(1, (side, size))  # n, row, y, column, x, channel
    return cut.transpose(2, 3).flatten(0, 2).flatten(1)


def pixels(kind: str, num_images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as our patches, uint8 [n * 4, 192], and as transformers takes them, [n, 3, 16, 16]."""
    images = torch.randint(0, 256, (num_images, 16, 16, 3), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    patches = patches_of(images, 8)
    mean, deviation = map(torch.tensor, PIXELS[kind])
    return patches, ((images / 255 - mean) / deviation).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A LLaVA and a tower of each kind, and a Llama, as transformers writes them."""
    import transformers

    place = tmp_path_factory.mktemp("hf")
    for kind, cls in (("clip", transformers.CLIPVisionModel), ("siglip", transformers.SiglipVisionModel)):
        llava_model(kind).save_pretrained(place / f"llava-{kind}")
        torch.manual_seed(0)
        tower = randomise(cls(vision_config(kind, hidden_act=ACTIVATIONS[kind])))
        tower.save_pretrained(place / kind)
    text_model("llama").save_pretrained(place / "llama")
    return {path.name: path for path in place.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_tower(folders, kind):
    import transformers

    cls = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}[kind]
    theirs = cls.from_pretrained(folders[kind]).eval()
    weights = open_weights(folders[kind])
    tower = PretrainedTower(weights.config)
    state = {name.removeprefix("vision."): weights.read(name) for name in weights.shapes}
    assert set(tower.load_state_dict(state, strict=False).missing_keys) == {"projector.weight"}
    patches, images = pixels(kind)
    with torch.no_grad():
        out, ours = theirs(images, output_hidden_states=True), tower.features(patches, torch.float32)
        last = theirs.post_layernorm(out.hidden_states[-1]) if kind == "clip" else out.last_hidden_state
        torch.testing.assert_close(ours, last[:, -4:], rtol=1e-5, atol=1e-5)


def llava_inputs(kind: str):
    """Two rows with an image each: token ids [2, 12], their pixels, and our batch."""
    tokens = torch.randint(8, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    tokens[0, 1:5] = tokens[1, 3:7] = 7  # the image token of exchange_factory, not ours
    patches, images = pixels(kind)
    return tokens, images, causal_batch(tokens, patches)


def hf_llava(folder: Path):
    import transformers

    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_llava(folders, kind):
    tokens, images, batch = llava_inputs(kind)
    with torch.no_grad():
        theirs = hf_llava(folders[f"llava-{kind}"])(input_ids=tokens, pixel_values=images).logits
        ours = our_model(folders[f"llava-{kind}"]).logits(batch)
        other = our_model(folders[f"llava-{kind}"]).logits(causal_batch(tokens, 255 - batch.patches))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert (other - theirs).abs().max() > 0.01  # images matter


@pytest.mark.parametrize("kind", KINDS)
def test_a_llava_there_and_back(folders, kind, tmp_path):
    source = folders[f"llava-{kind}"]
    convert(source, "megamm", tmp_path / "ours")
    assert convert(tmp_path / "ours", "hf", tmp_path / "back", shard_bytes=9000) == "llava"
    first, again = open_weights(source), open_weights(tmp_path / "back")
    assert first.shapes == again.shapes and first.config == again.config
    assert first.special == again.special and first.special.image == 7
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.shapes)
    tokens, images, _ = llava_inputs(kind)
    before, after = hf_llava(source), hf_llava(tmp_path / "back")
    with torch.no_grad():
        old, new = (m(input_ids=tokens, pixel_values=images).logits for m in (before, after))
    assert torch.equal(old, new)
    prompt = {"input_ids": tokens[:1, :8], "pixel_values": images[:1]}
    texts = [m.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None) for m in (before, after)]
    assert torch.equal(*texts) and texts[0].shape[1] == 16


def test_names_of_earlier_transformers(folders, tmp_path):
    """Published LLaVA and CLIP folders have ``vision_model.`` in the names of the tower, and a text tower beside it."""
    shutil.copytree(folders["clip"], tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    tensors = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    extra = {"text_model.final.weight": torch.ones(2), "vision_model.embeddings.position_ids": torch.arange(5)}
    save_file(tensors | extra | {"logit_scale": torch.ones(())}, path)
    about = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": about}))
    first, again = open_weights(folders["clip"]), open_weights(tmp_path / "clip")
    assert first.config == again.config
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.shapes)


def test_names_of_a_llava_inside_model(folders, tmp_path):
    shutil.copytree(folders["llava-clip"], tmp_path / "llava")
    path = tmp_path / "llava" / "model.safetensors"
    tensors = {name.replace("language_model.model.", "language_model."): t for name, t in load_file(path).items()}
    tensors = {name if "lm_head" in name else f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file({name.replace("language_model.lm_head", "lm_head"): tensor for name, tensor in tensors.items()}, path)
    first, again = open_weights(folders["llava-clip"]), open_weights(tmp_path / "llava")
    assert first.shapes == again.shapes
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_and_a_decoder_become_one_model(folders, kind, tmp_path):
    """Late fusion from a Llama and the last layer but one of a tower, both frozen; the projector is new."""
    settings = {
        "model.architecture": "late",
        "model.width": 32,
        "model.depth": 2,
        "model.head_dim": 8,
        "model.key_heads": 2,
        "model.hidden": 40,
        "model.qk_norm": "false",
        "model.vision": f"{{kind: {kind}, width: 16, depth: 2, head_dim: 8, hidden: 24, final_norm: false}}",
        "model.vision.projector": "mlp",
        "model.vision.activation": {"clip": "gelu", "siglip": "gelu_tanh"}[kind],
        "start.weights": folders["llama"],
        "start.vision_weights": folders[kind],
        "start.first_row": 5,
        "optimizer.freeze": "[blocks., vision.embed., vision.blocks.]",
        "optimizer.vision_lr_factor": 1,
        "train.steps": 3,
    }
    one = trainer(make_sources(tmp_path / "data"), tmp_path / "run", **settings)
    one._begin()
    towers, text = open_weights(folders[kind]), open_weights(folders["llama"])
    fresh = dict(MultimodalModel(one.config.model, seed=0).named_parameters())
    one.run()
    for name, parameter in one.model.named_parameters():
        if name.startswith(("vision.embed.", "vision.blocks.")):
            assert torch.equal(parameter, towers.read(name)), name
        elif name.startswith("blocks."):
            assert torch.equal(parameter, text.read(name)), name
        else:
            assert not torch.equal(parameter, fresh[name]), name
    assert convert(tmp_path / "run", "hf", tmp_path / "hf") == "llava"


def test_a_tower_is_taken_whole(folders, tmp_path):
    """A LLaVA has no norm after the last block of its tower: a model that has one cannot start from it in silence."""
    settings = {
        "model.architecture": "late",
        "model.width": 32,
        "model.depth": 2,
        "model.head_dim": 8,
        "model.key_heads": 2,
        "model.hidden": 40,
        "model.qk_norm": "false",
        "model.vision": "{kind: clip, width: 16, depth: 2, head_dim: 8, hidden: 24, projector: mlp}",
        "start.weights": folders["llava-clip"],
    }
    one = trainer(make_sources(tmp_path / "data"), tmp_path / "run", **settings)
    with pytest.raises(InputError, match=r"has no vision\.norm\.weight; only what images need may be new"):
        one._begin()
    one = trainer(tmp_path / "data", tmp_path / "run", **settings, **{"model.vision.final_norm": "false"})
    one._begin()
    weights = open_weights(folders["llava-clip"])
    for name, parameter in one.model.named_parameters():
        if name.startswith("vision."):
            assert torch.equal(parameter, weights.read(name)), name


@pytest.mark.parametrize("vision", [*KINDS, "megamm"])
@pytest.mark.parametrize("options", [{}, {"projector": "mlp", "final_norm": False, "hidden": 40}, {"patch_size": 4}])
def test_towers_are_counted(vision, options):
    config = model_config("late")
    config.vision = VisionConfig(kind=vision, width=16, depth=2, head_dim=8, **options)
    model = MultimodalModel(model_config("late", vision=config.vision), seed=0)
    counts = count_parameters(model.config)
    tower = sum(p.numel() for n, p in model.vision.named_parameters() if not n.startswith("projector"))
    assert (counts.total, counts.vision) == (sum(p.numel() for p in model.parameters()), tower)
    stats, none = (TokenStats(patches=n, labels=0.0, pairs=0.0) for n in (4.0, 0.0))
    whole = Stage(first_block=0, last_block=1, inputs=True, head=True, cost=0.0)
    assert sum(unit.size for unit in units_of(model.config, Layout(), [whole])) == counts.total
    groups = operations(model.config, 64, stats)
    estimated = sum(work.flops for group in groups for work in (group.forward, group.backward))
    assert estimated == pytest.approx(64 * exact_flops_per_token(model.config, stats), rel=1e-9)
    if vision != "megamm":  # whose attention computes masked pairs, too
        row = one_row([7], torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted
            model.vision(row.patches, row.grids, torch.float32).sum().backward()
        counted = exact_flops_per_token(model.config, stats) - exact_flops_per_token(model.config, none)
        assert counted == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("kind", ["clip", "megamm"])
def test_pixel_shuffle_sees_the_same_image(kind):
    """A tower of smaller patches does with the model's larger ones what it does with its own; then four are joined."""
    vision = {"kind": kind, "width": 16, "depth": 2, "head_dim": 8}
    small = MultimodalModel(model_config("late", patch_size=4, vision=VisionConfig(**vision)), seed=0).vision
    large = MultimodalModel(model_config("late", vision=VisionConfig(**vision, patch_size=4)), seed=0).vision
    assert large.projector.weight.shape == (32, 4 * 16)
    images = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    small.projector = large.projector = torch.nn.Identity()
    with torch.no_grad():
        each = small(patches_of(images, 4), torch.full((2, 2), 4), torch.float32).unflatten(1, (4, 4))
        joined = large(patches_of(images, 8), torch.full((2, 2), 2), torch.float32)
    for row in range(2):
        for column in range(2):
            four = [each[:, 2 * row + i, 2 * column + j] for i in range(2) for j in range(2)]
            torch.testing.assert_close(joined[:, 2 * row + column], torch.cat(four, -1))


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("ratio", [1, 2])
def test_projectors_are_what_their_names_say(projector, ratio):
    """One matrix, or two with biases and a GELU; over one feature of the tower, or four side by side."""
    vision = VisionConfig(width=16, depth=1, head_dim=8, projector=projector, patch_size=8 // ratio)
    tower = randomise(MultimodalModel(model_config("late", vision=vision), seed=0).vision.double())
    images = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    weights = dict(tower.projector.named_parameters())
    with torch.no_grad():
        found = tower(patches_of(images, 8), torch.full((2, 2), 2), torch.float64)
        tower.projector = torch.nn.Identity()
        x = tower(patches_of(images, 8), torch.full((2, 2), 2), torch.float64)
    assert found.shape == (2, 4, 32) and x.shape == (2, 4, 16 * ratio**2)
    if projector == "linear":
        assert set(weights) == {"weight"}
        wanted = x @ weights["weight"].T
    else:
        hidden = x @ weights["up.weight"].T + weights["up.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        wanted = hidden @ weights["down.weight"].T + weights["down.bias"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit(folders, tmp_path):
    config = Config()
    config.model = model_config("late", vision=VisionConfig(kind="clip", width=16, head_dim=8, depth=1))
    config.parallel.tensor = 2
    assert any("towers other than model.vision.kind megamm" in line for line in layout_problems(config, 2))
    with pytest.raises(InputError, match="a tower alone"):
        convert(folders["clip"], "megamm", tmp_path / "out")
