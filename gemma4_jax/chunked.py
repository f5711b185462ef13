"""Cross-entropy, KL and argmax against a large table without ever holding all logits.

Axis letters: B batch, T positions, D width, V vocabulary, S shards, C chunks a shard, c entries a chunk.

Positions are cut into runs of at most ``token_chunk`` rows (along T, so a sharded batch stays sharded); the vocabulary
into C chunks, each taking c entries from *every* shard, so that a table split over devices is read where it lies.
The gradient is computed in the forward pass while a chunk's logits exist: with one vocabulary chunk that is three matrix
products, as in the plain form; with several, one more to have the normaliser first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.model.layers import soft_cap
from gemma4_jax.model.products import product

ABSENT = -1e30  # logit of a padding entry: finite, and no probability after the soft-cap


class ChunkSpec(NamedTuple):
    """Rows of logits at once, vocabulary entries at once, and shards of the vocabulary axis."""

    token_chunk: int = 1024
    vocab_chunk: int = 32_768
    vocab_shards: int = 1


class _Table(NamedTuple):
    """A table cut for scanning: rows (C, S, c, D) and the vocabulary id of each entry, (C, S, c)."""

    rows: jax.Array
    ids: jax.Array


def _cut_table(table: jax.Array, spec: ChunkSpec) -> _Table:
    vocab, width = table.shape
    shards = spec.vocab_shards
    per_shard = -(-vocab // shards)
    chunks = -(-per_shard * shards // spec.vocab_chunk)
    entries = -(-per_shard // chunks)
    padded = shards * chunks * entries
    if padded != vocab:
        table = jnp.pad(table, ((0, padded - vocab), (0, 0)))
    ids = jnp.arange(padded, dtype=jnp.int32).reshape(shards, chunks, entries)
    rows = table.reshape(shards, chunks, entries, width)
    return _Table(jnp.moveaxis(rows, 1, 0), jnp.moveaxis(ids, 1, 0))


def _uncut_gradient(rows: jax.Array, vocab: int) -> jax.Array:
    return jnp.moveaxis(rows, 0, 1).reshape(-1, rows.shape[-1])[:vocab]


def _cut_positions(x: jax.Array, spec: ChunkSpec) -> jax.Array:
    batch, length = x.shape[:2]
    return cut_positions(x, min(length, -(-batch * length // spec.token_chunk)))


def cut_positions(x: jax.Array, chunks: int) -> jax.Array:
    """(B, T, …) -> (chunks, B, t, …), zero-padded at the end of T."""
    batch, length = x.shape[:2]
    t = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, t * chunks - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunks, t, *x.shape[2:]), 1, 0)


def uncut_positions(x: jax.Array, length: int) -> jax.Array:
    """(chunks, B, t, …) -> (B, T, …) with T = ``length``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _logits(h: jax.Array, chunk: _Table, vocab: int, cap: float | None) -> jax.Array:
    """Capped f32 logits (B, t, S, c) of one chunk; entries beyond the vocabulary are absent (after the cap, so they stay)."""
    raw = product("BtD,vD->Btv", h, _flat_rows(chunk, h.dtype))
    return jnp.where(chunk.ids < vocab, soft_cap(raw.reshape(*h.shape[:-1], *chunk.ids.shape), cap), ABSENT)


def _flat_rows(chunk: _Table, dtype) -> jax.Array:
    """(S·c, D). With the shards as an axis of the products XLA:CPU copies the table, transposed, for each of them."""
    return chunk.rows.reshape(-1, chunk.rows.shape[-1]).astype(dtype)


def _normalizer(h: jax.Array, table: _Table, vocab: int, cap: float | None) -> jax.Array:
    """log-sum-exp of all logits of each row, f32 (B, t), with a running maximum over chunks."""
    if table.rows.shape[0] == 1:
        return jax.nn.logsumexp(_logits(h, _only_chunk(table), vocab, cap), axis=(-2, -1))

    def add(carry, chunk):
        top, total = carry
        logits = _logits(h, chunk, vocab, cap)
        new = jnp.maximum(top, logits.max((-2, -1)))
        total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None, None]).sum((-2, -1))
        return (new, total), None

    start = jnp.full(h.shape[:2], ABSENT, jnp.float32), jnp.zeros(h.shape[:2], jnp.float32)
    (top, total), _ = jax.lax.scan(add, start, table)
    return top + jnp.log(total)


def _only_chunk(table: _Table) -> _Table:
    return _Table(table.rows[0], table.ids[0])


def _target_logit(h: jax.Array, table: jax.Array, targets: jax.Array, cap: float | None) -> jax.Array:
    """The capped logit of each row's target, f32 (B, t)."""
    rows = table[targets].astype(h.dtype)
    return soft_cap(jnp.einsum("BtD,BtD->Bt", h, rows, preferred_element_type=jnp.float32), cap)


def chunked_log_probability(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, *, softcap: float | None, spec: ChunkSpec = ChunkSpec()
) -> jax.Array:
    """log p(target) of each row: hidden (B, T, D), table (V, D), targets (B, T) int32 -> f32 (B, T).

    Differentiable in hidden and table; the backward pass makes the logits anew.
    """
    return _log_probability(hidden, table, targets, softcap, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _log_probability(hidden, table, targets, softcap, spec):
    vocab, cut = table.shape[0], _cut_table(table, spec)

    def part(piece):
        h, t = piece
        return _target_logit(h, table, t, softcap) - _normalizer(h, cut, vocab, softcap)

    logs = jax.lax.map(part, (_cut_positions(hidden, spec), _cut_positions(targets, spec)))
    return uncut_positions(logs, hidden.shape[1])


def _log_probability_forward(hidden, table, targets, softcap, spec):
    return _log_probability(hidden, table, targets, softcap, spec), (hidden, table, targets)


def _log_probability_backward(softcap, spec, residuals, g):
    """A sum of log-probabilities with weights g is a cross-entropy with weights -g."""
    hidden, table, targets = residuals
    _, d_hidden, d_table = _scan_loss(hidden, table, targets, None, -g, softcap, None, spec, gradient=True)
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), _zero_cotangent(targets)


_log_probability.defvjp(_log_probability_forward, _log_probability_backward)


def chunked_argmax(hidden: jax.Array, table: jax.Array, *, spec: ChunkSpec = ChunkSpec()) -> jax.Array:
    """The most probable token of each row (the lowest id among equals): (B, T, D), (V, D) -> int32 (B, T). No gradient."""
    vocab, cut = table.shape[0], _cut_table(table, spec)

    def part(h):
        def better(carry, chunk):
            top, best = carry
            logits = _logits(h, chunk, vocab, None).reshape(*h.shape[:2], -1)
            value = logits.max(-1)
            index = chunk.ids.reshape(-1)[jnp.argmax(logits, axis=-1)]
            wins = (value > top) | ((value == top) & (index < best))
            return (jnp.where(wins, value, top), jnp.where(wins, index, best)), None

        start = jnp.full(h.shape[:2], ABSENT, jnp.float32), jnp.zeros(h.shape[:2], jnp.int32)
        return jax.lax.scan(better, start, cut)[0][1]

    return uncut_positions(jax.lax.map(part, _cut_positions(jax.lax.stop_gradient(hidden), spec)), hidden.shape[1])


def chunked_cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None,
    spec: ChunkSpec = ChunkSpec(),
) -> jax.Array:
    """Sum over rows of ``-weight * log softmax(cap(hidden @ table.T))[target]``, as an f32 scalar.

    Args:
      hidden: (B, T, D); table: (V, D); targets: (B, T) int32; weights: f32 (B, T). Rows of weight 0 contribute nothing to
        the value or to any gradient, NaN included.
      softcap: c of ``c * tanh(x / c)`` or None.

    Differentiable in hidden and table.
    """
    return _weighted_loss(hidden, table, targets, None, weights, softcap, None, spec)


def chunked_kl(
    hidden: jax.Array,
    table: jax.Array,
    teacher_hidden: jax.Array,
    teacher_table: jax.Array,
    weights: jax.Array,
    *,
    teacher_softcap: float | None,
    spec: ChunkSpec = ChunkSpec(),
) -> jax.Array:
    """Sum over rows of ``weight * KL(teacher || student)``, as an f32 scalar; no gradient reaches the teacher.

    Args:
      hidden, table: the student's (B, T, h) and (V, h), not soft-capped.
      teacher_hidden, teacher_table: (B, T, D) and (V, D), soft-capped by ``teacher_softcap``.
      weights: f32 (B, T), as in ``chunked_cross_entropy``.
    """
    teacher = jax.lax.stop_gradient((teacher_hidden, teacher_table))
    return _weighted_loss(hidden, table, None, teacher, weights, None, teacher_softcap, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _weighted_loss(hidden, table, targets, teacher, weights, cap, teacher_cap, spec):
    return _scan_loss(hidden, table, targets, teacher, weights, cap, teacher_cap, spec, gradient=False)[0]


def _weighted_loss_forward(hidden, table, targets, teacher, weights, cap, teacher_cap, spec):
    loss, d_hidden, d_table = _scan_loss(
        hidden, table, targets, teacher, weights, cap, teacher_cap, spec, gradient=True
    )
    return loss, (d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), targets, teacher, weights)


def _weighted_loss_backward(cap, teacher_cap, spec, residuals, g):
    d_hidden, d_table, targets, teacher, weights = residuals
    zero = jax.tree.map(_zero_cotangent, (targets, teacher))
    scale = lambda x: (g * x).astype(x.dtype)  # noqa: E731
    return scale(d_hidden), scale(d_table), *zero, jnp.zeros_like(weights)


def _zero_cotangent(x):
    return np.zeros(x.shape, jax.dtypes.float0) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.zeros_like(x)


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _scan_loss(hidden, table, targets, teacher, weights, cap, teacher_cap, spec, gradient: bool):
    """(loss, gradient of hidden, gradient of table), the last two None unless asked; scans runs of positions."""
    length, vocab = hidden.shape[1], table.shape[0]
    cut = _cut_table(table, spec)
    live = (weights != 0)[..., None]
    hidden = jnp.where(live, hidden, 0)  # a NaN in a masked row must not enter through 0 * NaN
    pieces = {"h": hidden, "w": weights.astype(jnp.float32)}
    if teacher is None:
        pieces["target"] = targets
    else:
        pieces["teacher"] = jnp.where(live, teacher[0], 0)
    teacher_cut = None if teacher is None else _cut_table(teacher[1], spec)
    pieces = {k: _cut_positions(v, spec) for k, v in pieces.items()}

    def piece_loss(carry, piece):
        total, d_rows = carry
        value, d_h, d_rows = _piece_loss(piece, cut, table, teacher_cut, vocab, cap, teacher_cap, d_rows)
        return (total + value, d_rows), d_h

    start = jnp.zeros((), jnp.float32), jnp.zeros(cut.rows.shape, jnp.float32) if gradient else None
    (loss, d_rows), d_h = jax.lax.scan(piece_loss, start, pieces)
    if not gradient:
        return loss, None, None
    return loss, uncut_positions(d_h, length), _uncut_gradient(d_rows, vocab)


def _piece_loss(piece, cut, table, teacher_cut, vocab, cap, teacher_cap, d_rows):
    """Loss of one run of positions, its gradient (B, t, D), and the table's gradient added to ``d_rows`` (None: no gradient)."""
    h, w = piece["h"], piece["w"]
    normalizer = _normalizer(h, cut, vocab, cap)
    if teacher_cut is None:
        nll = normalizer - _target_logit(h, table, piece["target"], cap)
        value = jnp.where(w != 0, w * nll, 0.0).sum()
        if d_rows is None:
            return value, None, None
    else:
        value = jnp.zeros((), jnp.float32)
        teacher_normalizer = _normalizer(piece["teacher"], teacher_cut, vocab, teacher_cap)

    def chunk_step(carry, scanned):
        value, d_h = carry
        chunk, teacher_chunk = scanned
        logits = _logits(h, chunk, vocab, cap)
        log_p = logits - normalizer[..., None, None]
        if teacher_chunk is None:
            expected = (chunk.ids == piece["target"][..., None, None]).astype(jnp.float32)
        else:
            teacher_log_p = _logits(piece["teacher"], teacher_chunk, vocab, teacher_cap)
            teacher_log_p = teacher_log_p - teacher_normalizer[..., None, None]
            expected = jnp.exp(teacher_log_p)
            kl = (expected * (teacher_log_p - log_p)).sum((-2, -1))
            value = value + jnp.where(w > 0, w * kl, 0.0).sum()
        if d_rows is None:
            return (value, d_h), None
        d_logits = w[..., None, None] * (jnp.exp(log_p) - expected)
        if cap is not None:
            d_logits = d_logits * (1.0 - jnp.square(logits / cap))
            d_logits = jnp.where(chunk.ids < vocab, d_logits, 0.0)
        # Both products below read it; see layers.matmul.
        d_logits = jax.lax.optimization_barrier(d_logits.astype(h.dtype).reshape(-1, chunk.ids.size))
        rows = h.reshape(-1, h.shape[-1])
        back = product("mv,vD->mD", d_logits, _flat_rows(chunk, h.dtype))
        d_chunk = product("mv,mD->vD", d_logits, rows)
        return (value, d_h + back.reshape(h.shape)), d_chunk.reshape(chunk.rows.shape)

    start = value, jnp.zeros(h.shape, jnp.float32)
    if cut.rows.shape[0] == 1:  # outside of a loop, so that the compiler shares the logits with the normaliser
        only = None if teacher_cut is None else _only_chunk(teacher_cut)
        (value, d_h), d_chunks = chunk_step(start, (_only_chunk(cut), only))
        d_chunks = None if d_chunks is None else d_chunks[None]
    else:
        (value, d_h), d_chunks = jax.lax.scan(chunk_step, start, (cut, teacher_cut))
    return value, (None if d_rows is None else d_h), (None if d_rows is None else d_rows + d_chunks)
