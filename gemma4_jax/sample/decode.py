"""Decoding as one loop on the device; a round drafts D tokens (0: plain decoding) and verifies them in one pass.

Axis letters: B batch, T = D + 1 verified positions, D drafted tokens, E emitted tokens held on the device, V
vocabulary, S stop ids. Rows have lengths, seeds and stops of their own and never read one another. Between rounds a
row is: ``lengths`` positions in the caches, the newest token, whose keys and values do not exist yet, and the hidden
  row that gave it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.model.cache import LayerCache
from gemma4_jax.model.rope import rope_table
from gemma4_jax.sample.attend import DecodeAttend, drafter_attend
from gemma4_jax.sample.choose import Controls, Mode, choose, position_noise
from gemma4_jax.sample.prefill import Prefix
from gemma4_jax.sample.weights import ReadDrafter, ReadTarget

RUNNING, STOPPED, FULL_LENGTH = 0, 1, 2


class Request(NamedTuple):
    """What stays the same over a generation.

    controls; stop_ids: int32 (S,), -1 pads; bias: f32 (V,), -inf for suppressed tokens; limits: int32 (B,), new tokens
    wanted.
    """

    controls: Controls
    stop_ids: jax.Array
    bias: jax.Array
    limits: jax.Array


class State(NamedTuple):
    """A generation between rounds; arrays (B,) unless said otherwise.

    caches, lengths, hidden (B, D): see ``Prefix``. newest: int32, the token to be read next. emitted: int32, new
    tokens so far.
    finished: int32, RUNNING, STOPPED (by a stop id, not emitted) or FULL_LENGTH. seen: bool (B, V) for the repetition
    penalty, or None.
    """

    caches: tuple[LayerCache, ...]
    lengths: jax.Array
    hidden: jax.Array
    newest: jax.Array
    emitted: jax.Array
    finished: jax.Array
    seen: jax.Array | None


class Emission(NamedTuple):
    """What a run of the loop emitted. tokens: int32 (B, E); drafted: bool (B, E), accepted from the drafter; counts:
    int32 (B,); rounds: int32 (B,), rounds in which the row was running; accepted: int32 (B, D), how often each draft
    step was accepted in them."""

    tokens: jax.Array
    drafted: jax.Array
    counts: jax.Array
    rounds: jax.Array
    accepted: jax.Array


def begin(target: ReadTarget, prefix: Prefix, request: Request, mode: Mode, seen: jax.Array | None) -> State:
    """Choose every row's first token from the prompt's last hidden row: the state's ``newest``; ``emitted`` counts
    it."""
    logits = target.logits(prefix.hidden[:, None]) + request.bias
    noise = None
    if mode.sampled:
        noise = position_noise(request.controls.seed, prefix.lengths[:, None], logits.shape[-1])
    newest = choose(logits, request.controls, mode, noise, None if seen is None else seen[:, None])[:, 0]
    stopped = _is_stop(newest, request.stop_ids)
    emitted = jnp.where(stopped, 0, 1).astype(jnp.int32)
    finished = jnp.where(stopped, STOPPED, jnp.where(emitted >= request.limits, FULL_LENGTH, RUNNING)).astype(jnp.int32)
    return State(prefix.caches, prefix.lengths, prefix.hidden, newest, emitted, finished, seen)


def verify(target: ReadTarget, state: State, tokens: jax.Array) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """One pass of the target over T tokens (B, T) behind every row: new caches and hidden rows (B, T, D)."""
    config = target.config
    positions = state.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    ropes = {kind: rope_table(config, kind, positions) for kind in dict.fromkeys(config.layer_types)}
    attend = DecodeAttend(config, state.lengths)
    x = target.embedder.encode(tokens, jnp.dtype(config.dtype))
    x, caches = target.layers(x, ropes, attend, state.caches)
    return caches, target.final_norm(x)


def draft(
    target: ReadTarget, drafter, state: State, request: Request, mode: Mode, steps: int, noise: jax.Array | None
) -> jax.Array:
    """D = ``steps`` tokens that may follow each row's newest: int32 (B, D).

    Args:
      drafter: ``ReadDrafter``, or a function of the other arguments that takes its place.
      noise: (B, D + 1, V), of the positions behind the newest token.
    """
    if not isinstance(drafter, ReadDrafter):
        return drafter(target, state, request, mode, steps, noise)
    config = target.config
    kinds = tuple(dict.fromkeys(config.drafter.layer_types))
    ropes = {kind: rope_table(config, kind, state.lengths[:, None]) for kind in kinds}
    attend = drafter_attend(
        config,
        {kind: target.last_cache(kind, state.caches, len(state.lengths)) for kind in kinds},
        {kind: target.last_key_norm(kind) for kind in kinds},
        state.lengths,
    )

    def step(carry, noise):
        token, hidden, seen = carry
        seen = _mark(seen, token)
        embedding = target.embedder.encode(token[:, None], hidden.dtype)
        y, hidden = drafter.step(drafter.project_embedding(embedding), hidden, ropes, attend)
        logits = drafter.logits(y) + request.bias
        step_noise = None if noise is None else noise[:, None]
        token = choose(logits, request.controls, mode, step_noise, None if seen is None else seen[:, None])[:, 0]
        return (token, hidden, seen), token

    start = state.newest, state.hidden[:, None], state.seen
    each = None if noise is None else noise[:, :steps].swapaxes(0, 1)
    return jax.lax.scan(step, start, each, length=steps)[1].swapaxes(0, 1)


def decode_rounds(
    target: ReadTarget,
    drafter,
    state: State,
    request: Request,
    max_rounds: jax.Array,
    *,
    steps: int,
    mode: Mode,
    buffer: int,
) -> tuple[State, Emission]:
    """Rounds until ``max_rounds`` are done, every row is finished, or the next round might not fit the buffer.

    Args:
      drafter: see ``draft``; unused when ``steps`` is 0.
      steps: D, drafted tokens a round.
      buffer: E.
    """
    rows, width = state.lengths.shape[0], steps + 1
    empty = Emission(
        jnp.zeros((rows, buffer), jnp.int32),
        jnp.zeros((rows, buffer), jnp.bool_),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, steps), jnp.int32),
    )

    def go_on(carry):
        done, state, out = carry
        fits = jnp.max(out.counts) + width <= buffer
        return (done < max_rounds) & fits & jnp.any(state.finished == RUNNING)

    def one_round(carry):
        done, state, out = carry
        state, out = _round(target, drafter, state, request, out, steps, mode)
        return done + 1, state, out

    _, state, out = jax.lax.while_loop(go_on, one_round, (jnp.int32(0), state, empty))
    return state, out


def _round(target, drafter, state: State, request: Request, out: Emission, steps: int, mode: Mode):
    config = target.config
    noise = None
    if mode.sampled:
        ahead = state.lengths[:, None] + 1 + jnp.arange(steps + 1, dtype=jnp.int32)[None]
        noise = position_noise(request.controls.seed, ahead, config.vocab_size)
    tokens = state.newest[:, None]
    if steps:
        drafts = draft(target, drafter, state, request, mode, steps, noise)
        tokens = jnp.concatenate([tokens, drafts], axis=1)
    caches, hidden = verify(target, state, tokens)
    logits = target.logits(hidden) + request.bias
    chosen = choose(logits, request.controls, mode, noise, _seen_rows(state.seen, tokens))
    return _accept(state, request, out, caches, hidden, tokens, chosen)


def _accept(state: State, request: Request, out: Emission, caches, hidden, tokens, chosen):
    """Keep the drafts that equal the target's own choices: the round emits those, and the choice behind them."""
    width = tokens.shape[1]
    running = state.finished == RUNNING
    index = jnp.arange(width, dtype=jnp.int32)[None]
    agree = jnp.cumprod(tokens[:, 1:] == chosen[:, :-1], axis=1, dtype=jnp.int32)
    reach = 1 + jnp.sum(agree, axis=1, dtype=jnp.int32)  # chosen[:reach] are right
    stops = _is_stop(chosen, request.stop_ids) & (index < reach[:, None])
    stop_at = jnp.min(jnp.where(stops, index, width), axis=1)
    room = request.limits - state.emitted
    count = jnp.where(running, jnp.minimum(jnp.minimum(reach, stop_at), room), 0)
    ending = jnp.where(stop_at < jnp.minimum(reach, room), STOPPED, jnp.where(reach >= room, FULL_LENGTH, RUNNING))
    finished = jnp.where(running, ending, state.finished).astype(jnp.int32)
    goes_on = finished == RUNNING
    newest = jnp.take_along_axis(chosen, reach[:, None] - 1, axis=1)[:, 0]
    last = jnp.take_along_axis(hidden, reach[:, None, None] - 1, axis=1)[:, 0]
    new = State(
        caches,
        jnp.where(goes_on, state.lengths + reach, state.lengths),
        jnp.where(goes_on[:, None], last, state.hidden),
        jnp.where(goes_on, newest, state.newest),
        state.emitted + count,
        finished,
        _mark_first(state.seen, tokens, jnp.where(goes_on, reach, 0)),
    )
    places, kept = out.counts[:, None] + index, index < count[:, None]
    out = Emission(
        _scatter(out.tokens, chosen, places, kept),
        _scatter(out.drafted, index < reach[:, None] - 1, places, kept),
        out.counts + count,
        out.rounds + running,
        out.accepted + agree * running[:, None],
    )
    return new, out


def _scatter(buffer, values, places, keep):
    rows = jnp.arange(buffer.shape[0], dtype=jnp.int32)[:, None]
    return buffer.at[rows, jnp.where(keep, places, buffer.shape[1])].set(values, mode="drop")


def _is_stop(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    return jnp.any(tokens[..., None] == stop_ids, axis=-1)


def _mark(seen, token):
    """seen (B, V) with token (B,) added; None stays None."""
    if seen is None:
        return None
    return seen | (jnp.arange(seen.shape[1], dtype=jnp.int32)[None] == token[:, None])


def _seen_rows(seen, tokens):
    """(B, T, V): what has been seen at each of T positions, the position's own token included."""
    if seen is None:
        return None
    rows = []
    for t in range(tokens.shape[1]):
        seen = _mark(seen, tokens[:, t])
        rows.append(seen)
    return jnp.stack(rows, axis=1)


def _mark_first(seen, tokens, count):
    """seen (B, V) with the first ``count`` (B,) of tokens (B, T) added."""
    if seen is None:
        return None
    for t in range(tokens.shape[1]):
        seen = jnp.where((t < count)[:, None], _mark(seen, tokens[:, t]), seen)
    return seen
