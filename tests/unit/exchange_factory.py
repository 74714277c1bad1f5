"""Tiny models of Hugging Face's transformers with random weights, and ours with the weights of a folder."""

from pathlib import Path

import torch

from megamm.exchange.weights import open_weights
from megamm.model.multimodal import MultimodalModel
from megamm.sequence import IGNORE, Batch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TEXT = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases too, so that none is right by being 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.1)
    return model.eval()


def text_model(name: str):
    """A decoder of transformers."""
    import transformers

    family, options = TEXT[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config))


def vision_config(kind: str, **options):
    """The config of a tower."""
    import transformers

    cls = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[kind]
    return cls(**(VISION | options))


def llava_model(kind: str, **options):
    """A LLaVA of a tower and a Llama."""
    import transformers

    text = transformers.LlamaConfig(**SIZES)
    strategy = "default" if kind == "clip" else "full"
    config = transformers.LlavaConfig(
        vision_config=vision_config(kind),
        text_config=text,
        image_token_index=7,
        vision_feature_select_strategy=strategy,
        **options,
    )
    torch.manual_seed(0)
    return randomise(transformers.LlavaForConditionalGeneration(config))


def our_model(folder: Path) -> MultimodalModel:
    """Our model with the weights of a folder."""
    weights = open_weights(folder)
    model = MultimodalModel(weights.config, seed=0)
    model.load_state_dict({name: weights.read(name) for name in weights.shapes})
    return model.eval()


def causal_batch(tokens: torch.Tensor, patches: torch.Tensor | None = None) -> Batch:
    """Rows [B, S] in which every position sees those before it, images too, as in a language model."""
    tokens = tokens.to(torch.int32)
    rows = torch.arange(tokens.shape[1], dtype=torch.int32).expand(tokens.shape)
    return Batch(
        tokens=tokens,
        positions=rows.clone(),
        targets=torch.full_like(tokens, IGNORE),
        source=torch.zeros_like(tokens, dtype=torch.uint8),
        label_kind=torch.zeros_like(tokens, dtype=torch.uint8),
        lo=torch.zeros_like(tokens),
        hi=rows.clone(),
        patches=torch.zeros(0, 192, dtype=torch.uint8) if patches is None else patches,
        patch_index=torch.zeros(0, dtype=torch.int64) if patches is None else (tokens.flatten() == 7).nonzero()[:, 0],
        grids=torch.full((0 if patches is None else len(patches) // 4, 2), 2, dtype=torch.int32),
        label_index=torch.zeros(0, dtype=torch.int64),
    )
