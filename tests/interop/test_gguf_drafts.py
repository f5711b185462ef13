"""A drafter that has learnt something: llama.cpp keeps as many of its drafts as this project does."""

import inspect
import pprint

import numpy as np
import pytest
from llama_cpp import ask
from mini_train import mini_trainer

import gemma4_jax as g4
from gemma4_jax.config import get_preset
from gemma4_jax.losses import LossConfig
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train.optimizer import OptimizerConfig

VOCAB, STEPS, ROWS, LENGTH, DRAFTS = 512, 120, 8, 64, 3


@pytest.fixture(scope="module")
def trained():
    """The bundle after a minute on a module's source, and the source's tokens."""
    text = inspect.getsource(pprint)
    tokenizer = train_tokenizer([text], VOCAB)
    ids = np.asarray(tokenizer.encode(text, bos=False), np.int32)
    config = get_preset(
        "tiny", vision=None, audio=None, vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        sliding_window_pattern=2, sliding_window=32, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        global_head_dim=64, scan_layers=False, max_position_embeddings=256,
        drafter={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        suppress_tokens=[tokenizer.token_id(name) for name in ("<eos>", "<turn|>", "<|tool_response>")],
    )  # fmt: skip
    trainer = mini_trainer(
        model=config,
        loss=LossConfig(mtp_steps=DRAFTS),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        batch_size=ROWS,
        steps=STEPS,
    )
    rng, state = np.random.default_rng(0), trainer.init()
    shape = ROWS, LENGTH
    rows = {"loss_mask": np.ones(shape, bool), "segment_ids": np.ones(shape, np.int32)}
    rows["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    for _ in range(STEPS):
        starts = rng.integers(0, len(ids) - LENGTH, ROWS)
        tokens = np.stack([ids[start : start + LENGTH] for start in starts])
        state, _ = trainer.train_step(state, trainer.place({"tokens": tokens, **rows}))
    model, drafter = trainer.network.merge({**state.params, **state.frozen})
    return g4.Bundle(config, model, drafter, tokenizer), ids


def test_llama_cpp_keeps_as_many_drafts(trained, tmp_path):
    """Greedy, F32: equal tokens, and rates of kept drafts within 2 % of all drafts. A drafter that lost its way on the way
    out would still give equal tokens, and keep few."""
    bundle, ids = trained
    g4.save(bundle, tmp_path / "out", format="gguf")
    prompts = [ids[start : start + 24].tolist() for start in range(0, len(ids) - 24, len(ids) // 4)]
    sampler = g4.Sampler(bundle, max_length=256, draft_tokens=DRAFTS)
    ours = [sampler.generate([prompt], max_new_tokens=200, stop_ids=[]) for prompt in prompts]
    drafter = str(tmp_path / "out" / "drafter-f32.gguf")
    theirs = ask(tmp_path / "out", prompts, count=200, context=256, drafter=drafter, draft_tokens=DRAFTS)
    assert [answer["tokens"] for answer in theirs] == [out.tokens[0] for out in ours]
    kept = sum(out.stats.accepted for out in ours) / sum(out.stats.drafted for out in ours)
    timings = [answer["timings"] for answer in theirs]
    kept_there = sum(t["draft_n_accepted"] for t in timings) / sum(t["draft_n"] for t in timings)
    assert kept > 0.2
    assert abs(kept - kept_there) < 0.02, (kept, kept_there)
