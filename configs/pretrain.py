"""Train a model and its drafter from scratch.

    python launch.py --config configs/pretrain.py:tiny     # laptop core, a minute: does everything work?
    python launch.py --config configs/pretrain.py:small    # 2 cores for some hours, or any accelerator
    python launch.py --config configs/pretrain.py:12b --config.mesh.fsdp=256   # a pod slice; --dry_run shows what it takes
    python launch.py --config configs/pretrain.py:media_base   # a minute or two: text first, for the tasks of configs/finetune.py

Expected: ``results.json`` with the held-out bits per byte and the drafter's acceptance per step.
"""

from gemma4_jax.config import unknown_name
from gemma4_jax.train.defaults import override_model, training_config


def tiny():
    """4 layers of width 64: a smoke test."""
    config = training_config("pretrain")
    config.model = "tiny"
    override_model(config, vision=None, audio=None, sliding_window=32)
    config.data.update(vocab_size=512, seq_len=64, batch_size=8)
    config.loss.update(mtp_query_stride=2)
    config.optimizer.update(learning_rate=5e-3, warmup_steps=20)
    config.train.update(steps=200, eval_every=100, checkpoint_every=100, final_eval_batches=32)
    return config


def small():
    """About 30 M parameters."""
    config = training_config("pretrain")
    config.model = "small"
    config.data.update(vocab_size=8192, seq_len=512, batch_size=16)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=200)
    config.train.update(steps=10_000, eval_every=500, checkpoint_every=500)
    return config


def _12b():
    """The published size, 8 devices or more, weights and moments cut over all of them."""
    config = training_config("pretrain")
    config.model = "gemma4_12b"
    override_model(config, remat="full")
    # Text pretraining of the published shape needs a corpus and its tokenizer; these are places to put them.
    config.data.update(source="tfds:c4/en", tokenizer="tokenizer.json", seq_len=4096, batch_size=256, workers=8)
    config.loss.update(mtp_steps=4, mtp_query_stride=4)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=2000)
    config.train.update(steps=100_000, eval_every=1000, checkpoint_every=500, keep=3, final_eval_batches=256)
    config.mesh.update(data=1, fsdp=8, tensor=1)
    return config


def media_base():
    """4 layers of width 128 that have read some text; images and sound enter by projections that are still random."""
    config = training_config("pretrain")
    config.model = "tiny"
    override_model(
        config,
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, sliding_window_pattern=4, head_dim=32,
        global_head_dim=64, sliding_window=128, drafter=None,
        vision={"patch_size": 8, "pooling_kernel_size": 2, "mm_embed_dim": 128}, audio={},
    )  # fmt: skip
    config.data.update(vocab_size=512, seq_len=128, batch_size=8)
    config.loss.mtp_weight = 0.0
    config.optimizer.update(learning_rate=3e-3, warmup_steps=50, b2=0.98)
    config.train.update(steps=200, eval_every=100, checkpoint_every=100, final_eval_batches=32)
    return config


SIZES = {"tiny": tiny, "small": small, "12b": _12b, "media_base": media_base}


def get_config(arg="tiny"):
    """``arg``: one of ``SIZES``."""
    arg = arg or "tiny"
    if arg not in SIZES:
        raise unknown_name("argument of configs/pretrain.py", arg, SIZES)
    return SIZES[arg]()


def sweep_mtp():
    """How much the multi-token term costs and brings: none, one step, three steps."""
    yield {"loss.mtp_weight": 0.0}
    yield {"loss.mtp_steps": 1}
    yield {"loss.mtp_steps": 3}


def sweep_pairing():
    """The ablations of the drafter's training."""
    yield {"loss.mtp_pairing": "inference"}
    yield {"loss.mtp_pairing": "same_row"}
    yield {"loss.mtp_distill": True}
    yield {"loss.mtp_teacher_forcing": False}
