"""Sound to frames: decode, average channels, resample to 16 kHz, cut into 640-sample frames of raw waveform.

Axis letters: A frames (soft tokens), S = 640 samples of a frame. Source of the rules: spec, audio. Files are read in
blocks up to the limit, so neither a lying header nor an hour of sound takes more than bounded memory.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import soxr

from gemma4_jax.errors import MediaError
from gemma4_jax.media.images import describe, encoded_file, is_encoded, one_line

SAMPLE_RATE = 16_000
FRAME_SAMPLES = 640
MAX_TOKENS = 750  # 30 s, the family's limit
ON_LONG = ("raise", "cut")
MIN_RATE, MAX_RATE = 100, 768_000
MAX_CHANNELS = 64
# Raw samples in floats reach past 1 when clipped or noisy, but never this far: such an array holds unscaled integers.
MAX_AMPLITUDE = 100.0
_BLOCK = 65_536

AudioSource = Any  # path, bytes, array, or (array, rate)


def prepare_audio(
    source: AudioSource,
    rate: int | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    on_long: str = "raise",
    frame_samples: int = FRAME_SAMPLES,
) -> np.ndarray:
    """Sound as the model takes it.

    Args:
      source: path or bytes of a WAV, FLAC, OGG or MP3 file (whatever libsndfile reads); or samples: an array, or a pair
        (array, rate). Arrays are (samples,), (samples, channels) or (channels, samples), the shorter axis being the
        channels; float in [-1, 1], int16, int32, or uint8 around 128.
      rate: samples a second of an array without one; None: 16 000.
      max_tokens: the most frames.
      on_long: "raise" an error when there are more, or "cut" the end off.
      frame_samples: S, samples in a frame at 16 kHz.

    Returns:
      (A, S) f32, the last frame padded with zeros, A = ceil(samples at 16 kHz / S).

    Raises:
      MediaError: naming the source, if it is broken, empty or too long.
    """
    if on_long not in ON_LONG:
        raise MediaError(f"on_long is {on_long!r}; choices: {', '.join(ON_LONG)}")
    name = describe(source[0] if isinstance(source, tuple) else source)
    limit = max_tokens * frame_samples / SAMPLE_RATE
    samples, rate = _read_file(source, name, limit) if is_encoded(source) else _read_array(source, rate, name, limit)
    if len(samples) == 0:
        raise MediaError(f"audio {name} is empty: 0 samples")
    _check_amplitude(samples, name)
    frames = to_frames(resample(samples, rate), frame_samples)
    if len(frames) > max_tokens:
        if on_long == "raise":
            raise MediaError(f"audio {name} is longer than {limit:g} s, the limit of {max_tokens} tokens")
        frames = frames[:max_tokens]
    return frames


def resample(samples: np.ndarray, rate: int, target: int = SAMPLE_RATE) -> np.ndarray:
    """Mono f32 (n,) at ``rate`` -> f32 at ``target`` samples a second; never shorter than one sample."""
    if rate == target:
        return samples
    resampled = soxr.resample(samples, rate, target, quality="HQ")
    # A handful of samples at a high rate can come out as none; they are still a sound.
    return resampled if len(resampled) else samples[:1]


def to_frames(waveform: np.ndarray, frame_samples: int = FRAME_SAMPLES) -> np.ndarray:
    """Waveform (n,) -> (ceil(n / S), S) f32, zeros at the end."""
    count = math.ceil(len(waveform) / frame_samples)
    frames = np.zeros((count, frame_samples), np.float32)
    frames.reshape(-1)[: len(waveform)] = waveform
    return frames


def to_float(array: np.ndarray, name: str) -> np.ndarray:
    """Samples of any supported dtype as f32 in [-1, 1]. Raises MediaError for other dtypes."""
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - np.float32(128)) / np.float32(128)
    if array.dtype in (np.int8, np.int16):
        return array.astype(np.float32) / np.float32(-float(np.iinfo(array.dtype).min))
    if array.dtype == np.int32:
        return (array / -float(np.iinfo(np.int32).min)).astype(np.float32)
    if kind == "f" or array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    raise MediaError(f"audio {name} has dtype {array.dtype}; choices: float, int8, int16, int32, uint8")


def _check_rate(rate: Any, name: str) -> int:
    if not isinstance(rate, (numbers.Real, np.number)):
        raise MediaError(f"audio {name} has rate {rate!r}; a number of samples a second is expected")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise MediaError(f"audio {name} has rate {rate}; the range is {MIN_RATE} to {MAX_RATE}")
    return int(rate)


def _check_channels(channels: int, name: str):
    if channels > MAX_CHANNELS:
        raise MediaError(f"audio {name} has {channels} channels; the limit is {MAX_CHANNELS}")


def _check_amplitude(samples: np.ndarray, name: str):
    peak = float(np.max(np.abs(samples)))
    if not math.isfinite(peak):
        raise MediaError(f"audio {name} has samples that are not finite")
    if peak > MAX_AMPLITUDE:
        raise MediaError(f"audio {name} peaks at {peak:g}; float samples are in [-1, 1] (were they integers?)")


def _most_samples(limit: float, rate: int) -> int:
    # One frame more than the limit is enough to see that it is passed.
    return math.ceil((limit + FRAME_SAMPLES / SAMPLE_RATE) * rate) + 1


def _read_array(source: Any, rate: int | None, name: str, limit: float) -> tuple[np.ndarray, int]:
    if isinstance(source, tuple):
        if len(source) != 2 or np.ndim(source[1]) != 0:
            raise MediaError(f"audio {name} is a tuple of {len(source)}; a pair (array, rate) is expected")
        source, rate = source
    rate = _check_rate(SAMPLE_RATE if rate is None else rate, name)
    array = np.asarray(source)
    if array.ndim not in (1, 2):
        raise MediaError(f"audio {name} has {array.ndim} axes; choices: (samples,), (samples, channels)")
    if array.ndim == 2:
        if array.shape[0] < array.shape[1]:
            array = array.T
        _check_channels(array.shape[1], name)
    array = array[: _most_samples(limit, rate)]
    if array.size == 0:
        raise MediaError(f"audio {name} is empty: shape {array.shape}")
    samples = to_float(array, name)
    return (samples if samples.ndim == 1 else _mono(samples)), rate


def _read_file(source: Any, name: str, limit: float) -> tuple[np.ndarray, int]:
    file = encoded_file(source, f"audio {name}")
    try:
        with soundfile.SoundFile(os.fspath(file) if isinstance(file, os.PathLike) else file) as sound:
            rate = _check_rate(sound.samplerate, name)
            _check_channels(sound.channels, name)
            blocks = list(_mono_blocks(sound, _most_samples(limit, rate)))
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError, OverflowError) as error:
        raise MediaError(f"audio {name} cannot be decoded: {one_line(error)}") from error
    return (np.concatenate(blocks) if blocks else np.zeros(0, np.float32)), rate


def _mono_blocks(sound: soundfile.SoundFile, most: int) -> Iterator[np.ndarray]:
    size = max(1, _BLOCK // sound.channels)
    while most > 0:
        block = sound.read(min(size, most), dtype="float32", always_2d=True)
        if len(block) == 0:
            return
        most -= len(block)
        yield _mono(block)


def _mono(samples: np.ndarray) -> np.ndarray:
    # (n, channels) -> (n,): the mean. Adding columns is six times as fast as NumPy's mean over a short last axis.
    total = samples[:, 0].copy()
    for channel in range(1, samples.shape[1]):
        total += samples[:, channel]
    return total / np.float32(samples.shape[1])
