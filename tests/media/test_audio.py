"""Sound: parity with the published extractor, every way of giving it, limits, and what is refused."""

import io
import pathlib
import re
import sysconfig
import tracemalloc

import numpy as np
import pytest
import scipy.io
import soundfile
from hypothesis import given, settings
from media_fuzz import mutated, outcome
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

from gemma4_jax.errors import MediaError
from gemma4_jax.media import audio, prepare_audio

SCIPY_WAVS = sorted((pathlib.Path(scipy.io.__file__).parent / "tests" / "data").glob("*.wav"))
STDLIB_WAVS = sorted((pathlib.Path(sysconfig.get_paths()["stdlib"]) / "test").glob("audiodata/*.wav"))
SPOKEN_WAVS = sorted(pathlib.Path("/usr/share/sounds").glob("alsa/*.wav"))


def wav(samples, rate=16_000, subtype="PCM_16", form="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=form)
    return buffer.getvalue()


def tone(rate, seconds=1.0, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 1280, 22_849, 480_000])
def test_frames_are_bit_equal_to_the_published_extractor(samples):
    waveform = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    peer = Gemma4UnifiedAudioFeatureExtractor()(waveform, return_tensors="np")
    frames = prepare_audio(waveform)
    assert frames.dtype == np.float32
    assert frames.shape == (-(-samples // 640), 640)
    np.testing.assert_array_equal(frames, peer["input_features"][0])
    assert peer["input_features_mask"].all()


def test_file_in_another_rate_is_bit_equal_after_resampling():
    waveform = tone(48_000, 1.43)
    stereo = np.stack([waveform, np.zeros_like(waveform)], axis=1)
    mono = audio.resample(waveform / 2, 48_000)
    peer = Gemma4UnifiedAudioFeatureExtractor()(mono, return_tensors="np")["input_features"][0]
    np.testing.assert_array_equal(prepare_audio((stereo, 48_000)), peer)
    assert len(peer) == 36


def test_dtypes_and_channels_agree():
    exact = np.array([0, 16384, -16384, -32768], np.int16)  # exact in every dtype below
    want = [0, 0.5, -0.5, -1]
    forms = [
        exact, exact.astype(np.int32) << 16, (exact >> 8).astype(np.int8), ((exact >> 8) + 128).astype(np.uint8),
        np.float16(want), np.float32(want), np.float64(want), want,
        np.stack([exact, exact], 1), np.stack([exact, exact]),
        np.stack([np.float32(want), 0 * np.float32(want), -np.float32(want)], 1) + np.float32(want)[:, None],
    ]  # fmt: skip
    for form in forms:
        np.testing.assert_array_equal(prepare_audio(form)[0, :4], np.float32(want))
        np.testing.assert_array_equal(prepare_audio((np.asarray(form), 16_000))[0, :4], np.float32(want))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_a_tone(rate):
    frames = prepare_audio(tone(rate), rate)
    assert frames.shape == (25, 640)
    middle = slice(1600, 14_400)  # the filter rings at both ends
    np.testing.assert_allclose(frames.reshape(-1)[middle], tone(16_000)[middle], atol=2e-3)


@pytest.mark.parametrize(
    ("form", "subtype", "atol"),
    [("WAV", "PCM_16", 1e-4), ("WAV", "PCM_24", 1e-6), ("WAV", "PCM_U8", 1e-2), ("WAV", "FLOAT", 0),
     ("FLAC", "PCM_16", 1e-4), ("OGG", "VORBIS", 0.1), ("MP3", "MPEG_LAYER_III", 0.1), ("AIFF", "PCM_16", 1e-4)],
)  # fmt: skip
def test_file_formats(form, subtype, atol, tmp_path):
    data = wav(tone(16_000), subtype=subtype, form=form)
    path = tmp_path / f"x.{form.lower()}"
    path.write_bytes(data)
    frames = prepare_audio(data)
    np.testing.assert_allclose(frames[:24], tone(16_000).reshape(25, 640)[:24], atol=atol)
    np.testing.assert_array_equal(frames, prepare_audio(path))
    np.testing.assert_array_equal(frames, prepare_audio(str(path)))


def test_real_files():
    # Which of them exist depends on how Python and the system were installed; scipy's below always do.
    for path in STDLIB_WAVS + SPOKEN_WAVS:
        info = soundfile.info(path)
        frames = prepare_audio(path)
        assert abs(len(frames) - info.frames / info.samplerate * 25) <= 1, path
        assert 0 < np.abs(frames).max() <= 1.1, path  # false for NaN


def test_odd_files_are_there():
    assert len(SCIPY_WAVS) >= 20


@pytest.mark.parametrize("path", SCIPY_WAVS, ids=lambda path: path.name)
def test_odd_files_give_sound_or_a_named_error(path):
    frames, error = outcome(prepare_audio, path)
    assert error is None or path.name in error
    assert frames is None or np.isfinite(frames).all()


def test_limit_of_750_tokens():
    assert len(prepare_audio(np.zeros(480_000, np.float32))) == 750
    assert len(prepare_audio((np.zeros(1_323_000, np.float32), 44_100))) == 750
    long = np.linspace(-1, 1, 480_001, dtype=np.float32)
    for source in (long, wav(long), (np.zeros(60 * 48_000), 48_000)):
        with pytest.raises(MediaError, match=r"longer than 30 s, the limit of 750 tokens"):
            prepare_audio(source)
    np.testing.assert_array_equal(prepare_audio(long, on_long="cut"), long[:480_000].reshape(750, 640))
    assert len(prepare_audio(long, max_tokens=3, on_long="cut")) == 3
    with pytest.raises(MediaError, match="on_long is 'trim'; choices: raise, cut"):
        prepare_audio(long, on_long="trim")


def test_long_file_is_read_up_to_the_limit_only(tmp_path):
    path = tmp_path / "hour.flac"
    soundfile.write(path, np.zeros((600 * 48_000, 2), np.int16), 48_000)
    tracemalloc.start()
    assert len(prepare_audio(path, on_long="cut")) == 750
    with pytest.raises(MediaError, match=r"hour.flac.* is longer than 30 s"):
        prepare_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # 30 s are 6 MB as mono, 10 minutes of stereo 230 MB


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.float32), r"<array \(0,\) float32> is empty"),
        (np.zeros((0, 2)), "is empty"),
        (b"", "<0 bytes> is empty"),
        (wav(np.zeros(0, np.int16)), "is empty: 0 samples"),
        (b"RIFFxxxxWAVE", "<12 bytes> cannot be decoded"),
        ("/nowhere/x.wav", "'/nowhere/x.wav' is not a file"),
        (np.array([0.0, np.nan]), "not finite"),
        (np.array([0.0, 20_000.0]), "peaks at 20000"),
        (np.zeros((2, 2, 2)), "has 3 axes"),
        (np.zeros((100, 99)), "99 channels; the limit is 64"),
        (np.zeros(9, np.complex64), "dtype complex64"),
        ((np.zeros(9), 0), "rate 0; the range is 100 to 768000"),
        ((np.zeros(9), float("nan")), "rate nan; the range is 100 to 768000"),
        ((np.zeros(9), "16000"), "rate '16000'; a number of samples a second is expected"),
        ((np.zeros(9), 16_000, 1), "a tuple of 3"),
    ],
)
def test_refused(source, message):
    with pytest.raises(MediaError, match=message):
        prepare_audio(source)


MUTABLE = {
    form: wav(tone(8_000, 0.1), 8_000, subtype, form)
    for form, subtype in {"WAV": "PCM_16", "FLAC": "PCM_16", "OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.items()
} | {path.name: path.read_bytes() for path in (*SCIPY_WAVS, *STDLIB_WAVS)}


@settings(max_examples=150, deadline=None)
@given(mutated(MUTABLE, head=200))
def test_mutated_files_give_sound_or_a_named_error(file):
    frames, error = outcome(prepare_audio, file)
    assert error is None or re.fullmatch(r".*\d bytes>.*", error)  # one line
    assert frames is None or (1 <= len(frames) <= 750 and np.isfinite(frames).all())
