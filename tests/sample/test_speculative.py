"""Speculative decoding: the same tokens as without, whatever the drafter does; rollback after the ring has turned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    WINDOW,
    prompts_of,
    script,
    script_weights,
    small_bundle,
    uncached_greedy,
)

from gemma4_jax.model.cache import kind_layout, read, ring_positions
from gemma4_jax.model.drafter import draft_rollout
from gemma4_jax.sample import decode, programs
from gemma4_jax.sample.choose import Mode
from gemma4_jax.sample.sampler import Sampler

LENGTHS = (5, 7, 8, 9, 16, 20)
DRAFT, NEW = 4, 30
GREEDY = Mode()


@pytest.fixture(scope="module")
def case():
    """Prompts below, at and above the window, with their greedy continuations recomputed without a cache."""
    bundle = small_bundle()
    prompts = prompts_of(LENGTHS)
    return bundle, prompts, [uncached_greedy(bundle.model, p, NEW) for p in prompts]


@pytest.fixture(scope="module")
def sampler(case):
    return Sampler(case[0], max_length=64, draft_tokens=DRAFT)


@pytest.mark.parametrize("first_wrong", range(DRAFT + 1))
def test_scripted_drafter_wrong_at_each_step(case, sampler, first_wrong):
    """Fault 2: first error at step 0…4 (4: none), six prompt lengths, 30 new tokens."""
    _, prompts, answers = case
    wrong = [first_wrong] if first_wrong < DRAFT else []
    sampler.replace_drafter(script, script_weights(prompts, answers, wrong_step=wrong))
    out = sampler.generate(prompts, max_new_tokens=NEW, stop_ids=[])
    assert out.tokens == answers
    per_round = min(first_wrong, DRAFT) + 1
    assert out.stats.rounds == len(prompts) * -(-(NEW - 1) // per_round)
    for row in out.drafted:
        assert sum(row) == sum(1 for i in range(NEW - 1) if i % per_round != per_round - 1)
    accepted = out.stats.accepted_per_step
    assert all((n > 0) == (j < first_wrong) for j, n in enumerate(accepted))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_pattern_of_errors(case, sampler, data):
    """Rows accept different lengths in every round."""
    _, prompts, answers = case
    wrong = np.asarray(
        [data.draw(st.lists(st.booleans(), min_size=96, max_size=96), label=f"row {i}") for i in range(len(prompts))]
    )
    sampler.replace_drafter(script, script_weights(prompts, answers, wrong_at=wrong))
    assert sampler.generate(prompts, max_new_tokens=NEW, stop_ids=[]).tokens == answers


@given(seed=st.integers(0, 10_000), stop=st.integers(3, 63), new=st.integers(1, NEW))
@settings(max_examples=20, deadline=None)
def test_stops_and_limits_inside_a_block(case, sampler, seed, stop, new):
    """A row ends before its first stop id or at the limit, wherever in a draft that falls."""
    _, prompts, answers = case
    wrong = np.random.default_rng(seed).random((len(prompts), 96)) < 0.3
    sampler.replace_drafter(script, script_weights(prompts, answers, wrong_at=wrong))
    out = sampler.generate(prompts, max_new_tokens=new, stop_ids=[stop])
    for tokens, reason, answer in zip(out.tokens, out.finish_reasons, answers, strict=True):
        cut = answer[:new]
        want = cut[: cut.index(stop)] if stop in cut else cut
        assert tokens == want
        assert reason == ("stop" if stop in cut else "length")


def test_caches_after_rejections_are_those_of_a_fresh_pass(case, sampler):
    """Fault 2: after every round, each key and value that may be read equals one computed without any rejection."""
    bundle, prompts, answers = case
    wrong = np.random.default_rng(5).random((len(prompts), 96)) < 0.4
    sampler.replace_drafter(script, script_weights(prompts, answers, wrong_at=wrong))
    rows = [np.asarray(p, np.int32) for p in prompts]
    wanted, mode = sampler._request(rows, NEW, (0.0, 0, 1.0, 0.0, 1.0), 0, [])
    state = sampler._begin(rows, None, wanted, mode)
    fresh = Sampler(bundle, max_length=64, draft_tokens=DRAFT)
    for _ in range(6):
        state, _ = programs.rounds(
            *sampler._target, *sampler._drafter, state, wanted, jnp.int32(1), steps=DRAFT, mode=mode, buffer=256
        )
        lengths = np.asarray(state.lengths)
        whole = [[*p, *a][:n] for p, a, n in zip(prompts, answers, lengths, strict=True)]
        again = fresh.prefill([np.asarray(row, np.int32) for row in whole])
        np.testing.assert_allclose(state.hidden, again.hidden, atol=1e-5)
        for kind, got, want in zip(bundle.config.layer_types, state.caches, again.caches, strict=True):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                slots = a.shape[2]
                if kind == "full_attention":
                    readable = np.arange(slots)[None] < lengths[:, None]
                else:
                    position = np.asarray(ring_positions(jnp.asarray(lengths), slots))
                    readable = (position >= 0) & (position >= lengths[:, None] - 1 - WINDOW)
                keep = np.broadcast_to(readable[:, None, :, None], a.shape)
                np.testing.assert_allclose(np.asarray(a)[keep], np.asarray(b)[keep], atol=1e-5)


def test_draft_logits_use_exactly_the_accepted_keys(case):
    """After partial acceptances, our drafter's tokens equal those of a rollout over a recomputed row."""
    bundle, prompts, answers = case
    sampler = Sampler(bundle, max_length=64, draft_tokens=DRAFT)
    rng = np.random.default_rng(8)
    wrong = rng.random((len(prompts), 96)) < 0.4
    weights = script_weights(prompts, answers, wrong_at=wrong)
    rows = [np.asarray(p, np.int32) for p in prompts]
    wanted, mode = sampler._request(rows, NEW, (0.0, 0, 1.0, 0.0, 1.0), 0, [])
    state = sampler._begin(rows, None, wanted, mode)
    target, (graph, drafter_weights) = sampler._target, sampler._drafter
    seen = []
    ours = jax.jit(_recorded_draft, static_argnums=(0, 2, 5))
    theirs = jax.jit(lambda model, drafter, tokens, at: _rollout(model, drafter, tokens, at, DRAFT))
    for _ in range(4):
        seen.clear()
        jax.block_until_ready(ours(target[0], target[1], graph, drafter_weights, state, seen.append))
        jax.effects_barrier()
        got = np.concatenate(seen, axis=1)
        assert got.shape[1] == DRAFT
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            at = int(state.lengths[row])
            whole = [*prompt, *answer][: at + 1]
            assert whole[-1] == int(state.newest[row])
            padded = np.zeros((1, 64), np.int32)
            padded[0, : at + 1] = whole
            want = theirs(bundle.model, bundle.drafter, padded, jnp.int32(at))
            np.testing.assert_allclose(got[row], want, atol=2e-5)
        state, _ = programs.rounds(
            *target, script, weights, state, wanted, jnp.int32(1), steps=DRAFT, mode=mode, buffer=256
        )


def _recorded_draft(target_graph, weights, graph, drafter_weights, state, record):
    """Drafts by way of the loop's own function; ``record`` gets the logits (B, 1, V) of every step."""
    target, drafter = target_graph.merge(weights), graph.merge(drafter_weights)
    plain = drafter.embedder.decode

    def decode_and_record(y):
        logits = plain(y)
        jax.debug.callback(record, logits, ordered=True)
        return logits

    object.__setattr__(drafter.embedder, "decode", decode_and_record)
    bias = jnp.zeros((target.config.vocab_size,), jnp.float32)
    request = decode.Request(None, None, bias, None)
    return decode.draft(target, drafter, state, request, GREEDY, DRAFT, None)


def _rollout(model, drafter, tokens, at, steps):
    output = model(tokens)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    def own(y):
        return model.embedder.encode(jnp.argmax(drafter.logits(y), axis=-1).astype(jnp.int32), jnp.float32)

    ys = draft_rollout(
        drafter, model.embed(tokens), output, queries=at[None], steps=steps, positions=positions, next_embedding=own
    )
    return jnp.concatenate([drafter.logits(y)[0] for y in ys])


def test_suppressed_tokens_are_never_drafted_nor_chosen():
    bundle = small_bundle()
    (prompt,) = prompts_of([6])
    free = uncached_greedy(bundle.model, prompt, 12)
    banned = tuple(set(free))[:8]
    limited = small_bundle(suppress_tokens=banned)
    out = Sampler(limited, max_length=64, draft_tokens=2).generate([prompt], max_new_tokens=12, stop_ids=[])
    plain = Sampler(limited, max_length=64, draft_tokens=0).generate([prompt], max_new_tokens=12, stop_ids=[])
    assert out.tokens == plain.tokens
    assert not set(out.tokens[0]) & set(banned)


def test_forced_stops_in_a_batch():
    """Fault 24: [7,106,9] and [7,8,1] end as [7] and [7,8]; an accepted block [5,106,6] emits [5]."""
    stops = jnp.asarray([1, 50, 106, -1], jnp.int32)
    for chosen, want in (([7, 106, 9], [7]), ([7, 8, 1], [7, 8]), ([5, 106, 6], [5]), ([5, 6, 9], [5, 6, 9])):
        tokens = jnp.asarray([[3, *chosen[:-1]]], jnp.int32)  # every draft right
        zeros = jnp.zeros((1,), jnp.int32)
        state = decode.State((), zeros + 9, jnp.zeros((1, 2)), tokens[:, 0], zeros + 1, zeros, None)
        request = decode.Request(None, stops, None, zeros + 20)
        out = decode.Emission(
            jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), bool), zeros, zeros, jnp.zeros((1, 2), jnp.int32)
        )
        hidden = jnp.zeros((1, 3, 2))
        new, out = decode._accept(state, request, out, (), hidden, tokens, jnp.asarray([chosen], jnp.int32))
        assert out.tokens[0, : int(out.counts[0])].tolist() == want
        assert int(new.finished[0]) == (decode.RUNNING if len(want) == 3 else decode.STOPPED)


def test_sampling_is_what_plain_sampling_gives(case):
    """The same seeds give the same tokens with and without a drafter, with penalties and filters."""
    bundle, prompts, _ = case
    options = dict(max_new_tokens=16, temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    options |= dict(seed=3, stop_ids=[])
    plain = Sampler(bundle, max_length=64, draft_tokens=0).generate(prompts, **options)
    fast = Sampler(bundle, max_length=64, draft_tokens=3).generate(prompts, **options)
    assert fast.tokens == plain.tokens
    assert fast.stats.accepted > 0
    assert fast.stats.drafted == 3 * fast.stats.rounds


@pytest.mark.parametrize("steps", [1, 11])  # 11: longer than any that "auto" tries, and than the window
def test_any_draft_length(case, steps):
    bundle, prompts, wanted = case
    out = Sampler(bundle, max_length=64, draft_tokens=steps).generate(prompts, max_new_tokens=NEW, stop_ids=[])
    assert out.tokens == wanted
    assert out.stats.drafted == steps * out.stats.rounds


def test_another_draft_length_beside_the_first(case):
    """Each side drafts as it was asked to, whichever ran first, over caches of one size."""
    bundle, prompts, wanted = case
    drafting = Sampler(bundle, max_length=64, draft_tokens=2)
    plain = drafting.with_draft_tokens(0)
    for sampler, drafted in ((plain, False), (drafting, True), (plain, False)):
        out = sampler.generate(prompts, max_new_tokens=NEW, stop_ids=[])
        assert out.tokens == wanted
        assert (out.stats.drafted > 0) is drafted
    assert plain.cache_bytes() == drafting.cache_bytes()
    longer = plain.with_draft_tokens(11)
    assert longer.generate(prompts, max_new_tokens=NEW, stop_ids=[]).tokens == wanted


def test_layout_has_what_the_drafter_reads(case):
    """The compact form gives back keys and values: v, and k_norm * v with its turned dimensions replaced."""
    bundle, _, _ = case
    layout = kind_layout(bundle.config, "full_attention")
    assert layout.key_parts == (32, 8)
    assert layout.numbers_per_token() == 40
    sampler = Sampler(bundle, max_length=64, draft_tokens=0)
    tokens = np.asarray(prompts_of([10])[0], np.int32)
    prefix = sampler.prefill([tokens])
    k, v = bundle.model(tokens[None]).kv["full_attention"]
    stored = np.asarray(read(prefix.caches[-1].keys, layout.key_parts, jnp.float32))[0, 0, :10]
    np.testing.assert_allclose(stored[:, :32], v[0, :, 0], atol=1e-5)
    turned = np.r_[0:4, 16:20]
    np.testing.assert_allclose(stored[:, 32:], k[0, :, 0][:, turned], atol=1e-5)
