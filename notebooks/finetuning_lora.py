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
# # Finetuning with LoRA
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/notebooks/finetuning_lora.ipynb)
#
# Small adapters learn beside frozen weights: train them, see how little moves, sample with them, merge them.
# Any hardware; with the small model below a minute on a CPU.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gemma4_jax") is None:  # a fresh machine, such as Colab's
    source = "gemma4_jax[notebooks] @ git+https://github.com/gemma4-jax/gemma4_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
CHECKPOINT = ""  # a folder to start from; empty: a small random model
MODEL = {}  # fields of the small random model to change
DRAFT_STEPS = 3  # what the drafter learns
STEPS = 60
RANK = 8

# %%
import json
import tempfile
from pathlib import Path

import gemma4_jax as g4
import launch
from gemma4_jax.bundle import bundle_weights

folder = Path(tempfile.mkdtemp())
base = CHECKPOINT
if not base:
    base = str(folder / "base")
    g4.save(g4.init("tiny", seed=0, config_overrides=MODEL), base)

# %% [markdown]
# ## Data
# One conversation a line; only the model's turns are learnt. Media stand in the content as `{"type": "image", "image": PATH}`.

# %%
lines = [
    {"messages": [{"role": "user", "content": f"What comes after {i}?"}, {"role": "model", "content": f"{i + 1}."}]}
    for i in range(200)
]
(folder / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

# %% [markdown]
# ## Training
# `launch.main([…])` is `python launch.py …`. `finetune:lora` puts adapters on the attention of target and drafter; `qlora`
# does it on weights packed in 4 bits. The table says what trains.

# %%
fields = {
    "base.checkpoint": base, "data.source": f"jsonl:{folder / 'talk.jsonl'}", "data.format": "chat", "data.seq_len": 64,
    "data.batch_size": 8, "lora.rank": RANK, "loss.mtp_steps": DRAFT_STEPS, "train.steps": STEPS, "train.eval_every": 0, "train.checkpoint_every": 0,
    "train.final_eval_batches": 1, "optimizer.warmup_steps": min(10, STEPS), "optimizer.learning_rate": 0.01,
}
run = folder / "run"
code = launch.main(
    ["--config", "configs/finetune.py:lora", "--workdir", str(run), *(f"--config.{k}={v}" for k, v in fields.items())]
)
assert code == 0
results = json.loads((run / "results.json").read_text())
print(f"held-out loss {results['val_loss']:.3f} nats a token")

# %% [markdown]
# ## What moved
# The adapters, and nothing else.

# %%
adapted = g4.load(run, dtype=None)
before, after = bundle_weights(g4.load(base, dtype=None)), bundle_weights(adapted)
moved = [name for name, leaf in before.items() if (leaf != after[name]).any()]
adapters = {name: leaf.size for name, leaf in after.items() if name not in before}
print("weights that moved:", moved)
print(f"{sum(adapters.values()):,} adapter weights beside {sum(leaf.size for leaf in before.values()):,}")

# %% [markdown]
# ## Using it
# A run's folder loads like any other; the adapters are applied while sampling.

# %%
chat = g4.Chat(g4.Sampler(adapted, max_length=256, draft_tokens=DRAFT_STEPS), temperature=0.0, max_new_tokens=16)
print(repr(chat.send("What comes after 7?").text))

# %% [markdown]
# ## Giving it away
# `huggingface` and `gguf` merge the adapters into the weights; `peft` writes them alone, to go beside the base model.

# %%
g4.save(adapted, folder / "merged", format="huggingface")
g4.save(adapted, folder / "adapter", format="peft")
print(sorted(path.name for path in (folder / "merged").iterdir()))
print(sorted(path.name for path in (folder / "adapter").iterdir()))
