"""The first run: a small Gemma-4-shaped model and its drafter learn Python from the interpreter's own library.

    python launch.py --config configs/quickstart.py

Hardware: 2 CPU cores, under 8 minutes, 2 GB. Expected in ``runs/quickstart/results.json``: ``val_bits_per_byte`` below 1.75
(xz needs about 1.8 on the same text), ``acceptance_per_step`` above 0.6 for each of three drafted tokens, and
``speculative_equals_greedy`` true. ``samples.md`` shows what it writes, with the drafted tokens marked.
"""

from gemma4_jax.train.defaults import override_model, training_config


def get_config():
    """2 M parameters, 0.8 M tokens: at this budget fewer layers and more text learn more than six layers do."""
    config = training_config("pretrain")
    config.model = "tiny"
    override_model(
        config,
        vision=None, audio=None, vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        sliding_window_pattern=4, num_attention_heads=2, num_key_value_heads=1, head_dim=64, global_head_dim=128,
        sliding_window=64,
        drafter={"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    )  # fmt: skip
    config.data.update(source="python_stdlib", vocab_size=2048, seq_len=128, batch_size=4)
    # Held-out rows repeat 64 tokens of the row before as context, so that no token in mid-document is judged without any.
    config.data.update(heldout_fraction=0.02, heldout_overlap=64)
    config.loss.update(mtp_steps=3, mtp_query_stride=2)
    config.optimizer.update(learning_rate=5e-3, warmup_steps=50, final_fraction=0.02, b2=0.98)
    config.train.update(steps=1500, eval_every=500, eval_batches=8, checkpoint_every=500)
    config.samples.update(prompts=4, prompt_tokens=64, new_tokens=128)
    return config


def sweep_mtp():
    """What the multi-token term costs the target, and what it brings, at the same budget."""
    yield {"loss.mtp_weight": 1.0}
    yield {"loss.mtp_weight": 0.0}
