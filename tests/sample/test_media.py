"""Generation from prompts with media: chunks, speculation and other rows change nothing."""

import jax
import numpy as np
import pytest
from flax import nnx

import gemma4_jax as g4
from gemma4_jax.errors import MediaError
from gemma4_jax.media import MediaOptions

LAYERS = {
    "num_hidden_layers": 2,
    "layer_types": ("sliding_attention", "full_attention"),
    "vision.patch_size": 2,
    "vision.pooling_kernel_size": 2,
}
RNG = np.random.default_rng(0)
IMAGE, OTHER = (RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((5, 25), (9, 6)))
SOUND = RNG.uniform(-1, 1, 3000).astype(np.float32)
PROMPTS = ["no media", "<|image|> what?", "<|image|> and <|image|>?", "<|audio|>", "<|video|> <|audio|>"]
IMAGES = [None, [IMAGE], [OTHER, IMAGE], None, None]
AUDIO = [None, None, None, [SOUND], [SOUND[:700]]]
VIDEOS = [None, None, None, None, [[OTHER, OTHER[::-1]]]]


@pytest.fixture(scope="module")
def bundle():
    bundle = g4.init("tiny", config_overrides=LAYERS)  # sliding window 8, images of up to 70 tokens
    for module in (bundle.model, bundle.drafter):
        state = nnx.state(module, nnx.Param)
        rng = np.random.default_rng(1)
        nnx.update(module, jax.tree.map(lambda w: w + 0.1 * rng.standard_normal(w.shape).astype(w.dtype), state))  # noqa: B023
    bundle.processor.options = MediaOptions(image_budget=70, video_frames=2)
    return bundle


def generate(bundle, rows=range(5), **options):
    sampler = g4.Sampler(bundle, max_length=512, **options)
    given = {
        "images": [IMAGES[row] for row in rows],
        "audio": [AUDIO[row] for row in rows],
        "videos": [VIDEOS[row] for row in rows],
    }
    return sampler.generate([PROMPTS[row] for row in rows], **given, **settings(rows))


def settings(rows):
    """Sampling with a seed of each row's own: its tokens then depend on every logit, unlike a greedy loop's."""
    return {"temperature": 1.0, "seed": [7 + row for row in rows], "max_new_tokens": 12, "stop_ids": []}


@pytest.fixture(scope="module")
def plain(bundle):
    return generate(bundle, draft_tokens=0).tokens


@pytest.mark.parametrize("chunk", [75, 500])
def test_chunks(bundle, plain, chunk):
    assert generate(bundle, draft_tokens=0, chunk=chunk).tokens == plain


def test_speculation(bundle, plain):
    out = generate(bundle, draft_tokens=3)
    assert out.tokens == plain
    assert out.stats.drafted > 0


@pytest.mark.parametrize("row", [0, 2, 4])
def test_rows_alone(bundle, plain, row):
    assert generate(bundle, [row], draft_tokens=0).tokens == [plain[row]]


def test_media_decide_what_is_said(bundle):
    row = bundle.processor.encode(PROMPTS[1], images=[IMAGE]).tokens
    bright, dark = (g4.logits(bundle, [row], images=[[picture]])[0, -1] for picture in (IMAGE, np.zeros_like(IMAGE)))
    assert np.abs(np.asarray(bright) - np.asarray(dark)).max() > 1e-3


def test_count_mismatch_names_the_row(bundle):
    sampler = g4.Sampler(bundle, max_length=512, draft_tokens=0)
    soft = bundle.config.image_token_id
    with pytest.raises(MediaError, match=r"row 1: 1 image soft tokens but the image inputs fill \d+"):
        sampler.generate([[2, 5], [2, soft]], images=[None, [IMAGE]])
    with pytest.raises(MediaError, match="row 0: 2 image placeholders but 1 image inputs"):
        sampler.generate(["<|image|><|image|>"], images=[[IMAGE]])
    with pytest.raises(MediaError, match=r"row 0: audio 0: .* longer than 30 s"):
        sampler.generate(["x"], audio=[[np.zeros(480_001, np.float32)]])


def test_saved_and_loaded(bundle, plain, tmp_path):
    g4.save(bundle, tmp_path / "saved")
    again = g4.load(tmp_path / "saved", dtype=None)
    assert again.processor.options == bundle.processor.options
    assert generate(again, [4], draft_tokens=0).tokens == [plain[4]]
