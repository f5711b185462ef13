"""The processor: one bos, expanded placeholders, token types, media in order of position, counts that must agree."""

import dataclasses
import json

import numpy as np
import pytest

from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.media import MediaOptions, Processor, bucket, check_counts, prepare_image, prepare_video, token_types
from gemma4_jax.text.pieces import AUDIO, BOS, IMAGE, TURN, Pieces
from gemma4_jax.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["What is this? 00:01 a b c <|image|>"] * 2, 384)


def ids(name):
    return TOKENIZER.token_id(name)


CONFIG = dataclasses.replace(
    get_preset("tiny"),
    **{"image_token_id": ids("<|image|>"), "audio_token_id": ids("<|audio|>"), "video_token_id": ids("<|video|>")},
    **{"boi_token_id": ids("<|image>"), "eoi_token_id": ids("<image|>")},
    **{"boa_token_id": ids("<|audio>"), "eoa_token_id": ids("<audio|>")},
)
PROCESSOR = Processor(TOKENIZER, CONFIG, MediaOptions(image_budget=70))
RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 256, (30, 90, 3), dtype=np.uint8)
TALL = RNG.integers(0, 256, (90, 30, 3), dtype=np.uint8)
SOUND = RNG.uniform(-1, 1, 1500).astype(np.float32)
CLIP = RNG.integers(0, 256, (3, 20, 40, 3), dtype=np.uint8)


def text(string):
    return TOKENIZER.encode(string, bos=False)


def image_ids(count):
    return [CONFIG.boi_token_id, *[CONFIG.image_token_id] * count, CONFIG.eoi_token_id]


def test_text_alone_has_one_bos_and_controls_stay_text():
    row = PROCESSOR.encode("a <|turn> <|image|> <bos>")
    assert row.tokens.tolist() == TOKENIZER.encode("a <|turn> <|image|> <bos>")
    assert row.tokens.tolist().count(CONFIG.bos_token_id) == 1
    assert not set(row.tokens[1:].tolist()) & TOKENIZER.special_ids
    assert row.tokens.dtype == np.int32
    assert not row.token_types.any()
    assert row.patches.shape == (0, 6912)
    assert row.audio_frames.shape == (0, 640)


def test_images_between_texts_and_sound():
    row = PROCESSOR.encode("a <|image|> b <|audio|> c <|image|>", images=[WIDE, TALL], audio=[SOUND])
    wide, tall = prepare_image(WIDE, 70), prepare_image(TALL, 70)
    sound = [CONFIG.boa_token_id, *[CONFIG.audio_token_id] * 3, CONFIG.eoa_token_id]
    assert row.tokens.tolist() == [
        CONFIG.bos_token_id, *text("a "), *image_ids(len(wide.patches)), *text(" b "), *sound, *text(" c "),
        *image_ids(len(tall.patches)),
    ]  # fmt: skip
    np.testing.assert_array_equal(row.patches, np.concatenate([wide.patches, tall.patches]))
    np.testing.assert_array_equal(row.patch_positions, np.concatenate([wide.positions, tall.positions]))
    np.testing.assert_array_equal(row.audio_frames.reshape(-1)[:1500], SOUND)
    np.testing.assert_array_equal(row.token_types == 1, row.tokens == CONFIG.image_token_id)
    np.testing.assert_array_equal(row.token_types == 3, row.tokens == CONFIG.audio_token_id)


def test_video_frames_have_their_times():
    row = PROCESSOR.encode("see <|video|>", videos=[(CLIP, 1.5)])
    count = prepare_video(CLIP).patches.shape[1]
    frame = [CONFIG.boi_token_id, *[CONFIG.video_token_id] * count, CONFIG.eoi_token_id]
    assert row.tokens.tolist() == [
        CONFIG.bos_token_id, *text("see 00:00 "), *frame, *text(" 00:00 "), *frame, *text(" 00:01 "), *frame,
    ]  # fmt: skip
    assert set(row.token_types.tolist()) == {0, 2}


def test_image_and_video_patches_in_order_of_position():
    row = PROCESSOR.encode("<|video|><|image|>", images=[TALL], videos=[CLIP])
    clip, tall = prepare_video(CLIP), prepare_image(TALL, 70)
    np.testing.assert_array_equal(row.patches, np.concatenate([*clip.patches, tall.patches]))


def test_media_without_marks_come_first():
    row = PROCESSOR.encode("What is this?", images=[WIDE], audio=[SOUND])
    want = PROCESSOR.encode("\n\n<|image|>\n\n<|audio|>What is this?", images=[WIDE], audio=[SOUND])
    np.testing.assert_array_equal(row.tokens, want.tokens)


def test_pieces_hold_their_own_bos_and_keep_text_apart():
    row = PROCESSOR.encode(Pieces([BOS, TURN, "user\n", "<|turn>", IMAGE, AUDIO]), images=[WIDE], audio=[SOUND])
    assert row.tokens[:2].tolist() == [CONFIG.bos_token_id, ids("<|turn>")]
    assert row.tokens.tolist().count(ids("<|turn>")) == 1


def test_ids_are_taken_as_they_are():
    count = len(prepare_image(WIDE, 70).patches)
    row = PROCESSOR.encode([9, *image_ids(count), 8], images=[WIDE])
    assert row.tokens.tolist() == [9, *image_ids(count), 8]
    with pytest.raises(MediaError, match=f"{count - 1} image soft tokens but the image inputs fill {count}"):
        PROCESSOR.encode([9, *image_ids(count - 1), 8], images=[WIDE])


@pytest.mark.parametrize(
    ("prompt", "media", "message"),
    [
        ("<|image|>", {"images": [WIDE, TALL]}, "1 image placeholders but 2 image inputs"),
        ("<|image|><|image|>", {"images": [WIDE]}, "2 image placeholders but 1 image inputs"),
        ("a", {"images": [WIDE, b"x"]}, "image 1: <1 bytes> cannot be decoded"),
        ("a", {"audio": [np.zeros(0)]}, r"audio 0: audio <array \(0,\) float64> is empty"),
        ("a", {"videos": [[]]}, "video 0: .* is empty"),
        ([CONFIG.audio_token_id], {}, "1 audio soft tokens but the audio inputs fill 0"),
    ],
)
def test_row_is_named(prompt, media, message):
    given = {kind: [None, sources] for kind, sources in media.items()}
    with pytest.raises(MediaError, match=f"^row 1: {message}"):
        PROCESSOR(["fine", prompt], **given)


def test_ids_are_a_flat_list_of_whole_numbers():
    for prompt in ([2.5, 3.0], [[2, 3], [4, 5]]):
        with pytest.raises(PromptError, match="row 1: a prompt is a string or a flat list of ids, not"):
            PROCESSOR(["a", prompt], images=[None, None])


def test_shape_of_the_media_argument():
    assert PROCESSOR(["a"], images=([WIDE] for _ in range(1))).media is not None
    with pytest.raises(MediaError, match="images has 1 rows but there are 2 prompts"):
        PROCESSOR(["a", "b"], images=[[WIDE]])
    with pytest.raises(MediaError, match="row 1: images is ndarray; each row takes a list of sources"):
        PROCESSOR(["a", "b"], images=[None, WIDE])


def test_model_without_media_input():
    blind = Processor(TOKENIZER, dataclasses.replace(CONFIG, vision=None, audio=None))
    assert blind.encode("a").patches.shape == (0, 0)
    with pytest.raises(MediaError, match="image 0 given, but the model has no image input"):
        blind.encode("a", images=[WIDE])


def test_position_table_too_small():
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, mm_posemb_size=4))
    with pytest.raises(MediaError, match="patch position 13 is outside the model's position table of 4"):
        Processor(TOKENIZER, config, MediaOptions(image_budget=70)).encode("a", images=[WIDE])


def test_batch_of_unlike_rows():
    prompts = ("a",), ("<|image|>", [WIDE]), ("<|image|> <|image|>", [WIDE, TALL]), ("<|audio|>", (), [SOUND])
    rows = [PROCESSOR.encode(*prompt) for prompt in prompts]
    batch = PROCESSOR.batch(rows)
    assert batch.lengths.tolist() == [len(row.tokens) for row in rows]
    counts = [len(row.patches) for row in rows]
    assert batch.media.patches.shape[:2] == (4, bucket(max(counts)))
    assert batch.media.audio_frames.shape == (4, 64, 640)
    media = batch.media.patches, batch.media.patch_positions
    for row, tokens, types, patches, positions in zip(rows, batch.tokens, batch.token_types, *media, strict=True):
        n, p = len(row.tokens), len(row.patches)
        np.testing.assert_array_equal(tokens[:n], row.tokens)
        assert not tokens[n:].any()
        assert not types[n:].any()
        np.testing.assert_array_equal(patches[:p], row.patches)
        assert not patches[p:].any()
        assert (positions[p:] == -1).all()
        assert (positions[:p] >= 0).all()
    check_counts(CONFIG, batch.tokens, batch.media)
    assert PROCESSOR.batch(rows[:1]).media is None
    with pytest.raises(PromptError, match="a row has 2 tokens but the batch is 1 long"):
        PROCESSOR.batch(rows[:1], length=1)


def test_counts_are_checked_before_a_compiled_function():
    batch = PROCESSOR(["a", "<|image|>"], images=[None, [WIDE]])
    tokens = batch.tokens.copy()
    tokens[1, 2] = 5
    with pytest.raises(MediaError, match="row 1 has 55 image and video soft tokens but 56 patches"):
        check_counts(CONFIG, tokens, batch.media)
    with pytest.raises(MediaError, match="row 1 has 56 image and video soft tokens but 0 patches"):
        check_counts(CONFIG, batch.tokens, None)
    frames = PROCESSOR(["<|audio|>"], audio=[[SOUND]]).media
    with pytest.raises(MediaError, match="row 0 has 65 audio soft tokens but 64 audio frames"):
        check_counts(CONFIG, np.full((1, 65), CONFIG.audio_token_id), frames)


def test_token_types():
    tokens = np.array([[5, CONFIG.image_token_id, CONFIG.video_token_id, CONFIG.audio_token_id, CONFIG.boi_token_id]])
    assert token_types(CONFIG, tokens).tolist() == [[0, 1, 2, 3, 0]]


def test_buckets_are_few_and_close():
    sizes = sorted({bucket(count) for count in range(1, 5000)})
    assert len(sizes) < 32
    assert bucket(0) == 0
    for count in range(1, 5000):
        assert count <= bucket(count) <= max(64, 1.25 * count)


def test_options_of_a_folder(tmp_path):
    assert MediaOptions.from_folder(tmp_path) == MediaOptions()
    path = tmp_path / "processor_config.json"
    stored = {"image_processor": {"max_soft_tokens": 560}, "video_processor": {"num_frames": 8}, "audio_seq_length": 9}
    path.write_text(json.dumps(stored))
    assert MediaOptions.from_folder(tmp_path) == MediaOptions(image_budget=560, video_frames=8, max_audio_tokens=9)
    path.write_text(MediaOptions(video_budget=140, max_audio_tokens=3).to_json())
    assert MediaOptions.from_folder(tmp_path) == MediaOptions(video_budget=140, max_audio_tokens=3)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"processor_config.json is not JSON"):
        MediaOptions.from_folder(tmp_path)
    with pytest.raises(ConfigError, match="image_budget is 100; choices: 70, 140, 280, 560, 1120"):
        MediaOptions(image_budget=100)
