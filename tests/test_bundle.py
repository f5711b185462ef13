"""The public functions on a bundle: init, save and load, logits and drafts of ragged rows, and what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest

import gemma4_jax as g4
from gemma4_jax.errors import CheckpointError, ConfigError, PromptError
from gemma4_jax.train.sharding import MeshConfig, make_mesh

OVERRIDES = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "vision": None, "audio": None}


@pytest.fixture(scope="module")
def bundle():
    return g4.init("tiny", seed=0, config_overrides=OVERRIDES)


def weights(bundle):
    from gemma4_jax.bundle import bundle_weights

    return bundle_weights(bundle)


def test_init_aligns_tokenizer_and_config(bundle):
    config, tokenizer = bundle.config, bundle.tokenizer
    assert tokenizer.vocab_size == config.vocab_size == 512
    assert config.image_token_id == tokenizer.token_id("<|image|>")
    assert config.stop_token_ids == tuple(tokenizer.token_id(t) for t in ("<eos>", "<turn|>", "<|tool_response>"))
    text = "Grüße, 世界!\n"
    ids = tokenizer.encode(text)
    assert ids[0] == config.bos_token_id
    assert max(ids) < 512
    assert tokenizer.decode(ids, skip_special=True) == text


def test_equal_seeds_give_equal_weights(bundle):
    again, other = (g4.init("tiny", seed=s, config_overrides=OVERRIDES) for s in (0, 1))
    assert again.config == bundle.config
    table = bundle.model.embedder.table[...]
    np.testing.assert_array_equal(again.model.embedder.table[...], table)
    assert np.abs(other.model.embedder.table[...] - table).max() > 0.01


def test_ragged_rows_equal_single_rows(bundle):
    rows = [[2, 5, 7], [2], [2, 9, 9, 4, 300, 12, 40, 41, 42, 43, 44]]
    together = np.asarray(g4.logits(bundle, rows))
    assert together.shape == (3, 11, 512)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    for row, mine in zip(rows, together, strict=True):
        np.testing.assert_allclose(mine[: len(row)], g4.logits(bundle, [row])[0], atol=1e-5)


def test_ragged_drafts_equal_single_rows(bundle):
    rows = [[2, 5], [2, 9, 9, 4, 300, 12, 40, 41, 42, 43, 44, 45], [2, 7, 8]]
    together = g4.draft_logits(bundle, rows, steps=2)
    assert together.shape == (2, 3, 512)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(together[:, i], g4.draft_logits(bundle, [row], steps=2)[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([[1], []], "row 1 has shape"),
        ([[1, 2], [3, 512]], "row 1 has token id 512; the vocabulary has 512 entries"),
        ([[1, -1]], "row 0 has token id -1"),
        ([[1.5]], "row 0 holds float64 values"),
        ([[[1]]], "row 0 has shape"),
    ],
)
def test_bad_rows_are_named(bundle, rows, message):
    with pytest.raises(PromptError, match=message):
        g4.logits(bundle, rows)
    with pytest.raises(PromptError, match=message):
        g4.draft_logits(bundle, rows)


def test_drafting_needs_a_drafter_two_tokens_and_a_step(bundle):
    with pytest.raises(PromptError, match="row 1 has 1 token; drafting needs"):
        g4.draft_logits(bundle, [[2, 3], [2]])
    with pytest.raises(PromptError, match="steps is 0"):
        g4.draft_logits(bundle, [[2, 3]], steps=0)
    with pytest.raises(ConfigError, match="no drafter"):
        g4.draft_logits(dataclasses.replace(bundle, drafter=None), [[2, 3]])


def test_checkpoints_come_back_bit_for_bit(bundle, tmp_path):
    bundle.chat_template = "{{ x }}"
    g4.save(bundle, tmp_path / "c")
    back = g4.load(tmp_path / "c", dtype=None)
    assert back.config == bundle.config
    assert back.chat_template == "{{ x }}"
    assert back.tokenizer.fingerprint() == bundle.tokenizer.fingerprint()
    ours, theirs = weights(back), weights(bundle)
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        g4.save(bundle, tmp_path / "c")
    with pytest.raises(ConfigError, match="holds its own"):
        g4.load(tmp_path / "c", drafter=tmp_path / "c")
    low = g4.load(tmp_path / "c")
    assert low.config.param_dtype == "bfloat16"
    table = np.asarray(bundle.model.embedder.table[...].astype("bfloat16"))
    np.testing.assert_array_equal(np.asarray(low.model.embedder.table[...]), table)


def test_a_published_drafter_for_a_checkpoint_without_one(bundle, tmp_path):
    alone = g4.init("tiny", seed=0, config_overrides={**OVERRIDES, "drafter": None})
    g4.save(alone, tmp_path / "alone")
    g4.save(bundle, tmp_path / "published", format="huggingface")
    joined = g4.load(tmp_path / "alone", drafter=tmp_path / "published" / "drafter", dtype="float32")
    assert joined.config == bundle.config
    np.testing.assert_array_equal(joined.drafter.embedder.table[...], bundle.drafter.embedder.table[...])


def test_a_run_folder_is_loaded_from_its_newest_checkpoint(bundle, tmp_path):
    other = g4.init("tiny", seed=5, config_overrides=OVERRIDES)
    g4.save(bundle, tmp_path / "run" / "checkpoints" / "00000002")
    g4.save(other, tmp_path / "run" / "checkpoints" / "00000010")
    (tmp_path / "run" / "config.json").write_text('{"experiment": "pretrain"}')
    found = g4.load(tmp_path / "run", dtype="float32")
    np.testing.assert_array_equal(found.model.embedder.table[...], other.model.embedder.table[...])


def test_loading_onto_a_mesh(bundle, tmp_path):
    g4.save(bundle, tmp_path / "c")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    spread = g4.load(tmp_path / "c", dtype="float32", mesh=mesh)
    table = spread.model.embedder.table[...]
    assert table.addressable_shards[0].data.shape == (256, 32)
    np.testing.assert_array_equal(table, bundle.model.embedder.table[...])
    np.testing.assert_allclose(g4.logits(spread, [[2, 3, 4]]), g4.logits(bundle, [[2, 3, 4]]), atol=1e-4)


def test_unknown_arguments_list_the_choices(bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown format 'onnx'.*checkpoint"):
        g4.save(bundle, tmp_path / "x", format="onnx")
    with pytest.raises(ConfigError, match=r"unknown dtype 'int3'.*bfloat16"):
        g4.load(tmp_path, dtype="int3")
    with pytest.raises(ConfigError, match="unknown quantization"):
        g4.load(tmp_path, quantization="int3")
    with pytest.raises(ConfigError, match=r"unknown preset 'tinny'.*tiny"):
        g4.init("tinny")
    with pytest.raises(ConfigError, match="hidden_sise"):
        g4.init("tiny", config_overrides={"hidden_sise": 3})
    assert not (tmp_path / "x").exists()
