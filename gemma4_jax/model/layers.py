"""Building blocks: linear maps, norms, the gated feed-forward and the shared embedding table.

Axis letters: B batch, T positions, D model width, F feed-forward width, V vocabulary, I inputs, O outputs.
Weights are stored as published: linear ``(O, I)``, table ``(V, D)``. Row-major rows of the output side are also what a
one-row product reads fastest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.model.apart import apart_if_traced
from gemma4_jax.model.products import product

PRODUCT, FEED_FORWARD = "product", "feed_forward_product"  # names of what ``remat`` may keep (``decoder``)


class LayerScalar(nnx.Variable):
    """One stored number per layer; loaded from checkpoints, not trained by default (spec: one decoder layer)."""


@jax.custom_vjp
def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x @ weight.T`` accumulated in f32, in x's dtype. x (..., I), weight (O, I) -> (..., O)."""
    return product("...i,oi->...o", x, weight.astype(x.dtype)).astype(x.dtype)


def _matmul_forward(x, weight):
    return matmul(x, weight), (x, weight)


def _matmul_backward(residuals, g):
    x, weight = residuals
    # Both products read g. Without the barrier XLA:CPU fuses what computes it (a GELU gradient, say) into the transposing
    # copy that the second one needs, and so computes it twice, the second time in strides: a third of a training step.
    g = jax.lax.optimization_barrier(g)
    d_x = product("...o,oi->...i", g, weight.astype(g.dtype))
    d_weight = product("mi,mo->oi", x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """A linear map without bias unless asked. weight (out, in), bias (out,).

    ``lora`` is None or an adapter (``gemma4_jax.model.lora``), whose share is added to the product. ``kept_as``: what ``remat``
    knows the product by.
    """

    kept_as = PRODUCT

    lora: nnx.Module | None = None  # of the class: an attribute that was None once cannot hold a module later

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype, rngs: nnx.Rngs):
        std = in_features**-0.5
        self.weight = nnx.Param(_truncated_normal(rngs.params(), (out_features, in_features), std, dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., out) in x's dtype."""
        y = checkpoint_name(self.product(x), self.kept_as)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def product(self, x: jax.Array, columns: slice | None = None) -> jax.Array:
        """The map without its bias, or what some of its input columns add to it: x (..., columns) -> (..., out)."""
        weight = self.weight[...]
        y = matmul(x, weight if columns is None else weight[:, columns])
        return y if self.lora is None else y + self.lora(x, columns)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in f32, multiplied by ``weight`` (not ``1 + weight``). weight (D,)."""

    def __init__(self, width: int, eps: float, *, dtype, initial: float = 1.0):
        self.eps = eps
        self.weight = nnx.Param(jnp.full((width,), initial, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D) in x's dtype."""
        return (_rms(x, self.eps) * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """The norm without a weight, computed in f32, in x's dtype."""
    return _rms(x, eps).astype(x.dtype)


def _rms(x, eps):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """LayerNorm with weight and bias, computed in f32. weight, bias (D,)."""

    def __init__(self, width: int, eps: float, *, dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D) in x's dtype."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class FeedForward(nnx.Module):
    """Gated GELU (tanh form): ``down(gelu(gate x) * up x)``."""

    def __init__(self, width: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, width, dtype=dtype, rngs=rngs)
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear.kept_as = FEED_FORWARD

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D)."""
        return self.down_proj(jax.nn.gelu(self.gate_proj(x), approximate=True) * self.up_proj(x))


class Embedder(nnx.Module):
    """The shared table: input embedding and output head. table (V, D)."""

    def __init__(self, vocab_size: int, width: int, *, dtype, rngs: nnx.Rngs):
        # The input side is multiplied by sqrt(D), so D**-0.5 gives unit-variance rows there and unit logits here.
        self.table = nnx.Param(_truncated_normal(rngs.params(), (vocab_size, width), width**-0.5, dtype))

    def encode(self, tokens: jax.Array, dtype) -> jax.Array:
        """Scaled embeddings: tokens (B, T) int32 -> (B, T, D).

        The factor sqrt(D) is rounded to the table's dtype (bf16 at D=3840: 62.0; f32: 61.96773), as published.
        """
        return (self.rows(tokens) * embedding_scale(self.table[...])).astype(dtype)

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Unscaled rows (B, T, D) of the table, in its dtype."""
        return self.table[...][tokens]

    def decode(self, hidden: jax.Array, softcap: float | None = None) -> jax.Array:
        """Logits in f32 from the unscaled table: hidden (..., D) -> (..., V)."""
        table = self.table[...]
        return soft_cap(product("...d,vd->...v", hidden, table.astype(hidden.dtype)), softcap)


def embedding_scale(table: jax.Array) -> jax.Array:
    """sqrt(D) in the table's dtype."""
    return jnp.asarray(table.shape[-1] ** 0.5, table.dtype)


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """``cap * tanh(logits / cap)``; the identity when cap is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _truncated_normal(key, shape, std, dtype):
    def draw(key):
        # 0.87962566 is the standard deviation of a unit normal cut at +-2.
        numbers = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return (numbers * (std / 0.87962566)).astype(dtype)

    # One weight after the other, where many are drawn in one program.
    return apart_if_traced(draw, key)
