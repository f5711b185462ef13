"""Networks of any size with made-up weights, made in place: for measuring speed, where numbers only have to be numbers."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

import gemma4_jax as g4
from gemma4_jax.config import ModelConfig
from gemma4_jax.train.state import Network

_DEVIATION = 3**0.5  # of numbers spread evenly over -1…1, its inverse


def filled_bundle(config: ModelConfig) -> g4.Bundle:
    """A bundle whose matrices hold numbers of the deviation 1/sqrt(inputs), packed where ``config.quantization`` says so.

    Nothing but the weights is ever in memory: each array is made by one program that writes it in its own dtype.
    """
    network = Network(dataclasses.replace(config, scan_layers=False))
    widths = {name.removesuffix("/values"): leaf for name, leaf in network.shapes.items() if name.endswith("/values")}
    weights = {}
    for seed, (name, leaf) in enumerate(network.shapes.items()):
        place, _, kind = name.rpartition("/")
        if kind == "scale":
            weights[name] = jnp.full(leaf.shape, _step(widths[place]), leaf.dtype)
        elif leaf.ndim > 1:
            weights[name] = _noise(seed, leaf.shape, leaf.dtype)
        else:
            weights[name] = jnp.ones(leaf.shape, leaf.dtype)
    model, drafter = network.merge(weights)
    return g4.Bundle(network.config, model, drafter)


def _step(values: jax.ShapeDtypeStruct) -> float:
    """The scale that gives packed numbers the deviation of a matrix."""
    per_byte, largest = (2, 8) if values.dtype == jnp.uint8 else (1, 127)
    return _DEVIATION / math.sqrt(values.shape[-1] * per_byte) / largest


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(seed, shape: tuple[int, ...], dtype) -> jax.Array:
    """Bits of a counter, mixed: whole numbers of all sizes, or floats of the deviation 1/sqrt(last axis)."""
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        counter = (counter ^ (counter >> shift)) * jnp.uint32(factor)
    bits = (counter ^ (counter >> 16)).reshape(shape)
    if jnp.issubdtype(dtype, jnp.integer):
        return (bits >> 24).astype(jnp.uint8).astype(dtype)
    unit = bits.astype(jnp.float32) * 2.0**-31 - 1
    return (unit * (_DEVIATION / math.sqrt(shape[-1]))).astype(dtype)
