"""Images: decoding untrusted files, resizing to training resolution, patches, augmentation.

The resize is the slow step of reading (about twice the time of decoding a JPEG), so it is done once, at
preparation; the loader only decodes. Up to 64 pixels a side an image is stored as PNG, lossless, since JPEG
blocks of 8 pixels blur the few pixels there are; above, as JPEG of quality 95 with full chroma, about a fifth
of the bytes of PNG.
"""

import hashlib
import io
import json
import math
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image as PillowImage

from megamm.config import Fit

DEFAULT_FIT: Fit = "pad"
"""Nothing is lost, and a circle stays one."""

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO")
"""Pillow decoders in use; the list keeps out those that run other programs (EPS) or unpack archives."""

PREPROCESSING_VERSION = 1
"""Goes up when decoding, resizing or encoding give other pixels than before."""

LOSSLESS_MAX = 64
JPEG_QUALITY = 95
JPEG_MAX = 65500
"""Most pixels a side that JPEG can store."""
EXIF_ORIENTATION = 0x0112


class ImageError(Exception):
    """An image that cannot be used; the message is a short reason."""


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height from the file's header, without decoding.

    Raises:
        ImageError: not an image of a known format.
    """
    return _open(data).size


def read_rgb(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a file of any supported format to upright RGB; transparency is laid over white.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: not an image, damaged, or of more than ``max_pixels`` pixels (found before decoding).
    """
    picture = _open(data)
    # From the header: a small file may unpack to more than the memory holds.
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(f"image over the pixel limit: {width}x{height}")
    # simplejpeg is the faster way; CMYK and the like need the conversions of Pillow.
    is_plain_jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata
            # Cameras store pictures lying; whoever wrote the caption saw them upright.
            orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
            image = _decode_jpeg(data) if is_plain_jpeg else None
            if image is None:
                image = np.asarray(_flatten(picture))
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on bad bytes
        raise ImageError(f"broken image: {error}") from error
    return np.ascontiguousarray(_upright(image, orientation))


def resize(image: np.ndarray, size: int, fit: Fit = DEFAULT_FIT, patch_size: int = 1) -> np.ndarray:
    """Resize to [size, size, 3], native to whole patches: area average on axes that shrink, cubic on axes that grow.

    squash keeps all content and wastes no patch, at the price of the aspect ratio; crop keeps the middle
    square; pad keeps both on a white ground. native keeps both in as many patches as the picture needs, at most as many
    as a square of ``size`` has; white is only the rest of the last patches.
    """
    height, width = image.shape[:2]
    target = (size, size)
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    elif fit in ("pad", "native"):
        scale = size / max(height, width)
        if fit == "native":
            scale = native_scale(height, width, patch_size, (size // patch_size) ** 2)
        inner = _resize_to(image, max(1, round(height * scale)), max(1, round(width * scale)))
        if fit == "native":
            target = tuple(-(-side // patch_size) * patch_size for side in inner.shape[:2])
        image = np.full((*target, 3), 255, np.uint8)  # white, as transparency is
        top, left = (target[0] - inner.shape[0]) // 2, (target[1] - inner.shape[1]) // 2
        image[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return _resize_to(image, *target)


def native_scale(height: int, width: int, patch_size: int, max_patches: int) -> float:
    """The largest scale, at most 1, at which whole patches that cover a picture are no more than ``max_patches``.

    A small picture is not enlarged, and an extreme aspect leaves one patch across. Sizes in pixels.
    """
    # With so many rows there may be so many columns; a scale is best where one of the two is filled.
    longest = JPEG_MAX // patch_size
    rows = np.arange(1, min(max_patches, longest) + 1)
    columns = np.minimum(max_patches // rows, longest)
    return min(1.0, float(np.minimum(rows * patch_size / height, columns * patch_size / width).max()))


def preprocessing_fingerprint(image_size: int, patch_size: int, fit: Fit) -> str:
    """Hex digest of all that decides which pixels and patches the model sees of an image file."""
    rules = {
        "version": PREPROCESSING_VERSION,
        "image_size": image_size,
        "patch_size": patch_size,
        "fit": fit,
        "resize": "area, cubic where it grows",
        "lossless_max": LOSSLESS_MAX,
        "jpeg_quality": JPEG_QUALITY,
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def encode(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] for storage: PNG up to 64 pixels a side, else JPEG q95 4:4:4."""
    if max(image.shape[:2]) > LOSSLESS_MAX:
        image = np.ascontiguousarray(image)
        # Full chroma: half of it would blur colours over patches.
        return simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    done, data = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])  # OpenCV has blue first
    if not done:
        raise ImageError("image could not be encoded")
    return data.tobytes()


def decode(data: bytes) -> np.ndarray:
    """Decode a stored image (RGB PNG or JPEG, made by :func:`encode`) to uint8 [H, W, 3].

    Raises:
        ImageError: the bytes are damaged.
    """
    try:
        if simplejpeg.is_jpeg(data):
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, cv2.error) as error:
        raise ImageError(f"broken image: {error}") from error
    if image is None:
        raise ImageError("broken image: neither PNG nor JPEG")
    return image


def patchify(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut [H, W, 3] into patches in raster order: [num_patches, patch_size * patch_size * 3].

    Within a patch: row, column, channel. H and W must be multiples of ``patch_size``.
    """
    height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    # [rows, P, columns, P, 3] to [rows, columns, P, P, 3].
    grid = image.reshape(rows, patch_size, columns, patch_size, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The inverse of :func:`patchify`: [H, W, 3] of [rows * columns, patch_size * patch_size * 3]."""
    rows, columns = grid
    size = math.isqrt(patches.shape[1] // 3)
    tiles = patches.reshape(rows, columns, size, size, 3)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)


def on_grid(patches: np.ndarray, grid: tuple[int, int], other: tuple[int, int]) -> np.ndarray:
    """Patches of an image of ``grid`` (rows, columns) stretched to another grid; the same where the grids are."""
    if grid == other:
        return patches
    size = math.isqrt(patches.shape[1] // 3)
    return patchify(_resize_to(unpatchify(patches, grid), other[0] * size, other[1] * size), size)


def augment(image: np.ndarray, rng: np.random.Generator, crop_scale_min: float, flip: bool) -> np.ndarray:
    """Random resized crop of between ``crop_scale_min`` and all of the area, back to the same size, and flip.

    The crop's aspect ratio, over that of the image, is log-uniform in [3/4, 4/3], as usual for this augmentation.
    """
    height, width = image.shape[:2]
    if crop_scale_min < 1:
        area = height * width * rng.uniform(crop_scale_min, 1)
        # In the log, so that wide and tall are equally likely.
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        tall = height / width
        crop_height = min(height, max(1, round(np.sqrt(area / ratio * tall))))
        crop_width = min(width, max(1, round(np.sqrt(area * ratio / tall))))
        top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
        image = _resize_to(image[top : top + crop_height, left : left + crop_width], height, width)
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)  # a flip is a view with a negative stride, which torch refuses


def _open(data: bytes) -> PillowImage.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own pixel limit replaces Pillow's warning
            return PillowImage.open(io.BytesIO(data), formats=FORMATS)
    except PillowImage.DecompressionBombError as error:
        raise ImageError("image over the pixel limit: refused by its header") from error
    except Exception as error:  # any byte string may come in, and each decoder fails in its own way
        raise ImageError("not an image of a known format") from error


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode at full scale; None where Pillow, which forgives stray bytes, should try."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _flatten(picture: PillowImage.Image) -> PillowImage.Image:
    """Any mode to RGB: palettes, 16 bits, CMYK; transparency over white."""
    if picture.mode == "F":
        raise ImageError("unsupported image: floating-point pixels")
    # Pillow would cut values above 255 off; of 16 bits the high byte is the picture.
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        shift = 8 if picture.mode.startswith("I;16") or values.max(initial=0) > 255 else 0
        return PillowImage.fromarray((values >> shift).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        # Palettes keep their transparency in the file's info, so all kinds take the same way.
        picture = picture.convert("RGBA")
        ground = PillowImage.new("RGBA", picture.size, "white")
        return PillowImage.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1-8)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _resize_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    smaller = min(width, image.shape[1]), min(height, image.shape[0])
    # First what shrinks, by area, and then what grows: neither way is good at the other.
    if smaller != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    return image
