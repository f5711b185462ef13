"""Goes on with a mini run in a process of its own: ``python resume_run.py WORKDIR STEPS``."""

import sys
from pathlib import Path

import mini_train

from gemma4_jax.train.loop import train

if __name__ == "__main__":
    workdir, steps = Path(sys.argv[1]), int(sys.argv[2])
    train(mini_train.mini_trainer(steps=steps), mini_train.MiniData(), workdir, files={})
