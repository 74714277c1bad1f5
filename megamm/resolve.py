"""Complete a training config: what the data decides and what follows from other settings."""

from megamm.config import Config
from megamm.data.shards import read_dataset_info
from megamm.errors import InputError
from megamm.model.sizes import resolve_model


def resolve_config(config: Config) -> Config:
    """Fill in vocabulary, image and patch size, model widths and the number of steps, in place.

    Reads ``dataset.json`` of the first source, where there are sources.

    Raises:
        InputError: the data contradicts the config, or neither says it.
    """
    model, problems = config.model, []
    source = next(iter(config.data.sources.values()), None)
    info = read_dataset_info(source.path) if source else {}
    for name in ("vocab_size", "image_size", "patch_size"):
        known, wanted = info.get(name), getattr(model, name)
        if wanted is None and known is None:
            problems.append(f"model.{name}: set it, or data.sources, from which it is read")
        elif wanted is not None and known is not None and wanted != known:
            problems.append(f"model.{name}: {wanted}, but {source.path} was prepared with {known}")
        setattr(model, name, known if wanted is None else wanted)
    if problems:
        raise InputError("; ".join(problems))
    resolve_model(model)
    train = config.train
    if train.steps is None:
        train.steps = -(-int(train.tokens) // (train.batch_rows * config.data.row_length))
        train.tokens = None
    return config
