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
# # Sampling
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/notebooks/sampling.ipynb)
#
# Prompts in, tokens out: greedy and drawn, many rows at once, streamed, with and without the multi-token drafter.
# Any hardware; with the small random model below every cell takes seconds on a CPU.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gemma4_jax") is None:  # a fresh machine, such as Colab's
    source = "gemma4_jax[notebooks] @ git+https://github.com/gemma4-jax/gemma4_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
CHECKPOINT = ""  # a folder: Hugging Face weights, one of our checkpoints, or a run such as runs/quickstart
DRAFTER = ""  # a folder with a published drafter, if the checkpoint has none of its own
MODEL = {}  # fields of the small random model to change
NEW_TOKENS = 64

# %% [markdown]
# Without a checkpoint the weights are random: what it writes is noise, what the calls do is the same.

# %%
import gemma4_jax as g4

if CHECKPOINT:
    bundle = g4.load(CHECKPOINT, drafter=DRAFTER or None, dtype="bfloat16")
else:
    bundle = g4.init("tiny", seed=0, config_overrides=MODEL)
sampler = g4.Sampler(bundle, max_length=512, draft_tokens=3)

# %% [markdown]
# ## Greedy
# A prompt is a string (it gets one bos) or a list of token ids (taken as it is). Rows may differ in length.

# %%
out = sampler.generate(["import os\n", "class Queue:\n    def "], max_new_tokens=NEW_TOKENS)
for text, reason in zip(out.texts, out.finish_reasons, strict=True):
    print(repr(text), reason)

# %% [markdown]
# `stats` says what it took: verification passes of a row, and how many drafted tokens were kept.

# %%
stats = out.stats
print(stats.rounds, "rounds,", stats.drafted, "drafted,", stats.accepted, "kept,", stats.accepted_per_step, "by draft step")
print(f"{stats.mean_accepted:.2f} tokens a round")

# %% [markdown]
# ## The drafter changes the speed and nothing else
# `with_draft_tokens` gives a sampler of the same weights, held once, with another draft length.

# %%
plain = sampler.with_draft_tokens(0)
without = plain.generate(["import os\n", "class Queue:\n    def "], max_new_tokens=NEW_TOKENS)
print("same tokens:", without.tokens == out.tokens)
print(f"with the drafter {out.stats.tokens_per_second:.0f} tokens/s, without {without.stats.tokens_per_second:.0f}")

# %% [markdown]
# ## Drawn
# Temperature, top-k and top-p may differ from row to row; a row depends on its own seed and on no other row.

# %%
out = sampler.generate(
    ["import os\n"] * 2, max_new_tokens=NEW_TOKENS, temperature=[0.8, 1.2], top_k=40, top_p=0.95, seed=[0, 1]
)
for text in out.texts:
    print(repr(text[:80]))

# %% [markdown]
# ## Streamed

# %%
arrived = []
sampler.generate(
    ["def main():\n", "import sys\n"],
    max_new_tokens=NEW_TOKENS,
    on_token=lambda row, token, text: arrived.append((row, text)),
)
print(len(arrived), "pieces, each with its row:", arrived[:6])

# %% [markdown]
# ## What the model would have said
# `logits` is the target's soft-capped opinion of whole rows, `draft_logits` the drafter's of the tokens behind each row.

# %%
import jax.numpy as jnp

tokens = [bundle.tokenizer.encode("import os\nimport sys")]
logits = g4.logits(bundle, tokens)
drafts = g4.draft_logits(bundle, tokens, steps=3)
print("logits", logits.shape, logits.dtype, " draft logits", drafts.shape)
print("next token by the target:", repr(bundle.tokenizer.decode([int(jnp.argmax(logits[0, -1]))])))
print("drafted:", [bundle.tokenizer.decode([int(token)]) for token in jnp.argmax(drafts[:, 0], axis=-1)])
