"""Import published weights in a packed form, answer a prompt with and without the drafter, and say what that took.

    python -m experiments.try_import FOLDER [--quantization int4] [--dtype float32] [--prompt_tokens 64] [--new_tokens 8]
    [--draft_tokens 4]

Prints one JSON object: seconds of each part, bytes of the weights, the largest resident memory of the process, and whether
both ways gave the same tokens. Hardware: memory for the packed weights and 1 GB; a checkpoint to try it with comes from
``experiments.make_checkpoint``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import gemma4_jax as g4
from experiments.benchmarks.workers import peak_bytes
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.interop.hf_export import DRAFTER_FOLDER
from gemma4_jax.memory import give_back_freed_memory


def run(
    folder: Path, quantization: str, dtype: str, prompt_tokens: int, new_tokens: int, draft_tokens: int
) -> dict[str, Any]:
    """Import, then generate plainly and with the drafter.

    Raises:
      CheckpointError, ConfigError: as ``g4.load`` raises them.
    """
    start = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        bundle = g4.load(folder, folder / DRAFTER_FOLDER, dtype, quantization, progress=bar.update)
    report: dict[str, Any] = {
        "import_seconds": time.perf_counter() - start,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(bundle_weights(bundle))),
        "peak_bytes_after_import": peak_bytes(),
    }
    prompt = np.random.default_rng(0).integers(5, min(bundle.config.vocab_size, 250_000), prompt_tokens).tolist()
    sampler = g4.Sampler(bundle, max_length=prompt_tokens + new_tokens, draft_tokens=draft_tokens, release=True)
    tokens = {}
    for name, steps in (("plain", 0), ("drafter", draft_tokens)):
        jax.clear_caches()  # who answers in one way has no programs of the other
        give_back_freed_memory()
        start = time.perf_counter()
        out = sampler.with_draft_tokens(steps).generate([prompt], max_new_tokens=new_tokens, stop_ids=[])
        tokens[name] = out.tokens[0]
        report |= {
            f"{name}_seconds": time.perf_counter() - start,
            f"{name}_prefill_seconds": out.stats.prefill_seconds,
            f"{name}_rounds": out.stats.rounds,
            f"{name}_accepted": out.stats.accepted,
            f"peak_bytes_after_{name}": peak_bytes(),
        }
        logging.info("%s: %s", name, report)
    return {**report, "tokens": tokens["plain"], "equal": tokens["plain"] == tokens["drafter"]}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--dtype", default="float32", help="of activations and of what is not packed")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=8)
    parser.add_argument("--draft_tokens", type=int, default=4)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    print(json.dumps(run(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
