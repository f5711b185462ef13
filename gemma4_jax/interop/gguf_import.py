"""GGUF files of text models and of their drafters, as weights, configuration and tokenizer: the inverse of ``gguf_export``.

Tensors are dequantised by the ``gguf`` package, a few rows at a time; where Q4_0 blocks are wanted as int4 they are taken as
they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma4_jax.config import FULL, SLIDING, DrafterConfig, ModelConfig
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop import names
from gemma4_jax.interop.gguf_export import tensor_name
from gemma4_jax.interop.hf_import import pack_into_leaf
from gemma4_jax.text.tokenizer import Tokenizer

Kind = gguf.GGMLQuantizationType
_READ_ERRORS = (OSError, ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError)
_GENERATED = "rope_freqs.weight"
_TOKENIZER = "gemma4"
_STOPS = ("<eos>", "<turn|>", "<|tool_response>")
_PLACEHOLDERS = {
    "image_token_id": "<|image|>", "audio_token_id": "<|audio|>", "video_token_id": "<|video|>", "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>", "boa_token_id": "<|audio>", "eoa_token_id": "<audio|>",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file, read like one of a safetensors file (``StoredTensor``)."""

    file: Path
    name: str
    tensor: Any

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), as we have it."""
        return tuple(int(n) for n in reversed(self.tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.tensor.n_bytes)

    def read(self) -> np.ndarray:
        """All of it."""
        return gguf.dequantize(self.tensor.data, self.tensor.tensor_type).reshape(self.shape)

    def blocks(self, numbers: int) -> Iterator[tuple[Any, np.ndarray]]:
        """See ``StoredTensor.blocks``."""
        if len(self.shape) < 2:
            yield slice(None), self.read()
            return
        step = max(1, numbers // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            yield rows, gguf.dequantize(self.tensor.data[rows], self.tensor.tensor_type)


def pack_leaf(values: np.ndarray, scale: np.ndarray, tensor: FileTensor, row: names.Row) -> None:
    """Fill packed buffers: Q4_0 blocks as they are, anything else rounded anew."""
    if tensor.tensor.tensor_type != Kind.Q4_0 or values.dtype != np.uint8:
        pack_into_leaf(values, scale, tensor, row)
        return
    blocks = tensor.tensor.data.reshape(*scale.shape, -1)
    scale[...] = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if not np.isfinite(scale).all():
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} holds NaN or infinite numbers")
    values[...] = blocks[..., 2:].reshape(values.shape)


class File:
    """A GGUF file. fields: its keys; tensors: by their names there."""

    def __init__(self, path: str | Path):
        """Raises CheckpointError: unreadable, truncated or malformed."""
        self.path = Path(path)
        try:
            reader = gguf.GGUFReader(self.path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except _READ_ERRORS as error:
            line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{self.path}: not a readable GGUF file: {line}") from error
        self.tensors = {tensor.name: FileTensor(self.path, tensor.name, tensor) for tensor in reader.tensors}
        self.architecture = self.fields.get("general.architecture")

    def key(self, name: str) -> Any:
        """A key of this architecture. Raises CheckpointError: there is none."""
        full = f"{self.architecture}.{name}"
        if full not in self.fields:
            raise CheckpointError(f"{self.path}: key {full} is missing")
        return self.fields[full]

    def published(self, rows: list[names.Row]) -> dict[str, FileTensor]:
        """The file's tensors under the names of a name table; what is not in it keeps its own."""
        ours = {tensor_name(row.published): row.published for row in rows}
        return {ours.get(name, name): tensor for name, tensor in self.tensors.items() if name != _GENERATED}


def _architecture(file: File, wanted: str, what: str) -> None:
    if file.architecture != wanted:
        raise ConfigError(f"{file.path}: architecture is {file.architecture!r}; a {what} has {wanted!r}")


def _layer_types(file: File) -> tuple[str, ...]:
    pattern, count = file.key("attention.sliding_window_pattern"), file.key("block_count")
    if not isinstance(pattern, list) or len(pattern) != count:
        raise ConfigError(
            f"{file.path}: attention.sliding_window_pattern does not have one entry for each of {count} blocks"
        )
    return tuple(SLIDING if local else FULL for local in pattern)


def _only(file: File, name: str, values: Any) -> int:
    found = set(values) if isinstance(values, list) else {values}
    if len(found) != 1:
        raise ConfigError(f"{file.path}: {name} differs between layers: {sorted(found)}")
    return int(found.pop())


def model_config(file: File, tokenizer: Tokenizer | None, dtype: str) -> ModelConfig:
    """The configuration of a text file.

    Raises:
      ConfigError: another architecture, or a setting that the decoder does not have. CheckpointError: a missing key.
    """
    _architecture(file, "gemma4", "text model")
    if file.fields.get("gemma4.embedding_length_per_layer_input") or file.fields.get(
        "gemma4.attention.shared_kv_layers"
    ):
        raise ConfigError(f"{file.path}: per-layer inputs and shared key/value layers are not supported")
    kinds = _layer_types(file)
    heads = file.key("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * len(kinds)
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    sizes = {
        kind: _only(
            file, f"head_count_kv of {kind}", [n for n, k in zip(heads, kinds, strict=True) if k == kind] or [1]
        )
        for kind in (SLIDING, FULL)
    }
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    width = int(file.key("attention.key_length"))
    values = dict(
        vocab_size=table.shape[0], hidden_size=int(file.key("embedding_length")), num_hidden_layers=len(kinds),
        intermediate_size=_only(file, "feed_forward_length", file.key("feed_forward_length")), layer_types=kinds,
        num_attention_heads=_only(file, "head_count", file.key("attention.head_count")),
        num_key_value_heads=sizes[SLIDING], num_global_key_value_heads=sizes[FULL], global_head_dim=width,
        head_dim=int(file.key("attention.key_length_swa")), sliding_window=int(file.key("attention.sliding_window")),
        rope_theta=_round(file.key("rope.freq_base_swa")), global_rope_theta=_round(file.key("rope.freq_base")),
        partial_rotary_factor=_rotary_factor(file, width), max_position_embeddings=int(file.key("context_length")),
        rms_norm_eps=_round(file.key("attention.layer_norm_rms_epsilon")),
        final_logit_softcapping=_round(file.key("final_logit_softcapping")),
        attention_k_eq_v=not any(f"blk.{i}.attn_v.weight" in file.tensors for i in full),
        dtype=dtype, param_dtype=dtype,
    )  # fmt: skip
    return ModelConfig(**values, **_token_fields(file, tokenizer))


def _round(value: float) -> float:
    """A number that was stored in f32, as it was written before."""
    return float(f"{value:.7g}")


def _rotary_factor(file: File, width: int) -> float:
    freqs = file.tensors.get(_GENERATED)
    return 1.0 if freqs is None else 2 * int((freqs.read() < 1e20).sum()) / width


def _token_fields(file: File, tokenizer: Tokenizer | None) -> dict[str, Any]:
    keys = {"pad_token_id": "padding_token_id", "eos_token_id": "eos_token_id", "bos_token_id": "bos_token_id"}
    fields: dict[str, Any] = {
        ours: int(file.fields[f"tokenizer.ggml.{theirs}"])
        for ours, theirs in keys.items()
        if f"tokenizer.ggml.{theirs}" in file.fields
    }
    fields["suppress_tokens"] = tuple(int(i) for i in file.fields.get("tokenizer.ggml.suppress_tokens", ()))
    if tokenizer is None:
        return fields
    known = tokenizer.special_tokens
    fields |= {name: known[token] for name, token in _PLACEHOLDERS.items() if token in known}
    stops = [known[token] for token in _STOPS if token in known]
    return fields | ({"stop_token_ids": tuple(stops)} if stops else {})


def drafter_config(file: File, target: ModelConfig) -> DrafterConfig:
    """The configuration of a drafter's file. Raises ConfigError: of another architecture, or for another target."""
    _architecture(file, "gemma4-assistant", "drafter")
    if int(file.key("embedding_length_out")) != target.hidden_size:
        raise ConfigError(
            f"{file.path}: embedding_length_out is {file.key('embedding_length_out')} but the target's hidden_size is "
            f"{target.hidden_size}"
        )
    return DrafterConfig(
        hidden_size=int(file.key("embedding_length")),
        intermediate_size=_only(file, "feed_forward_length", file.key("feed_forward_length")),
        num_hidden_layers=int(file.key("block_count")),
        num_attention_heads=_only(file, "head_count", file.key("attention.head_count")),
        layer_types=_layer_types(file),
    )


def tokenizer_of(file: File) -> Tokenizer | None:
    """The file's tokenizer, or None if it holds none. Raises ConfigError: of another kind than Gemma's."""
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in file.fields.items()}
    if "tokens" not in fields:
        return None
    if fields.get("model") != _TOKENIZER:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.model is {fields.get('model')!r}; only {_TOKENIZER!r} is supported"
        )
    tokens, types = fields["tokens"], fields.get("token_type", [])
    of_type = functools.partial(_of_type, tokens, types)
    merges = [tuple(pair.split(" ", 1)) for pair in fields.get("merges", [])]
    return Tokenizer.of_entries(tokens, merges, of_type(gguf.TokenType.CONTROL), of_type(gguf.TokenType.USER_DEFINED))


def _of_type(tokens: list[str], types: list[int], kind: gguf.TokenType) -> list[str]:
    return [token for token, own in zip(tokens, types, strict=False) if own == int(kind)]


def chat_template(fields: Mapping[str, Any]) -> str | None:
    """The file's Jinja template."""
    return fields.get("tokenizer.chat_template")
