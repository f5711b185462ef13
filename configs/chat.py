"""Talk to a model in the terminal, about text, pictures, sound and video.

    python launch.py --config configs/chat.py --config.chat.checkpoint=FOLDER

FOLDER: one of our checkpoints, a run's folder, or a Hugging Face folder, finetuned on conversations (its own chat template is
used when it has one). ``--config.chat.drafter=FOLDER`` adds a published drafter. ``/help`` in the chat lists the commands
(``/image PATH``, ``/audio PATH``, ``/video PATH``, ``/think``, ``/reset``, ``/save PATH``); each reply ends with its speed and
how many drafted tokens were accepted. Hardware: whatever holds the weights; the 12B needs 24 GB in bfloat16.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
    """The recommended sampling settings."""
    return ConfigDict(
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
    ).lock()
