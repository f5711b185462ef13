"""The compiled functions. They belong to the module, not to a sampler: samplers of one architecture share them.

Networks come in two halves, as ``taken_apart`` makes them: a static ``Structure`` and a list of arrays. State that is
replaced is donated, so that caches are updated in place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.model.cache import init_cache
from gemma4_jax.sample import decode, prefill

_traces = 0


class Structure:
    """A module without its arrays, to be a static argument.

    A call looks its static arguments up by hash. That of a flax graph walks through all of the graph, and a flax state is
    flattened node by node: for a few layers they take as long as a round of decoding does. Here the hash is taken once, and
    the arrays are a list.
    """

    def __init__(self, graph: nnx.GraphDef, tree: jax.tree_util.PyTreeDef):
        self._parts = graph, tree
        self._hash = hash(self._parts)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, Structure) and self._parts == other._parts)

    def merge(self, weights: list[jax.Array]):
        """The module with these arrays."""
        graph, tree = self._parts
        return nnx.merge(graph, jax.tree.unflatten(tree, weights))


def taken_apart(module: nnx.Module) -> tuple[Structure, list[jax.Array]]:
    """Both halves of a module; equal modules share one structure, so that comparing them is comparing addresses."""
    graph, state = nnx.split(module)
    weights, tree = jax.tree.flatten(state)
    return _shared(Structure(graph, tree)), weights


@functools.cache
def _shared(structure: Structure) -> Structure:
    return structure


def trace_count() -> int:
    """How often any of these functions has been traced, each time to be compiled."""
    return _traces


def _traced(function):
    @functools.wraps(function)
    def counting(*args, **kwargs):
        global _traces
        _traces += 1  # runs while tracing only
        return function(*args, **kwargs)

    return counting


@functools.partial(jax.jit, static_argnames=("config", "batch", "max_length", "draft_tokens", "dtype", "stacked"))
@_traced
def empty(*, config, batch, max_length, draft_tokens, dtype, stacked) -> prefill.Prefix:
    """What prefill starts from: see ``init_cache`` for the arguments."""
    caches = init_cache(config, batch, max_length, draft_tokens, dtype, stacked)
    hidden = jnp.zeros((batch, config.hidden_size), jnp.dtype(config.dtype))
    return prefill.Prefix(caches, jnp.zeros((batch,), jnp.int32), hidden)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="prefix")
@_traced
def text_chunk(graph, weights, prefix: prefill.Prefix, counts, tokens) -> prefill.Prefix:
    """``prefill_chunk`` of token ids (B, T)."""
    target = graph.merge(weights)
    x = target.embedder.encode(tokens, jnp.dtype(target.config.dtype))
    return prefill.prefill_chunk(target, prefix, counts, x)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="prefix")
@_traced
def media_chunk(graph, weights, prefix: prefill.Prefix, counts, x, runs) -> prefill.Prefix:
    """``prefill_chunk`` of decoder inputs (B, T, D) with image runs (B, T)."""
    return prefill.prefill_chunk(graph.merge(weights), prefix, counts, x, runs)


@functools.partial(jax.jit, static_argnames=("graph", "mode"), donate_argnames="prefix")
@_traced
def begin(graph, weights, prefix, wanted, seen, *, mode) -> decode.State:
    """See ``decode.begin``."""
    return decode.begin(graph.merge(weights), prefix, wanted, mode, seen)


@functools.partial(
    jax.jit, static_argnames=("graph", "drafter_graph", "steps", "mode", "buffer"), donate_argnames="state"
)
@_traced
def rounds(
    graph, weights, drafter_graph, drafter_weights, state, wanted, max_rounds, *, steps, mode, buffer
) -> tuple[decode.State, decode.Emission]:
    """See ``decode.decode_rounds``. drafter_graph may be a function that takes the drafter's place: it gets
    ``drafter_weights`` and then the arguments of ``decode.draft``."""
    drafter = None
    if steps and callable(drafter_graph):
        drafter = functools.partial(drafter_graph, drafter_weights)
    elif steps:
        drafter = drafter_graph.merge(drafter_weights)
    target = graph.merge(weights)
    return decode.decode_rounds(target, drafter, state, wanted, max_rounds, steps=steps, mode=mode, buffer=buffer)
