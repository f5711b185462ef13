# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An ablation in one file
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/notebooks/ablation_sweep.ipynb)
#
# Change one field, run the sweep, read the answer: a config file of a few lines, its members one after another, a table.
# Two CPU cores, a few minutes.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gemma4_jax") is None:  # a fresh machine, such as Colab's
    source = "gemma4_jax[notebooks] @ git+https://github.com/gemma4-jax/gemma4_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
SOURCE = "python_stdlib"  # or text:GLOB, jsonl:GLOB, tfds:NAME
DRAFT_STEPS = 3
STEPS = 200
SEEDS = (0, 1)
DECAYS = (0.6, 1.0)

# %% [markdown]
# ## The config
# Start from an existing one, change what the ablation is about, and yield the members' overrides.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())
config_file = folder / "decay.py"
config_file.write_text(f'''"""How fast later draft steps lose weight.

    python launch.py --config decay.py --sweep decay
"""

from configs.pretrain import tiny
from gemma4_jax.train.sweeps import over_seeds


def get_config():
    config = tiny()
    config.data.source = "{SOURCE}"
    config.loss.mtp_steps = {DRAFT_STEPS}
    config.optimizer.warmup_steps = min(20, {STEPS})
    config.train.update(steps={STEPS}, eval_every=max(1, {STEPS} // 4), checkpoint_every=0, final_eval_batches=2)
    return config


def sweep_decay():
    for decay in {DECAYS}:
        yield from over_seeds({{"loss.mtp_decay": decay}}, seeds={SEEDS})
''')
print(config_file.read_text())

# %% [markdown]
# ## What would run

# %%
import launch

arguments = ["--config", str(config_file), "--workdir", str(folder / "runs"), "--sweep", "decay"]
launch.main([*arguments, "--dry_run"])

# %% [markdown]
# ## Running it
# `launch.main([…])` is `python launch.py …`. Member by member here, as an array job of a cluster would; without an index all
# run one after another, each in a process of its own.

# %%
for index in range(len(DECAYS) * len(SEEDS)):
    assert launch.main([*arguments, "--sweep_index", str(index)]) == 0

# %% [markdown]
# ## Comparing
# Finished members are skipped, so the sweep itself now only writes the comparison: a table with mean and spread over the
# seeds, and plots.

# %%
from IPython.display import Image, Markdown, display

launch.main(arguments)
display(Markdown((folder / "runs" / "sweep.md").read_text()))

# %%
for plot in sorted((folder / "runs" / "plots").glob("*.png"))[:3]:
    display(Image(filename=str(plot)))

# %% [markdown]
# Shipped sweeps, on a laptop or as array jobs: `configs/ablation.py` (draft steps, weight, decay, distillation, drafter depth
# and width, window, local:global pattern, …) and `configs/pretrain.py`.
