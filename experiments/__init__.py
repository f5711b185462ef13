"""Experiments by name: glue between a config and the library.

Each is a module with ``run(config, workdir) -> dict | None``: ``config`` is the locked ConfigDict, ``workdir`` an existing
``pathlib.Path``; the returned flat dict of final numbers becomes ``workdir/results.json`` (written by ``launch.py``, last and
atomically). A module may add ``plan(config) -> str``: what ``--dry_run`` prints below the resolved config. Modules are
imported when they run, so that a command line error costs no start-up time.
"""

from __future__ import annotations

import importlib
import types

from gemma4_jax.config import unknown_name

EXPERIMENTS = {
    "pretrain": "experiments.pretrain",
    "finetune": "experiments.finetune",
    "sample": "experiments.sample",
    "evaluate": "experiments.evaluate",
    "benchmark": "experiments.benchmark",
    "convert": "experiments.convert",
}


def get_experiment(name: str) -> types.ModuleType:
    """The module of an experiment. Raises ConfigError that lists the choices."""
    if name not in EXPERIMENTS:
        raise unknown_name("config.experiment", name, EXPERIMENTS)
    return importlib.import_module(EXPERIMENTS[name])
