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
# # Checkpoints: in, quantise, out
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/notebooks/checkpoints.ipynb)
#
# Hugging Face folders and our own checkpoints in; int8 and int4 in memory; Hugging Face, GGUF and checkpoints out.
# Any hardware, seconds with the small random model; the 12B wants 24 GB in bfloat16, 12 GB with `quantization="int8"`.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gemma4_jax") is None:  # a fresh machine, such as Colab's
    source = "gemma4_jax[notebooks] @ git+https://github.com/gemma4-jax/gemma4_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
CHECKPOINT = ""  # a folder: Hugging Face weights, one of our checkpoints, or a run
MODEL = {}  # fields of the small random model to change

# %%
import tempfile
from pathlib import Path

import jax

import gemma4_jax as g4
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.text.tokenizer import train_tokenizer

folder = Path(tempfile.mkdtemp())


def gigabytes(bundle):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(bundle_weights(bundle))) / 1e9


# %% [markdown]
# ## In
# The spelling of the config, one file or shards, and which of the forms it is: all found out.

# %%
if CHECKPOINT:
    bundle = g4.load(CHECKPOINT, dtype="bfloat16")
else:
    bundle = g4.init("tiny", seed=0, config_overrides=MODEL)
    bundle.tokenizer = train_tokenizer(["import os", "import sys", "def main():"] * 5, bundle.config.vocab_size)
print(f"{bundle.config.num_parameters():,} weights, {gigabytes(bundle):.4f} GB, {bundle.config.param_dtype}")

# %% [markdown]
# ## Out, and in again
# A folder that `transformers` loads, with a model card to fill in; a drafter goes into its subfolder.

# %%
g4.save(bundle, folder / "huggingface", format="huggingface", dtype="bfloat16")
print(sorted(str(path.relative_to(folder)) for path in (folder / "huggingface").rglob("*") if path.is_file()))
drafter = folder / "huggingface" / "drafter"
again = g4.load(folder / "huggingface", drafter=drafter if drafter.is_dir() else None)
print(again.config.dtype, again.drafter is not None)

# %%
print((folder / "huggingface" / "README.md").read_text()[:600])

# %% [markdown]
# ## Quantise
# `quantization=` packs matrices while they are read: `int8` halves bfloat16, `int4` (32 weights share a scale, the layout of
# GGUF's Q4_0) goes below a third. Norms stay as they are.

# %%
for scheme in (None, "int8", "int4"):
    packed = g4.load(folder / "huggingface", quantization=scheme)
    out = g4.Sampler(packed, max_length=64, draft_tokens=0).generate(["import os\n"], max_new_tokens=8, stop_ids=[])
    print(scheme, f"{gigabytes(packed):.4f} GB", repr(out.texts[0]))

# %% [markdown]
# ## Out to llama.cpp, Ollama and LM Studio
# `model-….gguf`, with `mmproj-…` for media and `drafter-…` beside it; `q8_0` and `q4_0` are packed in the file.

# %%
for dtype in ("bfloat16", "q8_0"):
    g4.save(bundle, folder / dtype, format="gguf", dtype=dtype)
    print({path.name: path.stat().st_size for path in sorted((folder / dtype).iterdir())})

# %% [markdown]
# The same from the command line, with checksums and a report: `python launch.py --config configs/convert.py:to_gguf
# --config.convert.source=runs/quickstart --config.convert.dtype=q8_0`.
