"""Megatron-LM: the text that training prints (megatron/training/training.py), with its list of arguments.

Read are ``iteration N/TOTAL | ... | lm loss: X |`` lines, ``validation loss at iteration N`` lines (one set, or
several named ones; the test set is not read), the parameters printed per model-parallel rank, and the arguments.
Tokens are consumed samples times ``seq_length``. Exact FLOPs (matrix products, attention and logits) are throughput
times time, printed with ``--log-throughput``. Files of several ranks, restarts or runs may be concatenated.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.parts import holds

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+)\s*\|(.*)")
_VALIDATION = re.compile(r"validation(?:-(\S+))? loss at iteration (\d+)(?: on (\w+) set)?\s*\|(.*)")
_ARGUMENT = re.compile(r"(?:^|\s)([a-z]\w+) \.{3,} (.+?)\s*$")
_VOCABULARY = re.compile(r"padded vocab \(size: \d+\).*\(new size: (\d+)\)")
_PARAMETERS = re.compile(r"number of parameters on .*?model parallel rank \(?([\d, ]+?)\)?: (\d+)")


_MARK = re.compile(rb"iteration\s+\d+/\s*\d+\s*\|.*lm loss")
_HEAD = re.compile(r"-{5,} arguments -{5,}")
_HEADS = ("train_iters", "seq_length", "hidden_size", "global_batch_size")
_OF_A_START = re.compile(
    r"load|save|rank|local_rank|world_size|.*parallel.*|.*interval|exit_.*|log_.*|tensorboard_.*|wandb_.*|.*_cache_path|"
    r"num_workers|master_.*|.*timeout.*|recompute.*|micro_batch_size|iteration|consumed_.*|finetune|padded_vocab_size"
)
"""Arguments that may change when a run is started again."""


@dataclass
class _Part:
    """What one start printed."""

    curve: Curve
    arguments: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    iterations: int = 0


def read_megatron(path: Path) -> list[Curve] | None:
    """The runs in a file of Megatron-LM's output; None if the file has no iteration line of that form.

    The list of arguments begins a new part. What is concatenated by rank may have steps before it: those of the first
    list.
    """
    if not holds(path, _MARK):
        return None
    parts = [_Part(Curve(name=run_name(path), origin=str(path)))]
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            part = parts[-1]
            curve = part.curve
            if match := _ITERATION.search(line):
                fields = _fields(match[3])
                # DeepSpeed's fork and others share the first part of the line; the loss tells that it is a step.
                part.iterations += "lm loss" in fields
                curve.total_steps = int(match[2]) or None
                curve.add(int(match[1]), _point(fields))
            elif match := _VALIDATION.search(line):
                if match[3] != "test" and (loss := _fields(match[4]).get("lm loss value")) is not None:
                    curve.add(int(match[2]), {f"loss_{match[1]}".lower() if match[1] else "loss": loss})
            elif match := _PARAMETERS.search(line):
                # By rank, since every restart prints the same counts again.
                part.ranks[match[1]] = int(match[2])
            elif match := _VOCABULARY.search(line):
                part.arguments["padded_vocab_size"] = match[1]
            elif match := _ARGUMENT.search(line):
                part.arguments.setdefault(match[1], match[2])
            elif _HEAD.search(line) and part.iterations and part.arguments:
                parts.append(_Part(Curve(name=curve.name, origin=curve.origin)))
    return [_finished(part) for part in parts]


def _finished(part: _Part) -> Curve:
    """The curve with what follows from the arguments."""
    curve, arguments = part.curve, part.arguments
    sequence = _integer(arguments, "seq_length")
    for values in curve.points.values():
        samples = values.pop("samples", None)
        if samples is not None and sequence:
            values["tokens"] = samples * sequence
    curve.headed = any(name in arguments for name in _HEADS)
    curve.settings = settings_of(arguments)
    curve.facts = facts_of_arguments(arguments)
    curve.facts |= _counts(arguments, part.ranks, curve)
    world, per_step = _integer(arguments, "world_size"), curve.facts.get("tokens_per_step")
    speeds = [(v.pop("throughput", None), v.pop("milliseconds", None)) for v in curve.points.values()]
    done = [speed * time for speed, time in speeds if speed and time]
    if done and world and per_step:
        # 1e9: TFLOP/s times milliseconds. Throughput is that of one GPU, hence the world size.
        curve.facts["flops_exact_per_token"] = median(done) * 1e9 * world / per_step
    return curve


def settings_of(arguments: dict[str, str]) -> dict[str, str]:
    """Arguments that do not change when a run is started again."""
    return {name: value for name, value in arguments.items() if not _OF_A_START.fullmatch(name)}


def facts_of_arguments(arguments: dict[str, str]) -> dict[str, Any]:
    """What the arguments alone say of a run: parameters of the vocabulary tables, tokens per step."""
    facts: dict[str, Any] = {}
    width, vocabulary = _integer(arguments, "hidden_size"), _integer(arguments, "padded_vocab_size")
    if width and vocabulary:
        head = vocabulary * width
        untied = arguments.get("untie_embeddings_and_output_weights") == "True"
        positions = 0
        if arguments.get("position_embedding_type") == "learned_absolute":
            positions = (_integer(arguments, "max_position_embeddings") or 0) * width
        facts |= {"params_embedding": head * (1 + untied) + positions, "params_head": head}
    batch, sequence = _integer(arguments, "global_batch_size"), _integer(arguments, "seq_length")
    # A batch that grows makes tokens no multiple of the steps.
    if batch and sequence and arguments.get("rampup_batch_size", "None") == "None":
        facts["tokens_per_step"] = batch * sequence
    return facts


def _counts(arguments: dict[str, str], ranks: dict[str, int], curve: Curve) -> dict[str, Any]:
    """All and active parameters from the counts printed per rank; ``curve.missing`` says what prevents it.

    Norms are held by every tensor-parallel rank and count once for each, some 0.01% of a model.
    """
    tensor = _integer(arguments, "tensor_model_parallel_size") or 1
    pipeline = _integer(arguments, "pipeline_model_parallel_size") or 1
    if len(ranks) != tensor * pipeline:
        curve.missing = f"it prints parameters of {len(ranks)} of {tensor * pipeline} model-parallel ranks"
        return {}
    params = sum(ranks.values())
    tied = arguments.get("untie_embeddings_and_output_weights") == "False"
    if pipeline > 1 and tied:  # the first and the last stage both hold the one table
        head = facts_of_arguments(arguments).get("params_head")
        if head is None:
            curve.missing = "no padded vocabulary size in it, which the tied tables of two stages need"
            return {}
        params -= head
    experts = _integer(arguments, "num_experts")
    if not experts:
        return {"params": params, "params_active": params}
    size, layers = _expert_size(arguments), _expert_layers(arguments)
    if size is None or layers is None:
        curve.missing = "its expert layers cannot be counted from its arguments"
        return {}
    # A rank prints the experts that it holds itself: those of the other expert-parallel ranks are added.
    local = experts // (_integer(arguments, "expert_model_parallel_size") or 1)
    params += layers * (experts - local) * size
    active = params - layers * (experts - (_integer(arguments, "moe_router_topk") or 1)) * size
    return {"params": params, "params_active": active, "architecture": "moe"}


def _expert_size(arguments: dict[str, str]) -> int | None:
    """Parameters of one expert, without biases; None where the ranks hold parts of it that cannot be told."""
    width = _integer(arguments, "hidden_size")
    hidden = _integer(arguments, "moe_ffn_hidden_size") or _integer(arguments, "ffn_hidden_size")
    tensor = arguments.get("tensor_model_parallel_size", "1")
    same = arguments.get("expert_tensor_parallel_size", tensor) in (tensor, "None")
    if not (width and hidden and same and arguments.get("add_bias_linear") == "False"):
        return None
    # Matrices of an expert: up and down, and the gate of SwiGLU.
    return (3 if arguments.get("swiglu") == "True" else 2) * width * hidden


def _expert_layers(arguments: dict[str, str]) -> int | None:
    """How many layers hold experts: all, every n-th, or those marked 1 in a list."""
    layers, every = _integer(arguments, "num_layers"), arguments.get("moe_layer_freq", "1")
    if layers is None:
        return None
    if every.isdigit() and int(every):
        return len(range(0, layers, int(every)))
    try:
        return sum(json.loads(every))
    except (ValueError, TypeError):
        return None


def _point(fields: dict[str, float]) -> dict[str, float]:
    names = {
        "lm loss": "train_loss",
        "learning rate": "lr",
        "consumed samples": "samples",
        "consumed tokens": "tokens",
        "throughput per GPU (TFLOP/s/GPU)": "throughput",
        "elapsed time per iteration (ms)": "milliseconds",
    }
    return {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}


def _fields(text: str) -> dict[str, float]:
    """``key: number |`` parts of a line."""
    found = {}
    for part in text.split("|"):
        key, _, value = part.rpartition(":")
        try:
            found[key.strip()] = float(value)
        except ValueError:
            continue
    return found


def _integer(arguments: dict[str, str], name: str) -> int | None:
    value = arguments.get(name, "")
    return int(value) if value.isdigit() else None
