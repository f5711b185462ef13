"""Video to patches: choose frames, resize them all to one size, and the time that stands before each in the text.

Axis letters: F frames, P patches of a frame, X numbers of a patch. Source of the rules: spec, video. Frames that are
not chosen are dropped as soon as they are decoded: a long file takes no more memory than its chosen frames.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gemma4_jax.errors import MediaError
from gemma4_jax.media import images
from gemma4_jax.media.images import PATCH_SIDE, describe, encoded_file, is_encoded, one_line

NUM_FRAMES = 32
BUDGET = 70
UNKNOWN_FPS = 24.0
MAX_FRAMES = 100_000  # of a file: what is scanned at most
_log = logging.getLogger(__name__)

VideoSource = Any  # path, bytes, sequence of images, array, or (frames, fps)


class VideoPatches(NamedTuple):
    """A prepared clip.

    patches: (F, P, X) f32 in [0, 1]. positions: (P, 2) int32, of every frame. seconds: whole seconds of each frame.
    """

    patches: np.ndarray
    positions: np.ndarray
    seconds: tuple[int, ...]


class _Clip(NamedTuple):
    frames: list[np.ndarray]  # chosen and resized, each (H, W, 3) uint8
    indices: list[int]
    fps: float


def prepare_video(
    source: VideoSource,
    *,
    num_frames: int = NUM_FRAMES,
    fps: float | None = None,
    source_fps: float | None = None,
    budget: int = BUDGET,
    side: int = PATCH_SIDE,
) -> VideoPatches:
    """A clip as the model takes it.

    Args:
      source: path or bytes of an animated GIF, WebP or PNG, or of any other file when the ``video`` extra (PyAV) is
        installed; a sequence of images of one size; an array (F, H, W) or (F, H, W, C); or a pair (frames, fps).
      num_frames: how many frames to take, spread evenly; a shorter clip gives all it has, which is logged.
      fps: take this many frames a second instead.
      source_fps: frames a second of a source that does not say; None: 24.
      budget: most soft tokens a frame.
      side: side of a tile in pixels.

    Raises:
      MediaError: naming the source, if it is broken, empty, of mixed sizes or too large.
    """
    name = f"video {describe(source)}"
    if num_frames < 1 or (fps is not None and fps <= 0):
        raise MediaError(f"{name}: num_frames {num_frames} and fps {fps} must be positive")
    if isinstance(source, tuple) and len(source) == 2 and np.ndim(source[1]) == 0 and not _is_image(source[1]):
        source, source_fps = source

    def choose(total: int, clip_fps: float) -> list[int]:
        return sample_indices(total, clip_fps, num_frames, fps, name)

    def shrink(image: Image.Image) -> np.ndarray:
        return images.resize(image, budget, side)

    read = _read_file if is_encoded(source) else _read_frames
    clip = read(source, name, source_fps, choose, shrink)
    first = images.patchify(clip.frames[0], side)
    patches = np.stack([first.patches] + [images.patchify(frame, side).patches for frame in clip.frames[1:]])
    return VideoPatches(patches, first.positions, tuple(int(i / clip.fps) for i in clip.indices))


def sample_indices(total: int, clip_fps: float, num_frames: int, fps: float | None, name: str = "video") -> list[int]:
    """Which of ``total`` frames to take: frame ``i * total // n`` for i < n.

    n is ``num_frames``, or as many as ``fps`` frames a second of the clip's duration give; at most ``total``.

    Raises:
      MediaError: no frames.
    """
    if total < 1:
        raise MediaError(f"{name} is empty: 0 frames")
    wanted = num_frames if fps is None else max(1, int(total / clip_fps * fps))
    if wanted > total:
        _log.warning("%s has %d frames; %d were asked for, all of it is used", name, total, wanted)
    count = min(wanted, total)
    return [i * total // count for i in range(count)]


def timestamp(seconds: int) -> str:
    """Whole seconds as ``mm:ss``."""
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or is_encoded(value)


def _read_frames(source: Any, name: str, source_fps: float | None, choose: Callable, shrink: Callable) -> _Clip:
    if not isinstance(source, Sequence):
        source = np.asarray(source)
        if source.ndim not in (3, 4):
            raise MediaError(f"{name} is not a video; choices of shape: (F, H, W), (F, H, W, C)")
    clip_fps = _positive_fps(source_fps, name)
    indices = choose(len(source), clip_fps)
    size, frames = None, []
    for index in indices:
        frame = images.load_image(source[index])
        size = size or frame.size
        if frame.size != size:
            raise MediaError(f"{name}: frame {index} is {frame.size} but the first is {size}; a clip has one size")
        frames.append(shrink(frame))
    return _Clip(frames, indices, clip_fps)


def _positive_fps(fps: float | None, name: str) -> float:
    if fps is None:
        return UNKNOWN_FPS
    if not 0 < fps < float("inf"):
        raise MediaError(f"{name}: {fps} frames a second; it must be positive")
    return float(fps)


def _read_file(source: Any, name: str, source_fps: float | None, choose: Callable, shrink: Callable) -> _Clip:
    file = encoded_file(source, name)
    try:
        with Image.open(file, formats=images.FORMATS) as image:
            images.check_pixels(image.width, image.height, name)
            return _read_animation(image, name, source_fps, choose, shrink)
    except MediaError:
        raise
    except Image.UnidentifiedImageError:
        return _read_container(encoded_file(source, name), name, source_fps, choose, shrink)
    except images.DECODER_ERRORS as error:
        raise MediaError(f"{name} cannot be decoded: {one_line(error)}") from error


def _read_animation(image: Image.Image, name: str, source_fps: float | None, choose: Callable, shrink) -> _Clip:
    total = int(getattr(image, "n_frames", 1))
    if total > MAX_FRAMES:
        raise MediaError(f"{name} has {total} frames; the limit is {MAX_FRAMES}")
    image.load()  # WebP tells durations only of decoded frames
    duration = image.info.get("duration")  # milliseconds of the first frame
    clip_fps = _positive_fps(source_fps or (1000.0 / duration if duration else None), name)
    indices = choose(total, clip_fps)
    frames = []
    for index in indices:
        image.seek(index)
        frames.append(shrink(images.to_rgb(image, name)))
    return _Clip(frames, indices, clip_fps)


def _read_container(file: Any, name: str, source_fps: float | None, choose: Callable, shrink: Callable) -> _Clip:
    if importlib.util.find_spec("av") is None:
        raise MediaError(f"{name} is not an animated image; other video files need the extra: gemma4_jax[video]")
    av = importlib.import_module("av")
    try:
        with av.open(str(file) if not hasattr(file, "read") else file) as container:
            if not container.streams.video:
                raise MediaError(f"{name} has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise MediaError(f"{name} cannot be decoded: its video stream names no codec that is known")
            images.check_pixels(stream.width, stream.height, name)
            total = stream.frames or _count_packets(container, stream)
            if total > MAX_FRAMES:
                raise MediaError(f"{name} has {total} frames; the limit is {MAX_FRAMES}")
            rate = stream.average_rate
            clip_fps = _positive_fps(source_fps or (float(rate) if rate else None), name)
            indices = choose(total, clip_fps)
            container.seek(0)
            frames = _decode_chosen(container, stream, set(indices), name, shrink)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name} cannot be decoded: {one_line(error)}") from error
    if not frames:
        raise MediaError(f"{name} is empty: no frame could be decoded")
    # A header may promise more frames than there are.
    return _Clip(frames, indices[: len(frames)], clip_fps)


def _count_packets(container: Any, stream: Any) -> int:
    return sum(1 for packet in container.demux(stream) if packet.size)


def _decode_chosen(container: Any, stream: Any, chosen: set[int], name: str, shrink: Callable) -> list[np.ndarray]:
    frames = []
    for index, frame in enumerate(container.decode(stream)):
        if index in chosen:
            images.check_pixels(frame.width, frame.height, name)
            frames.append(shrink(frame.to_image()))
        if index >= max(chosen):
            break
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise MediaError(f"{name} changes its size; a clip has one size")
    return frames
