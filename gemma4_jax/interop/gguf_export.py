"""GGUF files that llama.cpp reads: the text model, its drafter and the media projections (spec: gguf.md).

Tensors are those of the one name table (``interop.names``), renamed once more. They are written one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma4_jax.config import SLIDING, ModelConfig, unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.interop import names
from gemma4_jax.interop.hf_config import check_expressible
from gemma4_jax.interop.hf_export import new_folder
from gemma4_jax.interop.model_card import CARD, model_card
from gemma4_jax.quantize import PackedLeaf

Kind = gguf.GGMLQuantizationType
# Ours -> name in the file's name, type of matrices, number of the file type.
DTYPES: dict[str, tuple[str, Kind, int]] = {
    "float32": ("f32", Kind.F32, gguf.LlamaFileType.ALL_F32),
    "float16": ("f16", Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": ("bf16", Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": ("q8_0", Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": ("q4_0", Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# The file type that takes packed weights as they are, by their scheme.
PACKED_DTYPES = {"int8": "q8_0", "int4": "q4_0"}
_NEVER = 1e30  # divides the frequency of a pair that does not turn

_TEXT = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_MEDIA = {
    "model.vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "model.vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "model.vision_embedder.patch_ln1.weight": "v.patch_norm.1.weight",
    "model.vision_embedder.patch_ln1.bias": "v.patch_norm.1.bias",
    "model.vision_embedder.patch_ln2.weight": "v.patch_norm.2.weight",
    "model.vision_embedder.patch_ln2.bias": "v.patch_norm.2.bias",
    "model.vision_embedder.pos_norm.weight": "v.patch_norm.3.weight",
    "model.vision_embedder.pos_norm.bias": "v.patch_norm.3.bias",
    "model.vision_embedder.pos_embedding": "v.position_embd.weight",
    "model.embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "model.embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}
_PATCHES = "v.patch_embd.weight"
_DROPPED = (
    "masked_embedding.centroids.weight",
    "masked_embedding.token_ordering",
)  # a shortcut the client does not take
# Control tokens whose text the client shows or looks for.
_USER_DEFINED = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip


def save_folder(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Any],
    *,
    tokenizer,
    chat_template: str | None = None,
    dtype: str = "float32",
) -> dict[str, int]:
    """Write ``model-<dtype>.gguf`` and, where there are such parts, ``drafter-…`` and ``mmproj-<dtype>.gguf``; and a model
    card.

    Args:
      path: absent, or an empty folder.
      config: of target and drafter.
      weights: by our flat names.
      tokenizer: its table, merges and token types go into the text files.
      chat_template: Jinja text, or None.
      dtype: of matrices, one of ``DTYPES``; norms and biases are f32. Packed weights (``quantize.PackedLeaf``) go into
        files of their scheme's type as they are: int4 into Q4_0 and int8 into Q8_0, the table of either into Q8_0.

    Returns:
      Bytes of each file.

    Raises:
      ConfigError: no tokenizer, a setting that the client does not know, or rows that do not fill quantisation blocks.
      CheckpointError: the folder is not empty, or the disk refuses; nothing is left behind.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    check_expressible(config)
    if tokenizer is None:
        raise ConfigError("a GGUF file holds the tokenizer, but this bundle has none")
    if config.final_logit_softcapping is None:
        raise ConfigError("final_logit_softcapping is None; GGUF files of this architecture need a number")
    short = DTYPES[dtype][0]
    rows = names.target_rows(config, names.LAYOUTS["gemma4_unified"])
    vocabulary = _vocabulary(config, tokenizer, chat_template)
    files = {"model": ("gemma4", {**_text_keys(config), **vocabulary}, [r for r in rows if r.published not in _MEDIA])}
    if config.drafter:
        own = {**_drafter_keys(config), **vocabulary}
        files["drafter"] = ("gemma4-assistant", own, names.drafter_rows(config))
    if config.vision or config.audio:
        files["mmproj"] = ("clip", _media_keys(config), [r for r in rows if r.published in _MEDIA])
    with new_folder(path) as folder:
        card = model_card(config, short, name=Path(path).name, form="gguf")
        (folder / CARD).write_text(card, encoding="utf-8")
        for name, (architecture, keys, own_rows) in files.items():
            tensors = {tensor_name(row.published): row for row in own_rows if row.published not in _DROPPED}
            _write(folder / f"{name}-{short}.gguf", architecture, keys, tensors, weights, config, dtype)
        return {file.name: file.stat().st_size for file in sorted(folder.glob("*.gguf"))}


def tensor_name(published: str) -> str:
    """The name in the file of a published tensor."""
    if published in _MEDIA:
        return _MEDIA[published]
    rest = published.removeprefix("model.").removeprefix("language_model.")
    if rest in _TEXT:
        return _TEXT[rest]
    _, layer, part = rest.split(".", 2)
    return f"blk.{layer}.{_LAYER[part]}"


def _write(path: Path, architecture, keys, tensors: Mapping[str, names.Row], weights, config, dtype: str) -> None:
    _, kind, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(path, architecture)
    _add_keys(writer, {"general.type": "mmproj" if architecture == "clip" else "model", "general.file_type": file_type})
    if kind in (Kind.Q8_0, Kind.Q4_0):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_keys(writer, keys)
    as_packed = PACKED_DTYPES.get(config.quantization) == dtype
    stored = {name: (_type_of(name, row, weights, kind, as_packed), row) for name, row in tensors.items()}
    if architecture != "clip":
        freqs = _rope_freqs(config)
        writer.add_tensor_info("rope_freqs.weight", freqs.shape, freqs.dtype, freqs.nbytes)
    for name, (own, row) in stored.items():
        shape = _arranged_shape(name, row, weights)
        bytes_shape = gguf.quant_shape_to_byte_shape(shape, own)
        writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), raw_dtype=own)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if architecture != "clip":
            writer.write_tensor_data(freqs)
        for name, (own, row) in stored.items():
            writer.write_tensor_data(_stored_bytes(name, row, weights, config, own, as_packed))
    finally:
        writer.close()


def _stored_bytes(name: str, row: names.Row, weights, config, kind: Kind, as_packed: bool) -> np.ndarray:
    leaf = weights[row.ours]
    if as_packed and isinstance(leaf, PackedLeaf) and kind in (Kind.Q8_0, Kind.Q4_0):
        values, scale = (np.asarray(part) for part in leaf.packed(row.index))
        return packed_blocks(_arranged(name, values, config), scale)
    values = _arranged(name, _slice(row, weights), config)
    return np.ascontiguousarray(gguf.quantize(values, kind)).view(np.uint8)


def packed_blocks(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Packed weights as the bytes of a file: uint8 (O, bytes of a row), each block its f16 scale and then its numbers.

    A scale for whole rows (O, 1) is repeated in each of their blocks.
    """
    size = 16 if values.dtype == np.uint8 else 32
    blocks = values.view(np.uint8).reshape(len(values), -1, size)
    scales = np.broadcast_to(scale[..., None].view(np.uint8), (*blocks.shape[:2], 2))
    return np.concatenate([scales, blocks], axis=-1).reshape(len(values), -1)


def _slice(row: names.Row, weights) -> np.ndarray:
    leaf = weights[row.ours]
    return np.asarray(leaf[row.index]).astype(np.float32)


def _type_of(name: str, row: names.Row, weights, kind: Kind, as_packed: bool) -> Kind:
    shape, leaf = _arranged_shape(name, row, weights), weights[row.ours]
    if len(shape) != 2:
        return Kind.F32
    if as_packed and isinstance(leaf, PackedLeaf):
        whole_rows = leaf.scale.shape[-1] == 1
        if name == _PATCHES and not whole_rows:
            return Kind.F32  # the order of its columns changes: its groups would not stay together
        kind = Kind.Q4_0 if leaf.values.dtype == np.uint8 else Kind.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ConfigError(
            f"tensor {name} has rows of {shape[-1]} numbers; {kind.name.lower()} needs a multiple of {block}"
        )
    return kind


def _arranged_shape(name: str, row: names.Row, weights) -> tuple[int, ...]:
    shape = tuple(weights[row.ours].shape)
    shape = shape[len(row.index) :]
    return (shape[1], shape[0], shape[2]) if name == "v.position_embd.weight" else shape


def _arranged(name: str, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A tensor in the client's order: patch columns (channel, row, column), one position table after the other."""
    if name == "v.position_embd.weight":
        return np.ascontiguousarray(values.transpose(1, 0, 2))
    if name == _PATCHES or name.startswith("v.patch_norm.1."):
        side = config.vision.model_patch_size
        tiles = values.reshape(*values.shape[:-1], side, side, 3)
        return np.ascontiguousarray(np.moveaxis(tiles, -1, -3)).reshape(values.shape)
    return values


def _rope_freqs(config: ModelConfig) -> np.ndarray:
    pairs = config.global_head_dim // 2
    freqs = np.full(pairs, _NEVER, np.float32)
    freqs[: int(config.global_head_dim * config.partial_rotary_factor / 2)] = 1.0
    return freqs


def _attention_keys(prefix: str, config: ModelConfig, layer_types: Sequence[str]) -> dict[str, Any]:
    glob, local = config.global_head_dim, config.head_dim
    return {
        f"{prefix}.context_length": config.max_position_embeddings,
        f"{prefix}.attention.head_count_kv": [config.kv_heads(kind) for kind in layer_types],
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{prefix}.attention.key_length": glob,
        f"{prefix}.attention.value_length": glob,
        f"{prefix}.attention.key_length_swa": local,
        f"{prefix}.attention.value_length_swa": local,
        f"{prefix}.attention.sliding_window": config.sliding_window,
        f"{prefix}.attention.sliding_window_pattern": [kind == SLIDING for kind in layer_types],
        f"{prefix}.rope.freq_base": float(config.global_rope_theta),
        f"{prefix}.rope.freq_base_swa": float(config.rope_theta),
        f"{prefix}.rope.dimension_count": glob,
        f"{prefix}.rope.dimension_count_swa": local,
        f"{prefix}.embedding_length_per_layer_input": 0,
        f"{prefix}.final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _text_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "general.name": "gemma4",
        "gemma4.block_count": config.num_hidden_layers,
        "gemma4.embedding_length": config.hidden_size,
        "gemma4.feed_forward_length": config.intermediate_size,
        "gemma4.attention.head_count": config.num_attention_heads,
        "gemma4.attention.shared_kv_layers": 0,
        **_attention_keys("gemma4", config, config.layer_types),
    }


def _drafter_keys(config: ModelConfig) -> dict[str, Any]:
    drafter, prefix = config.drafter, "gemma4-assistant"
    if drafter.hidden_size == config.hidden_size:
        raise ConfigError(
            f"drafter.hidden_size {drafter.hidden_size} equals the target's; GGUF drafters need a width of their own"
        )
    return {
        "general.name": "gemma4 drafter",
        f"{prefix}.block_count": drafter.num_hidden_layers,
        f"{prefix}.nextn_predict_layers": drafter.num_hidden_layers,
        f"{prefix}.embedding_length": drafter.hidden_size,
        f"{prefix}.embedding_length_out": config.hidden_size,
        f"{prefix}.feed_forward_length": drafter.intermediate_size,
        f"{prefix}.attention.head_count": drafter.num_attention_heads,
        f"{prefix}.attention.shared_kv_layers": drafter.num_hidden_layers,
        **_attention_keys(prefix, config, drafter.layer_types),
    }


def _media_keys(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.name": "gemma4 media",
        "clip.has_vision_encoder": config.vision is not None,
        "clip.has_audio_encoder": config.audio is not None,
    }
    widths = {}
    if config.vision:
        widths["vision"] = config.vision.mm_embed_dim
        keys |= {
            "clip.vision.projector_type": "gemma4uv",
            "clip.vision.image_size": 224,
            "clip.vision.patch_size": config.vision.patch_size,
            "clip.vision.image_mean": [0.0, 0.0, 0.0],
            "clip.vision.image_std": [1.0, 1.0, 1.0],
        }
    if config.audio:
        widths["audio"] = config.audio.audio_embed_dim
        keys |= {"clip.audio.projector_type": "gemma4ua", "clip.audio.num_mel_bins": config.audio.audio_embed_dim}
    for part, width in widths.items():
        keys |= {
            f"clip.{part}.projection_dim": config.hidden_size,
            f"clip.{part}.embedding_length": width,
            f"clip.{part}.feed_forward_length": 0,
            f"clip.{part}.block_count": 0,
            f"clip.{part}.attention.head_count": 0,
            f"clip.{part}.attention.layer_norm_epsilon": 1e-6,
        }
    return keys


def _vocabulary(config: ModelConfig, tokenizer, chat_template: str | None) -> dict[str, Any]:
    """Tokenizer keys: table, scores, types, merges, special ids."""
    stored = json.loads(tokenizer.to_json())
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} entries but the model {config.vocab_size}")
    added = {token["content"]: token["special"] for token in stored["added_tokens"]}
    table = {index: name for name, index in stored["model"]["vocab"].items()}
    table |= {token["id"]: token["content"] for token in stored["added_tokens"]}
    entries = [table.get(i, f"<unused_entry_{i}>") for i in range(config.vocab_size)]
    types = [_token_type(name, added, i in table) for i, name in enumerate(entries)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]]
    if not merges:
        raise ConfigError("the tokenizer has no merges; GGUF files need at least one")
    keys = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": entries,
        "tokenizer.ggml.scores": [-1000.0] * len(entries),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.ggml.unknown_token_id": entries.index("<unk>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if config.suppress_tokens:
        keys["tokenizer.ggml.suppress_tokens"] = list(config.suppress_tokens)
    if chat_template:
        keys["tokenizer.chat_template"] = chat_template
    return keys


def _token_type(name: str, added: Mapping[str, bool], known: bool) -> int:
    if not known:
        return int(gguf.TokenType.UNUSED)
    if name in _USER_DEFINED or (name in added and not added[name]):
        return int(gguf.TokenType.USER_DEFINED)
    if name in added:
        return int(gguf.TokenType.CONTROL)
    is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
    return int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)


def _add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    """Whole numbers become u32 (in lists i32), as the client wants them."""
    adders = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
            continue
        next(add for kind, add in adders if isinstance(value, kind))(key, value)
