"""What a layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import jax

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.apart import apart, runs_apart
from gemma4_jax.model.layers import FEED_FORWARD, PRODUCT

CUT = "cut"  # weights of one layer, cut out of their stack


def remat(config: ModelConfig, function: Callable) -> Callable:
    """Recompute each layer in the backward pass: nothing ("none"), all but linear maps ("dots"), all but the feed-forward's
    ("mlp": three quarters of the work, two thirds of the memory), or all ("full").

    Layer by layer, not group by group: the recomputed values of one layer are alive at a time. A layer's weights are cut out
    of their stack again in any case.
    """
    policies = {
        "none": jax.checkpoint_policies.save_anything_except_these_names(CUT),
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, FEED_FORWARD),
        "mlp": jax.checkpoint_policies.save_only_these_names(FEED_FORWARD),
        "full": None,
    }
    return jax.checkpoint(function, policy=policies[config.remat])


def remat_apart(config: ModelConfig, function: Callable) -> Callable:
    """``remat``, and on one CPU device both passes as programs of their own; elsewhere schedules keep to the barriers.

    ``function`` must take every array that it reads as an argument.
    """
    function = remat(config, function)
    return apart(function) if runs_apart() and config.remat != "none" else function
