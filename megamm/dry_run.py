"""What a run would be, without running it: sizes, FLOPs, steps, memory and layout."""

import os

import torch

from megamm.config import Config
from megamm.data.loader import open_sources
from megamm.data.pack_plan import scan_lengths
from megamm.errors import InputError
from megamm.estimate.machine import device_here, memory_per_rank
from megamm.estimate.memory import rank_memory
from megamm.estimate.tokens import resolve_for_estimate, stats_of_sources
from megamm.extras import check_extras
from megamm.model.context import check_backend
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token
from megamm.model.sizes import num_heads
from megamm.parallel.layout import resolve_layout
from megamm.resolve import epochs_of, remarks, resolve_config

GIB = 2**30


def run_memory(config: Config) -> float:
    """Bytes that a run holds on one device at the fullest moment of a step, in place resolved; PyTorch itself, some
    hundred MiB, not counted.

    Raises:
        InputError: as :func:`describe_run`.
    """
    config = resolve_config(config)
    return sum(rank_memory(config, resolve_layout(config, 1), stats_of_sources(config)).values())


def describe_run(config: Config) -> str:
    """A text of a line per quantity. Reads at most the headers and lengths of the data.

    Prepared data need not be at hand, so long as the config has the sizes that they would decide.

    Raises:
        InputError: what the run would refuse: a size is set neither in the config nor by the data, a document is longer
            than a row, the layout does not fit the ranks, or the attention backend cannot train here.
    """
    config, stats, _ = resolve_for_estimate(config)
    check_extras(config)
    model, train, ranks = config.model, config.train, int(os.environ.get("WORLD_SIZE", 1))
    counts = count_parameters(model)
    row = config.data.row_length
    step_tokens = train.batch_rows * row
    layout = resolve_layout(config, ranks)
    data, epochs = _data_lines(config)
    device = device_here(config)
    refused = _refused_here(config, device)
    memory = rank_memory(config, layout, stats)
    state = sum(memory[name] for name in ("parameters", "gradients", "optimizer state") if name in memory)
    kept = sum(value for name, value in memory.items() if name.startswith("activations"))
    other = sum(memory.values()) - state - kept
    # One document per row and no image: an upper bound on labels and pairs, stated as such.
    exact = exact_flops_per_token(model, TokenStats(patches=0.0, labels=1.0, pairs=(row + 1) / 2))
    lines = [
        f"run                 {train.run_dir}",
        f"architecture        {model.architecture}, width {model.width}, depth {model.depth}, "
        f"heads {num_heads(model)} x {model.head_dim}{_tower(config)}",
        f"parameters          {counts.total:,} (decoder {counts.decoder:,}, vision tower {counts.vision:,})"
        + (f", {counts.active:,} active" if counts.idle else ""),
        f"FLOPs per token     {6 * counts.active_decoder:.4g} (6N)"
        + (f" + {6 * counts.vision:.4g} per image patch" if counts.vision else "")
        + f"; exact, on one text document per row: {exact:.4g}",
        f"tokens per step     {step_tokens:,} ({train.batch_rows} rows of {row})",
        f"steps               {train.steps:,}, {train.steps * step_tokens:,} tokens",
        f"total FLOPs         {6 * counts.active_decoder * train.steps * step_tokens:.4g} (6ND"
        + (", vision tower not counted)" if counts.vision else ")"),
        f"memory per rank     {_gib(state)} parameters, gradients and AdamW state (fp32) + about {_gib(kept)} "
        f"activations + {_gib(other)} weights and gradients in use, logits",
        f"layout              {layout}; {layout.micro_rows} rows per pass, passes per step: {layout.micro_batches}",
        *data,
        *(f"warning             {line}" for line in remarks(config, epochs)),
        *(f"warning             {line}" for line in refused),
        *(f"warning             {line}" for line in _memory_remarks(sum(memory.values()), device, ranks)),
    ]
    return "\n".join(lines)


def _data_lines(config: Config) -> tuple[list[str], dict[str, float]]:
    """What the data is, and how often each source is read.

    Raises:
        InputError: sources that do not fit together, or a document longer than a row.
    """
    if not config.data.sources:
        return ["data                not prepared here; image and text shares of the mixture 45-45-10 are taken"], {}
    for dataset in open_sources(config.data, "train"):
        scan_lengths(dataset, config.data.row_length)
    epochs = epochs_of(config)
    return [f"epochs              {', '.join(f'{name} {times:,.3g}' for name, times in epochs.items())}"], epochs


def _refused_here(config: Config, device: str) -> list[str]:
    """What this machine would not run, though another might.

    Raises:
        InputError: train.device is cpu, and the attention backend cannot train there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return ["train.device: cuda, but torch sees no CUDA device here"]
    try:
        check_backend(config.model, device)
    except InputError as error:
        if config.train.device != "auto":
            raise
        # Here the run would be refused; where there is a GPU, train.device auto would take that.
        return [f"on this machine, which has no GPU: {error}"] if device == "cpu" else [str(error)]
    return []


def _memory_remarks(needed: float, device: str, ranks: int) -> list[str]:
    """A line if the run needs more than the device has."""
    has = memory_per_rank(device, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if has is None or needed <= has:
        return []
    where = "GPU has" if device == "cuda" else "share of this machine's memory is"
    return [
        f"memory: a rank needs about {_gib(needed)}, its {where} {_gib(has)}; lower train.micro_rows, set "
        "train.recompute or spread over more ranks"
    ]


def _tower(config: Config) -> str:
    if config.model.architecture != "late":
        return ""
    tower = config.model.vision
    heads = f"heads {tower.width // tower.head_dim} x {tower.head_dim}"
    return f"; vision tower width {tower.width}, depth {tower.depth}, {heads}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
