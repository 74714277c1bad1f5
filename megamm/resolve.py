"""Complete a training config: what the data decides and what follows from other settings."""

from collections.abc import Mapping
from pathlib import Path

from megamm.config import Config
from megamm.data.dataset_info import FILE, is_native, read_dataset_info
from megamm.errors import InputError
from megamm.model.sizes import has_learnt_positions, resolve_model

MOST_EPOCHS = 4
"""Readings of the same data that teach nearly as much as new data (Muennighoff et al. 2023, arXiv 2305.16264)."""


def resolve_config(config: Config) -> Config:
    """Fill in vocabulary, image and patch size, model widths and the number of steps, in place.

    Reads ``dataset.json`` of the first source, where there are sources.

    Raises:
        InputError: the data contradicts the config, or neither says it.
    """
    problems = fill_in(config)
    if problems:
        raise InputError("; ".join(problems))
    return config


def fill_in(config: Config) -> list[str]:
    """What :func:`resolve_config` does, as far as it can be done; returns what stands in the way of the rest."""
    model, train, problems = config.model, config.train, []
    # The first will do: open_sources checks that all agree.
    source, info = next(iter(config.data.sources.values()), None), {}
    sizes = ("vocab_size", "image_size", "patch_size")
    try:
        info = read_dataset_info(source.path) if source else {}
    except InputError as error:
        # Noted and not raised: a dry run elsewhere has no data, and can still tell the rest.
        problems.append(str(error))
    else:
        for name in sizes:
            known, wanted = info.get(name), getattr(model, name)
            if wanted is None and known is None:
                problems.append(f"model.{name}: set it, or data.sources, from which it is read")
            elif wanted is not None and known is not None and wanted != known:
                if name == "vocab_size" and wanted > known:
                    continue  # rows that no token has, as other models have them for even shares
                problems.append(f"model.{name}: {wanted}, but {source.path} was prepared with {known}")
    for name in sizes:
        if getattr(model, name) is None:
            setattr(model, name, info.get(name))
    resolve_model(model)
    for other in config.data.sources.values():
        problems += _misfit_of_tower(config, other.path)
    if train.steps is None:
        train.steps = -(-int(train.tokens) // (train.batch_rows * config.data.row_length))  # whole steps, rounded up
        # Only steps from here on: two settings that say the same could contradict each other.
        train.tokens = None
    return problems


def _misfit_of_tower(config: Config, path: str) -> list[str]:
    """A line if images of unlike shape meet a tower that has learnt positions for one shape."""
    if not has_learnt_positions(config.model) or not (Path(path) / FILE).is_file():
        return []
    try:
        native = is_native(read_dataset_info(path))
    except InputError:
        return []  # told of elsewhere
    kind = config.model.vision.kind
    why = f"model.vision.kind: {kind} has learnt positions of square images, but {path} was prepared with --fit native"
    return [f"{why}; take kind megamm, or prepare with another --fit"] if native else []


def epochs_of(config: Config) -> dict[str, float]:
    """How often a resolved config's run reads each source.

    Raises:
        InputError: a source is missing or damaged.
    """
    sizes = {}
    for name, source in config.data.sources.items():
        train = read_dataset_info(source.path)["splits"]["train"]
        sizes[name] = train["num_text_tokens"] + train["num_patches"]
    weights = {name: source.weight for name, source in config.data.sources.items()}
    return times_read(config.train.steps * config.train.batch_rows * config.data.row_length, weights, sizes)


def times_read(tokens: float, weights: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """How often each source of a mixture is read in ``tokens`` positions; ``sizes``: its own positions."""
    total = sum(weights.values())
    return {name: tokens * weight / total / max(1, sizes[name]) for name, weight in weights.items()}


def remarks(config: Config, epochs: Mapping[str, float] | None = None) -> list[str]:
    """What is allowed in a resolved config but rarely meant, a line each.

    Args:
        epochs: how often the run reads each source, where the data is at hand.
    """
    schedule, steps, found = config.schedule, config.train.steps, []
    if schedule.warmup_steps > steps:
        found.append(
            f"schedule.warmup_steps: {schedule.warmup_steps}, but the run has {steps} steps; the rate never reaches "
            "optimizer.lr"
        )
    elif 2 * schedule.warmup_steps > steps > 3:
        found.append(f"schedule.warmup_steps: {schedule.warmup_steps}, more than half of the {steps} steps")
    for name, times in (epochs or {}).items():
        if times > MOST_EPOCHS:
            found.append(
                f"data.sources.{name}: read {times:,.0f} times; after about {MOST_EPOCHS} times the same text teaches "
                "little (arXiv 2305.16264), and the loss on held-out documents may rise"
            )
    return found
