"""The public face: requests, streaming, statistics, compilations, memory traffic of the compiled loop."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import prompts_of, script, script_weights, small_bundle, uncached_greedy

from gemma4_jax.errors import ConfigError, PromptError
from gemma4_jax.sample import programs
from gemma4_jax.sample.policy import DraftPolicy
from gemma4_jax.sample.sampler import Sampler
from gemma4_jax.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def bundle():
    return small_bundle()


@pytest.fixture(scope="module")
def sampler(bundle):
    return Sampler(bundle, max_length=32, draft_tokens=2)


def test_no_compilation_for_new_lengths(bundle):
    """20 prompt lengths and 20 continuation lengths run what the first two calls compiled."""
    sampler = Sampler(bundle, max_length=128, draft_tokens=2, chunk=32)
    sampler.generate(prompts_of([40]), max_new_tokens=4, stop_ids=[])
    before, compiled = programs.trace_count(), []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for n in range(1, 101, 5):
            sampler.generate(prompts_of([n]), max_new_tokens=1 + n // 4, stop_ids=[])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert programs.trace_count() == before
    assert compiled == []


def test_first_rates_leave_compilation_out():
    """Each program is compiled once, before it is called, and apart from both rates."""
    bundle = small_bundle(vocab_size=72)
    compiled = []

    def listen(event, duration, **details):
        if "backend_compile" in event:
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sampler = Sampler(bundle, max_length=64, draft_tokens=2)
        stats = sampler.generate(prompts_of([6]), max_new_tokens=8, stop_ids=[]).stats
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    for name in ("empty", "text_chunk", "begin", "rounds"):
        assert sum(name in entry for entry in compiled) == 1, compiled
    assert stats.compile_seconds > 0
    assert stats.tokens_per_second > 0
    again = sampler.generate(prompts_of([6]), max_new_tokens=8, stop_ids=[]).stats
    assert again.compile_seconds == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_decoding(dtype):
    """Weights, caches and 10 %: the loop updates in place and converts no weight beside the one it reads."""
    bundle = small_bundle(dtype=dtype, param_dtype=dtype, hidden_size=256, intermediate_size=1024, vocab_size=2048,
                          sliding_window=256, max_position_embeddings=4096)  # fmt: skip
    sampler = Sampler(bundle, max_length=2000, draft_tokens=2)
    prompts = [np.asarray(p, np.int32) for p in prompts_of([5])]
    wanted, mode = sampler._request(prompts, 4, (0.0, 0, 1.0, 0.0, 1.0), 0, [])
    state = sampler._begin(prompts, None, wanted, mode)
    memory = programs.rounds.lower(
        *sampler._target, *sampler._drafter, state, wanted, jnp.int32(4), steps=2, mode=mode, buffer=256
    ).compile().memory_analysis()  # fmt: skip
    weights = jax.tree.leaves((sampler._target[1], sampler._drafter[1]))
    held = sum({x.unsafe_buffer_pointer(): x.nbytes for x in weights}.values())  # a bf16 table and its bits are one
    held += sampler.cache_bytes()["total"]
    assert held < memory.argument_size_in_bytes
    added = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    assert added < 0.1 * held


@pytest.mark.parametrize(("dtype", "rows", "steps"), [("float32", 1, 0), ("float32", 1, 2), ("bfloat16", 3, 2)])
def test_the_loop_copies_no_cache(dtype, rows, steps):
    """Nothing of a cache's shape is copied in the optimised program, neither rings nor the global cache."""
    bundle = small_bundle(dtype=dtype, param_dtype=dtype, max_position_embeddings=1024)
    sampler = Sampler(bundle, max_length=700, draft_tokens=steps)
    prompts = [np.asarray(p, np.int32) for p in prompts_of([5] * rows)]
    wanted, mode = sampler._request(prompts, 4, (0.0, 0, 1.0, 0.0, 1.0), 0, [])
    state = sampler._begin(prompts, None, wanted, mode)
    lowered = programs.rounds.lower(
        *sampler._target, *sampler._drafter, state, wanted, jnp.int32(4), steps=steps, mode=mode, buffer=256
    )
    text = lowered.compile().as_text()
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    shapes = {f"{short}[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(state.caches)}
    assert len(shapes) == 2
    copies = re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", text)
    assert not shapes & set(copies)


def test_stop_ids_and_reasons(bundle, sampler):
    (prompt,) = prompts_of([6])
    answer = uncached_greedy(bundle.model, prompt, 20)
    assert sampler.generate([prompt], max_new_tokens=20, stop_ids=[]).finish_reasons == ["length"]
    stop = answer[4]
    out = sampler.generate([prompt], max_new_tokens=20, stop_ids=[stop])
    assert out.tokens == [answer[: answer.index(stop)]]
    assert out.finish_reasons == ["stop"]
    first = sampler.generate([prompt], max_new_tokens=20, stop_ids=[answer[0]])
    assert first.tokens == [[]]
    assert first.finish_reasons == ["stop"]
    none = sampler.generate([prompt], max_new_tokens=0)
    assert none.tokens == [[]]
    assert none.finish_reasons == ["length"]


def test_a_row_ends_at_max_length(bundle, sampler):
    """The cache full is reported as reason "length", and rows that still have room go on."""
    prompts = prompts_of([28, 5])
    out = sampler.generate(prompts, max_new_tokens=20, stop_ids=[])
    assert [len(row) for row in out.tokens] == [4, 20]
    assert out.finish_reasons == ["length", "length"]
    assert out.tokens[0] == uncached_greedy(bundle.model, prompts[0], 4)
    assert out.tokens[1] == uncached_greedy(bundle.model, prompts[1], 20)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[3], []], "row 1: the prompt is empty"),
        ([[3, 64]], "row 0: id 64 is outside the vocabulary of 64"),
        ([[3], [-1]], "row 1: id -1"),
        ([[3] * 32], "row 0: the prompt has 32 tokens, which leaves no room in max_length 32"),
        ([[[3]]], "row 0: a prompt is"),
        ([[0.5]], "row 0: a prompt is"),
        (["hi"], "row 0: a string, but the bundle has no tokenizer"),
        ("hi", "prompts is a string"),
        (7, "prompts is a int"),
        ([[3, [4]]], "row 0: a prompt is"),
        ([3, 4], "row 0: a prompt is"),
    ],
)
def test_bad_prompts(sampler, prompts, message):
    with pytest.raises(PromptError, match=re.escape(message)) as error:
        sampler.generate(prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1), "temperature is -1"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(top_k=-3), "top_k is -3"),
        (dict(temperature=[1.0, 1.0]), "temperature has 2 entries for 1 rows"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1"),
        (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (dict(stop_ids=[99]), "stop id 99 is outside the vocabulary of 64"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature="hot"), "temperature is 'hot'; it must be a number"),
        (dict(temperature=None), "temperature is None; it must be a number"),
        (dict(top_k=2.5), "top_k is 2.5; it must be a whole number"),
        (dict(seed=None), "seed is None; it must be a whole number"),
        (dict(seed=-1), "seed is -1; it must be between 0"),
        (dict(stop_ids=5), "stop_ids is 5; it must be a list of ids"),
        (dict(stop_ids=["</s>"]), "stop_ids has '</s>'"),
    ],
)
def test_bad_options(sampler, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sampler.generate([[3]], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_length=10_000), "max_length is 10000; it must be between 2 and 256"),
        (dict(draft_tokens=-1), "draft_tokens is -1"),
        (dict(draft_tokens="many"), "draft_tokens is 'many'"),
        (dict(cache_dtype="int4"), "float32, bfloat16, int8"),
        (dict(chunk=0), "chunk is 0"),
    ],
)
def test_bad_samplers(bundle, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Sampler(bundle, **{"max_length": 32, **options})


def test_without_a_drafter(bundle):
    alone = dataclasses.replace(bundle, drafter=None)
    assert Sampler(alone, max_length=32).draft_tokens == 0
    with pytest.raises(ConfigError, match="draft_tokens is 3 but the bundle has no drafter"):
        Sampler(alone, max_length=32, draft_tokens=3)


def test_release_holds_weights_once(bundle, sampler):
    """The layers' own arrays are gone, the tokens the same; layers beyond the repeating group too."""
    kinds = ("sliding_attention", "full_attention") * 2 + ("full_attention",)
    other = small_bundle(seed=4, num_hidden_layers=5, layer_types=kinds)
    prompts = prompts_of([5])
    want = Sampler(other, max_length=32, draft_tokens=0).generate(prompts, max_new_tokens=4, stop_ids=[]).tokens
    lean = Sampler(other, max_length=32, draft_tokens=0, release=True)
    small_bundle.cache_clear()
    assert lean.generate(prompts, max_new_tokens=4, stop_ids=[]).tokens == want
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(other.model.groups)))
    assert not other.model.embedder.table[...].is_deleted()


def test_release_frees_what_unstacked_layers_were_laid_out_from():
    """Joined or turned matrices alone: norms are shared, and a bundle that is not released stays whole."""
    other = small_bundle(seed=43, scan_layers=False)
    layer = other.model.tail[0]
    expected = Sampler(other, max_length=32, draft_tokens=0).generate([[2, 7, 9]], max_new_tokens=4, stop_ids=[]).tokens
    assert not layer.mlp.gate_proj.weight[...].is_deleted()
    lean = Sampler(other, max_length=32, draft_tokens=0, release=True)
    for part in (layer.mlp.gate_proj, layer.mlp.down_proj, layer.self_attn.q_proj, layer.self_attn.o_proj):
        assert part.weight[...].is_deleted()
    assert not layer.input_layernorm.weight[...].is_deleted()
    assert lean.generate([[2, 7, 9]], max_new_tokens=4, stop_ids=[]).tokens == expected


def test_statistics_and_drafted_marks(bundle, sampler):
    prompts = prompts_of([6, 9])
    answers = [uncached_greedy(bundle.model, p, 13) for p in prompts]
    own = Sampler(bundle, max_length=32, draft_tokens=2)
    own.replace_drafter(script, script_weights(prompts, answers))
    out = own.generate(prompts, max_new_tokens=13, stop_ids=[])
    stats = out.stats
    assert (stats.rounds, stats.drafted, stats.accepted, stats.accepted_per_step) == (8, 16, 16, [8, 8])
    assert stats.prefill_tokens == 15
    assert stats.decode_tokens == 24
    assert out.drafted == [[False] + [True, True, False] * 4] * 2
    assert own.generate(prompts, max_new_tokens=13, stop_ids=[]).stats.tokens_per_second > 0


def test_strings_and_streaming():
    """Texts, one bos, and a stream whose pieces add up, in order, for each row."""
    tokenizer = train_tokenizer(["abc abd äöü"] * 3, 512)
    bundle = small_bundle(vocab_size=512)
    bundle = dataclasses.replace(bundle, tokenizer=tokenizer)
    sampler = Sampler(bundle, max_length=64, draft_tokens=2)
    got, calls = {0: ([], ""), 1: ([], "")}, 0

    def on_token(row, token, text):
        nonlocal calls
        calls += 1
        got[row] = [*got[row][0], token], got[row][1] + text

    out = sampler.generate(["abc", "ä"], max_new_tokens=9, stop_ids=[], on_token=on_token)
    assert sum(len(row) for row in out.tokens) == calls
    ids = [tokenizer.encode(text) for text in ("abc", "ä")]
    assert [row.count(tokenizer.bos_id) for row in ids] == [1, 1]
    assert sampler.generate(ids, max_new_tokens=9, stop_ids=[]).tokens == out.tokens
    for row in (0, 1):
        assert got[row][0] == out.tokens[row]
        assert got[row][1] == out.texts[row] == tokenizer.decode(out.tokens[row])


def _drive(policy, cost, acceptance, runs=200, longest_run=32, run_cost=0.0):
    """Seconds per token with the policy, if a round of draft length D costs ``cost(D)``, and a run of rounds ``run_cost``."""
    rng = np.random.default_rng(0)
    seconds = tokens = 0.0
    for _ in range(runs):
        steps, rounds = policy.next(longest_run)
        assert rounds <= longest_run
        reach = rng.random((rounds, steps)) < acceptance
        accepted = np.cumprod(reach, axis=1).sum(axis=0).astype(int).tolist()
        spent = rounds * cost(steps) + run_cost
        policy.record(steps, rounds, spent, rounds, accepted)
        seconds += spent
        tokens += rounds + sum(accepted)
    return seconds / tokens


@pytest.mark.parametrize(
    ("acceptance", "slope", "limit"),
    [(0.0, 0.3, 1.03), (0.0, 0.05, 1.03), (0.9, 0.1, 0.45), (0.6, 0.2, 0.85), (0.95, 2.0, 1.03)],
)
def test_adaptive_length(acceptance, slope, limit):
    """A useless or dear drafter costs at most 3 %; a good and cheap one pays."""
    assert _drive(DraftPolicy("auto"), lambda d: 1 + slope * d + 0.1 * (d > 0), acceptance) < limit


@pytest.mark.parametrize("longest_run", [4, 32])
@pytest.mark.parametrize("run_cost", [0.0, 1.0, 20.0])
def test_what_a_run_costs_by_itself_is_known(run_cost, longest_run):
    """Beside it short trials of cheap rounds would look dear: at the costs of a whole run the best length is the best."""
    policy = DraftPolicy("auto")
    _drive(policy, lambda d: 1 + 0.8 * d, 0.7, runs=16, longest_run=longest_run, run_cost=run_cost)
    assert policy.run_seconds == run_cost
    share = run_cost / longest_run
    for length in policy.records:
        assert policy._cost(length) == pytest.approx(1 + 0.8 * length + share)
    drafts_pay = (1 + 0.8 * 2 + share) / (1 + 0.7 + 0.49) < 1 + share
    assert (policy.best() > 0) == drafts_pay


@pytest.mark.parametrize(("price", "rounds"), [(2.2, 4), (2.5, 2)])
def test_a_trial_ends_early_where_drafts_cannot_pay(price, rounds):
    """Two rounds without an accepted draft: a step accepted once in three times would make 7/3 tokens a round of four drafts."""
    policy = DraftPolicy("auto")
    _drive(policy, lambda d: price if d else 1.0, 0.0, runs=5)
    assert policy.tried[0] == pytest.approx({2: 2, 4: 2 * policy.fade + 2}[rounds])
    assert sorted(policy.records) == [0, 4]


def test_adaptive_length_where_any_draft_has_a_fixed_price():
    """Rounds of two rows that cost as much as those of five: a long draft pays where a short one cannot."""
    policy = DraftPolicy("auto")
    assert _drive(policy, lambda d: 1 + 1.2 * (d > 0), 0.8) < 0.75
    assert policy.best() >= 4


def test_a_useless_drafter_compiles_one_more_program():
    """Two lengths are ever run, and runs cut short by streaming cost no more than long ones."""
    policy = DraftPolicy("auto")
    assert _drive(policy, lambda d: 1 + 0.5 * d, 0.0, runs=1600, longest_run=4) < 1.03
    assert sorted(policy.records) == [0, 4]


def test_adaptive_sampler_gives_the_same_tokens(bundle):
    prompts = prompts_of([6, 9])
    answers = [uncached_greedy(bundle.model, p, 40) for p in prompts]
    sampler = Sampler(bundle, max_length=64, draft_tokens="auto")
    assert sampler.generate(prompts, max_new_tokens=40, stop_ids=[]).tokens == answers
    assert sum(sampler.generate(prompts, max_new_tokens=40, stop_ids=[]).stats.draft_lengths.values()) > 0


def test_first_runs_are_not_measured():
    """A program's first run takes ten times what the next ones do: "auto" would leave drafting alone for long."""
    sampler = Sampler(small_bundle(), max_length=64, draft_tokens="auto")
    for measured in ([0], [0], [0, 4]):  # plain rounds follow a run of none
        sampler.generate(prompts_of([6]), max_new_tokens=3, stop_ids=[])
        assert list(sampler._policies[1].records) == measured
