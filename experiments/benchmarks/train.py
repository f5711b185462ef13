"""Training steps of this project and of transformers + torch AdamW, on the same shape, in turns.

Both sides: weights and activations in one dtype (adapters in f32), AdamW, clipping by global norm, next-token loss, the same
rows. The share of the matrix peak counts six operations a weight and token (embedding lookups do none) beside a plain f32
matrix product measured in the same turns.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import numpy as np

from experiments.benchmarks.peers import transformers_model
from experiments.benchmarks.workers import Worker, alternate, serve
from gemma4_jax.config import ModelConfig, get_preset

MODULE = "experiments.benchmarks.train"
SIDES = ("ours", "transformers", "matrix")


def measure(options: dict[str, Any], threads: int) -> dict[str, float]:
    """Flat results of all sides.

    Args:
      options: ``model`` (preset), ``dtype``, ``batch_size``, ``seq_len``, ``rounds``, ``remat``, ``scan_layers``,
        ``token_chunk``, ``lora_rank`` (0: all weights train; else adapters of this rank on every linear map, and the peer is
        ``peft``).
      threads: torch threads.
    """
    with (
        Worker(MODULE, "ours", options, threads) as ours,
        Worker(MODULE, "transformers", options, threads) as peer,
        Worker(MODULE, "matrix", options, threads) as matrix,
    ):
        sides = alternate([ours, peer, matrix], options["rounds"])
    tokens = options["batch_size"] * options["seq_len"]
    config = model_config(options)
    # A frozen weight's own gradient is a third of the work that need not be done.
    operations = (4 if config.lora else 6) * config.num_parameters() * tokens
    results = {"parameters": config.num_parameters(), "tokens_per_step": tokens}
    for side in ("ours", "transformers"):
        seconds = sides[side]["seconds"]
        results[f"{side}_tokens_per_second"] = tokens / seconds
        results[f"{side}_peak_gigabytes"] = sides[side]["peak_bytes"] / 1e9
        results[f"{side}_share_of_matrix_peak"] = operations / seconds / sides["matrix"]["operations_per_second"]
    results["matrix_gigaflops"] = sides["matrix"]["operations_per_second"] / 1e9
    results["speed_ratio"] = results["ours_tokens_per_second"] / results["transformers_tokens_per_second"]
    results["memory_ratio"] = results["ours_peak_gigabytes"] / results["transformers_peak_gigabytes"]
    return results


def model_config(options: dict[str, Any]) -> ModelConfig:
    """The target alone: the peer has no multi-token loss."""
    lora = {"rank": options["lora_rank"], "alpha": 16.0} if options["lora_rank"] else None
    layers = {name: options[name] for name in ("remat", "scan_layers")}
    dtypes = {"dtype": options["dtype"], "param_dtype": options["dtype"]}
    return get_preset(options["model"], drafter=None, vision=None, audio=None, lora=lora, **layers, **dtypes)


def _rows(config: ModelConfig, options: dict[str, Any]) -> np.ndarray:
    shape = options["batch_size"], options["seq_len"]
    return np.random.default_rng(0).integers(5, config.vocab_size, shape).astype(np.int32)


def ours(options: dict[str, Any]):
    """The project's own trainer."""
    import jax

    from gemma4_jax.losses import LossConfig
    from gemma4_jax.train.optimizer import OptimizerConfig
    from gemma4_jax.train.sharding import MeshConfig
    from gemma4_jax.train.trainer import Trainer, TrainOptions

    config = model_config(options)
    trainer = Trainer(
        config,
        loss=LossConfig(mtp_steps=0, token_chunk=options["token_chunk"]),
        optimizer=dataclasses.replace(OptimizerConfig(), warmup_steps=1),
        options=TrainOptions(trainable=("!*", "*/lora/*") if config.lora else ("*",)),
        mesh=MeshConfig(),
        seed=0,
        batch_size=options["batch_size"],
        devices=jax.devices()[:1],
    )
    tokens = _rows(config, options)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = trainer.place(
        {"tokens": tokens, "loss_mask": ones.astype(bool), "segment_ids": ones, "positions": positions}
    )
    trainer.compile_ahead(*tokens.shape)
    state = trainer.init()

    def step():
        nonlocal state
        start = time.perf_counter()
        state, metrics = trainer.train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return {"seconds": time.perf_counter() - start}

    step()
    return step


def transformers(options: dict[str, Any]):
    """transformers' own model class with torch's AdamW; with adapters, wrapped by peft."""
    import torch

    c = model_config(options)
    model = transformers_model(c).to(getattr(torch, c.param_dtype))
    if c.lora:
        from peft import LoraConfig, get_peft_model

        maps = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = get_peft_model(model, LoraConfig(r=c.lora.rank, lora_alpha=c.lora.alpha, target_modules=maps))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows = torch.tensor(_rows(c, options), dtype=torch.long)

    def step():
        start = time.perf_counter()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start}

    step()
    return step


def matrix(options: dict[str, Any]):
    """A large f32 matrix product: what the machine can do at most."""
    import jax
    import jax.numpy as jnp

    size = 2048
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()

    def once():
        start, times = time.perf_counter(), 8
        for _ in range(times):
            product(a).block_until_ready()
        return {"operations_per_second": 2 * size**3 * times / (time.perf_counter() - start)}

    return once


if __name__ == "__main__":
    _side, _options = sys.argv[1], json.loads(sys.argv[2])
    serve(
        lambda: {"ours": ours, "transformers": transformers, "matrix": matrix}[_side](_options), _options.get("trace")
    )
