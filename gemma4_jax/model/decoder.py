"""The shared-embedding decoder.

Axis letters: B batch, T positions, D model width, K key/value heads, H head width, V vocabulary.

The layer pattern (5 sliding + 1 global in the 12B) is one ``Group``: runs of like blocks, each run stacked along an axis
and run with ``nnx.scan``; the groups are stacked and scanned in turn. So compile time does not grow with depth, and no more
than one layer's recomputed values are alive in the backward pass. Sampling takes the same blocks unstacked (``unstack``).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.attention import Attend, Attention, Rope, masked_attention
from gemma4_jax.model.audio import AudioEmbedder
from gemma4_jax.model.layers import Embedder, FeedForward, LayerScalar, RMSNorm
from gemma4_jax.model.masks import attention_band, make_masks
from gemma4_jax.model.remat import CUT, remat, remat_apart
from gemma4_jax.model.rope import rope_table
from gemma4_jax.model.vision import VisionEmbedder, place_media

BATCH_AXES = ("data", "fsdp")  # of a mesh: those over which rows of a batch are cut

KeysValues = tuple[jax.Array, jax.Array]


class DecoderOutput(NamedTuple):
    """What a forward pass gives.

    hidden: (B, T, D), after the final norm.
    kv: layer kind -> keys and values (B, T, K, H) of the last layer of that kind, keys after norm and RoPE.
    """

    hidden: jax.Array
    kv: dict[str, KeysValues]


class Block(nnx.Module):
    """One decoder layer: two normed sub-layers with normed outputs, the whole multiplied by ``layer_scalar`` (1,)."""

    def __init__(self, width: int, hidden: int, eps: float, attention: nnx.Module, *, dtype, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(width, eps, dtype=dtype)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(width, eps, dtype=dtype)
        self.pre_feedforward_layernorm = RMSNorm(width, eps, dtype=dtype)
        self.mlp = FeedForward(width, hidden, dtype=dtype, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(width, eps, dtype=dtype)
        self.layer_scalar = LayerScalar(jnp.ones((1,), dtype))

    @property
    def kind(self) -> str:
        """Layer kind of its attention."""
        return self.self_attn.kind

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """x (B, T, D) -> (B, T, D), and what ``attend`` returned beside its output."""
        x = rows_apart(x)
        o, aux = self.self_attn(self.input_layernorm(x), rope, attend)
        x = x + self.post_attention_layernorm(o).astype(x.dtype)  # sub-layers for sampling may give f32
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))).astype(x.dtype)
        return x * self.layer_scalar[...].astype(x.dtype), aux


def rows_apart(x: jax.Array) -> jax.Array:
    """x (B, …) with its rows cut over the batch axes of the mesh in context (``jax.sharding.use_abstract_mesh``), if any.

    Left to itself the compiler cuts activations as the weights' ``embed`` axis is, and then gathers and adds up those of all
    rows in every layer, instead of gathering one layer's weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def decoder_block(config: ModelConfig, kind: str, rngs: nnx.Rngs) -> Block:
    """A target layer of one kind with fresh weights."""
    return Block(
        config.hidden_size,
        config.intermediate_size,
        config.rms_norm_eps,
        Attention(config, kind, rngs=rngs),
        dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


class Group(nnx.Module):
    """The repeating part of the layer pattern. runs: one stack of blocks for each run of equal kinds, in order."""

    def __init__(self, config: ModelConfig, kinds: tuple[str, ...], rngs: nnx.Rngs):
        self.config = config
        self.runs = nnx.List([_stack(count, _block_maker(config, kind), rngs) for kind, count in runs_of(kinds)])


class _Run(NamedTuple):
    """A run of like layers in every group, as a pure value: arrays of ``state`` have two leading axes (group, layer)."""

    kind: str
    graph: Any
    state: Any
    count: int

    def __call__(self, config: ModelConfig, g: jax.Array, carry, rope: Rope, attend: Attend):
        """The layers of group ``g`` one by one, whose ``attend`` gives (k, v) beside its output; carry: x and the last (k, v)."""

        def step(state, x, i):
            return _block_at(self.graph, state, g, i)(x, rope, attend)

        def layer(carry, i):
            return remat(config, step)(self.state, carry[0], i), None

        return jax.lax.scan(layer, carry, jnp.arange(self.count, dtype=jnp.int32))[0]


def _block_at(graph, state, g: jax.Array, i: jax.Array) -> Block:
    """Layer ``i`` of group ``g``.

    A slice of the whole stack, not of an array that the loops were given: those would cut every group's weights out of the
    stack and pile its gradients up in an array of their own before they reach the stack's.
    """

    def cut(leaf):
        start = (g, i, *(jnp.int32(0),) * (leaf.ndim - 2))
        return checkpoint_name(jax.lax.dynamic_slice(leaf, start, (1, 1, *leaf.shape[2:]))[0, 0], CUT)

    return nnx.merge(graph, jax.tree.map(cut, state))


def _block_maker(config: ModelConfig, kind: str):
    return lambda rngs: decoder_block(config, kind, rngs)


def _stack(count: int, make, rngs: nnx.Rngs):
    """``count`` modules that ``make(rngs)`` gives, their arrays stacked along a new leading axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return make(rngs)

    return stack(rngs)


def _attend(config: ModelConfig, kind: str, mask: jax.Array, has_media: bool) -> Attend:
    """Attention to all that the mask of a layer kind (``make_masks``) allows, with (k, v) beside its output."""
    band = attention_band(config, kind, has_media)

    def attend(_, q, k, v):
        return masked_attention(q, k, v, mask, config.attention_scale, band), (k, v)

    return attend


def layer_pattern(layer_types: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The shortest (group + tail) description of a layer list.

    Returns:
      (kinds of the group, repeats); layers beyond ``len(group) * repeats`` are the tail.
    """
    n = len(layer_types)
    best = (n, layer_types, 1)
    for period in range(1, n):
        repeats = 1
        while layer_types[repeats * period : (repeats + 1) * period] == layer_types[:period]:
            repeats += 1
        cost = period + n - period * repeats
        if cost < best[0]:
            best = (cost, layer_types[:period], repeats)
    return best[1], best[2]


def scanned_layers(config: ModelConfig) -> tuple[tuple[str, ...], int]:
    """The layers that are stacked: kinds of a group and repeats (``layer_pattern``); none with ``scan_layers=False``."""
    return layer_pattern(config.layer_types) if config.scan_layers else ((), 0)


def runs_of(kinds: tuple[str, ...]) -> list[tuple[str, int]]:
    """Runs of equal kinds: (kind, count) in order."""
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]


def layer_places(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Where each layer lives, in order: path below the model, and its index in the leading axes of the arrays there.

    ``("groups/runs/R", (group, place in the run))``, or ``("tail/J", ())``.
    """
    kinds, repeats = scanned_layers(config)
    runs = runs_of(kinds)
    places: list[tuple[str, tuple[int, ...]]] = [
        (f"groups/runs/{r}", (g, i)) for g in range(repeats) for r, (_, count) in enumerate(runs) for i in range(count)
    ]
    return places + [(f"tail/{j}", ()) for j in range(config.num_hidden_layers - len(places))]


def is_stacked(name: str) -> bool:
    """Whether a parameter of that flat name (``model/groups/runs/0/…``) is a stack of layers."""
    return name.startswith("model/groups/")


class Gemma4(nnx.Module):
    """The network. Attributes: embedder, groups (stacked: groups first, then layers of a run; or None), tail (list),
    final_norm, vision, audio.

    Raises nothing of its own: shapes are checked where data enters (pipeline, sampler, ``g4.logits``).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        self.config = config
        self.embedder = Embedder(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        kinds, repeats = scanned_layers(config)
        self.groups = _stack(repeats, lambda rngs: Group(config, kinds, rngs), rngs) if repeats else None
        rest = config.layer_types[len(kinds) * repeats :]
        self.tail = nnx.List([decoder_block(config, kind, rngs) for kind in rest])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.vision = VisionEmbedder(config, rngs=rngs) if config.vision else None
        self.audio = AudioEmbedder(config, rngs=rngs) if config.audio else None

    def embed(self, tokens: jax.Array, media=None) -> jax.Array:
        """Decoder inputs: tokens (B, T) int32 -> (B, T, D); media rows replace their placeholders, unscaled."""
        dtype = jnp.dtype(self.config.dtype)
        if media is None:
            return self.embedder.encode(tokens, dtype)
        return place_media(self, tokens, media)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        media=None,
    ) -> DecoderOutput:
        """Whole rows at once.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32, restarting in each packed example; None: 0…T-1.
          segment_ids: (B, T) int32, 0 padding; None: one example a row.
          token_types: (B, T) int32 (0 text, 1 image, 2 video, 3 audio); None: all text.
          media: ``gemma4_jax.media`` inputs, or None.
        """
        config = self.config
        length = tokens.shape[1]
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        x = self.embed(tokens, media)
        ropes = {kind: rope_table(config, kind, positions) for kind in dict.fromkeys(config.layer_types)}
        masks = make_masks(config, length, segment_ids, token_types)
        has_media = token_types is not None
        x, kv = (x, {}) if self.groups is None else self._run_groups(x, ropes, masks, has_media)
        for index, block in enumerate(self.tail, config.num_hidden_layers - len(self.tail)):
            kind, (graph, state) = block.kind, nnx.split(block)
            is_read = index == last_of_kind(config, kind)

            def step(state, x, rope, mask, graph=graph, kind=kind, is_read=is_read):
                x, kv = nnx.merge(graph, state)(x, rope, _attend(config, kind, mask, has_media))
                return x, kv if is_read else None

            x, found = remat_apart(config, step)(state, x, ropes[kind], masks[kind])
            if is_read:
                kv[kind] = found
        return DecoderOutput(self.final_norm(x), kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Soft-capped f32 logits: hidden (..., D) -> (..., V)."""
        return self.embedder.decode(hidden, self.config.final_logit_softcapping)

    def _run_groups(self, x, ropes, masks, has_media):
        config = self.config
        attends = {kind: _attend(config, kind, mask, has_media) for kind, mask in masks.items()}
        empty = {kind: _empty_kv(config, kind, x) for kind in dict.fromkeys(config.layer_types)}

        kinds, repeats = scanned_layers(config)
        runs = [
            _Run(kind, *nnx.split(stack), count)
            for (kind, count), stack in zip(runs_of(kinds), self.groups.runs, strict=True)
        ]

        def group(carry, g):
            x, kv = carry[0], dict(carry[1])
            for run in runs:
                x, kv[run.kind] = run(config, g, (x, kv[run.kind]), ropes[run.kind], attends[run.kind])
            return (x, kv), None

        return jax.lax.scan(group, (x, empty), jnp.arange(repeats, dtype=jnp.int32))[0]


def _empty_kv(config: ModelConfig, kind: str, x: jax.Array) -> KeysValues:
    shape = (*x.shape[:2], config.kv_heads(kind), config.head_width(kind))
    return jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)


def unstack(model: Gemma4) -> list[Block]:
    """The blocks in layer order, each with weights of its own sliced out of the stack (a copy: for sampling)."""
    stacks = [] if model.groups is None else [nnx.split(run) for run in model.groups.runs]
    blocks = []
    for place, index in layer_places(model.config)[: model.config.num_hidden_layers - len(model.tail)]:
        graph, state = stacks[int(place.rpartition("/")[2])]
        blocks.append(nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state)))
    return [*blocks, *model.tail]


def last_of_kind(config: ModelConfig, kind: str) -> int:
    """Index of the last layer of a kind: the one whose keys and values the drafter reads."""
    return max(i for i, k in enumerate(config.layer_types) if k == kind)
