"""Memory by weight format: closed forms, and the aim for the 12B."""

import jax
import jax.numpy as jnp

import gemma4_jax as g4
from configs import benchmark
from experiments.benchmarks import load
from gemma4_jax.config import get_preset
from gemma4_jax.quantize import with_scheme


def test_the_12b_with_all_its_parts_fits_12_gb_at_full_length():
    options = benchmark.load().options.to_dict()
    results = load.measure(options, 0)
    assert results["int4_context_in_12gb"] == 262_144
    assert results["int4_total_bytes_256k"] <= 12 * load.GB
    assert results["bfloat16_context_in_16gb"] == 0
    config = get_preset("gemma4_12b")
    matrices = config.num_parameters() - config.vocab_size * config.hidden_size
    assert abs(results["int4_layers_bytes"] / (matrices * 0.5625) - 1) < 0.01
    assert abs(results["int8_table_bytes"] / (config.vocab_size * config.hidden_size) - 1) < 0.001
    assert (
        results["bfloat16_weight_bytes"] > 1.8 * results["int8_weight_bytes"] > 3 * results["int4_weight_bytes"] * 0.9
    )
    assert 0 < results["activation_bytes"] < load.GB
    text = load.table(results)
    assert "| int4 |" in text
    assert text.count("262,144") >= 3


def test_peak_of_a_program_counts_what_is_alive():
    def chain(x):
        a = x + 1.0
        b = a * 2.0
        return jnp.sum(b)

    found = load.peak_bytes(jax.make_jaxpr(chain)(jnp.zeros((1000,), jnp.float32)).jaxpr)
    assert found == 2 * 4000  # a and b together

    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x) @ x, x)

    found = load.peak_bytes(jax.make_jaxpr(loop)(jnp.zeros((100, 100), jnp.float32)).jaxpr)
    assert 40_000 <= found <= 3 * 40_000 + 100


def test_weight_bytes_follow_the_scheme():
    tiny = get_preset("tiny")
    plain, packed = load.weight_bytes(tiny), load.weight_bytes(with_scheme(tiny, "int8"))
    assert set(plain) == {"layers", "table", "media", "drafter"}
    assert packed["table"] == tiny.vocab_size * (tiny.hidden_size + 2)
    assert all(packed[part] < 0.35 * plain[part] for part in ("table", "drafter"))


def test_quality_of_formats():
    """int8 is nearer to the given weights than int4, and neither is there exactly."""
    bundle = g4.init("tiny", seed=2, config_overrides={"vision": None, "audio": None, "drafter": None})
    found = load.quality(bundle, "the quick brown fox " * 40, ["int8", "int4"], tokens=64, row=32)
    assert found["quality_tokens"] == 64
    assert 0 < found["quality_int8_kl"] < found["quality_int4_kl"] < 1
    assert abs(found["quality_int8_perplexity_change"]) < 0.05
    assert found["quality_perplexity"] > 100  # random weights
