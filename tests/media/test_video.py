"""Video: which frames are taken, their times, every way of giving a clip, and what is refused."""

import io
import re
import sys

import av
import numpy as np
import pytest
from hypothesis import given, settings
from media_fuzz import mutated, outcome
from PIL import Image

from gemma4_jax.errors import MediaError
from gemma4_jax.media import prepare_image, prepare_video, video


def frames(count, height=30, width=40):
    return [np.full((height, width, 3), 10 * i % 256, np.uint8) for i in range(count)]


def animated(form, count=6, duration=250):
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in frames(count)]
    options = {"lossless": True} if form == "WEBP" else {}
    first.save(buffer, form, save_all=True, append_images=rest, duration=duration, loop=0, **options)
    return buffer.getvalue()


def mp4(path, count=25, rate=10, size=(96, 64)):
    with av.open(path if isinstance(path, io.BytesIO) else str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), i * 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_frames_are_spread_evenly():
    assert video.sample_indices(100, 24, 32, None) == [i * 100 // 32 for i in range(32)]
    assert video.sample_indices(100, 25, 32, 2) == [i * 100 // 8 for i in range(8)]
    assert video.sample_indices(3, 24, 32, 0.1) == [0]


def test_short_clip_uses_what_it_has_and_says_so(caplog):
    clip = prepare_video(frames(3))
    assert clip.patches.shape == (3, 63, 6912)
    assert "has 3 frames; 32 were asked for" in caplog.text


def test_a_frame_is_an_image_with_a_smaller_budget():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5, 50, 70, 3), dtype=np.uint8)
    clip = prepare_video(noise, num_frames=5)
    for frame, patches in zip(noise, clip.patches, strict=True):
        image = prepare_image(frame, 70)
        np.testing.assert_array_equal(patches, image.patches)
        np.testing.assert_array_equal(clip.positions, image.positions)


def test_times():
    assert prepare_video(frames(100), num_frames=4).seconds == (0, 1, 2, 3)  # unknown rate: 24
    assert prepare_video((frames(100), 2.0), num_frames=4).seconds == (0, 12, 25, 37)
    assert prepare_video(frames(100), num_frames=4, source_fps=0.5).seconds == (0, 50, 100, 150)
    assert video.timestamp(0) == "00:00"
    assert video.timestamp(61) == "01:01"
    assert video.timestamp(6000) == "100:00"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations(form, tmp_path):
    data = animated(form)
    (tmp_path / "x").write_bytes(data)
    want = prepare_video((frames(6), 4.0), num_frames=6)
    for source in (data, tmp_path / "x"):
        clip = prepare_video(source, num_frames=6)
        assert clip.seconds == want.seconds == (0, 0, 0, 0, 1, 1)
        np.testing.assert_allclose(clip.patches, want.patches, atol=1 / 255 + 1e-6)
    np.testing.assert_array_equal(prepare_video(data, num_frames=2).patches, clip.patches[[0, 3]])


def test_still_image_is_a_clip_of_one_frame():
    buffer = io.BytesIO()
    Image.fromarray(frames(1)[0]).save(buffer, "PNG")
    assert prepare_video(buffer.getvalue(), num_frames=1).patches.shape == (1, 63, 6912)


def test_container_file(tmp_path):
    path = mp4(tmp_path / "x.mp4")
    clip = prepare_video(path, num_frames=5)
    assert clip.seconds == (0, 0, 1, 1, 2)
    np.testing.assert_allclose(clip.patches[:, 0, 0] * 255, [0, 50, 100, 150, 200], atol=3)
    again = prepare_video(path.read_bytes(), fps=2)
    np.testing.assert_array_equal(again.patches, clip.patches)


@pytest.mark.parametrize("cut", [3, 100, 1600])
def test_broken_container_is_named(tmp_path, cut):
    data = mp4(tmp_path / "x.mp4").read_bytes()[:cut]
    (tmp_path / "broken.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=r"broken.mp4' cannot be decoded"):
        prepare_video(tmp_path / "broken.mp4")


def test_without_pyav_the_extra_is_named(monkeypatch, tmp_path):
    path = mp4(tmp_path / "x.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"x.mp4' is not an animated image; .* gemma4_jax\[video\]"):
        prepare_video(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "is empty: 0 frames"),
        (b"", "<0 bytes> is empty"),
        ("/nowhere/x.mp4", "'/nowhere/x.mp4' is not a file"),
        ([np.zeros((5, 5, 3), np.uint8), np.zeros((5, 6, 3), np.uint8)], "frame 1 is .* a clip has one size"),
        (np.zeros((5, 5)), "is not a video"),
        ((frames(2), -1.0), "-1.0 frames a second"),
        ([b"nonsense"], "cannot be decoded as an image"),
    ],
)
def test_refused(source, message):
    with pytest.raises(MediaError, match=message):
        prepare_video(source, num_frames=2)


def test_too_many_frames(monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 5)
    with pytest.raises(MediaError, match="has 6 frames; the limit is 5"):
        prepare_video(animated("GIF"))


def mp4_bytes():
    buffer = io.BytesIO()
    mp4(buffer, count=4, size=(32, 32))
    return buffer.getvalue()


FILES = {form: animated(form, 3) for form in ("GIF", "WEBP")} | {"MP4": mp4_bytes()}


def test_a_stream_without_a_codec():
    """A file that ends where its stream has said that it is a video, but not yet of which kind."""
    file = FILES["MP4"]
    with pytest.raises(MediaError, match="names no codec that is known"):
        prepare_video(file[: file.index(b"vide") + 4], num_frames=3)


@settings(max_examples=90, deadline=None)
@given(mutated(FILES))
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_animations_give_frames_or_a_named_error(file):
    clip, error = outcome(prepare_video, file, num_frames=3)
    assert error is None or re.match(r"video <\d+ bytes>", error)
    assert clip is None or (1 <= len(clip.patches) <= 3 and np.isfinite(clip.patches).all())
