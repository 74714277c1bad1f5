"""Images: every mode of file, broken and oversized ones, resizing, patches, augmentation."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image as PillowImage
from PIL import ImageOps

from megamm.data import images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
SMOOTH = np.stack([*np.meshgrid(np.arange(240), np.arange(160)), np.full((160, 240), 90)], -1).astype(np.uint8)


def save(picture: PillowImage.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        picture = PillowImage.fromarray(picture)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def read(data: bytes, max_pixels: int = 10**6) -> np.ndarray:
    return images.read_rgb(data, max_pixels)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size, without any pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + struct.pack(">I", 100) + b"IDAT" + bytes(20)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_their_pixels(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(read(save(PIXELS, format, **options)), PIXELS)


def test_jpeg_is_near_its_pixels():
    found = read(save(SMOOTH, "JPEG", quality=95)).astype(int)
    assert np.abs(found - SMOOTH).mean() < 2


def test_grey_and_palette():
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(read(save(grey, "PNG")), np.repeat(grey[..., None], 3, -1))
    assert read(save(SMOOTH[..., 0], "JPEG")).shape == (160, 240, 3)
    palette = PillowImage.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(read(save(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_sixteen_bits_keep_the_high_byte():
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    np.testing.assert_array_equal(read(save(values, "PNG"))[..., 0], values >> 8)


def test_cmyk_jpeg_is_converted():
    colour = PillowImage.new("RGB", (32, 32), (200, 30, 60))
    np.testing.assert_allclose(read(save(colour.convert("CMYK"), "JPEG", quality=95))[16, 16], (200, 30, 60), atol=6)


def test_transparency_is_white():
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (10, 20, 30, 255)
    clear[4] = (0, 0, 0, 128)
    found = read(save(clear, "PNG"))
    assert (found[0] == (10, 20, 30)).all() and (found[7] == 255).all()
    assert abs(int(found[4, 0, 0]) - 127) <= 1
    gif = PillowImage.new("P", (8, 8), 0)
    gif.putpalette([255, 0, 0, 0, 255, 0])
    assert (read(save(gif, "GIF", transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation, format):
    exif = PillowImage.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    data = save(SMOOTH, format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(PillowImage.open(io.BytesIO(data))).convert("RGB")).astype(int)
    found = read(data).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1.5


def test_oversized_image_is_refused_by_its_header():
    with pytest.raises(images.ImageError, match="pixel limit"):
        read(png_header(60_000, 60_000))
    with pytest.raises(images.ImageError, match="pixel limit: 9000x9000"):
        read(png_header(9_000, 9_000))
    with pytest.raises(images.ImageError, match="pixel limit: 40x24"):
        read(save(PIXELS, "PNG"), max_pixels=959)
    assert read(save(PIXELS, "PNG"), max_pixels=960).shape == PIXELS.shape


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_cut_file_is_broken(format):
    data = save(SMOOTH, format)
    with pytest.raises(images.ImageError, match="broken image"):
        read(data[: len(data) // 2])


def test_other_files_are_no_images():
    for data in (b"", b"hello", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(images.ImageError, match="not an image"):
            read(data)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_never_escapes_as_another_error(data):
    good = data.draw(st.sampled_from([save(PIXELS, f) for f in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")]))
    where = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:where] + data.draw(st.binary(max_size=8)) + good[where + data.draw(st.integers(0, 8)) :]
    try:
        found = read(damaged)
    except images.ImageError:
        return
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


@pytest.mark.parametrize("shape", [(24, 40), (5, 5), (100, 7), (32, 32), (64, 31)])
@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_resize_gives_the_size_and_keeps_a_flat_colour(shape, fit):
    flat = np.full((*shape, 3), (10, 100, 200), np.uint8)
    found = images.resize(flat, 32, fit)
    assert found.shape == (32, 32, 3)
    assert (found[16, 16] == (10, 100, 200)).all()
    if fit != "pad" or shape[0] == shape[1]:
        assert (found == (10, 100, 200)).all()


def test_resize_shrinks_by_area_average():
    np.testing.assert_allclose(
        images.resize(PIXELS[:, :24], 8), PIXELS[:, :24].reshape(8, 3, 8, 3, 3).mean((1, 3)), atol=0.51
    )


def test_crop_keeps_the_middle_and_pad_is_white():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (images.resize(wide, 10, "crop") == 200).all()
    padded = images.resize(np.zeros((10, 30, 3), np.uint8), 30, "pad")
    assert (padded[:10] == 255).all() and (padded[10:20] == 0).all() and (padded[20:] == 255).all()


def test_storage_is_lossless_when_small_and_near_when_large():
    small = PIXELS[:24, :24]
    np.testing.assert_array_equal(images.decode(images.encode(small)), small)
    large = np.ascontiguousarray(SMOOTH[:112, :112])
    assert np.abs(images.decode(images.encode(large)).astype(int) - large).mean() < 1.5
    with pytest.raises(images.ImageError):
        images.decode(b"nothing")
    with pytest.raises(images.ImageError):
        images.decode(images.encode(large)[:200])


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.integers(1, 5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_patches_hold_row_column_channel_in_raster_order(rows, columns, patch, data):
    image = data.draw(hnp.arrays(np.uint8, (rows * patch, columns * patch, 3)))
    patches = images.patchify(image, patch)
    assert patches.shape == (rows * columns, patch * patch * 3)
    for index, found in enumerate(patches):
        top, left = index // columns * patch, index % columns * patch
        np.testing.assert_array_equal(found, image[top : top + patch, left : left + patch].ravel())


def test_augment_is_a_function_of_the_generator():
    image = np.ascontiguousarray(SMOOTH[:64, :64])
    first = images.augment(image, np.random.default_rng(3), 0.4, True)
    np.testing.assert_array_equal(first, images.augment(image, np.random.default_rng(3), 0.4, True))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert any((images.augment(image, np.random.default_rng(s), 0.4, False) != first).any() for s in range(4))
    np.testing.assert_array_equal(images.augment(image, np.random.default_rng(0), 1.0, False), image)


def test_flip_happens_half_of_the_time_and_crops_keep_the_share():
    image = np.ascontiguousarray(SMOOTH[:64, :64])
    rng = np.random.default_rng(0)
    flipped = [images.augment(image, rng, 1.0, True)[0, 0, 0] == image[0, -1, 0] for _ in range(200)]
    assert 70 < sum(flipped) < 130
    # Red counts columns: the span of a crop tells its width, and it is at least half of the image here.
    spans = [np.ptp(images.augment(image, rng, 0.5, False)[..., 0].astype(int)) for _ in range(50)]
    assert min(spans) >= 64 * np.sqrt(0.5 * 3 / 4) - 4 and max(spans) <= 63 and len(set(spans)) > 5
