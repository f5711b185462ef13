"""Adapters: new ones change nothing, merged ones change nothing, and everything that runs the network runs them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import prompts_of, uncached_greedy
from small_models import small_bundle as bare_bundle

import gemma4_jax as g4
from gemma4_jax.bundle import add_lora, bundle_weights, merge_lora
from gemma4_jax.config import LoraConfig, get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.media import Processor
from gemma4_jax.model.lora import Adapter, choose_targets, is_adapter
from gemma4_jax.sample.sampler import Sampler
from gemma4_jax.train.state import Network


def small_bundle(**changes):
    """With what ``g4.logits`` needs."""
    bundle = bare_bundle(**changes)
    return dataclasses.replace(bundle, processor=Processor(None, bundle.config))


EVERYWHERE = LoraConfig(rank=3, targets=("*",))


def with_random_adapters(bundle, lora=EVERYWHERE, size=0.3):
    """Adapters whose second half is not zero."""
    bundle = add_lora(bundle, lora, seed=1)
    rng = np.random.default_rng(2)
    weights = {
        name: jnp.asarray(rng.normal(0, size, leaf.shape), leaf.dtype) if name.endswith("lora/b") else leaf
        for name, leaf in bundle_weights(bundle).items()
    }
    model, drafter = Network(bundle.config).merge(weights)
    return dataclasses.replace(bundle, model=model, drafter=drafter)


@pytest.fixture(scope="module")
def adapted():
    return with_random_adapters(small_bundle())


@pytest.fixture(scope="module")
def merged(adapted):
    return merge_lora(adapted)


ROWS = prompts_of([14, 9])


def test_new_adapters_change_no_bit():
    """A stack of two groups and a layer left over, and the drafter."""
    kinds = ("sliding_attention", "full_attention")
    bundle = small_bundle(num_hidden_layers=5, layer_types=(*kinds, *kinds, kinds[0]))
    new = add_lora(bundle, EVERYWHERE)
    np.testing.assert_array_equal(g4.logits(new, ROWS), g4.logits(bundle, ROWS))
    np.testing.assert_array_equal(g4.draft_logits(new, ROWS, 2), g4.draft_logits(bundle, ROWS, 2))
    before, after = bundle_weights(bundle), bundle_weights(new)
    assert all(after[name] is leaf for name, leaf in before.items())
    added = [name for name in after if name not in before]
    assert added and all(is_adapter(name) for name in added)
    assert {name.rpartition("/lora/")[0] + "/weight" for name in added} <= before.keys()


def test_merged_equals_adapted(adapted, merged):
    base = small_bundle()
    got, want = g4.logits(merged, ROWS), g4.logits(adapted, ROWS)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - g4.logits(base, ROWS)).max() > 0.1
    drafts = g4.draft_logits(adapted, ROWS, 2)
    np.testing.assert_allclose(g4.draft_logits(merged, ROWS, 2), drafts, atol=1e-5)
    assert np.abs(drafts - g4.draft_logits(base, ROWS, 2)).max() > 0.1
    assert merged.config == base.config
    assert bundle_weights(merged).keys() == bundle_weights(base).keys()


def test_merging_equals_the_formula(adapted, merged):
    """W + alpha / rank * b a, layer by layer of a stack, in f64."""
    weights, result = bundle_weights(adapted), bundle_weights(merged)
    for name in [n for n in weights if n.endswith("q_proj/weight")]:
        a, b = (np.asarray(weights[name.replace("weight", f"lora/{half}")], np.float64) for half in "ab")
        want = np.asarray(weights[name], np.float64) + 16.0 / 3 * (b @ a)
        np.testing.assert_allclose(result[name], want, atol=1e-6)


def test_sampling_with_adapters(adapted):
    """Through fused projections and the drafter's halves: the tokens that recomputing everything gives."""
    prompts = prompts_of([5, 12])
    want = [uncached_greedy(adapted.model, p, 12) for p in prompts]
    for draft_tokens in (0, 2):
        sampler = Sampler(adapted, max_length=64, draft_tokens=draft_tokens)
        assert sampler.generate(prompts, max_new_tokens=12, stop_ids=[]).tokens == want


def test_only_some_projections_of_one_input():
    """q has an adapter, k and v have none: the fused product adds zeros for them."""
    some = with_random_adapters(small_bundle(), LoraConfig(rank=2, targets=("*/q_proj/weight", "*/up_proj/weight")))
    prompts = prompts_of([7])
    got = Sampler(some, max_length=64, draft_tokens=0).generate(prompts, max_new_tokens=10, stop_ids=[])
    assert got.tokens == [uncached_greedy(some.model, p, 10) for p in prompts]


def test_a_checkpoint_keeps_adapters(adapted, tmp_path):
    """Also when it is loaded in another dtype: adapters keep theirs."""
    g4.save(adapted, tmp_path / "c")
    back = g4.load(tmp_path / "c", dtype=None)
    assert back.config == adapted.config
    weights = bundle_weights(back)
    for name, leaf in bundle_weights(adapted).items():
        np.testing.assert_array_equal(weights[name], leaf)
    low = bundle_weights(g4.load(tmp_path / "c", dtype="bfloat16"))
    assert {low[name].dtype.name for name in low if is_adapter(name)} == {"float32"}
    assert {low[name].dtype.name for name in low if name.endswith("weight")} == {"bfloat16"}


def test_published_files_hold_the_merged_weights(adapted, tmp_path):
    g4.save(adapted, tmp_path / "hf", format="huggingface")
    back = g4.load(tmp_path / "hf", drafter=tmp_path / "hf" / "drafter", dtype=None)
    assert back.config.lora is None
    np.testing.assert_allclose(g4.logits(back, ROWS), g4.logits(adapted, ROWS), atol=1e-5)


def test_adapters_of_the_12b_by_shape_alone():
    """Rank 8 on the attention of 48 layers: two arrays a map, cut as the stack is."""
    lora = LoraConfig(rank=8, targets=("model/*/self_attn/*_proj/weight",))
    config = dataclasses.replace(get_preset("gemma4_12b"), lora=lora)
    shapes = {name: leaf for name, leaf in Network(config).shapes.items() if is_adapter(name)}
    sliding = 40 * ((3840 + 4096) * 2 + (3840 + 2048) * 2)
    full = 8 * ((3840 + 8192) * 2 + (3840 + 512))
    assert sum(leaf.size for leaf in shapes.values()) == 8 * (sliding + full)


def test_columns_add_up():
    adapter = Adapter(jnp.ones((2, 6)), jnp.ones((3, 2)), 0.5)
    x = jnp.arange(12.0).reshape(2, 6)
    parts = adapter(x[:, :4], slice(None, 4)) + adapter(x[:, 4:], slice(4, None))
    np.testing.assert_allclose(parts, adapter(x))
    np.testing.assert_allclose(adapter(x)[:, 0], x.sum(-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"dtype": "int8"}, "unknown lora.dtype 'int8'.*float32"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_targets():
    names = ["model/a_proj/weight", "model/b_proj/weight", "drafter/a_proj/weight"]
    assert choose_targets(names, ("*", "!drafter/*")) == set(names[:2])
    with pytest.raises(ConfigError, match="lora.targets: pattern 'x' matches none of the 3 linear weights"):
        choose_targets(names, ("*", "x"))
    with pytest.raises(ConfigError, match="leaves nothing to adapt"):
        choose_targets(names, ("!*",))


def test_adapters_are_not_put_twice(adapted):
    with pytest.raises(ConfigError, match="has adapters already; merge_lora"):
        add_lora(adapted, EVERYWHERE)


def test_dtype_of_adapters_is_their_own():
    low = add_lora(small_bundle(), LoraConfig(rank=2, dtype="bfloat16"))
    kinds = {leaf.dtype.name for name, leaf in bundle_weights(low).items() if is_adapter(name)}
    assert kinds == {"bfloat16"}
