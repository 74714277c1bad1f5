"""Parameter and FLOPs counts of a model, from its settings alone.

Two count conventions, both logged with every run:

* ``paper``: the 6ND forms of arXiv 2504.07951. Dense: 6 N D. Late fusion: 6 (N_v D_v + N D), where N_v is the
  vision tower's parameters, D_v the image patches, N the decoder's parameters (with the embedding tables and
  the projector) and D all positions. With experts, or weights per modality, N is what one position meets.
* ``exact``: every matrix product of forward and backward, counting two operations per multiply-add: linear
  layers at the positions that reach them, attention over the pairs that the mask admits, the head at labelled
  positions only, and no gradient with respect to pixels.

Element-wise work (norms, rotary embedding, SwiGLU, softmax) is left out of both.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megamm.config import ModelConfig
from megamm.model.sizes import decoder_hidden, num_heads, shuffle_ratio, tower_hidden, tower_patch_size
from megamm.sequence import patches_per_image


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Number of parameters.

    Attributes:
        decoder: with embedding, head, patch projection or projector.
        vision: of the tower.
        idle: of the decoder's, those that a position does not meet: the experts that it does not go to, or the other
            modality's weights.
    """

    decoder: int
    vision: int
    idle: int = 0

    @property
    def total(self) -> int:
        return self.decoder + self.vision

    @property
    def active_decoder(self) -> int:
        """Of the decoder's, those that a position meets."""
        return self.decoder - self.idle

    @property
    def active(self) -> int:
        """All that a position meets, the vision tower included."""
        return self.total - self.idle


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """What a training set holds per position of a packed row (padding counts as a position).

    Attributes:
        patches: image patches.
        labels: labelled positions.
        pairs: query-key pairs that the interval mask admits.
        image_pairs: pairs of patches of one image, n^2 for an image of n; None where all are full squares.
    """

    patches: float
    labels: float
    pairs: float
    image_pairs: float | None = None


def attention_weights(width: int, key_width: int, query_width: int | None = None) -> int:
    """Elements of the attention matrices: queries and output w q each, keys and values w k each (q = k = w: 4 w^2)."""
    return 2 * width * ((query_width or width) + key_width)


def block_parameters(width: int, hidden: int, head_dim: int) -> int:
    """A block of the vision tower: attention, SwiGLU 3 w f, two norms and two per-head norms."""
    return attention_weights(width, width) + 3 * width * hidden + 2 * width + 2 * head_dim


def tower_block_parameters(config: ModelConfig) -> int:
    """A block of the vision tower; of clip and siglip with a bias of every matrix and norm."""
    w, hidden = config.vision.width, tower_hidden(config)
    if config.vision.kind == "megamm":
        return block_parameters(w, hidden, config.vision.head_dim)
    # Matrices, then biases of qkv and output, of the feed-forward layer, and scale and bias of two layer norms.
    return attention_weights(w, w) + 2 * w * hidden + (3 * w + w) + (hidden + w) + 4 * w


def tower_parameters(config: ModelConfig) -> int:
    """The vision tower without its projector; of clip and siglip with learned positions."""
    v, size = config.vision, tower_patch_size(config)
    w, is_clip, patch_dim = v.width, v.kind == "clip", 3 * size**2
    found = v.depth * tower_block_parameters(config) + patch_dim * w
    if v.kind == "megamm":
        return found + w * v.final_norm  # a scale only: RMS norm
    length = patches_per_image(config.image_size, size) + is_clip
    # CLIP: class token and a norm before the first block; SigLIP: a bias of the patch projection.
    return found + length * w + (3 * w if is_clip else w) + 2 * w * v.final_norm


class TowerWork(NamedTuple):
    """What a tower computes, in the terms of our own block.

    Attributes:
        hidden: hidden width of a SwiGLU layer with as many weights: GELU has two matrices instead of three.
        longer: positions for each patch of the model: a tower may have several (pixel shuffle), and CLIP a class token
            beside an image's patches.
    """

    hidden: float
    longer: float


def tower_work(config: ModelConfig) -> TowerWork:
    """See :class:`TowerWork`."""
    kind, hidden = config.vision.kind, tower_hidden(config)
    per_image = patches_per_image(config.image_size, config.patch_size)
    # The class token is a position more of each image: a fraction of one for each patch.
    longer = shuffle_ratio(config) ** 2 + (kind == "clip") / per_image
    # Then 3 matrices of this width have as many weights as its 2.
    return TowerWork(hidden if kind == "megamm" else hidden * 2 / 3, longer)


def projector_parameters(config: ModelConfig) -> int:
    """From the tower's width to the decoder's."""
    v, w = config.vision, config.width
    first = v.width * shuffle_ratio(config) ** 2 * w
    return first + w + w * w + w if v.projector == "mlp" else first  # two matrices, each with a bias


def query_width(config: ModelConfig) -> int:
    """Width of all queries of a block of the decoder."""
    return num_heads(config) * config.head_dim


def key_width(config: ModelConfig) -> int:
    """Width of all keys (and of all values) of a block of the decoder."""
    return (config.key_heads or num_heads(config)) * config.head_dim


def small_parameters(config: ModelConfig) -> list[int]:
    """Sizes of the norms of a block of the decoder."""
    return [config.width, config.width] + [2 * config.head_dim] * config.qk_norm  # one scale for queries, one for keys


def decoder_block_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of a block of the decoder, and how many of them a position does not meet."""
    width, experts = config.width, config.experts
    queries, keys, feed_forward = query_width(config), key_width(config), 3 * width * decoder_hidden(config)
    bias = (queries + 2 * keys) * config.qkv_bias
    dense = attention_weights(width, keys, queries) + bias + feed_forward + sum(small_parameters(config))
    if experts.num:
        expert = 3 * width * experts.hidden
        always = dense - feed_forward + 3 * width * experts.shared_hidden + experts.num * width  # the last: the router
        return always + experts.num * expert, (experts.num - experts.top_k) * expert
    # What a position does not meet is the other modality's copy.
    idle = {"none": 0, "feed_forward": feed_forward, "block": dense}[config.per_modality]
    return dense + idle, idle


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count parameters of a resolved model config (see ``megamm.resolve``)."""
    width, patch_dim = config.width, 3 * config.patch_size**2
    block, idle = decoder_block_parameters(config)
    # The last width is that of the final norm.
    decoder = config.depth * block + (1 if config.tied_embeddings else 2) * config.vocab_size * width + width
    vision = 0
    if config.architecture == "early":
        decoder += patch_dim * width
    elif config.architecture == "late":
        vision = tower_parameters(config)
        decoder += projector_parameters(config)
    return ParameterCounts(decoder=decoder, vision=vision, idle=config.depth * idle)


def feed_forward_width(config: ModelConfig) -> int:
    """Hidden units that a position meets in a block of the decoder."""
    experts = config.experts
    if experts.num:
        return experts.top_k * experts.hidden + experts.shared_hidden
    return decoder_hidden(config)


def paper_flops(counts: ParameterCounts, tokens: float, patches: float) -> float:
    """6 N D, N the active parameters of the decoder, plus 6 N_v D_v for a vision tower.

    Args:
        counts: from :func:`count_parameters`.
        tokens: positions trained on, D.
        patches: image patches among them, D_v.
    """
    return 6 * (counts.active_decoder * tokens + counts.vision * patches)


def exact_flops_per_token(config: ModelConfig, stats: TokenStats) -> float:
    """Operations of forward and backward per position."""
    width = config.width
    hidden = feed_forward_width(config)
    sizes = key_width(config), query_width(config)
    total = config.depth * _block_flops(width, hidden, 1.0, stats.pairs, *sizes)
    total += config.depth * 6 * config.experts.num * width  # routers
    # Only labelled positions meet the head; looking up the embedding is no product.
    total += 6 * config.vocab_size * width * stats.labels
    patch_dim = 3 * config.patch_size**2
    if config.architecture == "early":
        # 4 and not 6: pixels need no gradient.
        total += 4 * patch_dim * width * stats.patches
    elif config.architecture == "late":
        v = config.vision
        v_hidden, longer = tower_work(config)
        # Each position of an image sees all of that image.
        pairs = image_pairs(config, stats) * longer**2
        total += v.depth * _block_flops(v.width, v_hidden, stats.patches * longer, pairs)
        matrices = v.width * shuffle_ratio(config) ** 2 * width + (width * width if v.projector == "mlp" else 0)
        # The tower's smaller patches are as many more: together they have the pixels of the model's.
        total += 4 * patch_dim * v.width * stats.patches + 6 * matrices * stats.patches
    return total


def image_pairs(config: ModelConfig, stats: TokenStats) -> float:
    """``stats.image_pairs``, or what it is where all images are full squares."""
    if stats.image_pairs is not None:
        return stats.image_pairs
    return stats.patches * patches_per_image(config.image_size, config.patch_size)


class FlopsWeights(NamedTuple):
    """FLOPs of forward and backward that each position, patch, label, query-key pair and pair of patches of one image
    adds to a row."""

    position: float
    patch: float
    label: float
    pair: float
    image_pair: float


def flops_weights(config: ModelConfig) -> FlopsWeights:
    """The weights by which :func:`exact_flops_per_token` counts."""

    def count(**more: float) -> float:
        return exact_flops_per_token(config, TokenStats(**dict.fromkeys(names, 0.0) | more))

    names = ("patches", "labels", "pairs", "image_pairs")
    position = count()
    # The count is linear in each of them, so one of each tells its weight.
    return FlopsWeights(position, *(count(**{name: 1.0}) - position for name in names))


def _block_flops(
    width: int, hidden: float, positions: float, pairs: float, keys: int | None = None, queries: int | None = None
) -> float:
    """Forward and backward of a block: 6 per weight and position; attention 2 products forward, 4 backward.

    Recomputing the scores in the backward is not counted, as is usual for MFU.
    """
    # 2 operations a multiply-add, once forward and twice backward: for the input's gradient and for the weight's.
    linear = 6 * positions * (attention_weights(width, keys or width, queries) + 3 * width * hidden)
    # Scores and weighted values: 2 x 2 operations for each pair and unit of width forward, twice that backward.
    attention = 6 * 2 * pairs * (queries or width)
    return linear + attention
