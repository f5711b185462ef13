"""Adapters alone, as a folder that the library ``peft`` puts on the published model.

Names are those of the modules in ``transformers``, found through the table that import and export read (``interop.names``):
``base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight`` (R, I), ``…lora_B.weight`` (O, R).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.config import LoraConfig, ModelConfig, unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.interop import names
from gemma4_jax.interop.hf_export import DRAFTER_FOLDER, new_folder
from gemma4_jax.interop.safetensors_io import write_file

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MODEL_TYPES = ("gemma4_unified", "gemma4_unified_text")
_HALVES = {"lora_A": "a", "lora_B": "b"}


def save_folder(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Any],
    *,
    base: str = "",
    model_type: str = "gemma4_unified",
) -> dict[str, int]:
    """Write a PEFT folder; adapters of the drafter go into its subfolder ``drafter``.

    Args:
      path: absent, or an empty folder.
      config: with ``lora``.
      weights: by our flat names; only adapters are read.
      base: where the published model is (a folder or a hub name), for ``peft`` to find; may be empty.
      model_type: whose module names to use: the whole model's, or those of its text model alone.

    Returns:
      Numbers for a report: tensors and bytes.

    Raises:
      ConfigError: no adapters, adapters of media parts for a text model, or an unknown ``model_type``.
      CheckpointError: the folder is not empty, or the disk refuses; nothing is left behind.
    """
    if config.lora is None:
        raise ConfigError("there are no adapters to write: lora is None in this configuration")
    if model_type not in MODEL_TYPES:
        raise unknown_name("model type", model_type, MODEL_TYPES)
    target = _tensors(names.target_rows(config, names.LAYOUTS[model_type]), weights)
    drafter = _tensors(names.drafter_rows(config), weights) if config.drafter else {}
    if model_type == "gemma4_unified_text":
        outside = [name for name in target if name.startswith("model.embed_") or name.startswith("model.vision_")]
        if outside:
            raise ConfigError(f"{outside[0]} has an adapter, but model type {model_type} has no such module")
    with new_folder(path) as folder:
        report = {"tensors": 0, "bytes": 0}
        for place, tensors, origin in ((folder, target, base), (folder / DRAFTER_FOLDER, drafter, "")):
            if tensors:
                place.mkdir(exist_ok=True)
                written = _write(place, config.lora, tensors, origin)
                report = {key: report[key] + written[key] for key in report}
    return report


def _tensors(rows: Sequence[names.Row], weights: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Module name -> ``lora_A`` and ``lora_B`` of every adapted map."""
    found = {}
    for row in rows:
        place = row.ours.removesuffix("/weight")
        if f"{place}/lora/a" in weights:
            halves = {theirs: weights[f"{place}/lora/{half}"] for theirs, half in _HALVES.items()}
            found[row.published.removesuffix(".weight")] = {
                theirs: np.asarray(leaf[row.index]) for theirs, leaf in halves.items()
            }
    return found


def _write(
    folder: Path, lora: LoraConfig, modules: Mapping[str, Mapping[str, np.ndarray]], base: str
) -> dict[str, int]:
    tensors = {
        f"base_model.model.{module}.{half}.weight": array
        for module, halves in modules.items()
        for half, array in halves.items()
    }
    write_file(folder / TENSORS, {name: (a.dtype, a.shape) for name, a in tensors.items()}, lambda name: tensors[name])
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {"tensors": len(tensors), "bytes": sum(array.nbytes for array in tensors.values())}
