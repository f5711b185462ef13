"""Images: sizes, tiles, every way of giving one, and what is refused."""

import importlib.util
import io
import os
import pathlib
import re
import resource
import struct
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_fuzz import mutated, outcome
from PIL import Image

from gemma4_jax.errors import MediaError
from gemma4_jax.media import images, prepare_image, target_size

PHOTOS = os.path.join(os.path.dirname(sklearn.datasets.__file__), "images")
CHINA = os.path.join(PHOTOS, "china.jpg")


@pytest.fixture(scope="module")
def photo():
    return Image.open(CHINA).convert("RGB")


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((512, 512), 280, (768, 768)),
        ((1, 1), 280, (768, 768)),
        ((1080, 1920), 280, (576, 1056)),
        ((4032, 3024), 280, (912, 672)),
        ((1, 2000), 280, (48, 13440)),
        ((2000, 1), 280, (13440, 48)),
        ((1080, 1920), 70, (288, 528)),
        ((512, 512), 1120, (1584, 1584)),
        ((427, 640), 280, (624, 960)),
        ((10, 400), 70, (48, 2496)),
    ],
)
def test_target_size(size, budget, expected):
    assert target_size(*size, budget) == expected


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(images.BUDGETS))
def test_target_size_fills_the_budget(height, width, budget):
    tall, wide = target_size(height, width, budget)
    tokens = tall * wide // 48**2
    assert tall % 48 == 0
    assert wide % 48 == 0
    assert 1 <= tokens <= budget
    assert (wide, tall) == target_size(width, height, budget)
    # One more row or column would pass the budget: the image is scaled up as well as down.
    scale = (budget * 48**2 / (height * width)) ** 0.5
    if min(height, width) * scale >= 48:
        assert tall > scale * height - 48.001
        assert wide > scale * width - 48.001


def test_budget_outside_of_the_published_ones():
    with pytest.raises(MediaError, match="image budget 300 is not one of 70, 140, 280, 560, 1120"):
        target_size(10, 10, 300)


def test_plain_tile_rule():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8)
    patches, positions = images.patchify(pixels)
    assert patches.shape == (6, 6912)
    assert patches.dtype == np.float32
    assert positions.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert positions.dtype == np.int32
    for patch, (x, y) in zip(patches, positions, strict=True):
        tile = pixels[48 * y : 48 * y + 48, 48 * x : 48 * x + 48].astype(np.float32) * np.float32(1 / 255)
        np.testing.assert_array_equal(patch, tile.reshape(-1))


def test_an_image_of_the_target_size_is_not_resampled():
    pixels = np.random.default_rng(1).integers(0, 256, (768, 768, 3), dtype=np.uint8)
    np.testing.assert_array_equal(prepare_image(pixels).patches, images.patchify(pixels).patches)


def real_files():
    """Photographs of scikit-learn, and the pictures of scikit-image where that is installed."""
    folders = [pathlib.Path(PHOTOS)]
    found = importlib.util.find_spec("skimage")
    if found is not None:
        folders.append(pathlib.Path(found.submodule_search_locations[0]) / "data")
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png", ".gif")]


@pytest.mark.parametrize("path", real_files(), ids=lambda path: path.name)
def test_real_files(path):
    """Sizes by the rule, and the published path's bicubic (torch's, on uint8) within two grey levels."""
    image = images.load_image(path)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for budget in (70, 280, 1120):
        size = target_size(image.height, image.width, budget)
        patches, positions = prepare_image(path, budget, exact=True)
        assert len(patches) == size[0] * size[1] // 48**2
        assert positions.max(axis=0).tolist() == [size[1] // 48 - 1, size[0] // 48 - 1]
        want = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
        difference = np.abs(patches - images.patchify(want).patches) * 255
        assert difference.max() < 2.5
        assert difference.mean() < 0.2


def test_photographs_are_there():
    assert [path.name for path in real_files()][:2] == ["china.jpg", "flower.jpg"]
    assert all(len(prepare_image(path).patches) == 260 for path in real_files()[:2])


def test_every_form_of_one_image_gives_the_same_patches(photo, tmp_path):
    want = prepare_image(photo)
    assert want.patches.shape == (260, 6912)
    assert want.patches.min() >= 0
    assert want.patches.max() <= 1
    array = np.asarray(photo)
    png = encoded(photo, "PNG")
    (tmp_path / "x.png").write_bytes(png)
    forms = [
        array, array.transpose(2, 0, 1), array.astype(np.int64), array / 255.0, array.astype(np.float32) / 255,
        array.astype(np.uint16) * 257, png, bytearray(png), tmp_path / "x.png", str(tmp_path / "x.png"), CHINA,
        encoded(photo, "TIFF"), encoded(photo, "BMP"), encoded(photo, "WEBP", lossless=True), encoded(photo, "PPM"),
    ]  # fmt: skip
    for form in forms:
        np.testing.assert_array_equal(prepare_image(form).patches, want.patches)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "I", "F", "I;16"])
def test_colour_modes(photo, mode):
    small = photo.resize((64, 48))
    if mode == "LAB":
        image = Image.merge("LAB", [small.convert("L"), *[Image.new("L", small.size, 128)] * 2])  # neutral colours
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    else:
        image = (small.convert("L") if mode in "IF" else small).convert(mode)
    assert image.mode == mode
    loaded = images.load_image(image)
    assert loaded.mode == "RGB"
    assert loaded.size == small.size
    grey = mode in ("1", "L", "I", "F", "I;16", "LAB")
    reference = small.convert("1" if mode == "1" else "L").convert("RGB") if grey else small
    limit = {"LAB": 12, "P": 20}.get(mode, 2.5)  # P is dithered to a few colours; LAB's lightness is not luma
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(reference)).mean() < limit


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBa", "La"])
def test_alpha_is_put_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image = Image.open(io.BytesIO(encoded(image, "PNG", transparency=0)))
    elif mode == "PA":
        image = Image.new("P", (2, 1)).convert("PA")
        image.putpixel((0, 0), (0, 0))  # (palette index, alpha)
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert np.asarray(images.load_image(image)).tolist() == [[[255] * 3, [0] * 3]]


def test_half_transparent_and_grey_alpha_arrays():
    rgba = np.zeros((1, 1, 4), np.uint8)
    rgba[..., 3] = 51
    assert np.asarray(images.load_image(rgba)).tolist() == [[[204] * 3]]
    assert np.asarray(images.load_image(np.array([[[0, 0], [0, 255]]], np.uint8))).tolist() == [[[255] * 3, [0] * 3]]
    transparent_rgb = encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert np.asarray(images.load_image(transparent_rgb)).tolist() == [[[255] * 3]]


def test_sixteen_bits_keep_their_range():
    grey = np.array([[0, 257, 65535]], np.uint16)
    for source in (grey, encoded(Image.fromarray(grey), "PNG"), encoded(Image.fromarray(grey), "TIFF")):
        assert np.asarray(images.load_image(source))[0, :, 0].tolist() == [0, 1, 255]


def test_arrays_of_other_libraries():
    grey = np.arange(12, dtype=np.float32).reshape(3, 4) / 16  # exact in bfloat16
    want = np.asarray(images.load_image(grey))
    for array in (jnp.asarray(grey), jnp.asarray(grey, jnp.bfloat16), torch.from_numpy(grey), grey.astype(np.float16)):
        np.testing.assert_array_equal(np.asarray(images.load_image(array)), want)


def test_large_arrays_are_converted_piece_by_piece():
    array = np.broadcast_to(np.float64(0.5), (3000, 4000, 3))  # takes no memory itself; 288 MB as f64
    tracemalloc.start()
    assert prepare_image(array, 70).patches[0, 0] == np.float32(128 * np.float32(1 / 255))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_exif_orientation(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to view
    turned = encoded(photo, "JPEG", exif=exif, quality=95)
    assert images.load_image(turned).size == (427, 640)
    assert prepare_image(turned).positions.max(axis=0).tolist() == [12, 19]
    upright = images.load_image(encoded(photo, "JPEG", quality=95)).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(images.load_image(turned)), np.asarray(upright))


def test_large_jpeg_decoded_small_is_close(photo):
    large = photo.crop((0, 0, 640, 416)).resize((2560, 1664), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=92)
    exact, fast = prepare_image(data, 70, exact=True), prepare_image(data, 70)
    np.testing.assert_array_equal(exact.positions, fast.positions)
    difference = 255 * np.abs(exact.patches - fast.patches)
    assert 0 < difference.mean() < 0.5
    assert difference.max() < 8


@pytest.mark.parametrize("budget", images.BUDGETS)
@pytest.mark.parametrize("size", [(1, 1), (1, 999), (3, 2), (5000, 7)])
def test_thin_and_tiny(size, budget):
    patches, positions = prepare_image(np.full((*size, 3), 7, np.uint8), budget)
    assert 1 <= len(patches) <= budget
    assert np.isfinite(patches).all()
    assert np.unique(positions, axis=0).shape == positions.shape


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/x.png", "'/nowhere/x.png' is not a file"),
        (b"", "<0 bytes> is empty"),
        (b"hello", "<5 bytes> cannot be decoded as an image"),
        (np.zeros((0, 5, 3), np.uint8), r"<array \(0, 5, 3\) uint8> is empty"),
        (np.zeros((5, 5, 5)), r"<array \(5, 5, 5\) float64> is not an image"),
        (np.full((2, 2), np.nan), "not finite"),
        (np.full((2, 2), -1), "from -1 to -1; the range is 0 to 255"),
        (np.full((2, 2), 300.0), "from 300 to 300; the range is 0 to 255"),
        (np.array([["a"]]), "dtype <U1"),
        (None, "<NoneType>"),
    ],
)
def test_refused(source, message):
    with pytest.raises(MediaError, match=message):
        prepare_image(source)


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 4_001), (60_000, 60_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_decoding(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match="pixels"):
        prepare_image(png_header(*size))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_oversized_file(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    (tmp_path / "x.png").write_bytes(b"0" * 11)
    with pytest.raises(MediaError, match=r"x.png' has 11 bytes; the limit is 10"):
        prepare_image(tmp_path / "x.png")


SMALL_FILES = {
    form: encoded(Image.open(CHINA).resize((40, 30)), form)
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA")
}


@settings(max_examples=150, deadline=None)
@given(mutated(SMALL_FILES))
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_files_give_an_image_or_a_named_error(file):
    image, error = outcome(prepare_image, file, 70)
    assert error is None or re.fullmatch(r".*\d bytes>.*", error)  # one line
    assert image is None or (1 <= len(image.patches) <= 70 and np.isfinite(image.patches).all())


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(MediaError):
        prepare_image(data)
