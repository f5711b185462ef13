"""Generation of this project, transformers and llama.cpp on one shape with random weights, in turns.

Modes: ``decode`` (one row and eight, early and late in a text), ``prefill``, and ``speculative`` (drafts accepted at a scripted
rate, the real drafter's cost included). The share of memory bandwidth counts the weights that a token reads once, beside
a plain matrix-vector product measured in the same turns; the share of the matrix peak counts two operations a weight.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gemma4_jax as g4
from experiments.benchmarks.peers import transformers_model
from experiments.benchmarks.workers import Worker, alternate, serve
from gemma4_jax.config import ModelConfig, get_preset
from gemma4_jax.quantize import quantize_model
from gemma4_jax.sample.decode import draft
from gemma4_jax.text.tokenizer import train_tokenizer

MODULE = "experiments.benchmarks.sampling"
BYTES = {"float32": 4, "bfloat16": 2}
SCHEMES = {"q8_0": "int8", "q4_0": "int4"}  # our packed weights, by the name of llama.cpp's
EARLY, LATE = 100, 4000


def measure(options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Flat results of all sides.

    Args:
      options: ``mode`` (of the three), ``model`` (preset), ``dtypes``, ``peers`` (of transformers, llama_cpp),
        ``packed_dtypes`` (of ``SCHEMES``: ours and llama.cpp's), ``rounds`` (turns), ``new_tokens``, ``prompt_tokens``,
        ``rows`` (decoded together), ``draft_tokens``, ``acceptance``.
      threads: of the peers.
    """
    sides = [("machine", "float32")]
    peers = options["peers"] if options["mode"] != "speculative" else ()
    for dtype in options["dtypes"]:
        sides += [("ours", dtype)] + [(peer, dtype) for peer in peers]
    packed = options["packed_dtypes"] if options["mode"] != "speculative" else ()
    sides += [("ours", dtype) for dtype in packed]
    packed = packed if "llama_cpp" in peers else ()
    sides += [("llama_cpp", dtype) for dtype in packed]
    with tempfile.TemporaryDirectory() as folder:
        if "llama_cpp" in peers:
            _write_gguf(options, [*options["dtypes"], *packed], Path(folder))
        workers = [
            Worker(MODULE, f"{side}_{dtype}", {**options, "side": side, "dtype": dtype, "folder": folder}, threads)
            for side, dtype in sides
        ]
        try:
            taken = alternate(workers, options["rounds"])
        finally:
            for worker in workers:
                worker.__exit__()
    return _results(options, taken)


def _results(options: dict[str, Any], taken: dict[str, dict[str, float]]) -> dict[str, Any]:
    config = model_config(options)
    machine = taken.pop("machine_float32")
    results: dict[str, Any] = {"parameters": config.num_parameters(), **{f"machine_{k}": v for k, v in machine.items()}}
    for side, numbers in taken.items():
        results |= {f"{side}_{name}": value for name, value in numbers.items()}
    for dtype in [*options["dtypes"], *(dtype for dtype in SCHEMES if f"ours_{dtype}" in taken)]:
        ours = taken[f"ours_{dtype}"]
        peers = {peer: taken[f"{peer}_{dtype}"] for peer in options["peers"] if f"{peer}_{dtype}" in taken}
        for name in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            for peer, numbers in peers.items():
                if name in ours and name in numbers:
                    results[f"{name.split('_')[0]}_ratio_to_{peer}_{dtype}"] = ours[name] / numbers[name]
        if dtype in SCHEMES:
            for name in ("decode_tokens_per_second", "prefill_tokens_per_second"):
                if name in ours and "ours_float32" in taken:
                    ratio = ours[name] / taken["ours_float32"][name]
                    results[f"{name.split('_')[0]}_ratio_of_{SCHEMES[dtype]}_to_float32"] = ratio
            continue
        if "decode_tokens_per_second" in ours:
            read = config.num_parameters() * BYTES[dtype] * ours["decode_tokens_per_second"]
            results[f"share_of_bandwidth_{dtype}"] = read / machine["bytes_per_second"]
        if "prefill_tokens_per_second" in ours:
            done = prefill_operations(config) * ours["prefill_tokens_per_second"]
            results[f"share_of_matrix_peak_{dtype}"] = done / machine["operations_per_second"]
    return results


def prefill_operations(config: ModelConfig) -> int:
    """Operations of a prompt's token, two a weight: only the last row meets the output table."""
    return 2 * (config.num_parameters() - config.vocab_size * config.hidden_size)


def model_config(options: dict[str, Any], dtype: str = "float32") -> ModelConfig:
    """The measured shape."""
    return get_preset(options["model"], vision=None, audio=None, dtype=dtype, param_dtype=dtype)


# ------------------------------------------------------------------------------------------------------------------ sides


def _prepare(options: dict[str, Any]):
    makers = {"machine": _machine, "transformers": _transformers, "llama_cpp": _llama_cpp, "ours": _ours}
    return makers[options["side"]](options)


def _ours(options):
    mode, bundle = options["mode"], _bundle(options)
    steps = options["draft_tokens"] if mode == "speculative" else 0
    lengths = {
        "decode": LATE + 256,
        "prefill": options["prompt_tokens"] + 16,
        "speculative": EARLY + 2 * options["new_tokens"] + 64,
    }
    sampler = g4.Sampler(bundle, max_length=lengths[mode], draft_tokens=steps, release=True)
    return MEASURES[mode](sampler, options)


def _machine(options):
    """What the machine can do at most: bytes a second of a matrix-vector product, operations a second of a matrix product."""
    weights = [jnp.ones((8192, 2048), jnp.float32) * i for i in range(4)]
    square = jnp.ones((2048, 2048), jnp.float32)
    read = jax.jit(lambda x, weights: sum(jnp.einsum("i,oi->o", x, w) for w in weights))
    multiply = jax.jit(lambda a: a @ a)
    x = weights[0][0]

    def once():
        def rate(amount, function, *args, times=5):
            seconds = [_seconds(lambda: jax.block_until_ready(function(*args))) for _ in range(times)]
            return amount / statistics.median(seconds)

        return {
            "bytes_per_second": rate(sum(w.nbytes for w in weights), read, x, weights),
            "operations_per_second": rate(2 * 2048**3, multiply, square),
        }

    once()
    return once


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _bundle(options):
    dtype = options["dtype"]
    if dtype in SCHEMES:
        return quantize_model(g4.init(model_config(options), seed=0), SCHEMES[dtype])
    return g4.init(model_config(options, dtype), seed=0)


def _state(sampler, rows: int, length: int):
    """A generation with ``length`` positions in its caches, without the time to fill them: cost depends on lengths alone."""
    wanted, mode = sampler._request([[0]] * rows, 1 << 20, (0.0, 0, 1.0, 0.0, 1.0), 0, [])
    prefix = sampler.empty(rows)
    prefix = prefix._replace(lengths=jnp.full_like(prefix.lengths, length), hidden=jnp.ones_like(prefix.hidden))
    return sampler.begin(prefix, wanted, mode), wanted, mode


def _round_seconds(sampler, rows: int, length: int, rounds: int, steps: int = 0):
    """A function that measures seconds of one round (all rows), averaged over ``rounds``."""

    def once() -> float:
        state, wanted, mode = _state(sampler, rows, length)
        state, _ = sampler.run_rounds(state, wanted, mode, steps, 1)
        start = time.perf_counter()
        state, out = sampler.run_rounds(state, wanted, mode, steps, rounds)
        return (time.perf_counter() - start) / int(out.rounds.max())

    once()
    return once


def decode_rates(sampler, options):
    """A function that measures tokens a second: one row early and late in a text, and ``rows`` of them."""
    count, rows = options["new_tokens"], options["rows"]
    early, late = (_round_seconds(sampler, 1, length, count) for length in (EARLY, LATE))
    many = _round_seconds(sampler, rows, EARLY, count)

    def once():
        one, last, all_rows = early(), late(), many()
        return {
            "decode_tokens_per_second": 1 / one,
            f"decode_tokens_per_second_{rows}_rows": rows / all_rows,
            f"gain_of_{rows}_rows": rows * one / all_rows,
            f"time_of_token_{LATE}_to_{EARLY}": last / one,
        }

    return once


def prefill_rate(sampler, options):
    """A function that measures prompt tokens a second."""
    count = options["prompt_tokens"]
    prompt = np.random.default_rng(0).integers(5, sampler.config.vocab_size, count).astype(np.int32)

    def once():
        return {
            "prefill_tokens_per_second": count / _seconds(lambda: sampler.prefill([prompt]).hidden.block_until_ready())
        }

    once()
    return once


def speculation(sampler, options):
    """A function that measures plain and speculative rounds with drafts accepted at ``acceptance`` each, and what verification
    and drafting cost. ``speedup`` is that of the acceptances drawn, ``speedup_on_average`` that of rounds of average length."""
    steps, count = options["draft_tokens"], options["new_tokens"]
    prompt = np.random.default_rng(0).integers(5, sampler.config.vocab_size, EARLY).tolist()
    graph, drafter_weights = sampler._drafter
    free, paid = _scripted(None), _scripted(graph)

    def rate(steps, propose=None):
        if propose is not None:
            sampler.replace_drafter(propose, (weights, drafter_weights))
        return sampler.with_draft_tokens(steps).generate([prompt], max_new_tokens=count, stop_ids=[])

    length = EARLY + count + 2 * steps + 2
    right = np.zeros((1, length), np.int32)
    wrong = np.random.default_rng(1).random((1, length)) >= options["acceptance"]
    weights = {"right": jnp.asarray(right), "wrong": jnp.asarray(wrong)}
    # The answer as verification gives it, whatever is drafted: where products of one row add up in another order, made-up weights
    # let plain decoding wander off.
    right[0, : EARLY + count] = [*prompt, *rate(steps, free).tokens[0]]
    weights["right"] = jnp.asarray(right)
    draft_seconds = _draft_seconds(sampler, graph, drafter_weights, steps)
    average = sum(options["acceptance"] ** i for i in range(steps + 1))  # tokens of a round, of any draw

    def once():
        own, cheap, base = (rate(*which).stats for which in ((steps, paid), (steps, free), (0,)))
        seconds = [s.decode_seconds / s.rounds for s in (own, cheap, base)]
        drafted = draft_seconds()
        return {
            "plain_tokens_per_second": base.tokens_per_second,
            "speculative_tokens_per_second": own.tokens_per_second,
            "speedup": own.tokens_per_second / base.tokens_per_second,
            "speedup_on_average": average * seconds[2] / seconds[0],
            "accepted_share": own.accepted / own.drafted,
            "tokens_per_round": own.mean_accepted,
            "round_seconds": seconds[0],
            "verification_seconds": seconds[1],
            "draft_seconds": drafted,
            "round_to_its_parts": seconds[0] / (seconds[1] + drafted),
            "plain_round_seconds": seconds[2],
        }

    once()
    return once


MEASURES = {"decode": decode_rates, "prefill": prefill_rate, "speculative": speculation}


def _draft_seconds(sampler, graph, drafter_weights, steps: int, times: int = 8):
    """A function that measures seconds of the drafter alone, ``steps`` tokens, in a loop of its own."""
    state, wanted, mode = _state(sampler, 1, EARLY)
    target_graph, target_weights = sampler._target

    @jax.jit
    def run(target_weights, drafter_weights, state):
        target, drafter = target_graph.merge(target_weights), graph.merge(drafter_weights)

        def again(_, newest):
            return draft(target, drafter, state._replace(newest=newest), wanted, mode, steps, None)[:, -1]

        return jax.lax.fori_loop(0, times, again, state.newest)

    def once() -> float:
        return _seconds(lambda: jax.block_until_ready(run(target_weights, drafter_weights, state))) / times

    once()
    return once


def _scripted(graph):
    """A drafter with known answers; with ``graph`` the real one runs beside it and its tokens are thrown away."""

    def propose(weights, target, state, request, mode, steps, noise):
        answers, drafter_weights = weights
        last = answers["right"].shape[1] - 1
        position = jnp.minimum(state.lengths[:, None] + 1 + jnp.arange(steps, dtype=jnp.int32)[None], last)
        right = jnp.take_along_axis(answers["right"], position, axis=1)
        wrong = jnp.take_along_axis(answers["wrong"], position, axis=1)
        tokens = jnp.where(wrong, (right + 1) % target.config.vocab_size, right)
        if graph is None:
            return tokens
        own = draft(target, graph.merge(drafter_weights), state, request, mode, steps, noise)
        return jnp.where(own < 0, own, tokens)  # never, but no compiler knows

    return propose


def _transformers(options):
    import torch

    torch.manual_seed(0)
    c = model_config(options)
    model = transformers_model(c)
    model = model.to(getattr(torch, options["dtype"])).eval()
    length = options["prompt_tokens"] if options["mode"] == "prefill" else EARLY
    prompt = torch.randint(5, c.vocab_size, (1, length))
    count = options["new_tokens"]

    @torch.inference_mode()
    def once():
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter() - start
        if options["mode"] == "prefill":
            return {"prefill_tokens_per_second": length / prefilled}
        token, start = out.logits[:, -1:].argmax(-1), time.perf_counter()
        for _ in range(count):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return {"decode_tokens_per_second": count / (time.perf_counter() - start)}

    once()
    return once


def _write_gguf(options, dtypes, folder: Path) -> None:
    bundle = g4.init(dataclasses.replace(model_config(options), drafter=None), seed=0)
    # A tokenizer with merges, which the format needs; prompts are ids.
    bundle = dataclasses.replace(bundle, tokenizer=train_tokenizer([__doc__], bundle.config.vocab_size))
    for dtype in dtypes:
        g4.save(bundle, folder / dtype, format="gguf", dtype=dtype)


def _llama_cpp(options):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next((Path(options["folder"]) / options["dtype"]).glob("model-*.gguf")))
    params.n_ctx, params.n_parallel = max(1024, options["prompt_tokens"] + 64), 1
    params.cpuparams.n_threads = int(os.environ["OMP_NUM_THREADS"])
    params.fit_params = params.warmup = False
    server = xllamacpp.Server(params)
    prefill = options["mode"] == "prefill"
    rng = np.random.default_rng(0)
    size = model_config(options).vocab_size
    body = {"n_predict": 1 if prefill else options["new_tokens"], "temperature": 0, "ignore_eos": True}

    def once():
        prompt = rng.integers(5, size, options["prompt_tokens"] if prefill else EARLY).tolist()
        data = json.dumps({**body, "prompt": prompt, "cache_prompt": False}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            timings = json.loads(answer.read())["timings"]
        if prefill:
            return {"prefill_tokens_per_second": timings["prompt_per_second"]}
        return {"decode_tokens_per_second": timings["predicted_per_second"]}

    once()
    return once


if __name__ == "__main__":
    _options = json.loads(sys.argv[2])
    serve(lambda: _prepare(_options), _options.get("trace"))
