"""Generation on the first device, by weight format: made-up weights of any size, beside what the device can do at most.

The share of memory bandwidth counts the weights that a token reads once, that of the matrix peak two operations a weight; both
limits are measured in the same process. On a card larger than the one meant, ``XLA_PYTHON_CLIENT_MEM_FRACTION`` holds the
process to a part of its memory.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import gc
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import gemma4_jax as g4
from experiments.benchmarks import sampling
from experiments.benchmarks.filled import filled_bundle
from experiments.benchmarks.load import weight_bytes
from experiments.benchmarks.sampling import MEASURES
from gemma4_jax.config import SCHEMES
from gemma4_jax.train import profiling

log = logging.getLogger(__name__)

ROW, READ_BYTES, SIDE = 8192, 1 << 31, 8192  # of what the limits are measured with: rows read, and sides of a product


def measure(options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Flat results of all weight formats; what a format cannot do for want of memory is left out, and logged.

    Args:
      options: ``model`` (preset), ``dtypes`` (of float32, bfloat16, int8, int4), ``modes`` (of ``MEASURES``), ``rounds``,
        ``chunk`` and what the modes take (``sampling.measure``).
      threads: unused: there are no peers.
    """
    del threads
    device = jax.devices()[0]
    results: dict[str, Any] = {"device": device.device_kind, **limits(options["rounds"])}
    for dtype in options["dtypes"]:
        results |= {f"{dtype}_{name}": value for name, value in _one(dtype, options, results).items()}
        gc.collect()
    return results


def limits(rounds: int) -> dict[str, float]:
    """What the device can do, the best of ``rounds``: bytes a second of reading (sums of rows) or of copying, whichever is
    faster, and operations a second of a bf16 matrix product."""
    rows = jnp.full((READ_BYTES // 2 // ROW, ROW), 1, jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.bfloat16)
    read = jax.jit(lambda a: jnp.sum(a, axis=1, dtype=jnp.float32))
    copy, multiply = jax.jit(lambda a: a + 1), jax.jit(lambda a: a @ a)
    return {
        "bytes_per_second": max(rows.nbytes / _best(read, rows, rounds), 2 * rows.nbytes / _best(copy, rows, rounds)),
        "operations_per_second": 2 * SIDE**3 / _best(multiply, square, rounds),
    }


def _best(function, argument, rounds: int, times: int = 4) -> float:
    """Seconds of one call, of ``times`` in a row."""

    def once() -> float:
        start = time.perf_counter()
        for _ in range(times):
            out = function(argument)  # of which one is held at a time
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / times

    once()
    return min(once() for _ in range(rounds))


def _one(dtype: str, options: dict[str, Any], limit: dict[str, float]) -> dict[str, Any]:
    """All measures of one weight format."""
    config = sampling.model_config(options, "bfloat16" if dtype in SCHEMES else dtype)
    config = dataclasses.replace(config, quantization=dtype if dtype in SCHEMES else None)
    length = max(sampling.LATE, options["prompt_tokens"], sampling.EARLY + 2 * options["new_tokens"]) + 256
    sampler = g4.Sampler(
        filled_bundle(config),
        max_length=length,
        draft_tokens=options["draft_tokens"],
        chunk=options["chunk"],
        release=True,
    )
    parts = weight_bytes(config)
    read = parts["layers"] + parts["table"]
    found: dict[str, Any] = {"weight_bytes": sum(parts.values())}
    prepare = {mode: functools.partial(_prepare, mode, sampler, options) for mode in options["modes"]}
    medians, crowded = _together(prepare, options["rounds"], dtype)
    found |= medians
    for mode in crowded:
        log.info("%s, %s: does not fit beside the other modes, and is measured alone", dtype, mode)
        gc.collect()
        medians, lack = _medians(prepare[mode], options["rounds"], f"{dtype}_{mode}")
        found |= medians
        if lack:
            log.warning("%s, %s: left out for want of memory: %s", dtype, mode, lack)
    if "decode_tokens_per_second" in found:
        found["share_of_bandwidth"] = read * found["decode_tokens_per_second"] / limit["bytes_per_second"]
    if "prefill_tokens_per_second" in found:
        done = sampling.prefill_operations(config) * found["prefill_tokens_per_second"]
        found["share_of_matrix_peak"] = done / limit["operations_per_second"]
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["peak_bytes"] = stats["peak_bytes_in_use"]
    return found


def _prepare(mode: str, sampler: g4.Sampler, options: dict[str, Any]) -> Callable:
    return MEASURES[mode](copy.copy(sampler), options)  # some exchange their sampler's drafter


def _together(prepare: dict[str, Callable], rounds: int, dtype: str) -> tuple[dict[str, float], list[str]]:
    """Results of modes that are prepared at once, since most of the time goes into compiling, and the modes that did not fit.
    What an error holds is freed on return."""
    found: dict[str, float] = {}
    crowded = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        prepared = {mode: pool.submit(function) for mode, function in prepare.items()}
    for mode, future in prepared.items():
        medians, lack = _medians(future.result, rounds, f"{dtype}_{mode}")
        found |= medians
        if lack:
            crowded.append(mode)
    return found, crowded


def _medians(prepare: Callable, rounds: int, name: str) -> tuple[dict[str, float], str]:
    """Medians of what ``prepare()`` measures, or what is said of a lack of memory. name: of a trace, where one is wanted."""
    try:
        once = prepare()
        rows = [once() for _ in range(rounds)]
        if profiling.folder():
            with jax.profiler.trace(str(profiling.folder() / name)):
                once()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {}, str(error)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}, ""
