"""What a run would be, without running it: sizes, FLOPs, steps, memory and layout."""

import os

from megamm.config import Config
from megamm.estimate.memory import rank_memory
from megamm.estimate.tokens import stated_stats, stats_of_sources
from megamm.extras import check_extras
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token
from megamm.model.sizes import num_heads
from megamm.parallel.layout import resolve_layout
from megamm.resolve import remarks, resolve_config

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
    """A text of a line per quantity. Reads at most the headers of the data.

    Raises:
        InputError: a size is set neither in the config nor by the data, or the layout does not fit the ranks.
    """
    config = resolve_config(config)
    check_extras(config)
    model, train, ranks = config.model, config.train, int(os.environ.get("WORLD_SIZE", 1))
    counts = count_parameters(model)
    row = config.data.row_length
    step_tokens = train.batch_rows * row
    layout = resolve_layout(config, ranks)
    stats = stats_of_sources(config) if config.data.sources else stated_stats(model, row)
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
        f"layout              {layout}; {layout.micro_rows} rows per pass, {layout.micro_batches} passes per step",
        *(f"warning             {line}" for line in remarks(config)),
    ]
    return "\n".join(lines)


def _tower(config: Config) -> str:
    if config.model.architecture != "late":
        return ""
    tower = config.model.vision
    heads = f"heads {tower.width // tower.head_dim} x {tower.head_dim}"
    return f"; vision tower width {tower.width}, depth {tower.depth}, {heads}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
