"""Model configuration: frozen dataclasses with the published field names, and presets.

The network itself is in ``gemma4_jax.model``; nothing here imports it. Sizes of the presets are closed forms
(``num_parameters``) that the tests hold against ``jax.eval_shape`` of the real modules.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gemma4_jax.errors import ConfigError

SLIDING = "sliding_attention"
FULL = "full_attention"
LAYER_KINDS = (SLIDING, FULL)
DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("int8", "int4")  # of quantised weights, see gemma4_jax.packed
REMAT_POLICIES = ("none", "dots", "mlp", "full")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Encoder-free image input: raw pixel patches, two LayerNorms and a dense layer, a 2-D position table, a projection."""

    patch_size: int = 16
    pooling_kernel_size: int = 3
    mm_embed_dim: int = 3840
    mm_posemb_size: int = 1120
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5

    @property
    def model_patch_size(self) -> int:
        """Side of one soft token's square of pixels."""
        return self.patch_size * self.pooling_kernel_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch (row, column, RGB)."""
        return self.model_patch_size**2 * 3


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Encoder-free sound input: frames of raw 16 kHz samples, one projection."""

    audio_embed_dim: int = 640
    sampling_rate: int = 16_000
    rms_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """The multi-token drafter. Head widths, key/value heads, window, RoPE and vocabulary are its target's."""

    hidden_size: int = 1024
    intermediate_size: int = 8192
    num_hidden_layers: int = 4
    num_attention_heads: int = 16
    layer_types: tuple[str, ...] | None = None  # None: all sliding but the last
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32

    def __post_init__(self):
        if self.layer_types is None:
            kinds = (SLIDING,) * (self.num_hidden_layers - 1) + (FULL,)
            object.__setattr__(self, "layer_types", kinds)
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        _check_layer_types("drafter", self.layer_types, self.num_hidden_layers)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside linear maps: ``y = x W' + alpha / rank * (x a') b'``, a (rank, in), b (out, rank).

    targets: glob patterns over the names of linear weights, of target and drafter; ``!pattern`` leaves out, the last match
    decides. dtype: of the adapters, whatever that of the weights beside them.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*_proj/weight",)
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be positive")
        if self.dtype not in DTYPES:
            raise unknown_name("lora.dtype", self.dtype, DTYPES)

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A dense Gemma decoder with optional media inputs and an optional multi-token drafter.

    Field names follow the published configuration. The switches at the end exist for ablations and for other dense
    Gemma text models, whose checkpoints fit the same decoder.

    Raises:
      ConfigError: on contradictory or out-of-range fields.
    """

    vocab_size: int = 262_144
    hidden_size: int = 3840
    intermediate_size: int = 15_360
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 256
    num_global_key_value_heads: int = 1
    global_head_dim: int = 512
    sliding_window: int = 1024
    layer_types: tuple[str, ...] | None = None  # None: every sliding_window_pattern-th layer, and the last, is global
    sliding_window_pattern: int = 6
    rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    partial_rotary_factor: float = 0.25
    global_rope_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0
    max_position_embeddings: int = 262_144

    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    stop_token_ids: tuple[int, ...] = (1, 106, 50)
    suppress_tokens: tuple[int, ...] = (258_882, 258_883)
    image_token_id: int = 258_880
    audio_token_id: int = 258_881
    video_token_id: int = 258_884
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    boa_token_id: int = 256_000
    eoa_token_id: int = 258_883

    vision: VisionConfig | None = None
    audio: AudioConfig | None = None
    drafter: DrafterConfig | None = None
    lora: LoraConfig | None = None

    # Switches of the family.
    attention_k_eq_v: bool = True  # global layers: keys and values from one projection
    value_norm: bool = True
    attention_scale: float = 1.0
    use_bidirectional_attention: str | None = "vision"

    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"  # of stored weights
    quantization: str | None = None  # of matrices and tables; one of SCHEMES
    remat: str = "none"
    scan_layers: bool = True  # like layers stacked, in loops; False: each with arrays of its own (``model.decoder``)

    def __post_init__(self):
        if self.layer_types is None:
            period, last = self.sliding_window_pattern, self.num_hidden_layers - 1
            kinds = tuple(
                FULL if (i + 1) % period == 0 or i == last else SLIDING for i in range(self.num_hidden_layers)
            )
            object.__setattr__(self, "layer_types", kinds)
        for name in ("layer_types", "stop_token_ids", "suppress_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._validate()

    def _validate(self):
        _check_layer_types("model", self.layer_types, self.num_hidden_layers)
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim num_global_key_value_heads global_head_dim sliding_window max_position_embeddings"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("head_dim", "global_head_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(f"{name} is {getattr(self, name)}; rotary embedding needs an even head width")
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            if self.num_attention_heads % getattr(self, name):
                raise ConfigError(
                    f"num_attention_heads {self.num_attention_heads} is not a multiple of {name} {getattr(self, name)}"
                )
            if self.drafter and self.drafter.num_attention_heads % getattr(self, name):
                raise ConfigError(
                    f"drafter.num_attention_heads {self.drafter.num_attention_heads} is not a multiple of "
                    f"{name} {getattr(self, name)}: the drafter reads its target's keys and values"
                )
        if not 0.0 < self.partial_rotary_factor <= 1.0:
            raise ConfigError(f"partial_rotary_factor is {self.partial_rotary_factor}; it must be in (0, 1]")
        choices = {"dtype": DTYPES, "param_dtype": DTYPES, "remat": REMAT_POLICIES,
                   "quantization": (None, *SCHEMES),
                   "use_bidirectional_attention": (None, "vision")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choices: {', '.join(map(str, allowed))}")
        if self.drafter:
            missing = set(self.drafter.layer_types) - set(self.layer_types)
            if missing:
                raise ConfigError(f"drafter.layer_types has {missing.pop()} but the target has no such layer to read")
            if self.drafter.use_ordered_embeddings and self.vocab_size % self.drafter.num_centroids:
                raise ConfigError(
                    f"vocab_size {self.vocab_size} is not a multiple of drafter.num_centroids {self.drafter.num_centroids}"
                )

    def kv_heads(self, kind: str) -> int:
        """Key/value heads K of a layer kind."""
        return self.num_global_key_value_heads if kind == FULL else self.num_key_value_heads

    def head_width(self, kind: str) -> int:
        """Head width H of a layer kind."""
        return self.global_head_dim if kind == FULL else self.head_dim

    def separate_values(self, kind: str) -> bool:
        """Whether a layer kind has its own value projection."""
        return kind == SLIDING or not self.attention_k_eq_v

    def parameters_by_part(self) -> dict[str, int]:
        """Number of weights of each part (``layer_scalar`` is a buffer and not counted, as published)."""
        d = self.hidden_size
        parts = {"embedding": self.vocab_size * d, SLIDING: 0, FULL: 0, "final_norm": d, "vision": 0, "audio": 0}
        for kind in self.layer_types:
            h, k = self.head_width(kind), self.kv_heads(kind)
            kv = k * h * d * (2 if self.separate_values(kind) else 1)
            attention = 2 * self.num_attention_heads * h * d + kv + 2 * h
            parts[kind] += attention + 3 * d * self.intermediate_size + 4 * d
        if self.vision:
            m, p = self.vision.mm_embed_dim, self.vision.patch_dim
            norms = 2 * p + 4 * m
            parts["vision"] = norms + p * m + m + self.vision.mm_posemb_size * 2 * m + m * d
        if self.audio:
            parts["audio"] = self.audio.audio_embed_dim * d
        parts["drafter"] = self._drafter_parameters()
        return parts

    def _drafter_parameters(self) -> int:
        if self.drafter is None:
            return 0
        dr, d = self.drafter, self.hidden_size
        h = dr.hidden_size
        total = self.vocab_size * h + 2 * d * h + d * h + h
        for kind in dr.layer_types:
            width = self.head_width(kind)
            total += 2 * dr.num_attention_heads * width * h + 3 * h * dr.intermediate_size + 4 * h + width
        if dr.use_ordered_embeddings:
            total += dr.num_centroids * h
        return total

    def num_parameters(self, drafter: bool = False) -> int:
        """Weights of the target alone, or of its drafter alone."""
        parts = self.parameters_by_part()
        own = parts.pop("drafter")
        return own if drafter else sum(parts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready nested dict; ``from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of ``to_dict``. Raises ConfigError naming an unknown field."""
        return _build(cls, values, "")


_NESTED = {"vision": VisionConfig, "audio": AudioConfig, "drafter": DrafterConfig, "lora": LoraConfig}


def _check_layer_types(owner: str, layer_types: tuple[str, ...], num_layers: int):
    if len(layer_types) != num_layers:
        raise ConfigError(f"{owner}: layer_types has {len(layer_types)} entries but num_hidden_layers is {num_layers}")
    for kind in layer_types:
        if kind not in LAYER_KINDS:
            raise ConfigError(f"{owner}: layer_types has {kind!r}; choices: {', '.join(LAYER_KINDS)}")


def unknown_name(what: str, name: str, choices) -> ConfigError:
    """The error for a name that is not among ``choices``: lists them, nearest first."""
    choices = [str(c) for c in choices]
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"unknown {what} {name!r}{hint}; choices: {', '.join(choices)}")


def _build(cls, values: Mapping[str, Any], prefix: str):
    names = [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for name, value in values.items():
        if name not in names:
            raise unknown_name("config field", f"{prefix}{name}", [f"{prefix}{n}" for n in names])
        if name in _NESTED and isinstance(value, Mapping):
            value = _build(_NESTED[name], value, f"{name}.")
        kwargs[name] = value
    return cls(**kwargs)


def _gemma4_12b() -> dict[str, Any]:
    return dict(vision={}, audio={}, drafter={}, dtype="bfloat16", param_dtype="bfloat16")


# Small vocabularies name the same tokens at low ids, in the order in which gemma4_jax.text trains them.
_SMALL_IDS = dict(stop_token_ids=(1,), suppress_tokens=())


def _tiny() -> dict[str, Any]:
    return dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_global_key_value_heads=1, global_head_dim=32, sliding_window=8,
        max_position_embeddings=4096, vision=dict(mm_embed_dim=64), audio={},
        drafter=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4), **_SMALL_IDS,
    )  # fmt: skip


def _small() -> dict[str, Any]:
    return dict(
        vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_global_key_value_heads=1, global_head_dim=128, sliding_window=256,
        max_position_embeddings=8192,
        drafter=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4), **_SMALL_IDS,
    )  # fmt: skip


def _bench() -> dict[str, Any]:
    return dict(
        vocab_size=32_768, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, num_global_key_value_heads=1, global_head_dim=256, sliding_window=256,
        max_position_embeddings=8192,
        drafter=dict(hidden_size=192, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=4), **_SMALL_IDS,
    )  # fmt: skip


PRESETS = {"gemma4_12b": _gemma4_12b, "tiny": _tiny, "small": _small, "bench": _bench}


def get_preset(name: str, **overrides: Any) -> ModelConfig:
    """A named configuration with fields replaced.

    Args:
      name: one of ``PRESETS``.
      overrides: ModelConfig fields; those of the parts as nested dicts or dotted (``**{"drafter.hidden_size": 64}``).
        ``drafter=None`` (or ``vision``, ``audio``) removes a part.

    Raises:
      ConfigError: unknown preset or field (lists the choices), or a contradiction.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    values = PRESETS[name]()
    for key, value in overrides.items():
        part, _, field = key.partition(".")
        if field:
            if part not in _NESTED:
                raise unknown_name("config field", key, [f"{p}.…" for p in _NESTED])
            values[part] = {**(values.get(part) or {}), field: value}
        elif key in _NESTED and isinstance(value, Mapping):
            values[key] = {**(values.get(key) or {}), **value}
        else:
            values[key] = value
    return ModelConfig.from_dict(values)
