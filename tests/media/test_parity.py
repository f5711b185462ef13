"""Prompts with media: logits and greedy continuations against transformers, through a saved checkpoint folder."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.models.gemma4_unified import (
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

import gemma4_jax as g4
from gemma4_jax.media import MediaOptions, Processor
from gemma4_jax.media.processor import IMAGE_TYPE, VIDEO_TYPE

IMAGE, VIDEO, AUDIO, BEGIN, END = 300, 301, 302, 303, 304
WINDOW = 12
RNG = np.random.default_rng(0)


def peer_config():
    text = dict(
        vocab_size=310, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_global_key_value_heads=1, global_head_dim=32, sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], attention_k_eq_v=True,
        final_logit_softcapping=30.0, rms_norm_eps=1e-6, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=2, eos_token_id=1, use_bidirectional_attention="vision",
    )  # fmt: skip
    vision = dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=48, mm_posemb_size=70, output_proj_dims=48)
    return Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, audio_config=dict(audio_embed_dim=40), image_token_id=IMAGE,
        video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=BEGIN, eoi_token_id=END, boa_token_id=305,
        eoa_token_index=306,
    )  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = peer_config()
    config._attn_implementation = "eager"
    model = Gemma4UnifiedForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_scale" in name:
                continue
            if value.ndim == 1 and "bias" not in name:
                value.copy_(0.5 + torch.rand_like(value))  # norms and layer scalars away from 1
            else:
                value.add_((0.3 if "pos_embedding" in name or "bias" in name else 0.1) * torch.randn_like(value))
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=2, eos_token_id=None, do_sample=False)
    return model


@pytest.fixture(scope="module")
def bundle(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    bundle = g4.load(folder, dtype="float32")
    options = MediaOptions(image_budget=70, video_budget=70, video_frames=2)
    bundle.processor = Processor(None, bundle.config, options)
    return bundle


def image(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


WIDE, TALL = image(20, 90), image(90, 20)  # both fill more than the window of 12
CLIP = np.stack([image(10, 70), image(10, 70)])
SOUND = RNG.uniform(-1, 1, 170).astype(np.float32)  # five frames of 40, the last one half empty


def image_ids(processor, source):
    return [BEGIN, *[IMAGE] * len(processor._image(source).patches), END]


def video_ids(processor, clip):
    count = processor._video(clip).patches.shape[1]
    return [frame for _ in clip for frame in (11, 12, BEGIN, *[VIDEO] * count, END)]


AUDIO_IDS = [305, *[AUDIO] * 5, 306]


def prompts(processor):
    """Token rows with their media: name -> (tokens, images, audio, videos)."""
    wide, tall, clip = image_ids(processor, WIDE), image_ids(processor, TALL), video_ids(processor, CLIP)
    return {
        "text": ([2, 7, 8, 9, 10, 11], [], [], []),
        "one image": ([2, 7, *wide, 8, 9], [WIDE], [], []),
        "two images side by side": ([2, *wide, *tall, 9], [WIDE, TALL], [], []),
        "image, text, image": ([2, *tall, 5, 6, 7, 8, *wide, 9], [TALL, WIDE], [], []),
        "audio": ([2, 7, *AUDIO_IDS, 8], [], [SOUND], []),
        "video": ([2, 7, *clip, 8], [], [], [CLIP]),
        "all": (
            [2, 7, *wide, 8, *AUDIO_IDS, 9, *clip, 10, *tall, *AUDIO_IDS, 11],
            [WIDE, TALL],
            [SOUND, SOUND / 2],
            [CLIP],
        ),
        "image at the very end": ([2, 7, *wide[:-1]], [WIDE], [], []),
    }


NAMES = list(prompts(Processor(None, g4.get_preset(
    "tiny", **{"vision.patch_size": 4, "vision.pooling_kernel_size": 2, "audio.audio_embed_dim": 40}),
    MediaOptions(image_budget=70, video_frames=2))))  # fmt: skip


def peer_inputs(processor, tokens, images, audio, videos):
    """What the peer's processor would hand to its model: media padded one by one, in separate arrays."""
    row = processor.encode(tokens, images, audio, videos)
    inputs = {
        "input_ids": torch.tensor(tokens)[None],
        "mm_token_type_ids": torch.from_numpy(row.token_types).long()[None],
    }

    def padded(parts):
        patches = np.zeros((len(parts), 70, parts[0][0].shape[1]), np.float32)
        positions = np.full((len(parts), 70, 2), -1)
        for i, (patch, position) in enumerate(parts):
            patches[i, : len(patch)], positions[i, : len(patch)] = patch, position
        return torch.from_numpy(patches), torch.from_numpy(positions).long()

    if images:
        inputs["pixel_values"], inputs["image_position_ids"] = padded([processor._image(source) for source in images])
    if videos:
        clips = [processor._video(source) for source in videos]
        frames = [(patches, clip.positions) for clip in clips for patches in clip.patches]
        inputs["pixel_values_videos"], inputs["video_position_ids"] = padded(frames)
        inputs["num_frames_per_video"] = torch.tensor([len(clip.patches) for clip in clips])
    if audio:
        sounds = [processor._audio(source) for source in audio]
        longest = max(map(len, sounds))
        features = np.stack([np.pad(sound, ((0, longest - len(sound)), (0, 0))) for sound in sounds])
        inputs["input_features"] = torch.from_numpy(features)
        inputs["input_features_mask"] = torch.ones(features.shape[:2], dtype=torch.bool)
    return inputs


def peer_logits(peer, inputs):
    """Logits under the masks that the peer means (global layers causal); its bare forward pass builds others."""
    embeddings = torch.zeros((*inputs["input_ids"].shape, 1))
    masks = peer.create_masks_for_generate(
        peer.config, embeddings, torch.ones_like(inputs["input_ids"]), None,
        torch.arange(embeddings.shape[1])[None], mm_token_type_ids=inputs["mm_token_type_ids"],
    )  # fmt: skip
    with torch.no_grad():
        return peer(**{**inputs, "attention_mask": masks}).logits[0].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_logits(peer, bundle, name):
    row = prompts(bundle.processor)[name]
    want = peer_logits(peer, peer_inputs(bundle.processor, *row))
    got = np.asarray(g4.logits(bundle, [row[0]], images=[row[1]], audio=[row[2]], videos=[row[3]]))[0]
    assert np.abs(got - want).max() < 2e-4 * np.ptp(want)
    types = bundle.processor.encode(*row).token_types
    runs = np.split(types, np.flatnonzero(np.diff(types)) + 1)
    assert name in ("text", "audio") or max(len(run) for run in runs if run[0] in (IMAGE_TYPE, VIDEO_TYPE)) > WINDOW


def test_batch_of_unlike_rows(peer, bundle):
    rows = list(prompts(bundle.processor).values())
    got = np.asarray(g4.logits(bundle, *[list(column) for column in zip(*rows, strict=True)]))
    for logits, row in zip(got, rows, strict=True):
        want = peer_logits(peer, peer_inputs(bundle.processor, *row))
        assert np.abs(logits[: len(row[0])] - want).max() < 2e-4 * np.ptp(want)


@pytest.fixture(scope="module")
def sampler(bundle):
    return g4.Sampler(bundle, max_length=512, draft_tokens=0, chunk=64)  # the longer prompts take several chunks


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("text", "image at the very end")])
def test_greedy_continuation(peer, bundle, sampler, name):
    row = prompts(bundle.processor)[name]
    # With a static cache the peer makes the masks of its own ``create_masks_for_generate``; with the default cache it
    # falls back to those of the bare forward pass.
    options = {"max_new_tokens": 40, "cache_implementation": "static", "disable_compile": True}
    with torch.no_grad():
        want = peer.generate(**peer_inputs(bundle.processor, *row), **options)[0, len(row[0]) :].tolist()
    given = {"images": [row[1]], "audio": [row[2]], "videos": [row[3]]}
    assert sampler.generate([row[0]], **given, max_new_tokens=40, stop_ids=[]).tokens[0] == want


def test_batch_of_unlike_rows_continues_like_single_ones(bundle):
    rows = list(prompts(bundle.processor).values())
    sampler = g4.Sampler(bundle, max_length=512, draft_tokens=0)
    tokens, *media = (list(column) for column in zip(*rows, strict=True))
    together = sampler.generate(tokens, *media, max_new_tokens=8, stop_ids=[]).tokens
    for row, want in zip(rows[1::3], together[1::3], strict=True):
        alone = sampler.generate([row[0]], [row[1]], [row[2]], [row[3]], max_new_tokens=8, stop_ids=[])
        assert alone.tokens[0] == want


def test_the_bare_forward_pass_of_the_peer_is_another_model(peer, bundle):
    # Why the tests above build masks: if this ever fails, the peer has changed.
    inputs = peer_inputs(bundle.processor, *prompts(bundle.processor)["one image"])
    with torch.no_grad():
        bare = peer(**inputs).logits[0].numpy()
    assert np.abs(bare - peer_logits(peer, inputs)).max() > 1e-2
