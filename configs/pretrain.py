"""Train a model and its drafter from scratch.

    python launch.py --config configs/pretrain.py:tiny     # laptop core, a minute: does everything work?
    python launch.py --config configs/pretrain.py:small    # 2 cores for some hours, or any accelerator
    python launch.py --config configs/pretrain.py:12b --config.mesh.fsdp=256   # a pod slice; --dry_run shows what it takes

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


SIZES = {"tiny": tiny, "small": small, "12b": _12b}


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
