"""Training that computes with rounded weights: forward those of the packed model, gradients passed straight through."""

import functools

import jax
import mini_train as mini
import numpy as np
import pytest

from gemma4_jax import quantize
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import step as steps
from gemma4_jax.train.state import Network
from gemma4_jax.train.trainer import TrainOptions

SIZES = {"hidden_size": 32, "intermediate_size": 64, "drafter": None}


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_losses_and_gradients_are_those_of_the_packed_model(scheme):
    config = mini.mini_config(**SIZES)
    plain, aware = Network(config), Network(config, scheme)
    assert aware.shapes == plain.shapes
    assert set(aware.rounded.values()) == {"int8", scheme}
    weights = jax.jit(plain.init)(jax.random.key(0))
    packed = quantize.quantize_weights(dict(weights), Network(quantize.with_scheme(config, scheme)))
    rounded = quantize.dequantize_weights(packed, "float32")
    loss, batch = LossConfig(mtp_weight=0.0), mini.random_batch(rows=4)
    found = [
        jax.jit(functools.partial(steps.gradients, network, loss))(params, {}, batch)
        for network, params in ((aware, weights), (plain, {name: rounded[name] for name in weights}))
    ]
    (ours, metrics), (theirs, expected) = jax.device_get(found)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5 * max(np.abs(gradient).max(), 1e-3), err_msg=name)


def test_bad_requests_are_named():
    with pytest.raises(ConfigError, match=r"unknown train\.quantization_aware 'int3'"):
        TrainOptions(quantization_aware="int3")
    with pytest.raises(ConfigError, match=r"model\.quantization is 'int8'"):
        Network(mini.mini_config(**SIZES, quantization="int8"), "int8")
