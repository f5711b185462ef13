"""The benchmark of one device at a small size, its made-up weights, and what happens when memory runs out."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_config

from configs import benchmark
from experiments.benchmarks import device, sampling
from experiments.benchmarks.filled import filled_bundle
from gemma4_jax.packed import unpack
from gemma4_jax.train import profiling
from gemma4_jax.train.state import Network


@pytest.fixture
def small(monkeypatch):
    """Options of a run that takes seconds; packed rows fill whole groups."""
    monkeypatch.setattr(device, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(device, "SIDE", 64)
    monkeypatch.setattr(sampling, "LATE", 120)
    config = small_config(intermediate_size=64, max_position_embeddings=1024)
    monkeypatch.setattr(
        sampling, "model_config", lambda options, dtype: dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    )
    options = benchmark.device().options.to_dict()
    return {**options, "rounds": 1, "new_tokens": 8, "prompt_tokens": 32, "chunk": 32, "rows": 2, "dtypes": ("int8",)}


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_made_up_weights_have_the_deviation_of_real_ones(scheme):
    config = small_config(hidden_size=64, intermediate_size=256, vocab_size=512, quantization=scheme)
    bundle = filled_bundle(config)
    network = Network(bundle.config)
    found = network.weights({"model": bundle.model, "drafter": bundle.drafter})
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in network.shapes.items()
    }
    down = bundle.model.tail[0].mlp.down_proj
    matrix = down.weight[...] if scheme is None else unpack(down.values[...], down.scale[...])
    assert float(jnp.std(matrix)) == pytest.approx(256**-0.5, rel=0.1)
    assert abs(float(jnp.mean(matrix))) < 0.15 * 256**-0.5  # int4: numbers are -8…7
    assert len(np.unique(matrix)) > (8 if scheme == "int4" else 200)
    np.testing.assert_array_equal(bundle.model.final_norm.weight[...], 1)


def test_shares_of_the_device(small, tmp_path):
    with profiling.requested(tmp_path):
        found = device.measure(small, 0)
    assert {path.name for path in tmp_path.iterdir()} == {f"int8_{mode}" for mode in small["modes"]}
    assert found["device"] == jax.devices()[0].device_kind
    config = dataclasses.replace(sampling.model_config(small, "bfloat16"), quantization="int8", scan_layers=False)
    shapes = Network(config).shapes
    stored = {
        part: sum(x.size * x.dtype.itemsize for n, x in shapes.items() if n.startswith(part)) for part in ("model", "")
    }
    assert found["int8_weight_bytes"] == stored[""]
    rate = found["int8_decode_tokens_per_second"]
    assert found["int8_share_of_bandwidth"] == pytest.approx(stored["model"] * rate / found["bytes_per_second"])
    assert found["int8_gain_of_2_rows"] == pytest.approx(found["int8_decode_tokens_per_second_2_rows"] / rate)
    assert found["int8_share_of_matrix_peak"] > 0
    # Seven tokens after the first, with 70 % of drafts kept: the drafts are those that verification takes.
    assert 0.3 < found["int8_accepted_share"] < 1
    assert found["int8_tokens_per_round"] > 1.5


def test_what_does_not_fit_is_left_out(small, monkeypatch, caplog):
    def too_large(sampler, options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 32 MiB")

    monkeypatch.setitem(device.MEASURES, "decode", too_large)
    with caplog.at_level(logging.WARNING):
        found = device.measure({**small, "modes": ("decode", "prefill")}, 0)
    assert "int8, decode: left out for want of memory" in caplog.text
    assert "int8_prefill_tokens_per_second" in found
    assert "int8_decode_tokens_per_second" not in found

    def too_large_at_first(sampler, options):
        once = sampling.speculation(sampler, options)
        return too_large(sampler, options) if next(tries) else once

    tries = iter([True, False])
    monkeypatch.setitem(device.MEASURES, "speculative", too_large_at_first)
    found = device.measure({**small, "modes": ("speculative",)}, 0)
    assert "int8_speedup" in found  # it fits alone

    def broken(sampler, options):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")

    monkeypatch.setitem(device.MEASURES, "decode", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such kernel"):
        device.measure({**small, "modes": ("decode",)}, 0)
