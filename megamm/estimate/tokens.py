"""What a position of a packed row holds, from prepared data or from a stated mixture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamm.config import Config, ModelConfig
from megamm.data.shards import DocumentSizes, ShardedDataset
from megamm.errors import InputError
from megamm.model.counts import TokenStats
from megamm.resolve import resolve_config
from megamm.sequence import labels_of_documents, pairs_of_documents, patches_per_image

PAPER_PATCHES = 0.544
"""Image patches per position of the 45-45-10 mixture of arXiv 2504.07951."""


def resolve_for_estimate(
    config: Config, image_share: float | None = None, document_length: int | None = None
) -> tuple[Config, TokenStats, str]:
    """The resolved config, what its positions hold, and where that is from.

    Prepared data are read (lengths only) where all sources are at hand and nothing is stated; data that are not at
    hand need not be, so long as the config has the sizes that they would decide.

    Raises:
        InputError: a size that nothing decides, or a share or length that cannot be.
    """
    missing = [s.path for s in config.data.sources.values() if not (Path(s.path) / "dataset.json").is_file()]
    if missing:
        # One that is missing makes the mixture unknown; the rest alone would be another mixture.
        config.data.sources = {}
    config, sources = resolve_config(config), list(config.data.sources.values())
    if sources and image_share is None and document_length is None:
        return config, stats_of_sources(config), f"lengths of {', '.join(source.path for source in sources)}"
    stats = stated_stats(config.model, config.data.row_length, image_share=image_share, document_length=document_length)
    text = (
        f"stated: {stats.patches:.1%} image patches, documents of {document_length or config.data.row_length} positions"
    )
    return config, stats, text + (f" ({missing[0]} is not prepared here)" if missing else "")


def stats_of_sources(config: Config) -> TokenStats:
    """Statistics of the train splits of a resolved config's sources."""
    sources = config.data.sources.values()
    sizes = [ShardedDataset(source.path, "train").sizes() for source in sources]
    return stats_of_sizes(sizes, [source.weight for source in sources], config.model.image_mask == "causal")


def stats_of_sizes(sizes: Sequence[DocumentSizes], weights: Sequence[float], is_causal: bool = False) -> TokenStats:
    """Statistics of a mixture of prepared datasets, rows taken as full (packing leaves 1 to 3% of padding).

    Args:
        sizes: of each dataset, what its documents hold.
        weights: shares of the mixture's tokens, relative.
        is_causal: whether a patch sees only earlier ones.
    """
    total = np.zeros(4)
    for of_source, weight in zip(sizes, weights, strict=True):
        text, patches, images, image_pairs = (np.asarray(column, float) for column in of_source)
        # Per document; a source counts by its share of tokens, so that its sums are divided by its own positions.
        size = text + patches
        labels, pairs = labels_of_documents(text, images), pairs_of_documents(size, patches, image_pairs, is_causal)
        sums = np.array([column.sum() for column in (patches, labels, pairs, image_pairs)])
        total += weight / sum(weights) * sums / size.sum()
    return TokenStats(patches=total[0], labels=total[1], pairs=total[2], image_pairs=total[3])


def stated_stats(
    model: ModelConfig, row_length: int, *, image_share: float | None = None, document_length: int | None = None
) -> TokenStats:
    """Statistics of a mixture that is only stated.

    Args:
        model: resolved.
        image_share: positions that hold patches; by default the paper's, or none for a text model.
        document_length: positions of a document; by default the whole row, the most that attention can cost.

    Raises:
        InputError: a share or length that cannot be.
    """
    if image_share is None:
        image_share = 0.0 if model.architecture == "text" else PAPER_PATCHES
    if not 0 <= image_share < 1:
        raise InputError(f"--image-share: {image_share:g} is not from 0 to below 1")
    length = row_length if document_length is None else document_length
    if not 0 < length <= row_length:
        raise InputError(f"--document-length: {length} is not from 1 to data.row_length {row_length}")
    patches = patches_per_image(model.image_size, model.patch_size)
    images = image_share * length / patches
    labels = max((1 - image_share) * length - images - 1, 0.0)
    of_images = np.array(images * patches), np.array(images * patches**2)
    pairs = pairs_of_documents(np.array(float(length)), *of_images, model.image_mask == "causal")
    return TokenStats(patches=image_share, labels=labels / length, pairs=float(pairs) / length)
