"""Vision embedder against transformers, and the placing of media rows by position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

from gemma4_jax.config import VisionConfig, get_preset
from gemma4_jax.model.decoder import Gemma4
from gemma4_jax.model.vision import MediaInputs, VisionEmbedder, place_rows

CONFIG = get_preset(
    "tiny",
    num_hidden_layers=2,
    layer_types=("sliding_attention", "full_attention"),
    vision=dataclasses.asdict(VisionConfig(patch_size=4, pooling_kernel_size=2, mm_embed_dim=48, mm_posemb_size=20)),
    audio={"audio_embed_dim": 16},
    image_token_id=500,
    video_token_id=501,
    audio_token_id=502,
)
X = CONFIG.vision.patch_dim  # 192
RNG = np.random.default_rng(0)


def random_state(module, seed=0, scale=0.3):
    """Weights away from their initial values: fresh norms and zero tables hide faults."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    noisy = jax.tree.map(lambda w: (w + scale * rng.standard_normal(w.shape)).astype(w.dtype), state)
    nnx.update(module, noisy)
    return module


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    vision = Gemma4UnifiedVisionConfig(patch_size=4, pooling_kernel_size=2, mm_embed_dim=48, mm_posemb_size=20,
                                       output_proj_dims=48)  # fmt: skip
    module = Gemma4UnifiedVisionEmbedder(vision, Gemma4UnifiedTextConfig(hidden_size=64))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def load(peer, module):
    tensors = {name: jnp.asarray(value.detach().numpy()) for name, value in peer.named_parameters()}
    for name in ("patch_ln1", "patch_dense", "patch_ln2", "pos_norm"):
        part = getattr(module, name)
        part.weight[...], part.bias[...] = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")
    module.pos_embedding[...] = tensors.pop("pos_embedding")
    module.embedding_projection.weight[...] = tensors.pop("multimodal_embedder.embedding_projection.weight")
    assert not tensors
    return module


def test_parity_with_padding_patches(peer):
    module = load(peer, VisionEmbedder(CONFIG, rngs=nnx.Rngs(0)))
    patches = RNG.random((2, 6, X), dtype=np.float32)
    positions = np.array([[[0, 0], [19, 0], [0, 19], [3, 7], [-1, -1], [-1, -1]], [[5, 5]] * 6], np.int32)
    patches[0, 4:] = 0
    with torch.no_grad():
        want = peer(torch.from_numpy(patches), torch.from_numpy(positions).long()).pooler_output.numpy()
    got = module(jnp.asarray(patches), jnp.asarray(positions))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_real_sizes_have_the_published_shapes():
    config = get_preset("gemma4_12b")
    module = nnx.eval_shape(lambda: VisionEmbedder(config, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): value.shape for path, value in nnx.to_flat_state(nnx.state(module))}
    assert shapes == {
        "patch_ln1.weight": (6912,), "patch_ln1.bias": (6912,), "patch_dense.weight": (3840, 6912),
        "patch_dense.bias": (3840,), "patch_ln2.weight": (3840,), "patch_ln2.bias": (3840,),
        "pos_embedding": (1120, 2, 3840), "pos_norm.weight": (3840,), "pos_norm.bias": (3840,),
        "embedding_projection.weight": (3840, 3840),
    }  # fmt: skip
    out = nnx.eval_shape(lambda m, *a: m(*a), module, jnp.zeros((2, 280, 6912)), jnp.zeros((2, 280, 2), jnp.int32))
    assert (out.shape, out.dtype) == ((2, 280, 3840), jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkerboard_is_finite_in_half_precision(dtype):
    config = dataclasses.replace(
        CONFIG, vision=VisionConfig(mm_embed_dim=48, mm_posemb_size=20), dtype=dtype, param_dtype=dtype
    )
    module = VisionEmbedder(config, rngs=nnx.Rngs(0))
    module.patch_dense.weight[...] = jnp.full((48, 6912), 60.0, dtype)  # the plain sum of 6912 products passes 65504
    board = (np.indices((48, 48)).sum(0) % 2).astype(np.float32)
    patches = jnp.asarray(np.repeat(board.reshape(-1), 3).reshape(1, -1))
    for pixels in (patches, jnp.zeros_like(patches), jnp.ones_like(patches)):
        out = module(pixels, jnp.zeros((1, 2), jnp.int32))
        assert out.dtype == jnp.dtype(dtype)
        assert bool(jnp.isfinite(out).all())


def test_rows_go_to_their_placeholders_in_order():
    rng = np.random.default_rng(1)
    embeddings, rows = rng.random((3, 7, 4)), rng.random((3, 5, 4))
    is_soft = np.array([[0, 1, 1, 0, 1, 0, 0], [0] * 7, [1, 1, 1, 1, 1, 0, 0]], bool)
    want = embeddings.copy()
    for b in range(3):
        want[b, is_soft[b]] = rows[b, : is_soft[b].sum()]
    got = place_rows(jnp.asarray(embeddings), jnp.asarray(is_soft), jnp.asarray(rows))
    np.testing.assert_array_equal(got, want.astype(np.float32))


# text / one image / two images / sound / image and video and sound
PROMPTS = [
    [2, 7, 8, 9],
    [2, 7, 500, 500, 500, 9],
    [2, 500, 500, 8, 500, 9, 10],
    [2, 7, 502, 502, 8],
    [2, 502, 7, 500, 500, 8, 501, 501, 9],
]
PATCHES = [RNG.random((sum(t in (500, 501) for t in p), X), dtype=np.float32) for p in PROMPTS]
POSITIONS = [RNG.integers(0, 20, (len(p), 2)).astype(np.int32) for p in PATCHES]
FRAMES = [RNG.standard_normal((p.count(502), 16)).astype(np.float32) for p in PROMPTS]


def batch(rows, length=12, patch_count=8, frame_count=4):
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    patches, frames = (
        np.zeros((len(rows), patch_count, X), np.float32),
        np.zeros((len(rows), frame_count, 16), np.float32),
    )
    positions = np.full((len(rows), patch_count, 2), -1, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(PROMPTS[row])], segments[b, : len(PROMPTS[row])] = PROMPTS[row], 1
        patches[b, : len(PATCHES[row])], positions[b, : len(PATCHES[row])] = PATCHES[row], POSITIONS[row]
        frames[b, : len(FRAMES[row])] = FRAMES[row]
    return tokens, segments, MediaInputs(patches, positions, frames)


def types(tokens):
    return np.select([tokens == 500, tokens == 501, tokens == 502], [1, 2, 3], 0).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return random_state(Gemma4(CONFIG, rngs=nnx.Rngs(0)), scale=0.1)


@nnx.jit
def run(model, tokens, segments, token_types, media, positions=None):
    return model(tokens, positions=positions, segment_ids=segments, token_types=token_types, media=media).hidden


def single(model, row):
    """Hidden rows of one prompt run alone."""
    tokens, segments, media = batch([row])
    return run(model, tokens, segments, types(tokens), media)[0, : len(PROMPTS[row])]


def test_unlike_rows_in_one_batch_equal_single_rows(model):
    tokens, segments, media = batch(range(5))
    together = run(model, tokens, segments, types(tokens), media)
    for b in range(5):
        np.testing.assert_allclose(together[b, : len(PROMPTS[b])], single(model, b), atol=1e-5)
    swapped = [4, 1, 2, 3, 0]
    tokens, segments, media = batch(swapped)
    np.testing.assert_allclose(
        run(model, tokens, segments, types(tokens), media), together[jnp.asarray(swapped)], atol=1e-5
    )


def test_media_are_looked_at_and_padding_is_not(model):
    tokens, segments, media = batch(range(5))
    before = run(model, tokens, segments, types(tokens), media)
    blind = run(model, tokens, segments, types(tokens), jax.tree.map(jnp.zeros_like, media))
    changed = np.abs(before - blind).max(axis=(1, 2))
    assert changed[0] == 0
    assert (changed[1:] > 1e-3).all()
    noisy = MediaInputs(*[np.array(part) for part in media])
    for b in range(5):
        noisy.patches[b, len(PATCHES[b]) :] = 9
        noisy.audio_frames[b, len(FRAMES[b]) :] = 9
    np.testing.assert_array_equal(run(model, tokens, segments, types(tokens), noisy), before)


def test_packed_examples_equal_separate_ones(model):
    order = [1, 3, 4, 0]  # an image right at the end of an example, then one that begins with another's sound
    rows = [PROMPTS[b] for b in order]
    tokens = np.concatenate(rows)[None].astype(np.int32)
    segments = np.concatenate([np.full(len(row), 1 + i) for i, row in enumerate(rows)])[None].astype(np.int32)
    positions = np.concatenate([np.arange(len(row)) for row in rows])[None].astype(np.int32)
    media = MediaInputs(*(np.concatenate([part[b] for b in order])[None] for part in (PATCHES, POSITIONS, FRAMES)))
    packed = run(model, tokens, segments, types(tokens), media, positions)[0]
    start = 0
    for b, row in zip(order, rows, strict=True):
        one, _, alone = batch([b], len(row), max(len(PATCHES[b]), 1), max(len(FRAMES[b]), 1))
        np.testing.assert_allclose(
            packed[start : start + len(row)], run(model, one, None, types(one), alone)[0], atol=1e-5
        )
        start += len(row)


def test_images_that_touch_in_different_examples_do_not_see_each_other(model):
    tokens = np.array([[2, 500, 500, 500, 500, 9]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
    media = MediaInputs(RNG.random((1, 4, X), dtype=np.float32), np.zeros((1, 4, 2), np.int32))
    changed = MediaInputs(media.patches.copy(), media.patch_positions)
    changed.patches[0, 2:] = RNG.random((2, X), dtype=np.float32)  # a mere shift would vanish in the first norm
    before, after = (run(model, tokens, segments, types(tokens), m) for m in (media, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:].max(axis=-1) > 1e-3).all()


def test_media_rows_are_not_scaled_and_placeholders_are_pad(model):
    tokens, _, media = batch([4])
    embedded = model.embed(jnp.asarray(tokens), media)
    rows = model.vision(media.patches, media.patch_positions)
    np.testing.assert_allclose(embedded[0, 3:5], rows[0, :2], rtol=1e-6)
    np.testing.assert_allclose(embedded[0, 6:8], rows[0, 2:4], rtol=1e-6)
    np.testing.assert_allclose(embedded[0, 1], model.audio(media.audio_frames)[0, 0], rtol=1e-6)
    only_sound = model.embed(jnp.asarray(tokens), MediaInputs(audio_frames=media.audio_frames))
    pad = model.embed(jnp.zeros((1, 1), jnp.int32))[0, 0]
    np.testing.assert_array_equal(only_sound[0, 3], pad)


def test_one_compilation_for_all_counts_of_a_bucket(model):
    compiled = jax.jit(lambda tokens, media: model.embed(tokens, media))
    for rows in ([0, 1], [2, 3], [4, 4]):
        tokens, _, media = batch(rows)
        compiled(tokens, media)
    assert compiled._cache_size() == 1


def test_gradients_reach_the_embedders(model):
    tokens, _, media = batch([4])

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda m: jnp.square(m.embed(jnp.asarray(tokens), media)).sum())(model)

    for path, value in nnx.to_flat_state(nnx.state(gradients(model), nnx.Param)):
        if path[0] in ("vision", "audio"):
            assert float(jnp.abs(value[...]).max()) > 0, path
