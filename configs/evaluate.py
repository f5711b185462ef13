"""Measure a model: bits per byte, acceptance of its drafter by kind of text, retrieval, media tasks, tasks of lm-eval.

    python launch.py --config configs/evaluate.py --config.bundle.checkpoint=runs/quickstart
    python launch.py --config configs/evaluate.py --config.bundle.checkpoint=FOLDER --config.text.split=whole \\
        --config.text.sources='("wiki=text:wiki/*.txt",)' --config.harness.tasks='("hellaswag",)'

FOLDER: a run's folder, one of our checkpoints or a Hugging Face folder. Each section is a part, left out when its list is
empty or its count 0. ``config.data`` says how sources are read and held out; for the quickstart model it is that run's.
Hardware: whatever holds the weights; the quickstart model needs 2 CPU cores and some minutes. Expected: ``results.json``
with flat names (``code_bits_per_byte``, ``code_acceptance_teacher_forced_1``, ``needle_256_0.5_found``, ``digits_exact``),
``table.md`` and ``plots/``.
"""

import dataclasses

from ml_collections import ConfigDict

from gemma4_jax.data import data_defaults
from gemma4_jax.evaluate import options


def get_config():
    """The quickstart model on held-out modules of Python's library: their code, and their docstrings."""
    sections = {
        "text": options.TextOptions,
        "acceptance": options.AcceptanceOptions,
        "needle": options.NeedleOptions,
        "media": options.MediaTaskOptions,
        "harness": options.HarnessOptions,
    }
    config = ConfigDict(
        {
            "experiment": "evaluate",
            "bundle": {"checkpoint": "runs/quickstart", "drafter": "", "dtype": "float32", "quantization": ""},
            "data": data_defaults(),
            **{name: dataclasses.asdict(section()) for name, section in sections.items()},
        }
    ).lock()
    config.data.heldout_fraction = 0.02
    return config
