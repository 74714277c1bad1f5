"""Families of Hugging Face decoders: their ``config.json`` <-> our model settings.

What a config asks for that our decoder does not have is an error, never left out in silence.
"""

from typing import Any

from megamm.config import ModelConfig
from megamm.errors import InputError
from megamm.model.sizes import decoder_hidden, num_heads

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Decoder families, and the class that transformers has for each."""
LLAMA3 = {
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
"""Our names of the settings of this rotary scaling, and theirs."""
FAMILIES = (*ARCHITECTURES, "llava")
"""Families that a model can be written as."""


def hf_value(hf: dict, key: str, where: str, default: Any = None) -> Any:
    """A value of a config.json, which must be there unless it has a default.

    Raises:
        InputError: it is missing.
    """
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{where}: {key} is missing; is this the config.json of a whole model?")
    return value


def whole_of(hf: dict, key: str, where: str, default: int | None = None) -> int:
    """A whole number above zero of a config.json.

    Raises:
        InputError: it is missing or something else.
    """
    value = hf_value(hf, key, where, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: {key} is {value!r}; want a whole number above zero")
    return value


def refuse_others(hf: dict, where: str, **wanted: Any) -> None:
    """Check settings that we have one value of only.

    Raises:
        InputError: one has another value.
    """
    for key, value in wanted.items():
        if hf.get(key, value) not in (value, None):
            raise InputError(f"{where}: {key} is {hf[key]!r}; only {value!r} can be read")


def read_decoder(hf: dict, where: str) -> dict[str, Any]:
    """Our settings of a decoder, as they would stand in YAML; ``settings.build`` checks the rest.

    Args:
        hf: its config.json, or the part of it that is the decoder's.
        where: that file, for messages.

    Raises:
        InputError: another family, a setting that our decoder does not have, or one that is missing.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise InputError(f"{where}: model_type is {family!r}; known are {', '.join(FAMILIES)}, clip and siglip")
    refuse_others(hf, where, hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    width, heads = whole_of(hf, "hidden_size", where), whole_of(hf, "num_attention_heads", where)
    return {
        "width": width,
        "depth": hf_value(hf, "num_hidden_layers", where),
        "heads": heads,
        "head_dim": whole_of(hf, "head_dim", where, width // heads),
        "key_heads": hf_value(hf, "num_key_value_heads", where, heads),
        "hidden": hf_value(hf, "intermediate_size", where),
        "vocab_size": hf_value(hf, "vocab_size", where),
        "norm_eps": hf_value(hf, "rms_norm_eps", where, 1e-6),
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
        **_read_rope(hf, where),
    }


def _read_rope(hf: dict, where: str) -> dict[str, Any]:
    """Base and scaling; transformers 5 keeps both in ``rope_parameters``, earlier ones apart."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: its rotary settings are {rope!r}; want a mapping")
    refuse_others(hf | rope, where, partial_rotary_factor=1.0)
    # 10000 where the file says nothing: the default of transformers.
    found = {"rope_theta": rope.get("rope_theta", hf.get("rope_theta")) or 10000.0}
    # Older files call it ``type``.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    if kind not in ("linear", "llama3"):
        raise InputError(f"{where}: rotary scaling {kind!r} is not known; linear and llama3 are")
    scaling = {"kind": kind, "factor": hf_value(rope, "factor", where)}
    if kind == "llama3":
        scaling |= {ours: hf_value(rope, theirs, where) for ours, theirs in LLAMA3.items()}
    return found | {"rope_scaling": scaling}


def family_of(model: ModelConfig) -> str:
    """The decoder family that a model's decoder has the layout of.

    Raises:
        InputError: none; says which setting stands in the way.
    """
    stays = "no Hugging Face layout; write it with --to megamm, which keeps every weight under our names"
    if model.architecture == "early":
        raise InputError(f"model.architecture: early has {stays}")
    if model.experts.num:
        raise InputError(f"model.experts.num: experts have {stays}")
    if model.per_modality != "none":
        raise InputError(f"model.per_modality: weights per modality have {stays}")
    if model.qk_norm and model.qkv_bias:
        raise InputError(f"model.qk_norm: together with model.qkv_bias it has {stays}")
    if model.qk_norm:
        return "qwen3"
    if not model.qkv_bias:
        return "llama"
    if num_heads(model) * model.head_dim != model.width:
        raise InputError(f"model.heads: with model.qkv_bias, heads that do not add up to the width have {stays}")
    return "qwen2"


def write_decoder(model: ModelConfig, length: int) -> dict[str, Any]:
    """The config.json of a (resolved) decoder; ``length``: positions that it was trained on."""
    family = family_of(model)
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling.kind != "none":
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in LLAMA3.items()}
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": model.width,
        "intermediate_size": decoder_hidden(model),
        "num_hidden_layers": model.depth,
        "num_attention_heads": num_heads(model),
        "num_key_value_heads": model.key_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        # In both forms, for newer and for older versions: see _read_rope.
        "rope_scaling": None if scaling.kind == "none" else rope,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
        "max_position_embeddings": length,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
    }
