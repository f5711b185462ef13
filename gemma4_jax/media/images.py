"""Images to patches: open, orient, put on white, resize to fill a token budget, cut into 48x48 tiles.

Axis letters: H image height, W image width, P patches, X = 6912 numbers of a patch. Source of the rules: spec, images.
Everything here is bounded: sizes are checked from the header before a pixel is decoded.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from gemma4_jax.errors import MediaError

BUDGETS = (70, 140, 280, 560, 1120)
PATCH_SIDE = 48
MAX_PIXELS = 80_000_000  # below the size at which Pillow itself starts to warn
MAX_FILE_BYTES = 256 * 2**20
_BLOCK_ROWS = 64
# What a stranger's file may be (JPEG opens MPO too). Left out: formats that start other programs (EPS) or hide a second
# size (ICO).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "TGA", "AVIF")
# Everything that Pillow's decoders are known to raise on broken files.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, ZeroDivisionError,
    AttributeError, RuntimeError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning, ImageCms.PyCMSError,
)  # fmt: skip

ImageSource = Any  # path, bytes, PIL image, or array; jax and torch arrays convert through NumPy


class ImagePatches(NamedTuple):
    """One prepared image or video frame.

    patches: (P, X) f32 in [0, 1], tiles row-major, each tile flattened as (row, column, RGB).
    positions: (P, 2) int32, (x, y) of each tile.
    """

    patches: np.ndarray
    positions: np.ndarray


def target_size(height: int, width: int, budget: int = 280, side: int = PATCH_SIDE) -> tuple[int, int]:
    """The size an image is resized to, up or down, so that its tiles fill the budget at its aspect ratio.

    Args:
      height, width: of the image, in pixels.
      budget: most soft tokens, one of ``BUDGETS``.
      side: side of a tile in pixels.

    Returns:
      (height, width), multiples of ``side`` with at most ``budget`` tiles.

    Raises:
      MediaError: empty image, or a budget that is not published.
    """
    if budget not in BUDGETS:
        raise MediaError(f"image budget {budget} is not one of {', '.join(map(str, BUDGETS))}")
    if height < 1 or width < 1:
        raise MediaError(f"image is empty: height {height}, width {width}")
    scale = math.sqrt(budget * side * side / (height * width))
    rows, columns = int(scale * height / side), int(scale * width / side)
    if rows == 0 and columns == 0:
        raise MediaError(f"image of height {height}, width {width} leaves no tile of {side}x{side} at budget {budget}")
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return rows * side, columns * side


def prepare_image(
    source: ImageSource, budget: int = 280, side: int = PATCH_SIDE, *, exact: bool = False
) -> ImagePatches:
    """An image as the model takes it.

    Args:
      source: path, encoded bytes, PIL image, or array (see ``load_image``).
      budget: most soft tokens, one of ``BUDGETS``.
      side: side of a tile in pixels.
      exact: decode every pixel of a large JPEG first. By default such a file is decoded at 1/2, 1/4 or 1/8 as long as
        that is still twice the target or more: half the time, and photographs move by 0.3 grey levels on average.

    Returns:
      The patches and their positions.

    Raises:
      MediaError: naming the source, if it is broken, empty or too large.
    """

    def goal(size):
        height, width = target_size(size[1], size[0], budget, side)
        return width, height

    image = load_image(source, shrink=None if exact else goal)
    return patchify(resize(image, budget, side), side)


def resize(image: Image.Image, budget: int = 280, side: int = PATCH_SIDE) -> np.ndarray:
    """Bicubic with antialiasing on uint8 to ``target_size``: RGB image -> (H, W, 3) uint8."""
    height, width = target_size(image.height, image.width, budget, side)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def patchify(pixels: np.ndarray, side: int = PATCH_SIDE) -> ImagePatches:
    """Cut (H, W, 3) uint8, whose sides are multiples of ``side``, into tiles."""
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    tiles = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return ImagePatches(tiles * np.float32(1 / 255), np.stack([x, y], axis=1))


def load_image(source: ImageSource, shrink=None) -> Image.Image:
    """Open anything that holds an image as an upright RGB image; transparency is put on white.

    Args:
      source: a path, encoded bytes, a PIL image in any mode, or an array: (H, W), (H, W, C) or (C, H, W) with 1 to 4
        channels (grey, grey and alpha, RGB, RGBA); uint8, uint16, bool, other integers (0 to 255, or to 65535 if one is
        above 255), or floats in [0, 1] (to 255 if one is above 1).
      shrink: maps the (width, height) of a JPEG to what is wanted of it; the file may then be decoded smaller, but not
        below twice that. None: never.

    Raises:
      MediaError: naming the source, if it is broken, empty or too large.
    """
    name = describe(source)
    try:
        if isinstance(source, Image.Image):
            return _finish(source, name)
        if is_encoded(source):
            with open_encoded(source, name) as image:
                if shrink is not None:
                    _draft(image, shrink)
                return _finish(image, name)
        return _finish(_from_array(np.asarray(source), name), name)
    except MediaError:
        raise
    except DECODER_ERRORS as error:
        raise MediaError(f"{name} cannot be decoded as an image: {one_line(error)}") from error


def describe(source: Any) -> str:
    """How a message names a source: its path, or what it is made of."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return f"<{source.mode} image {source.width}x{source.height}>"
    shape = getattr(source, "shape", None)
    return f"<{type(source).__name__}>" if shape is None else f"<array {tuple(shape)} {getattr(source, 'dtype', '')}>"


def one_line(error: BaseException) -> str:
    """An exception's text on one line, or its type when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_encoded(source: Any) -> bool:
    """Whether a source is a file: a path or bytes."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview))


def encoded_file(source: Any, name: str):
    """What a decoder opens for a path (checked: exists, size) or bytes.

    Raises:
      MediaError: missing, empty, not a file, or larger than ``MAX_FILE_BYTES``.
    """
    if isinstance(source, (str, os.PathLike)):
        path = pathlib.Path(source)
        if not path.is_file():
            raise MediaError(f"{name} is not a file")
        size, file = path.stat().st_size, path
    else:
        size, file = len(source), io.BytesIO(source)
    if size == 0:
        raise MediaError(f"{name} is empty")
    if size > MAX_FILE_BYTES:
        raise MediaError(f"{name} has {size} bytes; the limit is {MAX_FILE_BYTES}")
    return file


def open_encoded(source: Any, name: str) -> Image.Image:
    """Open an encoded image without decoding it; its size is checked first. Raises MediaError or a decoder's error."""
    image = Image.open(encoded_file(source, name), formats=FORMATS)
    check_pixels(image.width, image.height, name)
    return image


def check_pixels(width: int, height: int, name: str):
    """Raise MediaError for an empty image or one with more than ``MAX_PIXELS`` pixels."""
    if width < 1 or height < 1:
        raise MediaError(f"{name} is empty: width {width}, height {height}")
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name} is {width}x{height}, {width * height} pixels; the limit is {MAX_PIXELS}")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any Pillow mode to RGB: alpha on white, 16 bits and floats scaled to 8."""
    mode = image.mode
    if mode == "RGB" and not image.has_transparency_data:
        return image
    if mode in ("I", "F") or mode.startswith("I;16"):
        return Image.fromarray(_to_uint8(np.asarray(image), name)).convert("RGB")
    if mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if image.has_transparency_data:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _draft(image: Image.Image, shrink):
    """Have libjpeg decode at 1/8, 1/4 or 1/2 where that divides both sides and leaves twice what is wanted."""
    if image.format not in ("JPEG", "MPO"):
        return
    width, height = image.size
    wanted_width, wanted_height = shrink(image.size)  # of the file as it lies: the goal turns with the image
    for scale in (8, 4, 2):
        divides = width % scale == 0 and height % scale == 0
        if divides and width // scale >= 2 * wanted_width and height // scale >= 2 * wanted_height:
            image.draft(None, (width // scale, height // scale))
            return


def _finish(image: Image.Image, name: str) -> Image.Image:
    check_pixels(image.width, image.height, name)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose would copy upright images too
        image = ImageOps.exif_transpose(image)
    return to_rgb(image, name)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4) and array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise MediaError(f"{name} is not an image; choices of shape: (H, W), (H, W, C), (C, H, W) with C from 1 to 4")
    check_pixels(array.shape[1], array.shape[0], name)
    pixels = np.ascontiguousarray(_to_uint8(array, name))
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.name == "bfloat16":  # NumPy knows it as a foreign kind, so that it cannot be compared
        array = array.astype(np.float32)
    kind = array.dtype.kind
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf":
        raise MediaError(f"{name} has dtype {array.dtype}; choices: unsigned and signed integers, floats, bool")
    array_is_16_bit = array.dtype == np.uint16
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MediaError(f"{name} has values that are not finite")
    if kind == "f":
        top = 1.0 if high <= 1.0 else 255.0
    else:
        top = 65535.0 if array_is_16_bit or high > 255 else 255.0
    if low < 0 or high > top:
        raise MediaError(f"{name} has values from {low:g} to {high:g}; the range is 0 to {top:g}")
    pixels = np.empty(array.shape, np.uint8)
    for row in range(0, len(array), _BLOCK_ROWS):  # f64 is exact for every dtype, but eight times as large
        block = slice(row, row + _BLOCK_ROWS)
        pixels[block] = np.rint(array[block].astype(np.float64) * (255.0 / top))
    return pixels
