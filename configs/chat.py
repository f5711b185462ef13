"""Talk to a model about text, pictures, sound and video, in the terminal or on a web page.

    python launch.py --config configs/chat.py --config.chat.checkpoint=FOLDER
    python launch.py --config configs/chat.py:web --config.chat.checkpoint=FOLDER

FOLDER: one of our checkpoints, a run's folder, or a Hugging Face folder, finetuned on conversations (its own chat template is
used when it has one). ``--config.chat.drafter=FOLDER`` adds a published drafter. ``/help`` in the terminal lists the commands
(``/image PATH``, ``/audio PATH``, ``/video PATH``, ``/think``, ``/reset``, ``/save PATH``); each reply ends with its speed and
how many drafted tokens were accepted. ``web`` needs the extra ``[web]`` and listens on http://127.0.0.1:7860, this machine only
(``--config.web.host=0.0.0.0`` for others, ``--config.web.share=True`` for a public address, as from Colab). Hardware: whatever
holds the weights; the 12B needs 24 GB in bfloat16.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from gemma4_jax.config import unknown_name
from gemma4_jax.sample.web import WebOptions

PLACES = ("terminal", "web")


def get_config(arg="terminal"):
    """The recommended sampling settings. ``arg``: one of ``PLACES``."""
    arg = arg or "terminal"
    if arg not in PLACES:
        raise unknown_name("argument of configs/chat.py", arg, PLACES)
    config = ConfigDict(
        {
            "experiment": "sample",
            "chat": {
                "checkpoint": "",
                "drafter": "",
                "dtype": "bfloat16",
                "max_length": 4096,
                "draft_tokens": config_dict.placeholder(int),  # unset: adapts
                "system": "",
                "thinking": False,
                "temperature": 1.0,
                "top_k": 64,
                "top_p": 0.95,
                "max_new_tokens": 1024,
                "seed": 0,
            },
        }
    )
    if arg == "web":
        config.web = dataclasses.asdict(WebOptions())
    return config.lock()
