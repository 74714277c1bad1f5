"""Vision towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), so that trained ones can be read.

Pre-norm transformers with layer norms, biases, learned positions and a plain feed-forward layer; CLIP's has a class
token and a norm before the first block. Pixels are normalised as theirs were. Shape suffixes: n images, l positions of
one, w width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megamm.config import ModelConfig, VisionConfig
from megamm.model.layers import Linear
from megamm.model.sizes import shuffle_ratio, tower_activation, tower_eps, tower_hidden, tower_patch_size
from megamm.sequence import patch_order, patches_per_image

PIXELS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue, of pixels from 0 to 1."""


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation function of that name; see ``VisionConfig.activation``."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)  # the constant of OpenAI's CLIP
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, in float32 at least."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.initial = eps, {"weight": None, "bias": 0.0}
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)


class PatchEmbedding(nn.Module):
    """Normalised pixels to the tower's width, with positions, and CLIP's class token before them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision, self.kind, size = config.vision, config.vision.kind, tower_patch_size(config)
        is_clip = self.kind == "clip"
        length = patches_per_image(config.image_size, size) + is_clip
        patch_dim, std = 3 * size**2, vision.width**-0.5
        self.initial = {"position": std, "class_token": std}
        # As the originals are built: their weights must find a place each.
        self.projection = Linear(patch_dim, vision.width, patch_dim**-0.5, bias=not is_clip)
        self.position = nn.Parameter(torch.empty(length, vision.width))
        self.class_token = nn.Parameter(torch.empty(vision.width)) if is_clip else None
        self.norm = LayerNorm(vision.width, tower_eps(config)) if is_clip else None  # CLIP's pre_layrnorm

    def forward(self, patches: torch.Tensor, num_images: int, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [num_images * patches of one, patch_dim] -> [N, L, W]."""
        mean, deviation = (patches.new_tensor(values, dtype=torch.float32) for values in PIXELS[self.kind])
        # Channels come last within a patch.
        pixels = (patches.float().unflatten(1, (-1, 3)) / 255 - mean) / deviation
        x_nlw = self.projection(pixels.flatten(1).to(dtype)).unflatten(0, (num_images, -1))
        if self.class_token is not None:
            first = self.class_token.to(dtype).expand(num_images, 1, -1)
            x_nlw = torch.cat((first, x_nlw), dim=1)
        x_nlw = x_nlw + self.position.to(dtype)
        return x_nlw if self.norm is None else self.norm(x_nlw)


class VisionAttention(nn.Module):
    """Attention over all positions of an image; rows of ``qkv`` by heads, [H, 3, D]."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width, self.head_dim, std = vision.width, vision.head_dim, vision.width**-0.5
        self.qkv = Linear(width, 3 * width, std, bias=True)
        self.out = Linear(width, width, std / (2 * vision.depth) ** 0.5, bias=True)

    def forward(self, x_nlw: torch.Tensor) -> torch.Tensor:
        # [N, L, H, 3, D] to three of [N, H, L, D].
        q, k, v = self.qkv(x_nlw).unflatten(-1, (-1, 3, self.head_dim)).transpose(1, 2).unbind(3)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionFeedForward(nn.Module):
    """Two matrices with biases and an activation between them; to another width as a projector."""

    def __init__(self, width: int, hidden: int, out: int, activation: str, depth: int = 1):
        super().__init__()
        self.activation = activation
        self.up = Linear(width, hidden, width**-0.5, bias=True)
        self.down = Linear(hidden, out, hidden**-0.5 / (2 * depth) ** 0.5, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(activate(self.up(x), self.activation))


class VisionBlock(nn.Module):
    """Pre-norm block of such a tower."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision = config.vision
        self.attention_norm = LayerNorm(vision.width, tower_eps(config))
        self.attention = VisionAttention(vision)
        self.feed_forward_norm = LayerNorm(vision.width, tower_eps(config))
        sizes = vision.width, tower_hidden(config), vision.width
        self.feed_forward = VisionFeedForward(*sizes, tower_activation(config), vision.depth)

    def forward(self, x_nlw: torch.Tensor) -> torch.Tensor:
        x_nlw = x_nlw + self.attention(self.attention_norm(x_nlw))
        return x_nlw + self.feed_forward(self.feed_forward_norm(x_nlw))


class PretrainedTower(nn.Module):
    """A CLIP or SigLIP tower and a projector: the features of the patches, without CLIP's class token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision = config.vision
        self.config = config
        self.embed = PatchEmbedding(config)
        self.blocks = nn.ModuleDict({str(i): VisionBlock(config) for i in range(vision.depth)})
        self.norm = LayerNorm(vision.width, tower_eps(config)) if vision.final_norm else None
        self.projector = make_projector(config)

    def forward(self, patches: torch.Tensor, grids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [num_images * patches_per_image, patch_dim] of square images -> features [rows, L, W], as many.

        Without images it runs on a black one (see ``vision.VisionTower``).
        """
        full, ratio = patches_per_image(self.config.image_size, self.config.patch_size), shuffle_ratio(self.config)
        patches, grids = or_black(patches, grids, full)
        places = raster_places(grids, len(patches), ratio)
        return self.projector(join_features(self.features(cut_patches(patches, places, ratio), dtype), places, ratio))

    def features(self, patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tower's own features [num_images, L, width of the tower]; L and ``patches`` are those of the tower."""
        length = patches_per_image(self.config.image_size, tower_patch_size(self.config))
        x_nlw = self.embed(patches, patches.shape[0] // length, dtype)
        for block in self.blocks.values():
            x_nlw = block(x_nlw)
        x_nlw = x_nlw if self.norm is None else self.norm(x_nlw)
        return x_nlw[:, -length:]  # without the class token, which is first


def make_projector(config: ModelConfig) -> nn.Module:
    """From the tower's width to the decoder's."""
    width = config.vision.width * shuffle_ratio(config) ** 2
    if config.vision.projector == "mlp":
        return VisionFeedForward(width, config.width, config.width, "gelu")
    return Linear(width, config.width, width**-0.5)


def or_black(patches: torch.Tensor, grids: torch.Tensor, full: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grids of images; of one black image of ``full`` patches, a square, where there is none."""
    if len(patches):
        return patches, grids
    return patches.new_zeros(full, patches.shape[1]), grids.new_full((1, 2), math.isqrt(full))


def raster_places(grids: torch.Tensor, num_patches: int, ratio: int) -> torch.Tensor | None:
    """Where the patches of a tower lie in raster order of each image, those of one patch of the model together.

    Args:
        grids: [num_images, 2], rows and columns of each image in patches of the model.
        num_patches: P, of the model.
        ratio: of the sizes.

    Returns:
        int64 [P * ratio^2], a permutation; None where both have the same patches, which stay as they are.
    """
    if ratio == 1:
        return None
    order, columns = patch_order(grids, num_patches)
    # Patches before the image, and the row and column in it, for [P, row, column in the patch].
    before = torch.arange(num_patches, device=order.device) - order
    inside = torch.arange(ratio, device=order.device)
    row = (order // columns * ratio)[:, None] + inside
    column = (order % columns * ratio)[:, None] + inside
    rows_before = (before * ratio**2)[:, None] + row * (columns * ratio)[:, None]
    return (rows_before[:, :, None] + column[:, None]).flatten()


def cut_patches(patches: torch.Tensor, places: torch.Tensor | None, ratio: int) -> torch.Tensor:
    """Patches of the model [P, (ratio * p)^2 * 3] to those of a tower, [P * ratio^2, p^2 * 3] in raster order.

    Args:
        places: from :func:`raster_places`.
    """
    if places is None:
        return patches
    size = math.isqrt(patches.shape[1] // 3) // ratio
    # Patch, row and column of the tower's patch in it, values of that.
    parts = patches.unflatten(1, (ratio, size, ratio, size * 3)).transpose(2, 3).flatten(3).flatten(0, 2)
    return torch.empty_like(parts).index_copy_(0, places, parts)


def join_features(features: torch.Tensor, places: torch.Tensor | None, ratio: int) -> torch.Tensor:
    """Features [rows, L, W] of a tower's patches to those of the model's, [rows, P / rows, ratio^2 W] (pixel shuffle).

    Those of the tower's patches in one of the model's lie side by side.
    """
    if places is None:
        return features
    return features.flatten(0, 1)[places].unflatten(0, (features.shape[0], -1, ratio**2)).flatten(2)
