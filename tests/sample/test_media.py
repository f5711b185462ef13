"""Generation from prompts with media: chunks, speculation and other rows change nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma4_jax as g4
from gemma4_jax.errors import MediaError, PromptError
from gemma4_jax.media import MediaOptions
from gemma4_jax.sample import request

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
    media = {
        "images": [IMAGES[row] for row in rows],
        "audio": [AUDIO[row] for row in rows],
        "videos": [VIDEOS[row] for row in rows],
    }
    return sampler.generate([PROMPTS[row] for row in rows], **media, **sampling(rows))


def sampling(rows):
    """Sampling with a seed of each row's own: its tokens then depend on every logit, unlike a greedy loop's."""
    return {"temperature": 1.0, "seed": [7 + row for row in rows], "max_new_tokens": 12, "stop_ids": []}


@pytest.fixture(scope="module")
def plain(bundle):
    return generate(bundle, draft_tokens=0).tokens


@pytest.mark.parametrize("chunk", [16, 75, 500])  # 16 is less than an image has tokens
def test_chunks(bundle, plain, chunk):
    assert generate(bundle, draft_tokens=0, chunk=chunk).tokens == plain


def test_speculation(bundle, plain):
    out = generate(bundle, draft_tokens=3)
    assert out.tokens == plain
    assert out.stats.drafted > 0


@pytest.fixture(scope="module")
def samplers(bundle):
    return {
        (drafts, chunk): g4.Sampler(bundle, max_length=512, draft_tokens=drafts, chunk=chunk)
        for drafts, chunk in ((0, 75), (3, 75), (3, 500))
    }


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(5)), drafts_and_chunk=st.sampled_from([(0, 75), (3, 75), (3, 500)]))
def test_any_order_of_rows_in_chunks_and_with_drafts(plain, samplers, order, drafts_and_chunk):
    columns = [[column[row] for row in order] for column in (PROMPTS, IMAGES, AUDIO, VIDEOS)]
    out = samplers[drafts_and_chunk].generate(*columns, **sampling(order))
    assert out.tokens == [plain[row] for row in order]


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
    for kind in ("image", "video", "audio"):
        soft = getattr(bundle.config, f"{kind}_token_id")
        with pytest.raises(MediaError, match=f"row 1: 2 {kind} soft tokens but no {kind} inputs"):
            sampler.generate([[2, 5], [2, soft, soft]])
    with pytest.raises(MediaError, match="images has 2 rows but there are 1 prompts"):
        sampler.generate(["x"], images=([IMAGE] for _ in range(2)))
    with pytest.raises(PromptError, match=r"row 0: a prompt is a string or a flat list of ids, not float64"):
        sampler.generate([[2.5, 3]], images=[[]])


def test_ids_of_soft_tokens_are_plain_ids_for_a_model_without_media(bundle):
    rows = [np.asarray([2, bundle.config.image_token_id, bundle.config.audio_token_id])]
    request.check_no_media(dataclasses.replace(bundle.config, vision=None, audio=None), rows)
    with pytest.raises(MediaError, match="row 0: 1 audio soft tokens but no audio inputs"):
        request.check_no_media(dataclasses.replace(bundle.config, vision=None), rows)


def test_saved_and_loaded(bundle, plain, tmp_path):
    g4.save(bundle, tmp_path / "saved")
    again = g4.load(tmp_path / "saved", dtype=None)
    assert again.processor.options == bundle.processor.options
    assert generate(again, [4], draft_tokens=0).tokens == [plain[4]]
