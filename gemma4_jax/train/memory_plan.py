"""What a training step takes on one device: from the compiled program, without data or weights.

The numbers of temporaries are those of the platform that compiled. Where the wanted devices are not there, as many made-up
CPU devices take their place; other compilers fuse and schedule differently, so leave some room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from gemma4_jax.errors import ConfigError
from gemma4_jax.train import trees
from gemma4_jax.train.sharding import MeshConfig
from gemma4_jax.train.trainer import Trainer

GB = 1e9


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    weights, moments (of the optimiser), average (of the weights), batch: there all the time. gradients: in the weights'
    dtype. temporaries: the most that is held besides at one moment of a step: gradients, activations, scratch space. peak:
    all of it. platform: what it was compiled for.
    """

    weights: int
    moments: int
    average: int
    batch: int
    gradients: int
    temporaries: int
    peak: int
    platform: str

    def table(self) -> str:
        """Lines for people."""
        names = ("weights", "moments", "average", "batch", "temporaries", "peak")
        rows = [f"  {name:<12}{getattr(self, name) / GB:>10.3f} GB" for name in names]
        rows[4] += f"  (gradients {self.gradients / GB:.3f} GB and activations)"
        return "\n".join([f"memory per device, compiled for {self.platform}:", *rows])


def plan_devices(mesh: MeshConfig) -> list[Any] | None:
    """Devices to plan on: None for those that are there, or made-up CPU devices when the mesh needs more.

    Call it before anything asks for a device: afterwards their number is fixed.

    Raises:
      ConfigError: too few devices, and it is too late to make some up.
    """
    needed = max(mesh.data, 1) * mesh.fsdp * mesh.tensor
    if needed > 1:
        with contextlib.suppress(RuntimeError):  # too late: then those devices that are there have to do
            jax.config.update("jax_num_cpu_devices", needed)
    there = jax.devices()
    if len(there) == needed or (mesh.data == -1 and len(there) % needed == 0):
        return None
    for devices in (there, jax.devices("cpu")):
        if len(devices) >= needed:
            return devices[:needed]
    raise ConfigError(f"the mesh needs {needed} devices, but there are {len(there)}, and no more can be made up")


def measure(trainer: Trainer, batch: Mapping[str, jax.ShapeDtypeStruct]) -> MemoryPlan:
    """Compile the training step for shapes alone and read what it takes.

    Args:
      trainer: of the run.
      batch: shapes and shardings of one batch, see ``Trainer.abstract_batch``.
    """
    state, platform = trainer.abstract, trainer.mesh.devices.flat[0].platform
    # Memory is laid out before machine code is made: on a CPU that needs no care.
    quick = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    found = trainer.train_step.lower(state, dict(batch)).compile(compiler_options=quick).memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return MemoryPlan(
        weights=local_bytes({**state.params, **state.frozen}),
        moments=local_bytes(trees.named_leaves(state.opt_state)),
        average=local_bytes(state.average),
        batch=local_bytes(batch),
        gradients=local_bytes(state.params),
        temporaries=found.temp_size_in_bytes,
        peak=held + found.temp_size_in_bytes,
        platform=f"{trainer.mesh.size} x {platform}",
    )


def advice(plan: MemoryPlan, limit_gb: float, config: Mapping[str, Any], remat: str) -> list[str]:
    """What to change for a plan to fit, most effective first; a line that says so if it does.

    Args:
      plan: of the run as it is.
      limit_gb: gigabytes (1e9) of a device.
      config: the run's config, for the fields that could be changed.
      remat: the model's setting.
    """
    limit, held = limit_gb * GB, plan.weights + plan.moments + plan.average
    if plan.peak <= limit:
        return [f"fits into {limit_gb:g} GB with {(limit - plan.peak) / GB:.3f} GB to spare"]
    lines = [f"does not fit into {limit_gb:g} GB: {(plan.peak - limit) / GB:.3f} GB too much. Change:"]
    if held + plan.gradients > limit / 2:
        pieces = math.ceil(config["mesh"]["fsdp"] * (held + plan.gradients) / (limit / 2))
        lines.append(
            f"  mesh.fsdp {config['mesh']['fsdp']} -> {pieces}: weights, moments and gradients are "
            f"{(held + plan.gradients) / GB:.3f} GB a device, which this halves to half of the limit or less"
        )
        if config["optimizer"]["name"] == "adamw":
            lines.append(
                f"  optimizer.name -> adafactor: takes nearly all of the moments' {plan.moments / GB:.3f} GB away, or "
                f"optimizer.mu_dtype -> bfloat16 a quarter of them"
            )
    if remat != "full":
        lines.append(f"  model_overrides.remat {remat} -> full: activations of one layer instead of all")
    rows = config["data"]["batch_size"] // config["train"]["accumulation"]
    if rows > 1:
        lines.append(
            f"  train.accumulation {config['train']['accumulation']} -> more: {rows} rows at a time now; activations shrink "
            f"with them"
        )
    lines.append(
        f"  data.seq_len {config['data']['seq_len']} -> less, or finetune:lora, which has no moments of the base"
    )
    return lines


def local_bytes(leaves: Mapping[str, Any]) -> int:
    """What arrays or shapes with shardings take on one device."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves.values())
