"""CLIP and SigLIP towers and LLaVA models of Hugging Face: settings and tables.

LLaVA takes the features of an inner layer (``vision_feature_layer``), without class token and without the tower's last
norm. Layers above it, that norm, and parts of CLIP and SigLIP that give no features of patches (text towers, pooling
heads) are left where they are.
"""

import re
from dataclasses import replace
from typing import Any

import torch

from megamm.config import ModelConfig
from megamm.errors import InputError, warn
from megamm.exchange.families import read_decoder, refuse_others, whole_of, write_decoder
from megamm.exchange.names import DECODER, Row, names_of, rows_of
from megamm.model.pretrained_vision import PIXELS, PretrainedTower
from megamm.model.sizes import resolve_model, tower_activation, tower_eps, tower_hidden, tower_patch_size
from megamm.sequence import patches_per_image
from megamm.settings import build

KINDS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "clip": "clip", "siglip": "siglip"}
"""model_type -> ``model.vision.kind``; without ``_vision_model`` a folder holds a text tower, too."""
DEFAULTS = {
    "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32},
    "siglip": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16},
}
TOWER_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
LLAMA_SIZES = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
"""What published files leave out where it is the default of transformers; shapes are checked against it."""
HF_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}

_LAYER = "encoder.layers.{n}."


def _is_clip(config: ModelConfig) -> bool:
    return config.vision.kind == "clip"


def _both(ours: str, theirs: str, where: Any = lambda config: True) -> tuple[Row, ...]:
    """Weight and bias."""
    return tuple(Row(f"{ours}.{end}", (f"{theirs}.{end}",), where=where) for end in ("weight", "bias"))


TOWER = (
    Row("vision.embed.projection.weight", ("embeddings.patch_embedding.weight",), "patches"),
    Row("vision.embed.projection.bias", ("embeddings.patch_embedding.bias",), where=lambda c: not _is_clip(c)),
    Row("vision.embed.position", ("embeddings.position_embedding.weight",)),
    Row("vision.embed.class_token", ("embeddings.class_embedding",), where=_is_clip),
    # Spelled so in transformers.
    *_both("vision.embed.norm", "pre_layrnorm", _is_clip),
    *_both("vision.blocks.{n}.attention_norm", f"{_LAYER}layer_norm1"),
    *(
        Row(
            f"vision.blocks.{{n}}.attention.qkv.{end}",
            names_of(f"{_LAYER}self_attn.", "q_proj k_proj v_proj", f".{end}"),
            "tower_heads",
        )
        for end in ("weight", "bias")
    ),
    *_both("vision.blocks.{n}.attention.out", f"{_LAYER}self_attn.out_proj"),
    *_both("vision.blocks.{n}.feed_forward_norm", f"{_LAYER}layer_norm2"),
    *_both("vision.blocks.{n}.feed_forward.up", f"{_LAYER}mlp.fc1"),
    *_both("vision.blocks.{n}.feed_forward.down", f"{_LAYER}mlp.fc2"),
    *_both("vision.norm", "post_layernorm", lambda config: config.vision.final_norm),
)
PROJECTOR = (
    *_both("vision.projector.up", "multi_modal_projector.linear_1"),
    *_both("vision.projector.down", "multi_modal_projector.linear_2"),
)
"""LLaVA 1.5."""


def is_tower(hf: dict) -> bool:
    """Whether a config.json is of CLIP or SigLIP."""
    return hf.get("model_type") in KINDS


def tower_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a tower's parameters without projector, by our names."""
    with torch.device("meta"):
        tower = PretrainedTower(config)
    found = {f"vision.{name}": tuple(p.shape) for name, p in tower.named_parameters()}
    return {name: shape for name, shape in found.items() if not name.startswith("vision.projector.")}


_OTHER_PARTS = r"text_model\.|visual_projection\.|text_projection\.|logit_|(vision_model\.)?head\."


def is_left_out(name: str, hf: dict) -> bool:
    """Whether a tensor belongs to a part that gives no features of patches, or repeats another one."""
    # Buffers that older versions of transformers saved; they follow from the settings.
    if name.endswith(("rotary_emb.inv_freq", "position_ids")):
        return True
    if is_tower(hf):
        return re.match(_OTHER_PARTS, name) is not None
    text = hf.get("text_config", hf)
    if name.endswith("lm_head.weight") and (hf.get("tie_word_embeddings") or text.get("tie_word_embeddings")):
        return True  # the table once more
    if hf.get("model_type") == "llava":
        layer = re.search(r"vision_tower\..*encoder\.layers\.(\d+)\.", name)
        above = layer is not None and int(layer[1]) >= _depth(hf, "config.json")
        return above or re.match(r"(model\.)?vision_tower\.(vision_model\.)?(post_layernorm|head)\.", name) is not None
    return False


def read_tower(hf: dict, where: str) -> dict[str, Any]:
    """Our settings of a tower, as they stand in ``model.vision``."""
    kind, hf = _tower_sizes(hf)
    width, activation = whole_of(hf, "hidden_size", where), hf["hidden_act"]
    if activation not in HF_ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {activation!r} is not known; {', '.join(HF_ACTIVATIONS)} are")
    refuse_others(hf, where, num_channels=3)
    return {
        "kind": kind,
        "width": width,
        "depth": hf["num_hidden_layers"],
        "head_dim": width // whole_of(hf, "num_attention_heads", where),
        "hidden": hf["intermediate_size"],
        "activation": HF_ACTIVATIONS[activation],
        "norm_eps": hf["layer_norm_eps"],
    }


def _tower_sizes(hf: dict) -> tuple[str, dict]:
    """``model.vision.kind`` of a config.json, and the part of it that is the tower's, with defaults filled in."""
    kind = KINDS[hf["model_type"]]
    given = {key: value for key, value in hf.get("vision_config", hf).items() if value is not None}
    return kind, TOWER_SIZES | DEFAULTS[kind] | given


def read_tower_folder(hf: dict, where: str, names: dict) -> tuple[ModelConfig, list[Row]]:
    """Settings and table of a tower alone; the decoder's settings mean nothing."""
    _, sizes = _tower_sizes(hf)
    vision = read_tower(hf, where)
    shape = {"width": vision["width"], "head_dim": vision["head_dim"], "vision": vision} | _image_sizes(sizes)
    config = build(ModelConfig, {"architecture": "late"} | shape, where)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    return resolve_model(config), rows_of(TOWER, config, config.vision.depth, prefix)


def _image_sizes(sizes: dict) -> dict[str, Any]:
    return {name: sizes[name] for name in ("image_size", "patch_size")}


def _depth(hf: dict, where: str) -> int:
    """Blocks below the layer whose features a LLaVA takes."""
    layers = whole_of(_tower_sizes(hf["vision_config"])[1], "num_hidden_layers", where)
    layer = hf.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise InputError(f"{where}: vision_feature_layer is {layer!r}; only one layer can be read")
    # Counted over the embedding's output and that of each block: one more than there are blocks.
    return layer if layer >= 0 else layers + 1 + layer


def read_llava(hf: dict, where: str, names: dict) -> tuple[ModelConfig, list[Row]]:
    """Settings and table of a LLaVA."""
    for part in ("vision_config", "text_config"):
        if not isinstance(hf.get(part), dict):
            raise InputError(f"{where}: {part} is missing; is this the config.json of a whole model?")
    if not is_tower(hf["vision_config"]):
        found = hf["vision_config"].get("model_type")
        raise InputError(f"{where}: vision_config.model_type is {found!r}; want clip or siglip")
    kind, sizes = _tower_sizes(hf["vision_config"])
    refuse_others(hf, where, projector_hidden_act="gelu", multimodal_projector_bias=True)
    # "default" drops the class token, which SigLIP does not have.
    refuse_others(hf, where, vision_feature_select_strategy="default" if kind == "clip" else "full")
    vision = read_tower(hf["vision_config"], where)
    vision |= {"final_norm": False, "projector": "mlp", "depth": _depth(hf, where)}
    given = {key: value for key, value in hf["text_config"].items() if value is not None}
    given.setdefault("tie_word_embeddings", hf.get("tie_word_embeddings", False))
    decoder = read_decoder((LLAMA_SIZES if given.get("model_type", "llama") == "llama" else {}) | given, where)
    shape = decoder | {"architecture": "late", "image_mask": "causal", "vision": vision} | _image_sizes(sizes)
    config = build(ModelConfig, shape, where)
    is_older = any("vision_tower.vision_model." in name for name in names)
    tower = "vision_tower.vision_model." if is_older else "vision_tower."
    rows = rows_of(TOWER, config, config.vision.depth, tower) + list(PROJECTOR)
    rows += rows_of(DECODER, config, config.depth, "language_model.")
    if any(name.startswith("model.language_model.") for name in names):
        rows = [replace(row, theirs=tuple(map(_inside_model, row.theirs))) for row in rows]
    return resolve_model(config), rows


def _inside_model(name: str) -> str:
    """A name as some versions of transformers write it: all parts inside ``model``, except the head."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return f"model.{name}".replace("model.language_model.model.", "model.language_model.")


def write_llava(model: ModelConfig, length: int, image_token: int) -> tuple[dict, dict, list[Row]]:
    """config.json, preprocessor_config.json and table of a late-fusion model in LLaVA's layout.

    Raises:
        InputError: tower or projector are none of LLaVA's.
    """
    v = model.vision
    for setting, value, wanted in (
        ("kind", v.kind, ("clip", "siglip")),
        ("projector", v.projector, ("mlp",)),
        ("final_norm", v.final_norm, (False,)),
        ("patch_size", tower_patch_size(model), (model.patch_size,)),
    ):
        if value not in wanted:
            raise InputError(
                f"model.vision.{setting}: {str(value).lower()} has no place in LLaVA's layout (want "
                f"{' or '.join(str(w).lower() for w in wanted)}); write the model with --to megamm"
            )
    if model.image_positions != "sequence":
        raise InputError(
            f"model.image_positions: {model.image_positions} has no place in LLaVA's layout (want sequence)"
        )
    if model.image_mask != "causal":
        warn(
            "model.image_mask: bidirectional; transformers lets a patch see only earlier ones, and answers will differ"
        )
    text = write_decoder(model, length)
    names = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}
    vision = {
        "model_type": f"{v.kind}_vision_model",
        "hidden_size": v.width,
        "intermediate_size": tower_hidden(model),
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.width // v.head_dim,
        "hidden_act": names[tower_activation(model)],
        "layer_norm_eps": tower_eps(model),
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": 3,
    }
    if v.kind == "siglip":
        vision["vision_use_head"] = False
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image_token,
        "image_seq_length": patches_per_image(model.image_size, model.patch_size),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        # Only blocks up to the layer whose features are taken are written, so that it is the last one.
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if v.kind == "clip" else "full",
        "tie_word_embeddings": model.tied_embeddings,
    }
    rows = rows_of(TOWER, model, v.depth, "vision_tower.vision_model.") + list(PROJECTOR)
    return config, preprocessor(model), rows + rows_of(DECODER, model, model.depth, "language_model.")


def unused_norm(model: ModelConfig) -> dict[str, torch.Tensor]:
    """The tower's last norm, which LLaVA has but does not use: that of a new model."""
    name, width = "vision_tower.vision_model.post_layernorm", model.vision.width
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def preprocessor(model: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json: pixels as our tower normalises them."""
    mean, deviation = PIXELS[model.vision.kind]
    size = {"height": model.image_size, "width": model.image_size}
    name = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[model.vision.kind]
    return {
        "image_processor_type": name,
        "do_resize": True,
        "size": size,
        # Bicubic, in the numbers of Pillow.
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(deviation),
    }
