"""Go on training a model: all of it, small adapters beside its weights, or only its drafter.

    python launch.py --config configs/finetune.py:full --config.base.checkpoint=FOLDER \\
        --config.data.source=jsonl:conversations/*.jsonl --config.data.format=chat
    python launch.py --config configs/finetune.py:lora --config.base.checkpoint=FOLDER …     # or :qlora, on packed weights
    python launch.py --config configs/finetune.py:dpo --config.base.checkpoint=FOLDER --config.data.source=jsonl:pairs.jsonl
    python launch.py --config configs/finetune.py:drafter --config.base.checkpoint=FOLDER
    python launch.py --config configs/finetune.py:digits    # after configs/pretrain.py:media_base; or :dtmf

FOLDER: a run's folder, one of our checkpoints or a Hugging Face folder (``--config.base.drafter=FOLDER`` adds a published
drafter). ``drafter`` keeps the target as it is; use it after a finetune, or for a model that has no drafter yet
(``--config.model_overrides.drafter.hidden_size=…``). Hardware: weights, gradients and two moments in f32 have to fit.
With adapters (``lora``: 1 % of the weights or less) there are gradients and moments of the adapters alone; ``qlora`` also holds
the frozen weights in 4 bits (``--config.base.quantization=int8``: 8). ``--dry_run`` shows what trains. ``g4.save`` of the result
merges adapters (``huggingface``, ``gguf``) or writes them alone (``peft``). ``dpo`` trains adapters on preference pairs
{"prompt" | "messages", "chosen", "rejected"}; with ``--config.lora.rank=0 --config.train.trainable="*"`` all weights, beside a
frozen copy.
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
from gemma4_jax.train.defaults import lora_defaults, training_config


def full():
    """Every weight that a gradient reaches."""
    config = training_config("finetune")
    with config.unlocked():
        del config.model  # the checkpoint says what the model is; model_overrides still change single fields
        config.base = ConfigDict(
            {
                "checkpoint": "runs/quickstart", "drafter": "", "dtype": "float32", "quantization": "",
                "merge_adapters": False,
            }
        )  # fmt: skip
        config.lora = ConfigDict(lora_defaults())
        config.answers = ConfigDict(dataclasses.asdict(AnswerOptions()))
    config.data.update(seq_len=256, batch_size=4)
    config.loss.update(mtp_query_stride=2)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=20, weight_decay=0.01)
    config.train.update(steps=200, eval_every=100, checkpoint_every=100)
    return config


def lora():
    """Adapters on the attention of target and drafter; everything else stays."""
    config = full()
    config.lora.update(rank=8, targets=("*/self_attn/*_proj/weight",))
    config.train.trainable = ("!*", "*/lora/*")
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def qlora():
    """``lora`` on weights packed in 4 bits."""
    config = lora()
    config.base.quantization = "int4"
    return config


def dpo():
    """``lora`` on preference pairs; the reference is the model without the adapters' change."""
    config = lora()
    config.data.update(format="preference", long_examples="error", seq_len=512)
    config.loss.name = "dpo"
    config.optimizer.learning_rate = 2e-4
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
    config.optimizer.update(warmup_steps=40, final_fraction=0.02)
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
    config.train.update(steps=700, eval_every=175, checkpoint_every=350)
    return config


KINDS = {"full": full, "lora": lora, "qlora": qlora, "dpo": dpo, "drafter": drafter, "digits": digits, "dtmf": dtmf}


def get_config(arg="full"):
    """``arg``: one of ``KINDS``."""
    arg = arg or "full"
    if arg not in KINDS:
        raise unknown_name("argument of configs/finetune.py", arg, KINDS)
    return KINDS[arg]()
