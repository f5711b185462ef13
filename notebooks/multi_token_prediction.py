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
# # Multi-token prediction
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/notebooks/multi_token_prediction.ipynb)
#
# What the drafter sees, how it is trained beside the model, and which tokens of a text it proposed.
# Trains a small model on the source code of this Python installation: two CPU cores, three minutes; any accelerator, less.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gemma4_jax") is None:  # a fresh machine, such as Colab's
    source = "gemma4_jax[notebooks] @ git+https://github.com/gemma4-jax/gemma4_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
SOURCE = "python_stdlib"  # or text:GLOB, jsonl:GLOB, tfds:NAME
LAYERS = 6
DRAFT_STEPS = 3
STEPS = 300
EVALUATE_EVERY = 50
NEW_TOKENS = 96

# %%
import dataclasses
import html
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from IPython.display import HTML, clear_output, display

import gemma4_jax as g4
import launch
from gemma4_jax.bundle import with_token_ids
from gemma4_jax.sample.web import COLORS, token_spans
from gemma4_jax.train import defaults, run_config
from gemma4_jax.train.feed import Feed
from gemma4_jax.train.step import eval_means

# %% [markdown]
# ## The run: the quickstart's configuration, shorter

# %%
config, _, _ = run_config.load_config("configs/quickstart.py", launch.ROOT)
config.data.update(source=SOURCE, seq_len=128, batch_size=8)
config.model_overrides.num_hidden_layers = LAYERS
config.loss.mtp_steps = DRAFT_STEPS
config.train.steps = STEPS
config.optimizer.warmup_steps = min(30, STEPS)
workdir = Path(tempfile.mkdtemp())
feed = Feed(config.data, workdir)
model_config = with_token_ids(defaults.model_config(config), feed.tokenizer)
trainer = defaults.make_trainer(config, model_config)
print(f"target {model_config.num_parameters():,} weights, drafter {model_config.num_parameters(drafter=True):,}")

# %% [markdown]
# ## Training, with a live plot of acceptance
# The loss is `CE(next token) + λ Σ_j w_j CE_j`: for every position the drafter starts a round from the newest token and the
# target's hidden row of the token *before* it, just as sampling does, and all positions are trained at once.
# Acceptance of step j: how often its choice on held-out text is the target's own.

# %%
state, curve = trainer.init(), []
batches = feed.train_iterator()
heldout = list(feed.heldout_batches(2))


def evaluate():
    sums = {}
    for batch in heldout:
        found = jax.device_get(trainer.eval_step(state.evaluated, state.frozen, trainer.place(batch)))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
    return eval_means(sums, trainer.loss)


def draw():
    clear_output(wait=True)
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for j in range(1, DRAFT_STEPS + 1):
        axes.plot([step for step, _ in curve], [means[f"acceptance_{j}"] for _, means in curve], "o-", label=f"step {j}")
    axes.set(xlabel="training step", ylabel="held-out acceptance", ylim=(0, 1))
    axes.legend()
    plt.show()


for step in range(1, STEPS + 1):
    state, metrics = trainer.train_step(state, trainer.place(next(batches)))
    if step % EVALUATE_EVERY == 0 or step == STEPS:
        curve.append((step, evaluate()))
        draw()
print(f"held-out loss {curve[-1][1]['next_token_loss']:.2f} nats a token")

# %% [markdown]
# ## What the drafter sees
# Keys and values of all positions before the newest token, which the target has computed; the hidden row of the last of
# them; and the newest token itself, whose keys do not exist yet. Each further step reads its own last choice and state.

# %%
weights = jax.device_get({**state.params, **state.frozen})
model, drafter = trainer.network.merge(jax.tree.map(jnp.asarray, weights))
bundle = g4.Bundle(model_config, model, drafter, feed.tokenizer)
tokenizer = feed.tokenizer
prompt = tokenizer.encode("import os\n\n\ndef main(self):\n    if self.")
drafts = jnp.argmax(g4.draft_logits(bundle, [prompt], steps=DRAFT_STEPS)[:, 0], axis=-1).tolist()
sampler = g4.Sampler(bundle, max_length=512, draft_tokens=DRAFT_STEPS)
plain_sampler = sampler.with_draft_tokens(0)
own = plain_sampler.generate([prompt], max_new_tokens=DRAFT_STEPS + 1, stop_ids=[]).tokens[0]
print("keys and values of:", [tokenizer.decode([token]) for token in prompt[:-1]][-6:])
print("newest token:", repr(tokenizer.decode(prompt[-1:])))
print("drafted:      ", [tokenizer.decode([token]) for token in drafts])
print("target's own: ", [tokenizer.decode([token]) for token in own])

# %% [markdown]
# ## Which tokens were drafted
# Green tokens were proposed by the drafter and confirmed by the target in one pass; gray ones are the target's own.

# %%
out = sampler.generate([prompt], max_new_tokens=NEW_TOKENS, stop_ids=[])
spans = token_spans(tokenizer, out.tokens[0], out.drafted[0])
marked = "".join(f'<span style="background:{COLORS[who]};color:#111">{html.escape(text)}</span>' for text, who in spans)
display(HTML(f"<pre>{html.escape(tokenizer.decode(prompt, skip_special=True))}{marked}</pre>"))
kept = [count / out.stats.rounds for count in out.stats.accepted_per_step]
print(f"{out.stats.mean_accepted:.2f} tokens a round; kept by step: {[round(share, 2) for share in kept]}")

# %% [markdown]
# ## Nothing but the speed changes

# %%
plain = plain_sampler.generate([prompt], max_new_tokens=NEW_TOKENS, stop_ids=[])
print("same tokens:", plain.tokens == out.tokens)
drawn = sampler.generate([prompt], max_new_tokens=NEW_TOKENS, temperature=1.0, stop_ids=[])
print(f"drawn at temperature 1: {drawn.stats.mean_accepted:.2f} tokens a round")
