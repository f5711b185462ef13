"""Small random networks for sampling tests, with every weight away from its initial value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.bundle import Bundle
from gemma4_jax.config import get_preset
from gemma4_jax.model.decoder import Gemma4
from gemma4_jax.model.drafter import Drafter

WINDOW = 8


def small_config(**changes):
    """2 layers (1 sliding, 1 global: each layer is compiled), window 8, vocabulary 64."""
    values = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=WINDOW,
        layer_types=("sliding_attention", "full_attention"), vision=None, audio=None,
        max_position_embeddings=256,
    )  # fmt: skip
    return get_preset("tiny", **{**values, **changes})


def randomize(module, seed):
    """The module with norms and scalars drawn anew, and livelier matrices."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        value = np.asarray(leaf)
        if not np.issubdtype(value.dtype, np.floating):
            return leaf
        if np.all(value == value.flat[0]):
            return jnp.asarray(value * rng.uniform(0.6, 1.4, value.shape), leaf.dtype)
        return leaf * 1.5

    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(draw, state))


@functools.lru_cache
def small_bundle(seed=0, **changes):
    """A bundle without tokenizer."""
    config = small_config(**changes)
    model = randomize(Gemma4(config, rngs=nnx.Rngs(seed)), seed)
    drafter = randomize(Drafter(config, rngs=nnx.Rngs(seed + 1)), seed + 1)
    return Bundle(config, model, drafter)


@nnx.jit
def _forward(model, tokens):
    output = model(tokens)
    return model.logits(output.hidden), output


def uncached_logits(model, tokens, length=64):
    """Logits (T, V) of one row without a cache, padded to one compiled length (causal, so padding is harmless)."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model, jnp.asarray(padded))[0])[0, : len(tokens)]


def uncached_greedy(model, prompt, count, length=64):
    """The greedy continuation, every step recomputed."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(uncached_logits(model, ids, length)[-1].argmax()))
    return ids[len(prompt) :]


def prompts_of(lengths, vocab=64, seed=0):
    """Random prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


def script(weights, target, state, request, mode, steps, noise):
    """A drafter that knows the answer and errs on purpose.

    weights: right int32 (B, L), the tokens by position; wrong_step bool (>= steps,), draft steps that err in every
    round; wrong_at bool (B, L), positions at which any draft errs.
    """
    position = state.lengths[:, None] + 1 + jnp.arange(steps, dtype=jnp.int32)[None]
    position = jnp.minimum(position, weights["right"].shape[1] - 1)
    right = jnp.take_along_axis(weights["right"], position, axis=1)
    wrong = jnp.take_along_axis(weights["wrong_at"], position, axis=1) | weights["wrong_step"][None, :steps]
    return jnp.where(wrong, (right + 1) % target.config.vocab_size, right)


def script_weights(prompts, answers, length=96, wrong_step=(), wrong_at=None):
    """Arguments of ``script`` for prompts and their right continuations."""
    right = np.zeros((len(prompts), length), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = [*prompt, *answer][:length]
        right[row, : len(whole)] = whole
    steps = np.zeros(32, bool)
    steps[list(wrong_step)] = True
    at = np.zeros(right.shape, bool) if wrong_at is None else wrong_at
    return {"right": jnp.asarray(right), "wrong_step": jnp.asarray(steps), "wrong_at": jnp.asarray(at)}
