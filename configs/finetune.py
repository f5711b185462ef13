"""Go on training a model: all of it, or only its drafter.

    python launch.py --config configs/finetune.py:full --config.base.checkpoint=FOLDER \\
        --config.data.source=jsonl:conversations/*.jsonl --config.data.format=chat
    python launch.py --config configs/finetune.py:drafter --config.base.checkpoint=FOLDER

FOLDER: a run's folder, one of our checkpoints or a Hugging Face folder (``--config.base.drafter=FOLDER`` adds a published
drafter). ``drafter`` keeps the target as it is; use it after a finetune, or for a model that has no drafter yet
(``--config.model_overrides.drafter.hidden_size=…``). Hardware: weights, gradients and two moments in f32 have to fit.
Expected: ``results.json`` with the held-out loss and the drafter's acceptance per step.
"""

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name
from gemma4_jax.train.defaults import training_config


def full():
    """Every weight that a gradient reaches."""
    config = training_config("finetune")
    with config.unlocked():
        del config.model  # the checkpoint says what the model is; model_overrides still change single fields
        config.base = ConfigDict({"checkpoint": "runs/quickstart", "drafter": "", "dtype": "float32"})
    config.data.update(seq_len=256, batch_size=4)
    config.loss.update(mtp_query_stride=2)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=20, weight_decay=0.01)
    config.train.update(steps=200, eval_every=100, checkpoint_every=100)
    return config


def drafter():
    """The drafter alone, on a target that does not move."""
    config = full()
    config.train.trainable = ("!*", "drafter/*")
    config.loss.mtp_stop_gradient = True
    config.optimizer.learning_rate = 1e-3
    return config


KINDS = {"full": full, "drafter": drafter}


def get_config(arg="full"):
    """``arg``: one of ``KINDS``."""
    arg = arg or "full"
    if arg not in KINDS:
        raise unknown_name("argument of configs/finetune.py", arg, KINDS)
    return KINDS[arg]()
