"""GGUF files: every value read back with the package, and llama.cpp's own greedy tokens."""

import dataclasses

import gguf
import numpy as np
import peers
import pytest
import soundfile
from llama_cpp import ask
from PIL import Image
from safetensors.numpy import load_file

import gemma4_jax as g4
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.text.tokenizer import train_tokenizer

VOCAB = 512
LAST = "model.language_model.layers.5."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    models = {
        "target": peers.target(vocab_size=VOCAB),
        "drafter": peers.drafter(vocab_size=VOCAB, intermediate_size=64),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, VOCAB).save(folder / "target")
    (folder / "target" / "chat_template.jinja").write_text("{{ messages }}")
    return folder, models["target"]


@pytest.fixture(scope="module")
def bundle(source):
    return g4.load(source[0] / "target", drafter=source[0] / "drafter", dtype="float32")


def fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_0"])
def test_values_read_back(source, bundle, tmp_path, dtype):
    # The media parts of this size do not fill quantisation blocks.
    whole = dtype in ("float32", "float16", "bfloat16")
    parts = bundle.config if whole else dataclasses.replace(bundle.config, vision=None, audio=None)
    model = bundle.model if whole else g4.bundle.Network(parts).merge(g4.bundle.bundle_weights(bundle))[0]
    g4.save(dataclasses.replace(bundle, config=parts, model=model), tmp_path / "out", format="gguf", dtype=dtype)
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(dtype, dtype)
    names = {p.name for p in (tmp_path / "out").iterdir()} - {"README.md"}
    assert names == {f"model-{short}.gguf", f"drafter-{short}.gguf"} | ({f"mmproj-{short}.gguf"} if whole else set())
    original = load_file(source[0] / "target" / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "out" / f"model-{short}.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 1 + sum("language_model" in name for name in original)
    for name, published in {
        "token_embd.weight": "model.language_model.embed_tokens.weight",
        "blk.5.attn_k.weight": f"{LAST}self_attn.k_proj.weight",
        "blk.5.ffn_down.weight": f"{LAST}mlp.down_proj.weight",
        "blk.5.post_ffw_norm.weight": f"{LAST}post_feedforward_layernorm.weight",
        "blk.5.layer_output_scale.weight": f"{LAST}layer_scalar",
    }.items():
        expected, tensor = original[published], found[name]
        kind = gguf.GGMLQuantizationType[short.upper()] if expected.ndim == 2 else gguf.GGMLQuantizationType.F32
        assert tensor.tensor_type == kind
        values = gguf.dequantize(tensor.data, kind)
        np.testing.assert_array_equal(values, gguf.dequantize(gguf.quantize(expected, kind), kind))
        tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2, "q8_0": 2e-2, "q4_0": 0.4}[dtype]
        np.testing.assert_allclose(values, expected, atol=tolerance)
    assert "blk.5.attn_v.weight" not in found
    assert "blk.4.attn_v.weight" in found
    np.testing.assert_array_equal(found["rope_freqs.weight"].data, np.repeat(np.float32([1, 1e30]), [4, 12]))


def test_keys_and_vocabulary(bundle, tmp_path):
    g4.save(bundle, tmp_path / "out", format="gguf")
    keys = fields(gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf"))
    assert keys["general.architecture"] == "gemma4"
    assert keys["gemma4.attention.head_count_kv"] == [2, 2, 1] * 2
    assert keys["gemma4.attention.sliding_window_pattern"] == [True, True, False] * 2
    assert (keys["gemma4.attention.key_length"], keys["gemma4.attention.key_length_swa"]) == (32, 16)
    assert keys["gemma4.embedding_length_per_layer_input"] == 0
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    names, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == VOCAB
    kinds = dict(zip(names, types, strict=True))
    assert [kinds[n] for n in ("<0x41>", "<turn|>", "<|channel>", "the")] == [6, 3, 4, 1]
    drafter = fields(gguf.GGUFReader(tmp_path / "out" / "drafter-f32.gguf"))
    assert drafter["general.architecture"] == "gemma4-assistant"
    assert drafter["gemma4-assistant.embedding_length_out"] == 64
    assert drafter["gemma4-assistant.nextn_predict_layers"] == 2


def test_media_projections(source, bundle, tmp_path):
    """Patch columns move from (row, column, channel) to (channel, row, column), weights and the first norm alike."""
    g4.save(bundle, tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "mmproj-f32.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    original = load_file(source[0] / "target" / "model.safetensors")
    side = 6
    order = [
        row * side * 3 + column * 3 + channel for channel in range(3) for row in range(side) for column in range(side)
    ]
    part = "model.vision_embedder."
    np.testing.assert_array_equal(found["v.patch_embd.weight"], original[f"{part}patch_dense.weight"][:, order])
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(found[f"v.patch_norm.1.{name}"], original[f"{part}patch_ln1.{name}"][order])
        np.testing.assert_array_equal(found[f"v.patch_norm.3.{name}"], original[f"{part}pos_norm.{name}"])
    table = original[f"{part}pos_embedding"]
    np.testing.assert_array_equal(found["v.position_embd.weight"], np.stack([table[:, 0], table[:, 1]]))
    for name, own in (("mm", "vision"), ("mm.a", "audio")):
        projection = original[f"model.embed_{own}.embedding_projection.weight"]
        np.testing.assert_array_equal(found[f"{name}.input_projection.weight"], projection)
    keys = fields(reader)
    assert keys["clip.vision.projector_type"] == "gemma4uv"
    assert keys["clip.audio.projector_type"] == "gemma4ua"
    assert keys["clip.vision.patch_size"] == 2


def banned(bundle):
    """The client's ignore_eos bans every end-of-generation id."""
    return [bundle.tokenizer.token_id(name) for name in ("<eos>", "<turn|>", "<|tool_response>")]


def test_llama_cpp_writes_the_same_tokens(source, bundle, tmp_path):
    """F32, greedy, 40 tokens after prompts below and past the window, with and without the drafter."""
    g4.save(bundle, tmp_path / "out", format="gguf")
    rng = np.random.default_rng(0)
    prompts = [[2, *rng.integers(290, VOCAB, n).tolist()] for n in (4, 13, 40)]
    expected = [peers.greedy(source[1], prompt, 40, suppress_tokens=banned(bundle)) for prompt in prompts]
    plain = ask(tmp_path / "out", prompts, count=40, context=128)
    assert [answer["tokens"] for answer in plain] == expected
    drafter = str(tmp_path / "out" / "drafter-f32.gguf")
    drafted = ask(tmp_path / "out", prompts, count=40, context=128, drafter=drafter, draft_tokens=3)
    assert [answer["tokens"] for answer in drafted] == expected
    assert all(answer["timings"]["draft_n"] > 0 for answer in drafted)


def test_llama_cpp_sees_and_hears_the_same(tmp_path):
    """One image (256 patches, no resizing on either side) and one sound (50 frames)."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, VOCAB)
    names = {"image": "<|image|>", "audio": "<|audio|>", "boi": "<|image>", "eoi": "<image|>", "boa": "<|audio>"}
    ids = {f"{part}_token_id": tokenizer.token_id(name) for part, name in names.items()}
    ids["eoa_token_index"] = tokenizer.token_id("<audio|>")
    vision = {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 64}
    config = peers.transformers.Gemma4UnifiedConfig(
        text_config=peers.text_config(vocab_size=VOCAB, sliding_window=512, max_position_embeddings=1024),
        vision_config=peers.transformers.Gemma4UnifiedVisionConfig(**vision),
        audio_config=peers.transformers.Gemma4UnifiedAudioConfig(),
        **ids,
    )
    model = peers.randomize(peers.transformers.Gemma4UnifiedForConditionalGeneration(config), 0)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save(tmp_path / "source")
    bundle = g4.load(tmp_path / "source", dtype="float32")
    g4.save(bundle, tmp_path / "out", format="gguf")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    image, sound = tmp_path / "a.png", tmp_path / "a.wav"
    Image.fromarray(pixels).resize((768, 768), Image.Resampling.BILINEAR).save(image)
    seconds = np.arange(32_000) / 16_000
    soundfile.write(sound, 0.5 * np.sin(2 * np.pi * (300 + 200 * seconds) * seconds), 16_000, "PCM_16")
    c, text = bundle.config, "the lazy fox"
    tail = tokenizer.encode(text, bos=False)
    media = {
        image: ("images", [2, c.boi_token_id, *[c.image_token_id] * 256, c.eoi_token_id, *tail]),
        sound: ("audio", [2, c.boa_token_id, *[c.audio_token_id] * 50, c.eoa_token_id, *tail]),
    }
    expected = []
    for file, (kind, prompt) in media.items():
        row = [*prompt]
        for _ in range(6):
            scores = np.array(g4.logits(bundle, [row], **{kind: [[file]]})[0, -1])
            scores[banned(bundle)] = -np.inf
            row.append(int(scores.argmax()))
        expected.append(row[len(prompt) :])
    prompts = [{"file": str(file), "text": text} for file in media]
    answers = ask(tmp_path / "out", prompts, count=6, context=1024, mmproj=str(tmp_path / "out" / "mmproj-f32.gguf"))
    assert [answer["tokens"] for answer in answers] == expected
    assert [answer["tokens_evaluated"] for answer in answers] == [len(prompt) for _, prompt in media.values()]


def test_what_a_file_cannot_hold_is_named(bundle, tmp_path):
    def save(changed, **options):
        g4.save(changed, tmp_path / "out", format="gguf", **options)

    with pytest.raises(ConfigError, match="has no tokenizer|this bundle has none"):
        save(dataclasses.replace(bundle, tokenizer=None))
    with pytest.raises(
        ConfigError, match=r"v\.patch_embd\.weight has rows of 108 numbers; q8_0 needs a multiple of 32"
    ):
        save(bundle, dtype="q8_0")
    with pytest.raises(ConfigError, match="no merges"):
        save(dataclasses.replace(bundle, tokenizer=train_tokenizer([], VOCAB)))
    with pytest.raises(ConfigError, match=r"unknown dtype 'q5_k'.*q4_0"):
        save(bundle, dtype="q5_k")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        save(bundle)
