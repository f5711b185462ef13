"""Speed beside installed peers, in turns within one run.

    python launch.py --config configs/benchmark.py:train

Needs the ``[test]`` extra for transformers and torch. Hardware: 2 CPU cores, 8 GB, a few minutes. Expected: ``results.json`` and
``table.md`` with tokens per second, peak memory and the ratio of both sides.
"""

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name


def _config(mode, **options):
    return ConfigDict(
        {"experiment": "benchmark", "benchmark": {"mode": mode, "threads": 2}, "options": options},
    ).lock()


def train():
    """Full f32 training steps with AdamW at 140 M parameters."""
    return _config("train", model="bench", batch_size=4, seq_len=256, rounds=5, remat="dots", token_chunk=256)


MODES = {"train": train}


def get_config(arg="train"):
    """``arg``: one of ``MODES``."""
    arg = arg or "train"
    if arg not in MODES:
        raise unknown_name("argument of configs/benchmark.py", arg, MODES)
    return MODES[arg]()
