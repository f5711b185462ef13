"""Training rows with media: what is learnt, media in the order of soft tokens, packing, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from flax import nnx
from PIL import Image

import gemma4_jax as g4
from gemma4_jax.bundle import with_token_ids
from gemma4_jax.config import get_preset
from gemma4_jax.data import heldout_conversations, make_dataset
from gemma4_jax.data.media_rows import MediaChatEncoder, make_processor
from gemma4_jax.data.options import DataOptions
from gemma4_jax.data.tasks import DIGIT_NAMES, TONES, VARIANTS, Digits, Dtmf
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.media import check_counts, stack_media
from gemma4_jax.text.chat import media_sources
from gemma4_jax.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["What is it? Which digit? user model thought one two three"] * 2, 384)
CONFIG = with_token_ids(get_preset("tiny", **{"vision.patch_size": 2, "vision.pooling_kernel_size": 2}), TOKENIZER)
SOFT = [CONFIG.image_token_id, CONFIG.audio_token_id, CONFIG.video_token_id]
MARKS = [CONFIG.boi_token_id, CONFIG.eoi_token_id, CONFIG.boa_token_id, CONFIG.eoa_token_id]


def dataset(folder, source, split="train", config=CONFIG, **fields):
    options = {"source": source, "format": "chat", "seq_len": 400, "batch_size": 2, "image_budget": 70} | fields
    processor = make_processor(DataOptions.of(options), TOKENIZER, config)
    return make_dataset(options, TOKENIZER, split, folder, processor=processor)


def first_batch(data):
    iterator = iter(data)
    batch = next(iterator)
    iterator.close()
    return batch


@pytest.fixture
def folder(tmp_path):
    """Conversations with none, one and two images, sound and video, their files beside them."""
    for name, shade in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (20, 30), (shade,) * 3).save(tmp_path / name)
    frames = [Image.new("RGB", (20, 20), (shade,) * 3) for shade in (40, 80)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=500)

    soundfile.write(tmp_path / "d.wav", np.full(1000, 0.25), 16_000)
    image = lambda name: {"type": "image", "image": name}  # noqa: E731
    contents = [
        "one",
        [image("a.png"), {"type": "text", "text": "What is it?"}],
        [image("b.png"), {"type": "text", "text": "two"}, image("a.png")],
        [{"type": "audio", "audio": "d.wav"}],
        [{"type": "video", "video": "c.gif"}, {"type": "audio", "audio": "d.wav"}, image("b.png")],
    ]
    lines = [
        {"messages": [{"role": "user", "content": c}, {"role": "model", "content": DIGIT_NAMES[i]}]}
        for i, c in enumerate(contents)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line) for line in [*lines, lines[0]]))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_a_jsonl_file(folder, workers):
    data = dataset(folder, f"jsonl:{folder}/x.jsonl", workers=workers, heldout_source=f"text:{folder}/x.jsonl")
    assert data.media_kinds == {"vision", "audio"}
    batch = first_batch(data)
    tokens, media = batch["tokens"], batch["media"]
    check_counts(CONFIG, tokens, media)
    answers = {TOKENIZER.decode(tokens[b][batch["loss_mask"][b] & (batch["segment_ids"][b] == s)])
               for b in range(2) for s in range(1, batch["segment_ids"][b].max() + 1)}  # fmt: skip
    assert answers <= {f"{name}<turn|>" for name in DIGIT_NAMES[:5]}
    assert not np.isin(tokens[batch["loss_mask"]], [*SOFT, *MARKS, CONFIG.pad_token_id]).any()
    assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
    # Every soft token's patch has the grey of the file that its example names.
    for b in range(2):
        shades = media.patches[b, media.patch_positions[b, :, 0] >= 0].mean(axis=1) * 255
        kinds = tokens[b][np.isin(tokens[b], [CONFIG.image_token_id, CONFIG.video_token_id])]
        allowed = {CONFIG.image_token_id: (10, 200), CONFIG.video_token_id: (40, 80)}
        assert all(min(abs(shade - x) for x in allowed[kind]) < 2 for shade, kind in zip(shades, kinds, strict=True))


def test_one_example_a_row_equals_the_processor(folder):
    source = f"jsonl:{folder}/x.jsonl"
    data = dataset(folder, source, seq_len=320, long_examples="error", heldout_source="digits")
    processor = make_processor(DataOptions.of({"format": "chat", "image_budget": 70}), TOKENIZER, CONFIG)
    want = processor.encode("<|image|>", images=[folder / "a.png"]).patches
    batch = first_batch(data)
    for b in range(2):
        if "What is it?" in TOKENIZER.decode(batch["tokens"][b]):
            found = batch["media"].patches[b]
            assert any(np.array_equal(found[i : i + len(want)], want) for i in range(len(found)))


def test_blind_rows_have_the_same_sizes_and_nothing_in_them(folder):
    options = {"seq_len": 320, "heldout_source": "digits"}
    seeing, blind = (first_batch(dataset(folder, f"jsonl:{folder}/x.jsonl", blind=b, **options)) for b in (False, True))
    for name in ("tokens", "loss_mask", "token_types"):
        np.testing.assert_array_equal(seeing[name], blind[name])
    np.testing.assert_array_equal(seeing["media"].patch_positions, blind["media"].patch_positions)
    for kind in ("patches", "audio_frames"):
        assert getattr(seeing["media"], kind).any()
        assert not getattr(blind["media"], kind).any()


@pytest.mark.parametrize(("line", "kinds"), [(1, {"vision"}), (3, {"audio"}), (4, {"vision", "audio"})])
def test_kinds_of_media(folder, line, kinds):
    (folder / "one.jsonl").write_text((folder / "x.jsonl").read_text().splitlines()[line])
    assert dataset(folder, f"jsonl:{folder}/one.jsonl", heldout_source="digits").media_kinds == kinds


def test_heldout_conversations_have_paths_that_hold(folder):
    data = {"source": "digits", "heldout_source": f"jsonl:{folder}/x.jsonl", "format": "chat"}
    found = heldout_conversations(data, 3)
    assert [len(document["messages"]) for document in found] == [2, 2, 2]
    images = media_sources([*found[1]["messages"], *found[2]["messages"]])["image"]
    assert images == [folder / "a.png", folder / "b.png", folder / "a.png"]
    assert len(heldout_conversations(data)) == 6


def test_packed_rows_give_the_logits_of_separate_conversations(folder):
    """Through the model: every example of a packed row, with its media, as if it stood alone."""
    layers = {"num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "drafter": None}
    config = dataclasses.replace(CONFIG, **layers)
    bundle = g4.init(config, seed=1)
    data = dataset(folder, f"jsonl:{folder}/x.jsonl", config=config, seq_len=640, batch_size=1, heldout_source="digits")
    batch = first_batch(data)
    assert len(data.media_kinds) == 2 and batch["segment_ids"].max() >= 4
    model = nnx.jit(lambda m, b: m.logits(m(
        b["tokens"], positions=b["positions"], segment_ids=b["segment_ids"], token_types=b["token_types"],
        media=b["media"]).hidden))  # fmt: skip
    packed = np.asarray(model(bundle.model, batch))[0]
    processor = make_processor(DataOptions.of({"format": "chat", "image_budget": 70}), TOKENIZER, config)
    encoder = MediaChatEncoder(processor, "messages")
    documents = heldout_conversations(
        {"source": "digits", "heldout_source": f"jsonl:{folder}/x.jsonl", "format": "chat"}
    )
    rows = {row.tokens.tobytes(): row for row, _, _ in (encoder.row(d, "x") for d in documents)}
    for segment in range(1, batch["segment_ids"].max() + 1):
        at = batch["segment_ids"][0] == segment
        row = rows[batch["tokens"][0][at].tobytes()]
        alone = {
            "tokens": np.pad(row.tokens, (0, 640 - len(row.tokens)))[None],
            "token_types": np.pad(row.token_types, (0, 640 - len(row.tokens)))[None],
            "segment_ids": (np.arange(640) < len(row.tokens)).astype(np.int32)[None],
            "positions": np.arange(640, dtype=np.int32)[None],
            "media": stack_media([row], batch["media"].patches.shape[1], batch["media"].audio_frames.shape[1], True),
        }
        np.testing.assert_allclose(np.asarray(model(bundle.model, alone))[0, : at.sum()], packed[at], atol=2e-4)


def test_text_only_conversations_have_no_media(folder):
    (folder / "t.jsonl").write_text((folder / "x.jsonl").read_text().splitlines()[0])
    data = dataset(folder, f"jsonl:{folder}/t.jsonl", heldout_source="digits")
    assert not data.media_kinds
    assert set(first_batch(data)) == {"tokens", "loss_mask", "segment_ids", "positions"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": "no.png"}], r"x.jsonl:1: image 0: '.*no.png' is not a file"),
        ([{"type": "image"}], r"x.jsonl:1: message 0 has a part of type image without a field 'image'"),
        ([{"type": "audio", "audio": "x.jsonl"}], r"x.jsonl:1: audio 0: .* cannot be decoded"),
    ],
)
def test_bad_media_name_the_line(tmp_path, content, message):
    line = {"messages": [{"role": "user", "content": content}, {"role": "model", "content": "x"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, f"jsonl:{tmp_path}/x.jsonl", heldout_source="digits")


def test_examples_with_media_are_not_cut(folder):
    with pytest.raises(DataError, match=r"x.jsonl:\d: a conversation with media has \d+ tokens, data.seq_len is 80"):
        dataset(folder, f"jsonl:{folder}/x.jsonl", seq_len=80, heldout_source="digits")


def test_model_without_media_input(folder):
    blind = with_token_ids(get_preset("tiny", vision=None, audio=None), TOKENIZER)
    with pytest.raises(DataError, match="but the model has no input for them"):
        dataset(folder, f"jsonl:{folder}/x.jsonl", config=blind, heldout_source="digits")
    with pytest.raises(ConfigError, match="image_token_id is 258880, but the tokenizer has 384 entries"):
        dataset(folder, "digits", config=get_preset("tiny"))
    with pytest.raises(ConfigError, match="image_budget is 71; choices: 70, 140"):
        dataset(folder, "digits", image_budget=71)


def test_digits():
    train, heldout = Digits("train"), Digits("heldout")
    assert (len(train), len(heldout)) == (1497 * VARIANTS, 300)
    seen = {train[i]["messages"][0]["content"][0]["image"].tobytes() for i in range(len(train))}
    assert not any(heldout[i]["messages"][0]["content"][0]["image"].tobytes() in seen for i in range(len(heldout)))
    assert {heldout[i]["messages"][1]["content"] for i in range(len(heldout))} == set(DIGIT_NAMES)
    assert train.fingerprint() != heldout.fingerprint()
    image, variant = (train[i]["messages"][0]["content"][0]["image"].astype(int) for i in (7, 7 + 1497))
    assert train[7]["messages"][1] == train[7 + 1497]["messages"][1]
    assert 0 < np.abs(image - variant).mean() < 0.5 * image.mean()


def test_telephone_tones_are_what_the_standard_says():
    source = Dtmf("heldout")
    for index in range(20):
        question, answer = source[index]["messages"]
        sound, rate = question["content"][0]["audio"]
        assert rate == 16_000
        assert np.abs(sound).max() <= 1
        assert decode(sound) == answer["content"]
        assert 4 <= len(answer["content"]) <= 10
    np.testing.assert_array_equal(sound, source[19]["messages"][0]["content"][0]["audio"][0])
    assert Dtmf("train")[0]["messages"][1] != source[0]["messages"][1]


def decode(sound, block=320):
    """The classical receiver: the strongest low and high tone of every 20 ms, while there is sound."""
    time = np.arange(block) / 16_000
    waves = {f: np.exp(-2j * np.pi * f * time) for pair in TONES.values() for f in pair}
    keys, last = [], None
    loudest = max(np.square(sound[i : i + block]).mean() for i in range(0, len(sound) - block, block))
    for start in range(0, len(sound) - block, block // 2):
        part = sound[start : start + block]
        if np.square(part).mean() < 0.25 * loudest:
            last = None
            continue
        power = {f: abs(wave @ part) for f, wave in waves.items()}
        low = max((f for f in power if f < 1000), key=power.get)
        high = max((f for f in power if f > 1000), key=power.get)
        key = next((k for k, pair in TONES.items() if pair == (low, high)), None)
        if last is None and key is not None:
            keys.append(key)
        last = key
    return "".join(keys)
