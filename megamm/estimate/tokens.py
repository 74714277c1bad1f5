"""What a position of a packed row holds, from prepared data or from a stated mixture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamm.config import Config, ModelConfig
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError
from megamm.resolve import resolve_config
from megamm.scaling.flops import TokenStats

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
    patches = (config.model.image_size // config.model.patch_size) ** 2
    sources = config.data.sources.values()
    lengths = [ShardedDataset(source.path, "train").lengths for source in sources]
    return stats_of_lengths(lengths, [source.weight for source in sources], patches)


def stats_of_lengths(lengths: Sequence[np.ndarray], weights: Sequence[float], patches_per_image: int) -> TokenStats:
    """Statistics of a mixture of prepared datasets, rows taken as full (packing leaves 1 to 3% of padding).

    Args:
        lengths: of each dataset int [num_documents, 2], text tokens and image patches of its documents.
        weights: shares of the mixture's tokens, relative.
        patches_per_image: of each image.
    """
    total = np.zeros(3)
    for pair, weight in zip(lengths, weights, strict=True):
        text, patches = np.asarray(pair, float).T
        size, images = text + patches, patches / patches_per_image
        # A label is a text token after a text token: all but the first of each span, of which images cut one off.
        labels = np.maximum(text - images - 1, 0)
        sums = np.array([patches.sum(), labels.sum(), _pairs(size, images, patches_per_image).sum()])
        total += weight / sum(weights) * sums / size.sum()
    return TokenStats(patches=total[0], labels=total[1], pairs=total[2])


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
    patches = (model.image_size // model.patch_size) ** 2
    images = image_share * length / patches
    labels = max((1 - image_share) * length - images - 1, 0.0)
    pairs = _pairs(np.array(float(length)), np.array(images), patches)
    return TokenStats(patches=image_share, labels=labels / length, pairs=float(pairs) / length)


def _pairs(size: np.ndarray, images: np.ndarray, patches_per_image: int) -> np.ndarray:
    """Query-key pairs of documents: the causal triangle, and in each image the other half of the square."""
    return size * (size + 1) / 2 + images * patches_per_image * (patches_per_image - 1) / 2
