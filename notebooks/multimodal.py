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
# # Pictures, sound and video
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/notebooks/multimodal.ipynb)
#
# No encoder: a picture is its patches of raw pixels, a sound its frames of raw samples, each one soft token among the text.
# Any hardware. With the random model below the answers are noise; the shapes and the calls are those of the 12B.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gemma4_jax") is None:  # a fresh machine, such as Colab's
    source = "gemma4_jax[notebooks] @ git+https://github.com/gemma4-jax/gemma4_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
CHECKPOINT = ""  # a folder with media inputs, such as the published gemma-4-12B-it
MODEL = {}  # fields of the small random model to change
NEW_TOKENS = 32

# %%
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import gemma4_jax as g4
from gemma4_jax.media import prepare_audio, prepare_image, prepare_video

bundle = g4.load(CHECKPOINT, dtype="bfloat16") if CHECKPOINT else g4.init("tiny", seed=0, config_overrides=MODEL)
side = bundle.config.vision.model_patch_size

# %% [markdown]
# ## A picture as the model gets it
# Resized so that its patches fit the budget of soft tokens and its shape stays; each patch comes with its place (x, y).

# %%
picture = Image.new("RGB", (320, 200), "steelblue")
draw = ImageDraw.Draw(picture)
draw.ellipse((200, 20, 280, 100), fill="gold")
draw.polygon([(0, 200), (100, 80), (200, 200)], fill="seagreen")
prepared = prepare_image(picture, 70, side)
print(prepared.patches.shape, "patches,", "places up to", prepared.positions.max(axis=0))

# %%
columns, rows = prepared.positions.max(axis=0) + 1
figure, grid = plt.subplots(int(rows), int(columns), figsize=(6, 6 * rows / columns))
for patch, (x, y) in zip(prepared.patches, prepared.positions, strict=True):
    grid[y, x].imshow(patch.reshape(side, side, 3))
for axes in grid.flat:
    axes.axis("off")
figure.suptitle(f"{len(prepared.patches)} soft tokens")
plt.show()

# %% [markdown]
# ## A sound
# 16 kHz, cut into frames of 40 ms: no spectrogram, the samples themselves.

# %%
time = np.arange(16_000) / 16_000
sound = (0.4 * np.sin(2 * np.pi * (300 + 400 * time) * time)).astype(np.float32)
frames = prepare_audio((sound, 16_000))
print(frames.shape, "frames")
plt.figure(figsize=(7, 2))
plt.plot(frames[:4].reshape(-1))
for edge in range(1, 4):
    plt.axvline(edge * frames.shape[1], color="gray", linewidth=0.5)
plt.title("the first four soft tokens")
plt.show()

# %% [markdown]
# ## A video
# Frames are pictures with a smaller budget, each with its time as text before it.

# %%
clip = [np.asarray(picture.rotate(5 * angle)) for angle in range(4)]
video = prepare_video((clip, 2.0), num_frames=4, budget=70, side=side)
print(video.patches.shape, "at seconds", list(video.seconds))

# %% [markdown]
# ## Asking about them
# Media of a row stand where `<|image|>`, `<|audio|>` and `<|video|>` are in its prompt, or first when there are no marks.

# %%
bundle.processor.options = dataclasses.replace(bundle.processor.options, image_budget=70)
sampler = g4.Sampler(bundle, max_length=1024, draft_tokens=0)
out = sampler.generate(
    ["Here is <|image|> and here <|audio|>. What are they?"],
    images=[[picture]],
    audio=[[(sound, 16_000)]],
    max_new_tokens=NEW_TOKENS,
)
print(repr(out.texts[0][:60]))

# %% [markdown]
# ## A conversation

# %%
chat = g4.Chat(sampler, max_new_tokens=NEW_TOKENS)
reply = chat.send("What is in this picture?", images=[picture])
print(repr(reply.text[:60]))
print([message["role"] for message in chat.history])

# %% [markdown]
# With `thinking=True` the model thinks first, and `reply.thinking` holds the thought; `tools=[…]` declares functions that
# `reply.tool_calls` may ask for, answered by `chat.respond([…])`. The same conversation on a web page:
# `python launch.py --config configs/chat.py:web --config.chat.checkpoint=FOLDER`.
