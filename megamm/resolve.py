"""Complete a training config: what the data decides and what follows from other settings."""

from megamm.config import Config
from megamm.data.dataset_info import read_dataset_info
from megamm.errors import InputError
from megamm.model.sizes import resolve_model


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
    if train.steps is None:
        train.steps = -(-int(train.tokens) // (train.batch_rows * config.data.row_length))  # whole steps, rounded up
        # Only steps from here on: two settings that say the same could contradict each other.
        train.tokens = None
    return problems


def remarks(config: Config) -> list[str]:
    """What is allowed in a resolved config but rarely meant, a line each."""
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if warmup > steps:
        return [f"schedule.warmup_steps: {warmup}, but the run has {steps} steps; the rate never reaches optimizer.lr"]
    return []
