"""What a model takes in memory, by weight format: weights, caches, activations, and the longest context that fits a card.

Nothing is allocated: shapes come from ``jax.eval_shape``, activations from the lifetimes of the values in the traced layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

import gemma4_jax as g4
from gemma4_jax.config import ModelConfig, get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.cache import cache_bytes, init_cache
from gemma4_jax.model.decoder import decoder_block
from gemma4_jax.model.rope import rope_table
from gemma4_jax.quantize import quantize_model, with_scheme
from gemma4_jax.sample.attend import DecodeAttend, PrefillAttend
from gemma4_jax.train.state import Network

GB = 10**9
K = 1024
PARTS = {"model/embedder/": "table", "model/vision/": "media", "model/audio/": "media", "drafter/": "drafter"}
LOGIT_ARRAYS = 3  # f32 rows of the vocabulary that are alive together: scores, with suppressed tokens, chosen from


def measure(options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Flat numbers for each weight format.

    Args:
      options: ``model`` (preset), ``schemes`` ("none" or of ``SCHEMES``), ``dtype`` (of activations and unpacked weights),
        ``cache_dtype``, ``lengths`` (tokens), ``draft_tokens``, ``chunk`` (of prefill), ``cards_gb``, ``reserve_gb`` (for
        programs, allocator and driver); ``quality_source`` (a trained checkpoint, "": none) and ``quality_text`` (a file of
        held-out text): how far each format's predictions are from those in ``dtype``, over ``quality_tokens`` tokens.
      threads: unused: nothing runs.
    """
    del threads
    base = get_preset(options["model"], dtype=options["dtype"], param_dtype=options["dtype"])
    draft = options["draft_tokens"] if base.drafter else 0
    cache = {length: cache_bytes(base, length, draft, options["cache_dtype"])["total"] for length in options["lengths"]}
    per_token = cache_bytes(base, max(options["lengths"]), draft, options["cache_dtype"])["per_token"]
    activations = activation_bytes(base, options["chunk"], draft, options["cache_dtype"])
    reserve = int(options["reserve_gb"] * GB)
    results: dict[str, Any] = {
        "parameters": base.num_parameters() + base.num_parameters(drafter=True),
        "activation_bytes": activations,
        "reserve_bytes": reserve,
        "cache_bytes_per_token": per_token,
        **{f"cache_bytes_{length // K}k": size for length, size in cache.items()},
    }
    for scheme in options["schemes"]:
        name = options["dtype"] if scheme == "none" else scheme
        parts = weight_bytes(with_scheme(base, None if scheme == "none" else scheme))
        fixed = sum(parts.values()) + activations + reserve
        results |= {f"{name}_{part}_bytes": size for part, size in parts.items()}
        results[f"{name}_weight_bytes"] = sum(parts.values())
        results |= {f"{name}_total_bytes_{length // K}k": fixed + size for length, size in cache.items()}
        anchor = max(options["lengths"])
        for card in options["cards_gb"]:
            fitting = anchor + (card * GB - fixed - cache[anchor]) // per_token
            fits = fitting if fitting >= base.sliding_window else 0
            results[f"{name}_context_in_{card}gb"] = int(min(fits, base.max_position_embeddings))
    if options["quality_source"]:
        bundle = g4.load(options["quality_source"], dtype=options["dtype"])
        text = Path(options["quality_text"]).read_text(encoding="utf-8")
        results |= quality(bundle, text, [s for s in options["schemes"] if s != "none"], options["quality_tokens"])
    return results


def quality(bundle: g4.Bundle, text: str, schemes: Sequence[str], tokens: int, row: int = 256) -> dict[str, float]:
    """Perplexity of a text, and by weight format its relative change and the mean KL divergence from the given weights.

    Args:
      bundle: not quantised, with a tokenizer. text: the first ``tokens`` tokens of it, in rows of ``row``.

    Raises:
      ConfigError: a text of less than one row.
    """
    ids = bundle.tokenizer.encode(text, bos=False)[:tokens]
    rows = [[bundle.config.bos_token_id, *ids[i : i + row]] for i in range(0, len(ids) - row + 1, row)]
    if not rows:
        raise ConfigError(f"the text has {len(ids)} tokens; a row takes {row}")
    networks = {"": bundle, **{scheme: quantize_model(bundle, scheme) for scheme in schemes}}
    losses, divergences = dict.fromkeys(networks, 0.0), dict.fromkeys(schemes, 0.0)
    for one in rows:
        true = None
        for scheme, network in networks.items():
            scores = jax.nn.log_softmax(g4.logits(network, [one])[0, :-1])
            losses[scheme] -= float(jnp.mean(scores[jnp.arange(row), jnp.asarray(one[1:])])) / len(rows)
            if true is None:
                true = scores
            else:
                divergences[scheme] += float(jnp.mean(jnp.sum(jnp.exp(true) * (true - scores), axis=-1))) / len(rows)
    found = {"quality_tokens": len(rows) * row, "quality_perplexity": math.exp(losses[""])}
    for scheme in schemes:
        found[f"quality_{scheme}_kl"] = divergences[scheme]
        found[f"quality_{scheme}_perplexity_change"] = math.exp(losses[scheme] - losses[""]) - 1
    return found


def weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of ``layers``, ``table``, ``media`` and ``drafter`` as they are stored."""
    sizes = dict.fromkeys(("layers", *PARTS.values()), 0)
    for name, leaf in Network(config).shapes.items():
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "layers")
        sizes[part] += leaf.size * leaf.dtype.itemsize
    return sizes


def activation_bytes(config: ModelConfig, chunk: int, draft_tokens: int, cache_dtype: str) -> int:
    """The most that values between the layers' inputs and outputs take: a prefill chunk, a verified draft, its logits.

    An upper bound: values that a compiler fuses away are counted.
    """
    dtype = jnp.dtype(config.dtype)
    largest = 0
    for length, prefill in ((chunk, True), (draft_tokens + 1, False)):
        for kind in dict.fromkeys(config.layer_types):
            one = dataclasses.replace(config, num_hidden_layers=1, layer_types=(kind,), drafter=None, quantization=None)
            block = nnx.eval_shape(lambda one=one, kind=kind: decoder_block(one, kind, nnx.Rngs(0)))
            cache = jax.eval_shape(lambda one=one: init_cache(one, 1, 4 * chunk, draft_tokens, cache_dtype)[0])
            graph, state = nnx.split(block)

            def layer(state, cache, x, lengths, counts, one=one, graph=graph, kind=kind, prefill=prefill):
                positions = lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
                attend = PrefillAttend(one, lengths, counts) if prefill else DecodeAttend(one, lengths)
                return nnx.merge(graph, state)(x, rope_table(one, kind, positions), attend.layer(cache))

            x = jax.ShapeDtypeStruct((1, length, config.hidden_size), dtype)
            number = jax.ShapeDtypeStruct((1,), jnp.int32)
            traced = jax.make_jaxpr(layer)(state, cache, x, number, number)
            written = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))  # in place, as donated
            largest = max(largest, peak_bytes(traced.jaxpr) - written)
    logits = LOGIT_ARRAYS * (draft_tokens + 1) * config.vocab_size * 4
    return max(largest, logits) + 2 * chunk * config.hidden_size * dtype.itemsize


def peak_bytes(jaxpr) -> int:
    """The most bytes of intermediate values alive at one moment when a program runs in its written order."""
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last |= {var: i for var in eqn.invars if not isinstance(var, core.Literal)}
    last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    alive: dict[Any, int] = {}
    peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = max((peak_bytes(sub) for sub in _inner(eqn)), default=0)
        new = {var: _bytes(var.aval) for var in eqn.outvars}
        total = sum(alive.values())
        # A loop's results are its carried values, which its body counts as well.
        peak = max(peak, total + max(inner, sum(new.values())))
        alive |= {var: size for var, size in new.items() if last.get(var, -1) > i}
        alive = {var: size for var, size in alive.items() if last.get(var, -1) > i}
    return peak


def _inner(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _bytes(aval) -> int:
    return aval.size * jnp.dtype(aval.dtype).itemsize


def table(results: dict[str, Any]) -> str:
    """One Markdown row for each weight format, in GB and tokens."""
    names = [key.removesuffix("_weight_bytes") for key in results if key.endswith("_weight_bytes")]
    lengths = [key.removeprefix("cache_bytes_") for key in results if key.startswith("cache_bytes_") and key[-1] == "k"]
    cards = [key.rpartition("_")[2] for key in results if key.startswith(f"{names[0]}_context_in_")]
    head = ["weights", *(f"all at {length}" for length in lengths), *(f"context in {card[:-2]} GB" for card in cards)]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in names:
        sizes = [results[f"{name}_weight_bytes"], *(results[f"{name}_total_bytes_{length}"] for length in lengths)]
        fitting = [results[f"{name}_context_in_{card}"] for card in cards]
        cells = [f"{size / GB:.2f} GB" for size in sizes] + [f"{n:,}" if n else "no" for n in fitting]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    judged = [name for name in names if f"quality_{name}_kl" in results]
    if judged:
        lines += ["", "| | KL from unpacked weights | change of perplexity |", "|---|---|---|"]
        lines += [
            f"| {name} | {results[f'quality_{name}_kl']:.4f} | {results[f'quality_{name}_perplexity_change']:+.2%} |"
            for name in judged
        ]
    cache = ", ".join(f"{results[f'cache_bytes_{length}'] / GB:.2f} GB at {length}" for length in lengths)
    return "\n".join(
        [
            *lines,
            "",
            f"Cache: {cache}. Activations at most {results['activation_bytes'] / GB:.2f} GB, reserve "
            f"{results['reserve_bytes'] / GB:.2f} GB; both are in the totals. GB are 10^9 bytes, k are 1024 tokens.",
            "",
        ]
    )
