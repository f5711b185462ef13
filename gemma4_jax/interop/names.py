"""The one table between our parameters and published tensor names; import and export read it in either direction.

Ours are the flat names of the trainer (``model/groups/runs/0/mlp/up_proj/weight``), where stacked layers have two leading
axes (group, place in the run): such a leaf corresponds to one published tensor per layer. Weights are stored alike on both
sides, (out, in).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.decoder import layer_places

HEAD = "lm_head.weight"  # tied: a copy of the table, or absent


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a family of published checkpoints names and stores what is ours.

    prefix: of the decoder's tensors. offset_norms: norm weights are stored as w - 1 (Gemma 3). layer_scalars: whether
    there is one stored number per layer.
    """

    prefix: str
    offset_norms: bool = False
    layer_scalars: bool = True


LAYOUTS = {
    "gemma4_unified": Layout("model.language_model."),
    "gemma4_unified_text": Layout("model."),
    "gemma4_text": Layout("model."),
    "gemma3_text": Layout("model.", offset_norms=True, layer_scalars=False),
}
DRAFTER_LAYOUT = Layout("model.")
DRAFTER_TYPES = ("gemma4_unified_assistant", "gemma4_assistant")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    ours: flat name of the leaf. index: of the slice in its leading axes, () for the whole leaf. published: tensor name.
    offset: the published norm weight is ours minus 1.
    """

    ours: str
    index: tuple[int, ...]
    published: str
    offset: bool = False


_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_VISION = (
    "patch_ln1.weight", "patch_ln1.bias", "patch_dense.weight", "patch_dense.bias", "patch_ln2.weight",
    "patch_ln2.bias", "pos_embedding", "pos_norm.weight", "pos_norm.bias",
)  # fmt: skip

# Module names of the reference implementation that its own files do not use, found in folders saved otherwise.
_ALIASES = {f"model.embed_vision.{name}": f"model.vision_embedder.{name}" for name in _VISION}
_ALIASES["model.embed_vision.multimodal_embedder.embedding_projection.weight"] = (
    "model.embed_vision.embedding_projection.weight"
)


def canonical(published: str) -> str:
    """The name that files of the pinned reference use, for a tensor that a folder names in another way."""
    return _ALIASES.get(published, published)


def target_rows(config: ModelConfig, layout: Layout) -> list[Row]:
    """Rows of the target: embedding, layers in order, final norm, media embedders."""
    rows = [Row("model/embedder/table", (), f"{layout.prefix}embed_tokens.weight")]
    for i, (place, index) in enumerate(layer_places(config)):
        separate = config.separate_values(config.layer_types[i])
        heads = ("q_proj", "k_proj", "v_proj", "o_proj") if separate else ("q_proj", "k_proj", "o_proj")
        rows += _layer_rows(f"model/{place}", index, f"{layout.prefix}layers.{i}.", heads, ("q_norm", "k_norm"), layout)
    rows.append(Row("model/final_norm/weight", (), f"{layout.prefix}norm.weight", layout.offset_norms))
    if config.vision:
        rows += [Row(f"model/vision/{_path(name)}", (), f"model.vision_embedder.{name}") for name in _VISION]
        rows.append(_projection("vision"))
    if config.audio:
        rows.append(_projection("audio"))
    return rows


def drafter_rows(config: ModelConfig) -> list[Row]:
    """Rows of the drafter (mtp.md: sizes)."""
    layout, drafter = DRAFTER_LAYOUT, config.drafter
    rows = [Row("drafter/embedder/table", (), "model.embed_tokens.weight")]
    for i in range(drafter.num_hidden_layers):
        rows += _layer_rows(f"drafter/layers/{i}", (), f"model.layers.{i}.", ("q_proj", "o_proj"), ("q_norm",), layout)
    rows.append(Row("drafter/final_norm/weight", (), "model.norm.weight"))
    rows += [Row(f"drafter/{name}/weight", (), f"{name}.weight") for name in ("pre_projection", "post_projection")]
    if drafter.use_ordered_embeddings:
        rows.append(Row("drafter/centroids", (), "masked_embedding.centroids.weight"))
        rows.append(Row("drafter/token_ordering", (), "masked_embedding.token_ordering"))
    return rows


def _layer_rows(
    place: str, index: tuple[int, ...], published: str, projections, norms, layout: Layout
) -> Iterator[Row]:
    for name in (*(f"self_attn.{p}" for p in projections), *_MLP):
        yield Row(f"{place}/{_path(name)}/weight", index, f"{published}{name}.weight")
    for name in (*(f"self_attn.{n}" for n in norms), *_NORMS):
        yield Row(f"{place}/{_path(name)}/weight", index, f"{published}{name}.weight", layout.offset_norms)
    if layout.layer_scalars:
        yield Row(f"{place}/layer_scalar", index, f"{published}layer_scalar")


def _projection(part: str) -> Row:
    name = "embedding_projection"
    return Row(f"model/{part}/{name}/weight", (), f"model.embed_{part}.{name}.weight")


def _path(name: str) -> str:
    return name.replace(".", "/")
