"""Names under which trainers log the same thing, for formats whose tags are free (TensorBoard, W&B, JSON lines)."""

import math
import re
from typing import Any

ALIASES = {
    "loss": (
        "val/loss",
        "val_loss",
        "valid/loss",
        "valid_loss",
        "validation/loss",
        "validation_loss",
        "eval/loss",
        "eval_loss",
        "lm loss validation",
        "validation_metrics/loss",
    ),
    # A bare loss is that of training: trainers say so where it is of a validation.
    "train_loss": (
        "loss",
        "train/loss",
        "train_loss",
        "training/loss",
        "training_loss",
        "lm loss",
        "train/ce loss",
        "loss_metrics/global_avg_loss",
    ),
    "tokens": (
        "tokens",
        "num_tokens",
        "total_tokens",
        "train/tokens",
        "tokens_seen",
        "n_tokens_seen",
        "consumed_tokens",
        "consumed-tokens",
        "train/num_input_tokens_seen",
        "train/total_tokens",
        "throughput/total tokens",
        "throughput/total_tokens",
    ),
    "lr": (
        "lr",
        "learning_rate",
        "learning-rate",
        "train/lr",
        "train/learning_rate",
        "optim/lr",
        "optim/learning_rate",
        "optim/lr (group 0)",
        "lr/group_0",
    ),
    "flops": ("flops", "total_flops", "train/flops", "train/total_flops"),
    "flops_exact": ("flops_exact",),
    "params": (
        "params",
        "n_params",
        "num_params",
        "nparams",
        "num_parameters",
        "n_parameters",
        "total_params",
        "parameters",
        "model/params",
        "model/num_params",
        "model/num_parameters",
        "model/n_params",
        "model/total_params",
    ),
    "params_active": ("params_active", "active_params", "n_active_params", "num_active_params", "model/active_params"),
    "params_embedding": ("params_embedding", "embedding_params", "n_embedding_params"),
    "params_head": ("params_head", "head_params"),
    "params_vision": ("params_vision", "vision_params", "n_vision_params"),
    "tokens_vision": ("tokens_vision", "vision_tokens", "n_vision_tokens"),
    "tokens_per_step": ("tokens_per_step", "batch_tokens", "global_batch_tokens"),
    "total_steps": ("total_steps", "max_steps", "train_steps", "train_iters"),
    "step": ("step", "_step", "global_step", "trainer/global_step", "iteration", "train/global_step", "train/step"),
    "run": ("run", "run_name", "name"),
    "id": ("id", "run_id", "run/id", "_run_id"),
    "state": ("state",),
    "architecture": ("architecture", "model/architecture"),
    "mixture": ("mixture", "data/mixture"),
}
"""Our column -> tags that mean it, in lower case."""
_KEY_OF = {alias: key for key, aliases in ALIASES.items() for alias in aliases}
_SOURCE = re.compile(
    r"(?:val|valid|validation|eval)[/_](?:lm/)?([\w.+-]+)[/_](?:ce )?loss|lm loss validation-(\S+)", re.I
)
_DOTTED_SOURCE = re.compile(r"(?:val|valid|validation|eval)\.(?:lm\.)?([\w.+-]+)\.(?:ce )?loss()", re.I)


class TagMap(dict[str, str]):
    """Tag of a log -> our name, as given by hand; ``used`` are the tags that some log had."""

    def __init__(self, names: dict[str, str]):
        super().__init__(names)
        self.used: set[str] = set()

    def __getitem__(self, tag: str) -> str:
        self.used.add(tag)
        return super().__getitem__(tag)


def key_of_tag(tag: str, mapping: dict[str, str] | None = None) -> str | None:
    """Our name of a tag, None if it means nothing here; ``mapping`` (tag -> our name) comes first."""
    if mapping and tag in mapping:
        return mapping[tag]
    lower = tag.strip().lower()
    # Some trainers part their names by dots; names of sources may hold some, too.
    for name in (lower, lower.replace(".", "/")):
        for prefix in ("", "config/", "summary/"):
            if name.startswith(prefix) and name.removeprefix(prefix) in _KEY_OF:
                return _KEY_OF[name.removeprefix(prefix)]
    source = _SOURCE.fullmatch(tag.strip()) or _DOTTED_SOURCE.fullmatch(tag.strip())
    return f"loss_{(source[1] or source[2]).lower()}" if source else None


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by a slash; W&B's ``{"value": ...}`` wrappers are opened."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict) and set(value) <= {"value", "desc"} and "value" in value:
            value = value["value"]
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def whole_number(value: float | None) -> int | None:
    """A count of steps as an integer; None if it is not finite or negative."""
    return int(value) if value is not None and math.isfinite(value) and value >= 0 else None


def number(value: Any) -> float | None:
    """A number, also from text such as ``1,234`` or ``NaN``; None if it is not one."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(str(value).replace(",", ""))
    except ValueError:
        return None
