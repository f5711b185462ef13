"""Continue prompts with a trained or imported model.

    python launch.py --config configs/sample.py --config.sample.checkpoint=runs/quickstart
    python launch.py --config configs/sample.py --config.sample.checkpoint=FOLDER --config.sample.prompts='("Hello",)'

Hardware: whatever holds the weights. Expected: ``samples.md`` with each prompt and its continuation, ``results.json`` with
rounds, drafted and accepted tokens and tokens per second.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
    """Greedy continuations of the quickstart model."""
    return ConfigDict(
        {
            "experiment": "sample",
            "sample": {
                "checkpoint": "runs/quickstart",
                "drafter": "",
                "dtype": "float32",
                "prompts": ("import os\n\ndef ", "class Queue:\n", "# Copyright"),
                "max_length": 512,
                "draft_tokens": config_dict.placeholder(int),  # unset: adapts
                "max_new_tokens": 128,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "seed": 0,
            },
        }
    ).lock()
