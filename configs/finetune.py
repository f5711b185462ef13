"""Go on training a model: all of it, or only its drafter.

    python launch.py --config configs/finetune.py:full --config.base.checkpoint=FOLDER \\
        --config.data.source=jsonl:conversations/*.jsonl --config.data.format=chat
    python launch.py --config configs/finetune.py:drafter --config.base.checkpoint=FOLDER
    python launch.py --config configs/finetune.py:digits    # after configs/pretrain.py:media_base; or :dtmf

FOLDER: a run's folder, one of our checkpoints or a Hugging Face folder (``--config.base.drafter=FOLDER`` adds a published
drafter). ``drafter`` keeps the target as it is; use it after a finetune, or for a model that has no drafter yet
(``--config.model_overrides.drafter.hidden_size=…``). Hardware: weights, gradients and two moments in f32 have to fit.
Expected: ``results.json`` with the held-out loss and the drafter's acceptance per step; with ``answers.ask`` also how many
held-out conversations the model answers right, and how many with their media blanked out (``blind_answers_…``).

``digits`` (name a handwritten digit; needs the extra ``tasks``) and ``dtmf`` (write down telephone tones from the raw waveform)
are ``full`` on the two tasks that come with the package; ``--config.data.blind=True`` trains the same run without seeing or
hearing anything. 2 CPU cores, some minutes each, at least 95 % right.
"""

import dataclasses

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name
from gemma4_jax.sample.answers import AnswerOptions
from gemma4_jax.train.defaults import training_config


def full():
    """Every weight that a gradient reaches."""
    config = training_config("finetune")
    with config.unlocked():
        del config.model  # the checkpoint says what the model is; model_overrides still change single fields
        config.base = ConfigDict({"checkpoint": "runs/quickstart", "drafter": "", "dtype": "float32"})
        config.answers = ConfigDict(dataclasses.asdict(AnswerOptions()))
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


def _task(source, **data):
    """``full`` on a bundled task, from a small model that has read text; asked at the end."""
    config = full()
    config.base.checkpoint = "runs/pretrain-media_base"
    config.data.update(source=source, format="chat", seq_len=192, batch_size=8, workers=1, **data)
    config.loss.mtp_weight = 0.0  # the base has no drafter
    config.optimizer.update(warmup_steps=40, b2=0.98)
    config.answers.update(ask=True, max_new_tokens=16)
    return config


def digits():
    """Name handwritten digits."""
    config = _task("digits", image_budget=70)
    config.optimizer.learning_rate = 2e-3
    config.train.update(steps=500, eval_every=100, checkpoint_every=250)
    return config


def dtmf():
    """Write down the digits that telephone tones stand for."""
    config = _task("dtmf")
    config.optimizer.learning_rate = 3e-3
    config.train.update(steps=600, eval_every=150, checkpoint_every=300)
    return config


KINDS = {"full": full, "drafter": drafter, "digits": digits, "dtmf": dtmf}


def get_config(arg="full"):
    """``arg``: one of ``KINDS``."""
    arg = arg or "full"
    if arg not in KINDS:
        raise unknown_name("argument of configs/finetune.py", arg, KINDS)
    return KINDS[arg]()
