"""Weights laid out for reading: per-layer arrays, fused projections, products that never take a slow path.

Axis letters: D model width, F feed-forward width, O outputs, I inputs, V vocabulary.

Training keeps its layers stacked; slices of a stack inside a compiled loop cost several times a plain array, so
sampling takes a list of layers with arrays of their own. Projections of one input are one array: q/k/v ``(O_q + O_k +
O_v, D)``, gate/up ``(2F, D)``.

Packed weights that are read in blocks (``packed.reads_blocks``) stay stacked, and their layers run in a loop: a block is
cut out of a stack as it is out of a matrix, and the compiler sees one layer of each kind instead of all (48 layers of
the 12B: 20 seconds and 0.6 GB a program).
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.model.attention import Attention
from gemma4_jax.model.cache import SMALL, LayerCache, cache_entries
from gemma4_jax.model.decoder import Block, Gemma4, runs_of, scanned_layers
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.layers import Embedder, FeedForward, Linear, soft_cap
from gemma4_jax.model.products import product
from gemma4_jax.packed import Quantized, QuantizedEmbedder
from gemma4_jax.sample import reduced
from gemma4_jax.sample.columns import column_product, inputs_first, paired, paired_product
from gemma4_jax.sample.packed import ReadPacked, ReadPackedEmbedder, are_packed, free

log = logging.getLogger(__name__)

FEW = 16  # tokens of a round; more are a prompt's


def read_matmul(
    x: jax.Array, weight: jax.Array, turned: bool = False, widened: bool = False, dtype=jnp.float32
) -> jax.Array:
    """``x @ weight.T`` for few rows, added in f32: x (..., I), weight (O, I) -> (..., O) in ``dtype``. turned: weight is
    (I, O), or pairs (I/2, O) as ``columns.paired`` makes them.

    widened: weight holds bf16 numbers that meet x in f32. The input is kept out of the product's loop by a barrier, else XLA:CPU
    recomputes what is fused into it for every output. One row of bf16 is padded to two: XLA:CPU has a fast form for two rows
    only (7 to 13 times that for one). On GPUs one row is a sum (``gemma4_jax.sample.reduced``).
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32 if widened else x.dtype)
    if jax.default_backend() == "gpu":
        y = _gpu_matmul(rows, weight, dtype)
    elif turned:
        y = _turned_matmul(rows, weight).astype(dtype)
    else:
        count = len(rows)
        if count == 1 and weight.dtype == jnp.bfloat16:
            rows = jnp.pad(rows, ((0, 1), (0, 0)))
        rows = jax.lax.optimization_barrier(rows)
        y = product("mi,oi->mo", rows, weight.astype(rows.dtype))[:count].astype(dtype)
    return y.reshape(*x.shape[:-1], -1)


def _turned_matmul(rows: jax.Array, weight: jax.Array) -> jax.Array:
    if weight.dtype == jnp.uint32:
        return paired_product(rows, weight)
    if len(rows) == 1 and rows.dtype == jnp.float32 and weight.size > SMALL:
        return column_product(rows, weight)
    rows = jax.lax.optimization_barrier(rows)
    return product("mi,io->mo", rows, weight.astype(rows.dtype))


def _gpu_matmul(rows: jax.Array, weight: jax.Array, dtype) -> jax.Array:
    if len(rows) == 1:
        return reduced.row_product(rows, weight).astype(dtype)
    # The product itself rounds to ``dtype``: many rows in f32 would be written and read once more.
    return jnp.einsum("mi,oi->mo", rows, weight.astype(rows.dtype), preferred_element_type=dtype)


def _turned(weight: jax.Array, often: bool) -> jax.Array | None:
    """The form with inputs first where that is the better one, on CPUs: f32 (I, O), or bf16 pairs (I/2, O); else None.

    - Small matrices, in f32. Two to eight rows cost half of what they cost with (O, I), which XLA:CPU lays out anew in each
      product. In bf16 half the bytes gain nothing, read from a cache, and one row takes half to a third of its time in f32.
    - Large ones of f32 where this machine is faster so: reading them may or may not take as long as laying them out anew.
    - Large ones of bf16 that are read ``often``, one row each: a drafter's. One row of pairs takes half of its time in (O, I),
      several take a little more.
    """
    if weight.dtype not in (jnp.float32, jnp.bfloat16) or not _on_host(weight):
        return None
    if weight.size <= SMALL or (weight.dtype == jnp.float32 and inputs_first()):
        return weight.astype(jnp.float32).T
    if weight.dtype == jnp.bfloat16 and often and weight.shape[1] % 2 == 0:
        return paired(weight)
    return None


class ReadLinear(nnx.Module):
    """A linear map for few rows. weight (out, in), or inputs first if ``turned`` (``widened``: of bf16 numbers, which meet f32);
    lora: None, or the adapters of what it was made of."""

    lora: nnx.Module | None = None

    def __init__(self, *sources: Linear, columns: slice | None = None, release: bool = False, often: bool = False):
        """Several maps of one input (or of some of its ``columns``) become one, their outputs side by side. ``release`` frees the
        arrays that they were made of; often: it is read several times a round."""
        given = [source.weight[...] for source in sources]
        weights = given if columns is None else [weight[:, columns] for weight in given]
        weight = weights[0] if len(weights) == 1 else jnp.concatenate(weights)
        turned = _turned(weight, often)
        self.turned = turned is not None
        self.widened = self.turned and weight.dtype == jnp.bfloat16
        self.weight = nnx.Param(turned if self.turned else weight)
        if release and (self.turned or len(given) > 1):
            jax.block_until_ready(self.weight[...])
            free(given)
        if any(source.lora is not None for source in sources):
            self.lora = ReadAdapters(sources, columns)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., out) in x's dtype."""
        return self.unrounded(x, x.dtype).astype(x.dtype)

    def unrounded(self, x: jax.Array, dtype) -> jax.Array:
        """x (..., in) in f32 or ``dtype`` -> (..., out) in f32, for what computes in f32 and rounds to ``dtype`` after that. On
        GPUs in ``dtype``: f32 has to be written there, and read once more."""
        x = x if self.widened else x.astype(dtype)
        result = dtype if jax.default_backend() == "gpu" else jnp.float32
        y = read_matmul(x, self.weight[...], self.turned, self.widened, result)
        return y if self.lora is None else y + self.lora(x)


class ReadAdapters(nnx.Module):
    """The shares of several maps' adapters side by side; zeros where a map has none.

    They stay beside the weights: packed or bf16 weights would lose most of so small a change.
    """

    def __init__(self, sources: Sequence[Linear], columns: slice | None):
        self.widths = tuple(_outputs(source) for source in sources)
        self.parts = nnx.Dict({str(i): s.lora.part(columns) for i, s in enumerate(sources) if s.lora is not None})

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., out) in x's dtype."""
        zeros = {str(i): jnp.zeros((*x.shape[:-1], width), x.dtype) for i, width in enumerate(self.widths)}
        shares = zeros | {i: adapter(x) for i, adapter in self.parts.items()}
        return jnp.concatenate(list(shares.values()), axis=-1)


def _outputs(source: Linear) -> int:
    """Outputs of a map."""
    return (source.scale if are_packed([source]) else source.weight)[...].shape[-2]


def read_linear(
    *sources: Linear, columns: slice | None = None, release: bool = False, often: bool = False
) -> ReadLinear | ReadPacked:
    """Several maps of one input (or of some of its ``columns``) for reading, see ``ReadLinear``; packed ones stay as they are."""
    if not are_packed(sources):
        return ReadLinear(*sources, columns=columns, release=release, often=often)
    packed = ReadPacked(*sources, columns=columns)
    if any(source.lora is not None for source in sources):
        packed.lora = ReadAdapters(sources, columns)
    return packed


class ReadAttention(Attention):
    """An ``Attention`` whose q, k and v projections are one product, rounded once normalised and turned; its output is rounded by
    what reads it."""

    def __init__(self, source: Attention, release: bool = False):
        self.config, self.kind = source.config, source.kind
        parts = [source.q_proj, source.k_proj] + ([] if source.v_proj is None else [source.v_proj])
        self.splits = tuple(_outputs(part) for part in parts)
        self.qkv_proj = read_linear(*parts, release=release)
        self.o_proj = read_linear(source.o_proj, release=release)
        self.q_norm, self.k_norm = source.q_norm, source.k_norm

    def qkv(self, x, rope):
        """See ``Attention.qkv``."""
        return tuple(y.astype(x.dtype) for y in super().qkv(x, rope))

    def __call__(self, x, rope, attend):
        """See ``Attention``; the output is f32."""
        o, aux = attend(self, *self.qkv(x, rope))
        return self.o_proj.unrounded(o.reshape(*x.shape[:-1], -1), x.dtype), aux

    def project(self, x):
        """See ``Attention.project``; f32."""
        y = self.qkv_proj.unrounded(x, x.dtype)
        q, k = y[..., : self.splits[0]], y[..., self.splits[0] : sum(self.splits[:2])]
        return q, k, k if len(self.splits) == 2 else y[..., sum(self.splits[:2]) :]


class ReadFeedForward(nnx.Module):
    """The gated feed-forward with gate and up as one product."""

    def __init__(self, source: FeedForward, release: bool = False, often: bool = False):
        self.gate_up_proj = read_linear(source.gate_proj, source.up_proj, release=release, often=often)
        self.down_proj = read_linear(source.down_proj, release=release, often=often)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D); f32."""
        gate, up = jnp.split(self.gate_up_proj.unrounded(x, x.dtype), 2, axis=-1)
        y = jax.nn.gelu(gate, approximate=True) * up
        return self.down_proj.unrounded(y, x.dtype)


class ReadEmbedder(Embedder):
    """The shared table, read as input rows and as output head. table (V, D); head: None, or a small table's f32 (D, V).

    With ``head_only`` it is read as a drafter's output head alone, and held once in any case: the head may have any form then.
    """

    def __init__(self, source: Embedder, head_only: bool = False):
        table = source.table[...]
        turned = _turned(table, often=True) if head_only or table.size <= SMALL else None
        self.table = None if turned is not None and head_only else source.table
        self.widened = turned is not None and table.dtype == jnp.bfloat16
        self.head = None if turned is None else nnx.Param(turned)
        bits = None if self.table is None else _bits(table)
        self.bits = None if bits is None else Bits(bits)

    def rows(self, tokens: jax.Array) -> jax.Array:
        """See ``Embedder.rows``. They are taken from ``bits`` where there are any."""
        table = self.table[...]
        if self.bits is None:
            return _rows(table, tokens)
        return jax.lax.bitcast_convert_type(_rows(self.bits[...], tokens), table.dtype)

    def decode(self, hidden: jax.Array, softcap: float | None = None) -> jax.Array:
        """f32 logits: hidden (..., D) -> (..., V)."""
        if self.head is not None:
            return soft_cap(read_matmul(hidden, self.head[...], turned=True, widened=self.widened), softcap)
        return soft_cap(read_matmul(hidden, self.table[...]), softcap)


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows (B, T, D) of a table (V, D). XLA:CPU lets its threads share even a gather of four rows, and waiting for each other
    takes them ten times as long as the rows do."""
    if tokens.size > FEW or jax.default_backend() != "cpu":
        return table[tokens]
    rows = [jax.lax.dynamic_index_in_dim(table, token, keepdims=False) for token in tokens.reshape(-1)]
    return jnp.stack(rows).reshape(*tokens.shape, -1)


class Bits(nnx.Variable):
    """A bf16 table as uint16, in the same memory."""


def _bits(table: jax.Array) -> jax.Array | None:
    """XLA:CPU has no bf16 gather: it would convert the whole table to f32 before each run of the decoding loop."""
    if table.dtype != jnp.bfloat16 or not _on_host(table):
        return None
    return jax.device_put(np.asarray(table).view(np.uint16), next(iter(table.devices())))


def _read_embedder(source: Embedder, head_only: bool = False) -> ReadEmbedder | ReadPackedEmbedder:
    return ReadPackedEmbedder(source) if isinstance(source, QuantizedEmbedder) else ReadEmbedder(source, head_only)


class ReadDrafter(Drafter):
    """A drafter laid out for reading; ``pre_projection`` is held as its two halves."""

    def __init__(self, source: Drafter):
        self.config = source.config
        width = self.config.hidden_size
        self.embedder = _read_embedder(source.embedder, head_only=True)
        self.embedding_projection = read_linear(source.pre_projection, columns=slice(None, width), often=True)
        self.hidden_projection = read_linear(source.pre_projection, columns=slice(width, None), often=True)
        self.post_projection = read_linear(source.post_projection, often=True)
        self.layers = nnx.List([_readable(block, often=True) for block in source.layers])
        self.final_norm = source.final_norm
        if self.config.drafter.use_ordered_embeddings:
            self.centroids, self.token_ordering = source.centroids, source.token_ordering

    def project_embedding(self, embedding):
        """See ``Drafter.project_embedding``."""
        return self.embedding_projection(embedding)

    def project_hidden(self, hidden):
        """See ``Drafter.project_hidden``."""
        return self.hidden_projection(hidden)


class ReadStack(nnx.Module):
    """Like layers that run in a loop: ``count`` in each group. Arrays of ``block`` have two leading axes (group, layer), those
    of packed weights among them."""

    def __init__(self, run: Block, count: int):
        self.block, self.count = _readable(run), count

    def layer(self, place: jax.Array) -> Block:
        """One layer, by its place in the stack (leading axes counted as one). Its packed products are told the place; other
        arrays are small, and cut out."""
        graph, state = nnx.split(self.block)

        def cut(variable):
            if isinstance(variable, Quantized):
                return variable
            leaf = variable.get_value()
            return variable.replace(leaf.reshape(-1, *leaf.shape[2:])[place])

        block = nnx.merge(graph, jax.tree.map(cut, state, is_leaf=lambda node: isinstance(node, nnx.Variable)))
        for _, node in nnx.iter_modules(block):
            if isinstance(node, ReadPacked):
                node.place = place
        return block


class ReadTarget(nnx.Module):
    """The decoder laid out for reading: embedder, stacks (``ReadStack``: layers that run in a loop), blocks (one for each
    other layer), final_norm.

    looped: leave stacked layers stacked; their matrices must be packed, for a product that ``reads_blocks``. ``release``
    frees the stacked arrays of ``model`` while they are copied, so that weights are held once; its blocks cannot be used
    any more then, its embedders can.
    """

    def __init__(self, model: Gemma4, release: bool = False, looped: bool = False):
        self.config = model.config
        kinds, self.repeats = scanned_layers(model.config)
        self.looped = looped and self.repeats > 0
        if self.looped:
            log.info("%d layers run in a loop over stacked weights", self.repeats * len(kinds))
        self.embedder = _read_embedder(model.embedder)
        runs = zip(model.groups.runs, runs_of(kinds), strict=True) if self.looped else ()
        self.stacks = nnx.List([ReadStack(run, count) for run, (_, count) in runs])
        blocks = model.tail if self.looped else _blocks(model, release)
        self.blocks = nnx.List([_readable(block, release) for block in blocks])
        self.final_norm = model.final_norm

    def layers(self, x: jax.Array, ropes, attend, caches: tuple[LayerCache, ...]):
        """All layers: x (B, T, D) -> (B, T, D), and the new caches.

        Args:
          ropes: by layer kind.
          attend: ``DecodeAttend`` or ``PrefillAttend``.
          caches: as ``init_cache`` lays them out (``stacked`` if looped).
        """
        batch, count = len(x), len(self.stacks)

        def run_layer(stack, place, carry):
            block = stack.layer(place)
            return block(carry[0], ropes[block.kind], attend.layer(carry[1], place * batch))

        def run_group(group, carry):
            x, caches = carry[0], list(carry[1])
            for i, stack in enumerate(self.stacks):
                start, run = group * stack.count, functools.partial(run_layer, stack)
                x, caches[i] = jax.lax.fori_loop(start, start + stack.count, run, (x, caches[i]))
            return x, tuple(caches)

        done = caches[:count]
        if self.looped:
            x, done = jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.repeats), run_group, (x, done))
        for block, cache in zip(self.blocks, caches[count:], strict=True):
            x, new = block(x, ropes[block.kind], attend.layer(cache))
            if x.shape[1] > FEW and jax.default_backend() == "gpu":
                # The next layer waits for this one's keys and values to be written. XLA would leave that to the end, and hold
                # what they are made of until then: 27 MB a layer of the 12B for 1024 tokens.
                x = jax.lax.optimization_barrier((x, new))[0]
            done = (*done, new)
        return x, done

    def last_cache(self, kind: str, caches: tuple[LayerCache, ...], batch: int) -> tuple[LayerCache, int]:
        """The cache of the last layer of a kind, and where its rows begin there."""
        entries = cache_entries(self.config, self.looped)
        index = max(i for i, (own, _) in enumerate(entries) if own == kind)
        return caches[index], (entries[index][1] - 1) * batch

    def last_key_norm(self, kind: str) -> jax.Array:
        """The key norm (H,) of the last layer of a kind."""
        for block in reversed(self.blocks):
            if block.kind == kind:
                return block.self_attn.k_norm.weight[...]
        stack = next(stack for stack in reversed(self.stacks) if stack.block.kind == kind)
        return stack.block.self_attn.k_norm.weight[...][-1, -1]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Soft-capped f32 logits: hidden (..., D) -> (..., V)."""
        return self.embedder.decode(hidden, self.config.final_logit_softcapping)


def _blocks(model: Gemma4, release: bool) -> Iterator[Block]:
    """Layers in order; what is handed out is not held here."""
    kinds, repeats = scanned_layers(model.config)
    runs = runs_of(kinds)
    stacks = [_unstacked(run, release) for run in model.groups.runs] if repeats else []
    for _ in range(repeats):
        for stack, (_, count) in zip(stacks, runs, strict=True):
            yield from itertools.islice(stack, count)
    yield from model.tail


def _unstacked(run: Block, release: bool) -> Iterator[Block]:
    """The layers of one stack in order, all cut at once; with ``release`` its arrays are freed one by one."""
    graph, state = nnx.split(run)
    variables, tree = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    slices = []
    for variable in variables:
        leaf = variable.get_value()
        shared = isinstance(variable, Quantized) and _on_host(leaf)
        parts = _views(leaf) if shared else [leaf[index] for index in np.ndindex(*leaf.shape[:2])]
        slices.append([variable.replace(part) for part in parts])
        if release and not shared:
            jax.block_until_ready(parts)
            leaf.delete()
    return (nnx.merge(graph, jax.tree.unflatten(tree, list(parts))) for parts in _drain(slices))


def _drain(slices: list[list[Any]]) -> Iterator[list[Any]]:
    """The first of every list, then the second, …; nothing that was handed out is kept."""
    while slices[0]:
        yield [parts.pop(0) for parts in slices]


def _on_host(leaf: jax.Array) -> bool:
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"


def _views(leaf: jax.Array) -> list[jax.Array]:
    """A stack's slices in the memory of the stack (where they are aligned as the backend wants, else copies)."""
    host, device = np.asarray(leaf), next(iter(leaf.devices()))
    return [jax.device_put(host[index], device) for index in np.ndindex(*host.shape[:2])]


def _readable(block: Block, release: bool = False, often: bool = False) -> Block:
    """The layer with its projections laid out for reading (``release``: and theirs freed), sharing its other arrays."""
    block = nnx.merge(*nnx.split(block))
    attention = block.self_attn
    if isinstance(attention, Attention):
        block.self_attn = ReadAttention(attention, release)
    else:
        attention.q_proj = read_linear(attention.q_proj, often=often)
        attention.o_proj = read_linear(attention.o_proj, often=often)
    block.mlp = ReadFeedForward(block.mlp, release, often)
    return block
