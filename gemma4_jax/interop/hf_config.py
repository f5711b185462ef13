"""Published configuration files and ``ModelConfig``, in both directions.

Source: spec, the published config and its two spellings. What cannot be represented is an error that names the field;
nothing is dropped silently unless it has no effect on inference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.config import FULL, SLIDING, AudioConfig, DrafterConfig, ModelConfig, VisionConfig, unknown_name
from gemma4_jax.errors import CheckpointError, ConfigError, PromptError
from gemma4_jax.interop.names import DRAFTER_TYPES, LAYOUTS

SPELLINGS = ("per_layer_config", "global_fields")
ACTIVATION = "gelu_pytorch_tanh"

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "sliding_window", "max_position_embeddings",
)  # fmt: skip
# Settings that change the network in ways this one does not have, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "attn_logit_softcapping": (None,),
    "hidden_activation": (ACTIVATION,),
    "hidden_act": (ACTIVATION,),
    "hidden_size_per_layer_input": (0, None),
    "enable_moe_block": (False, None),
    "num_experts": (0, None),
    "use_double_wide_mlp": (False, None),
    "tie_word_embeddings": (True, None),
    "quantization_config": (None,),
}
# Published name -> ours, for the ids of the composite configuration.
_IDS = {
    "image_token_id": "image_token_id",
    "audio_token_id": "audio_token_id",
    "video_token_id": "video_token_id",
    "boi_token_id": "boi_token_id",
    "eoi_token_id": "eoi_token_id",
    "boa_token_id": "boa_token_id",
    "eoa_token_index": "eoa_token_id",
}
_SHARED_WITH_TARGET = (
    "vocab_size", "num_key_value_heads", "head_dim", "num_global_key_value_heads", "global_head_dim", "sliding_window",
    "rope_theta", "global_rope_theta", "partial_rotary_factor", "global_rope_scaling_factor", "rms_norm_eps",
)  # fmt: skip


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(values).__name__}, not an object")
    return values


def read_optional_json(path: str | Path) -> dict[str, Any]:
    """``read_json``, or an empty dict when there is no such file."""
    return read_json(path) if Path(path).is_file() else {}


def model_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None, tokenizer=None) -> ModelConfig:
    """The target's configuration.

    Args:
      values: contents of ``config.json``; a composite or a text-only model.
      generation: contents of ``generation_config.json``: stop ids and suppressed tokens.
      tokenizer: adds its eos to the stop ids.

    Raises:
      ConfigError: an unsupported setting or a missing size, naming the field; an unknown ``model_type``.
      PromptError: the tokenizer's eos is not in its table.
    """
    kind = values.get("model_type")
    if kind not in tuple(LAYOUTS):  # of values that cannot be looked up, too
        hint = " (this is a drafter: give it as drafter=)" if kind in DRAFTER_TYPES else ""
        raise ConfigError(f"config.json: model_type {kind!r} is not supported{hint}; choices: {', '.join(LAYOUTS)}")
    composite = kind == "gemma4_unified"
    where = "text_config." if composite else ""
    text = _section(values, "text_config") if composite else values
    if composite:
        _check_neutral(values, "", ("tie_word_embeddings", "quantization_config"))
    fields = _gemma3_fields(text) if kind == "gemma3_text" else _text_fields(text, where)
    eos = _id_list(text.get("eos_token_id", 1), f"{where}eos_token_id")
    fields |= {
        "pad_token_id": _or_default(text.get("pad_token_id"), 0),
        "bos_token_id": _or_default(text.get("bos_token_id"), 2),
        "eos_token_id": eos[0] if eos else 1,
        "stop_token_ids": stop_token_ids(eos, generation or {}, tokenizer),
        "suppress_tokens": _id_list((generation or {}).get("suppress_tokens"), "suppress_tokens"),
    }
    if composite:
        fields |= {ours: values[name] for name, ours in _IDS.items() if values.get(name) is not None}
        fields |= {"vision": _vision_config(values), "audio": _audio_config(values)}
    return _made(ModelConfig, fields)


def stop_token_ids(eos: Sequence[int], generation: Mapping[str, Any], tokenizer=None) -> tuple[int, ...]:
    """Where generation stops: the generation list (else the config's eos), and the tokenizer's own eos.

    Raises:
      PromptError: the tokenizer names an eos that is not in its table.
    """
    listed = _id_list(generation.get("eos_token_id"), "eos_token_id") or tuple(eos)
    return tuple(dict.fromkeys([*listed, *_tokenizer_eos(tokenizer)]))


def _tokenizer_eos(tokenizer) -> list[int]:
    if tokenizer is None or not tokenizer.settings:
        return []
    name = tokenizer.settings.get("eos_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    if name is None:
        return []
    if not isinstance(name, str):
        raise PromptError(f"tokenizer_config.json: eos_token is {name!r}, not a token's name")
    return [tokenizer.token_id(name)]


def drafter_config(values: Mapping[str, Any], target: ModelConfig) -> DrafterConfig:
    """A drafter's configuration, checked against the target whose keys and values it reads.

    Args:
      values: contents of the drafter's ``config.json``.
      target: the target's configuration.

    Raises:
      ConfigError: not a drafter, an unsupported setting, or a size that differs from the target's, naming both numbers.
    """
    kind = values.get("model_type")
    if kind not in DRAFTER_TYPES:
        raise ConfigError(f"drafter config.json: model_type is {kind!r}; choices: {', '.join(DRAFTER_TYPES)}")
    text = _section(values, "text_config")
    layers = text.get("num_hidden_layers")
    shared = text.get("num_kv_shared_layers", 0)
    if shared not in (0, layers):
        raise ConfigError(f"drafter text_config.num_kv_shared_layers is {shared}; it must be all {layers} layers")
    fields = _text_fields({**text, "num_kv_shared_layers": 0}, "drafter text_config.")
    width = values.get("backbone_hidden_size")
    if width != target.hidden_size:
        raise ConfigError(
            f"drafter backbone_hidden_size is {width} but the target's hidden_size is {target.hidden_size}"
        )
    for name in _SHARED_WITH_TARGET:
        if fields[name] != getattr(target, name):
            raise ConfigError(f"drafter {name} is {fields[name]} but the target's is {getattr(target, name)}")
    own = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_types")
    ordered = ("use_ordered_embeddings", "num_centroids", "centroid_intermediate_top_k")
    defaults = {f.name: f.default for f in dataclasses.fields(DrafterConfig)}
    return DrafterConfig(
        **{name: fields[name] for name in own}, **{name: values.get(name, defaults[name]) for name in ordered}
    )


def _text_fields(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ModelConfig fields of a Gemma 4 text configuration."""
    _check_neutral(text, where, _NEUTRAL)
    if text.get("num_kv_shared_layers"):
        raise ConfigError(f"{where}num_kv_shared_layers is {text['num_kv_shared_layers']}; only 0 is supported")
    bidirectional = text.get("use_bidirectional_attention", "vision")
    if bidirectional not in (None, "vision"):
        raise ConfigError(f"{where}use_bidirectional_attention is {bidirectional!r}; choices: None, 'vision'")
    fields = _sizes(text, where)
    k_eq_v = bool(text.get("attention_k_eq_v", False))
    fields |= _rope_fields(text.get("rope_parameters"), where)
    fields |= {
        "layer_types": _layer_types(text, fields["num_hidden_layers"], 6, where, last_is_global=True),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "final_logit_softcapping": text.get("final_logit_softcapping"),
        "attention_k_eq_v": k_eq_v,
        "use_bidirectional_attention": bidirectional,
    }
    return fields | _global_attention(text, fields, k_eq_v, where)


def _gemma3_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig fields of a Gemma 3 text configuration: no value norm, separate values, a scale, full RoPE."""
    _check_neutral(text, "", _NEUTRAL)
    if text.get("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention is set; only causal attention is supported")
    fields = _sizes(text, "")
    rope = dict(text.get("rope_parameters") or {})
    rope.setdefault(FULL, {"rope_theta": text.get("rope_theta", 1e6), **(text.get("rope_scaling") or {})})
    rope.setdefault(SLIDING, {"rope_theta": text.get("rope_local_base_freq", 1e4)})
    period = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
    fields |= _rope_fields(rope, "")
    return fields | {
        "layer_types": _layer_types(text, fields["num_hidden_layers"], period, "", last_is_global=False),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "final_logit_softcapping": text.get("final_logit_softcapping"),
        "attention_k_eq_v": False,
        "value_norm": False,
        "attention_scale": text.get("query_pre_attn_scalar", 256) ** -0.5,
        "use_bidirectional_attention": None,
        "global_head_dim": fields["head_dim"],
        "num_global_key_value_heads": fields["num_key_value_heads"],
    }


def _sizes(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in _SIZES:
        value = text.get(name)
        if type(value) is not int:
            raise ConfigError(
                f"{where}{name} is {'missing' if name not in text else repr(value)}; a whole number is needed"
            )
    return {name: text[name] for name in _SIZES}


def _layer_types(text, count: int, period: int, where: str, last_is_global: bool) -> tuple[str, ...]:
    given = text.get("layer_types")
    if given is None:
        given = [FULL if (i + 1) % period == 0 else SLIDING for i in range(count)]
        if last_is_global:
            given[-1] = FULL
    if not isinstance(given, list) or (last_is_global and given and given[-1] != FULL):
        raise ConfigError(f"{where}layer_types must be a list that ends in {FULL!r}")
    if not all(isinstance(kind, str) for kind in given):
        raise ConfigError(f"{where}layer_types must be a list of names")
    return tuple(given)


def _global_attention(text, fields: dict[str, Any], k_eq_v: bool, where: str) -> dict[str, int]:
    """Head width and key/value heads of global layers, from either spelling."""
    defaults = {"head_dim": fields["head_dim"], "num_key_value_heads": fields["num_key_value_heads"]}
    if text.get("per_layer_config") is None:
        # The older spelling; its reference gives these defaults, and heads of their own only with shared values.
        width = text.get("global_head_dim", 512)
        heads = text.get("num_global_key_value_heads") if k_eq_v else None
        return {
            "global_head_dim": width,
            "num_global_key_value_heads": defaults["num_key_value_heads"] if heads is None else heads,
        }
    layers = _per_layer(text["per_layer_config"], fields["num_hidden_layers"], where)
    found: dict[str, dict[str, int]] = {}
    for index, kind in enumerate(fields["layer_types"]):
        own = {**defaults, **layers.get(index, {})}
        unknown = set(own) - set(defaults)
        if unknown:
            raise ConfigError(
                f"{where}per_layer_config.{index}.{min(unknown)} is not supported; choices: {', '.join(defaults)}"
            )
        first = found.setdefault(kind, own)
        if own != first:
            raise ConfigError(f"{where}per_layer_config.{index} gives {own} but other {kind} layers have {first}")
    if found.get(SLIDING, defaults) != defaults:
        raise ConfigError(
            f"{where}per_layer_config changes {SLIDING} layers to {found[SLIDING]}; only {FULL} ones may differ"
        )
    own = found.get(FULL, defaults)
    return {"global_head_dim": own["head_dim"], "num_global_key_value_heads": own["num_key_value_heads"]}


def _per_layer(values: Any, count: int, where: str) -> dict[int, Mapping[str, Any]]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}per_layer_config is a {type(values).__name__}, not an object")
    layers: dict[int, Mapping[str, Any]] = {}
    for key, own in values.items():
        if not str(key).isdecimal() or int(key) >= count or int(key) in layers or not isinstance(own, Mapping):
            raise ConfigError(f"{where}per_layer_config.{key} is not a layer below {count}, given once, with an object")
        layers[int(key)] = {name: value for name, value in own.items() if value is not None}
    return layers


def _rope_fields(rope: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    if rope is None:
        rope = {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            SLIDING: {"rope_theta": 1e4},
        }
    name = f"{where}rope_parameters"
    rope = _object(rope, name)
    local, glob = (_object(rope.get(kind) or {}, f"{name}.{kind}") for kind in (SLIDING, FULL))
    choices = {SLIDING: ("default",), FULL: ("default", "linear", "proportional")}
    for kind, own in ((SLIDING, local), (FULL, glob)):
        allowed = choices[kind]
        if own.get("rope_type", "default") not in allowed:
            raise ConfigError(f"{name}.{kind}.rope_type is {own['rope_type']!r}; choices: {', '.join(allowed)}")
    kind = glob.get("rope_type", "default")
    factor = glob.get("partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
    return {
        "rope_theta": local.get("rope_theta", 1e4),
        "global_rope_theta": glob.get("rope_theta", 1e6),
        "partial_rotary_factor": factor,
        "global_rope_scaling_factor": 1.0 if kind == "default" else glob.get("factor", 1.0),
    }


def _vision_config(values: Mapping[str, Any]) -> VisionConfig | None:
    vision = values.get("vision_config")
    if vision is None:
        return None
    vision = _object(vision, "vision_config")
    if vision.get("output_proj_dims", vision.get("mm_embed_dim")) != vision.get("mm_embed_dim"):
        raise ConfigError(
            f"vision_config.output_proj_dims is {vision['output_proj_dims']} but mm_embed_dim is "
            f"{vision.get('mm_embed_dim')}"
        )
    return _dataclass(VisionConfig, vision)


def _audio_config(values: Mapping[str, Any]) -> AudioConfig | None:
    audio = values.get("audio_config")
    return None if audio is None else _dataclass(AudioConfig, _object(audio, "audio_config"))


def _dataclass(cls, values: Mapping[str, Any]):
    return _made(cls, {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def _made(cls, fields: Mapping[str, Any]):
    """The dataclass, its numbers checked: files hold anything, and comparing it with a number says nothing of the field."""
    kinds = {"int": int, "float": (int, float), "float | None": (int, float, type(None)), "bool": bool}
    for field in dataclasses.fields(cls):
        wanted, value = kinds.get(field.type), fields.get(field.name)
        if field.name not in fields or wanted is None:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"config.json: {field.name} is {value!r}; a value of type {field.type} is needed")
    return cls(**fields)


def _check_neutral(values: Mapping[str, Any], where: str, names) -> None:
    for name in names:
        if name in values and values[name] not in _NEUTRAL[name]:
            choices = ", ".join(map(repr, _NEUTRAL[name]))
            raise ConfigError(f"{where}{name} is {values[name]!r}, which is not supported; choices: {choices}")


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is a {type(value).__name__}, not an object")
    return value


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(values.get(name), Mapping):
        raise ConfigError(f"config.json: {name} is missing")
    return values[name]


def _id_list(value: Any, name: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ConfigError(f"{name} is {value!r}; a token id or a list of them is needed")
    return tuple(ids)


def _or_default(value: Any, default: int) -> int:
    return default if value is None else value


def published_config(config: ModelConfig, spelling: str = "per_layer_config") -> dict[str, Any]:
    """The target's ``config.json``: a composite model, with or without media parts.

    Args:
      config: the configuration.
      spelling: how global layers' sizes are written: ``per_layer_config`` (current) or ``global_fields`` (older).

    Raises:
      ConfigError: a switch that the published form cannot express.
    """
    check_expressible(config)
    values: dict[str, Any] = {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "dtype": config.param_dtype,
        "tie_word_embeddings": True,
        "text_config": _published_text(config, spelling, config.layer_types),
        "vision_config": None,
        "audio_config": None,
    }
    if config.vision:
        own = {
            f.name: getattr(config.vision, f.name)
            for f in dataclasses.fields(VisionConfig)
            if f.name != "layer_norm_eps"
        }
        values["vision_config"] = {
            "model_type": "gemma4_unified_vision", **own, "output_proj_dims": config.vision.mm_embed_dim
        }  # fmt: skip
    if config.audio:
        values["audio_config"] = {
            "model_type": "gemma4_unified_audio",
            "audio_embed_dim": config.audio.audio_embed_dim,
            "rms_norm_eps": config.audio.rms_norm_eps,
        }
    return values | {name: getattr(config, ours) for name, ours in _IDS.items()}


def published_drafter_config(config: ModelConfig, spelling: str = "per_layer_config") -> dict[str, Any]:
    """The drafter's ``config.json``."""
    check_expressible(config)
    drafter = config.drafter
    text = _published_text(config, spelling, drafter.layer_types)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        text[name] = getattr(drafter, name)
    return {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM"],
        "model_type": "gemma4_unified_assistant",
        "dtype": config.param_dtype,
        "tie_word_embeddings": True,
        "backbone_hidden_size": config.hidden_size,
        "use_ordered_embeddings": drafter.use_ordered_embeddings,
        "num_centroids": drafter.num_centroids,
        "centroid_intermediate_top_k": drafter.centroid_intermediate_top_k,
        "text_config": text | {"num_kv_shared_layers": drafter.num_hidden_layers},
    }


def published_generation_config(config: ModelConfig) -> dict[str, Any]:
    """``generation_config.json``: stop ids, suppressed tokens, and the recommended sampling."""
    values = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": list(config.stop_token_ids),
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }
    return values | ({"suppress_tokens": list(config.suppress_tokens)} if config.suppress_tokens else {})


def check_expressible(config: ModelConfig) -> None:
    """Raise ConfigError for a switch that the published form of this model does not have."""
    wanted = {"value_norm": True, "attention_scale": 1.0, "global_rope_scaling_factor": 1.0}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{name} is {getattr(config, name)}; the published form of this model has {value}")


def _published_text(config: ModelConfig, spelling: str, layer_types: Sequence[str]) -> dict[str, Any]:
    if spelling not in SPELLINGS:
        raise unknown_name("config spelling", spelling, SPELLINGS)
    names = (
        "attention_k_eq_v", "bos_token_id", "eos_token_id", "pad_token_id", "final_logit_softcapping", "head_dim",
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "sliding_window", "use_bidirectional_attention", "vocab_size",
    )  # fmt: skip
    values = {"model_type": "gemma4_unified_text", **{name: getattr(config, name) for name in names}}
    values |= {
        "layer_types": list(layer_types),
        "hidden_activation": ACTIVATION,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": config.rope_theta},
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": config.partial_rotary_factor,
                "rope_theta": config.global_rope_theta,
            },
        },
    }
    width, heads = config.global_head_dim, config.num_global_key_value_heads
    if spelling == "global_fields":
        if not config.attention_k_eq_v and heads != config.num_key_value_heads:
            raise ConfigError(
                f"num_global_key_value_heads {heads} differs from num_key_value_heads {config.num_key_value_heads} "
                "without attention_k_eq_v: only the spelling per_layer_config can say so"
            )
        return values | {"global_head_dim": width, "num_global_key_value_heads": heads}
    digits = len(str(len(layer_types) - 1))
    own = {"head_dim": width, "num_key_value_heads": heads}
    layers = {str(i).zfill(digits): dict(own) for i, kind in enumerate(layer_types) if kind == FULL}
    return values | {"per_layer_config": layers}
