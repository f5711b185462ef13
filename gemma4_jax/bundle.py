"""What users hold: configuration, network, drafter, tokenizer and processor together; where they come from and go to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax import quantize
from gemma4_jax.config import DTYPES, SCHEMES, LoraConfig, ModelConfig, get_preset, unknown_name
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop import gguf_export, gguf_import, hf_config, hf_export, hf_import, names, peft_export
from gemma4_jax.media import MediaOptions, Processor
from gemma4_jax.model.decoder import Gemma4
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.lora import add_adapters, is_adapter, merge_adapters
from gemma4_jax.text.tokenizer import Tokenizer, minimum_vocab_size, train_tokenizer
from gemma4_jax.train import checkpoints, sharding, trees
from gemma4_jax.train.state import Network

FORMATS = ("checkpoint", "huggingface", "gguf", "peft")
TEMPLATE = "chat_template.jinja"
GGUF = ".gguf"

# Control tokens whose ids the configuration repeats.
_TOKEN_FIELDS = {
    "pad_token_id": "<pad>",
    "eos_token_id": "<eos>",
    "bos_token_id": "<bos>",
    "image_token_id": "<|image|>",
    "audio_token_id": "<|audio|>",
    "video_token_id": "<|video|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_id": "<audio|>",
}
_STOP_TOKENS = ("<eos>", "<turn|>", "<|tool_response>")
_SUPPRESSED_TOKENS = ("<image|>", "<audio|>")


@dataclasses.dataclass
class Bundle:
    """A model ready for use.

    config: of the target, with its drafter's. model: Gemma4. drafter: Drafter or None. tokenizer: Tokenizer or None.
    processor: turns prompts and media into rows. chat_template: a checkpoint's own Jinja template, or None.
    """

    config: ModelConfig
    model: Gemma4
    drafter: Drafter | None = None
    tokenizer: Tokenizer | None = None
    processor: Processor | None = None
    chat_template: str | None = None

    @property
    def quantization(self) -> str | None:
        """How matrices and tables are packed: None, ``int8`` or ``int4``."""
        return self.config.quantization


def init(
    name_or_config: str | ModelConfig, seed: int = 0, *, config_overrides: Mapping[str, Any] | None = None
) -> Bundle:
    """A bundle with random weights.

    Args:
      name_or_config: preset name or configuration.
      seed: of the weights.
      config_overrides: ModelConfig fields to replace; those of parts nested or dotted (``drafter.hidden_size``).

    A vocabulary that can hold the control tokens and all bytes gets a byte-level tokenizer, and the configuration its
    token ids (unless it is a full-size one, whose ids are published).

    Raises:
      ConfigError: unknown preset or field, or a contradiction.
    """
    config = _resolve(name_or_config, dict(config_overrides or {}))
    tokenizer = None
    if minimum_vocab_size() <= config.vocab_size <= config.image_token_id:
        tokenizer = train_tokenizer([], config.vocab_size)
        config = with_token_ids(config, tokenizer)
    network = Network(config)
    # Drawing runs once and takes no time; compiling it well would take most of a minute.
    draw = jax.jit(network.init, compiler_options={"xla_backend_optimization_level": 0})
    weights = draw(jax.random.key(seed))
    return _assemble(network, weights, tokenizer)


def _resolve(name_or_config: str | ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    if isinstance(name_or_config, str):
        return get_preset(name_or_config, **overrides)
    if not isinstance(name_or_config, ModelConfig):
        raise ConfigError(f"a preset name or a ModelConfig is needed, not {type(name_or_config).__name__}")
    values = name_or_config.to_dict()
    for key, value in overrides.items():
        part, _, field = key.partition(".")
        nested = {field: value} if field else value if isinstance(value, Mapping) else None
        values[part] = value if nested is None else {**(values.get(part) or {}), **nested}
    return ModelConfig.from_dict(values)


def with_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration with a tokenizer's ids for control tokens, stop tokens and never-generated tokens."""
    return dataclasses.replace(
        config,
        **{field: tokenizer.token_id(name) for field, name in _TOKEN_FIELDS.items()},
        stop_token_ids=tuple(tokenizer.token_id(name) for name in _STOP_TOKENS),
        suppress_tokens=tuple(tokenizer.token_id(name) for name in _SUPPRESSED_TOKENS),
    )


def load(
    path: str | Path,
    drafter: str | Path | None = None,
    dtype: str | None = "bfloat16",
    quantization: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    workers: int = 2,
    progress: Any = None,
) -> Bundle:
    """A bundle from disk.

    Args:
      path: a Hugging Face folder, one of our checkpoints, a run's folder (its newest complete checkpoint), or the GGUF file
        of a text model.
      drafter: a Hugging Face folder (for a GGUF file: such a file) of a drafter for it; not for a checkpoint of ours that
        holds its own.
      dtype: of weights and activations; None: as stored.
      quantization: ``int8`` or ``int4`` packs matrices and tables (``gemma4_jax.packed``), those of a Hugging Face folder
        as they are read; None: as stored.
      mesh: devices to spread the weights over, with axes data, fsdp and tensor; None: the first device.
      workers: reading threads. progress: called with the bytes of each Hugging Face tensor read.

    Raises:
      CheckpointError: nothing to load, or tensors that do not fit the configuration, naming tensor and file.
      ConfigError: an unsupported setting, naming the field; an unknown dtype.
      PromptError: a tokenizer that cannot be read.
    """
    path = Path(path)
    if quantization not in (None, *SCHEMES):
        raise unknown_name("quantization", quantization, (None, *SCHEMES))
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, (*DTYPES, None))
    if not path.is_dir() and path.suffix != GGUF:
        raise CheckpointError(f"{path} is not a folder")
    options = {"workers": workers, "progress": progress, "quantization": quantization}
    if path.suffix == GGUF:
        read = _load_gguf
    else:
        read = _load_published if _is_published(path) else _load_checkpoint
    return read(path, None if drafter is None else Path(drafter), dtype, mesh, **options)


def load_config(path: str | Path, drafter: str | Path | None = None) -> ModelConfig:
    """The configuration of what ``load`` reads (of a Hugging Face folder in f32), without reading weights.

    Raises:
      CheckpointError: nothing to load. ConfigError: an unsupported setting.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if not _is_published(path):
        config = ModelConfig.from_dict(hf_config.read_json(checkpoints.newest(path) / "config.json"))
    else:
        values = hf_config.read_json(path / "config.json")
        config = hf_config.model_config(values, hf_config.read_optional_json(path / "generation_config.json"))
    return _with_drafter(config, None if drafter is None else Path(drafter))


def _is_published(path: Path) -> bool:
    return "model_type" in hf_config.read_optional_json(path / "config.json")


def _load_published(path: Path, drafter: Path | None, dtype: str | None, mesh, *, quantization, **options) -> Bundle:
    tokenizer = Tokenizer.load(path) if (path / "tokenizer.json").is_file() else None
    values = hf_config.read_json(path / "config.json")
    config = hf_config.model_config(values, hf_config.read_optional_json(path / "generation_config.json"), tokenizer)
    rows = names.target_rows(config, names.LAYOUTS[values["model_type"]])
    dtype = dtype or _stored_dtype(path, rows)
    config = _with_drafter(dataclasses.replace(config, dtype=dtype, param_dtype=dtype), drafter)
    network = Network(quantize.with_scheme(config, quantization))
    weights = _read_part("model", path, rows, network, mesh, options)
    weights |= _drafter_weights(drafter, network, mesh, options)
    return _assemble(network, weights, tokenizer, path)


def _load_gguf(path: Path, drafter: Path | None, dtype: str | None, mesh, *, quantization, **options) -> Bundle:
    file = gguf_import.File(path)
    tokenizer = gguf_import.tokenizer_of(file)
    config = gguf_import.model_config(file, tokenizer, dtype or "float32")
    parts = {"model": (file, names.target_rows(config, names.LAYOUTS["gemma4_unified"]))}
    if drafter is not None:
        own = gguf_import.File(drafter)
        config = dataclasses.replace(config, drafter=gguf_import.drafter_config(own, config))
        parts["drafter"] = (own, names.drafter_rows(config))
    network = Network(quantize.with_scheme(config, quantization))
    weights: dict[str, Any] = {}
    for part, (source, rows) in parts.items():
        plain, packed = _shapes_of(part, network)
        weights |= hf_import.fill_weights(
            source.path, source.published(rows), rows, plain, packed=packed, pack=gguf_import.pack_leaf,
            place=_placer(network, mesh), **options,
        )  # fmt: skip
    bundle = _assemble(network, weights, tokenizer)
    return dataclasses.replace(bundle, chat_template=gguf_import.chat_template(file.fields))


def _shapes_of(part: str, network: Network) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Shapes of the plain leaves of ``model`` or ``drafter``, and those of the packed ones by the plain name."""
    shapes = network.shapes
    packed = {name: {own: shapes[own] for own in parts} for name, parts in quantize.packed_of(shapes).items()}
    plain = shapes if not packed else Network(quantize.with_scheme(network.config, None)).shapes
    return {name: leaf for name, leaf in plain.items() if name.startswith(f"{part}/")}, packed


def _read_part(part: str, folder: Path, rows: list[names.Row], network: Network, mesh, options) -> dict[str, Any]:
    """Weights of ``model`` or ``drafter`` from a Hugging Face folder, packed if the network is."""
    plain, packed = _shapes_of(part, network)
    return hf_import.load_weights(folder, rows, plain, packed=packed, place=_placer(network, mesh), **options)


def _with_drafter(config: ModelConfig, drafter: Path | None) -> ModelConfig:
    if drafter is None:
        return config
    own = hf_config.drafter_config(hf_config.read_json(drafter / "config.json"), config)
    return dataclasses.replace(config, drafter=own)


def _drafter_weights(drafter: Path | None, network: Network, mesh, options) -> dict[str, Any]:
    if drafter is None:
        return {}
    return _read_part("drafter", drafter, names.drafter_rows(network.config), network, mesh, options)


def _stored_dtype(path: Path, rows: list[names.Row]) -> str:
    """The dtype of the stored table."""
    tensors = hf_import.list_tensors(path)
    table = rows[0].published
    if table not in tensors or tensors[table].dtype.name not in DTYPES:
        raise CheckpointError(f"{path}: no tensor {table} of dtype {', '.join(DTYPES)}")
    return tensors[table].dtype.name


def _load_checkpoint(path: Path, drafter: Path | None, dtype: str | None, mesh, *, quantization, **options) -> Bundle:
    folder = checkpoints.newest(path)
    config = ModelConfig.from_dict(hf_config.read_json(folder / "config.json"))
    if drafter is not None and config.drafter is not None:
        raise ConfigError(f"drafter {drafter} given, but {path} is one of our checkpoints and holds its own")
    if quantization is not None and config.quantization not in (None, quantization):
        raise ConfigError(f"quantization {quantization!r} given, but {path} holds weights in {config.quantization!r}")
    network = Network(config)
    places = sharding.parameter_shardings(network.shapes, config, mesh) if mesh else {}
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places.get(name))
        for name, leaf in network.shapes.items()
    }
    weights = trees.flatten(checkpoints.load_params(folder, trees.unflatten(shapes)))
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
        weights = _cast(weights, dtype)
    if quantization is not None and config.quantization is None:
        config = quantize.with_scheme(config, quantization)
        weights = quantize.quantize_weights(weights, Network(config))
    network = Network(_with_drafter(config, drafter))
    weights |= _drafter_weights(drafter, network, mesh, options)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return _assemble(network, weights, tokenizer, folder)


def _cast(weights: dict[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
    """Floating-point weights in another dtype; adapters and packed weights keep theirs.

    Empties ``weights``, so that no second copy of all of them exists.
    """
    cast = {}
    for name in list(weights):
        leaf = weights.pop(name)
        changes = jnp.issubdtype(leaf.dtype, jnp.floating) and not is_adapter(name) and not quantize.is_packed(name)
        cast[name] = leaf.astype(dtype) if changes else leaf
    return cast


def _placer(network: Network, mesh) -> hf_import.Place:
    if mesh is None:
        return hf_import.put_on_device
    places = sharding.parameter_shardings(network.shapes, network.config, mesh)
    return lambda name, leaf: jax.device_put(leaf, places[name])


def _assemble(network: Network, weights: Mapping[str, Any], tokenizer: Tokenizer | None, folder: Path | None = None):
    model, drafter = network.merge(weights)
    options = MediaOptions.from_folder(folder) if folder else MediaOptions()
    return Bundle(
        config=network.config,
        model=model,
        drafter=drafter,
        tokenizer=tokenizer,
        processor=Processor(tokenizer, network.config, options),
        chat_template=_chat_template(folder, tokenizer),
    )


def _chat_template(folder: Path | None, tokenizer: Tokenizer | None) -> str | None:
    """The folder's ``chat_template.jinja``, else the one inside of its ``tokenizer_config.json``."""
    if folder and (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    return tokenizer.chat_template if tokenizer else None


def save(bundle: Bundle, path: str | Path, format: str = "checkpoint", dtype: str | None = None) -> None:
    """Write a bundle.

    Args:
      path: a folder that does not exist yet or is empty.
      format: ``checkpoint`` (ours; keeps adapters), ``huggingface`` or ``gguf`` (adapters merged into the weights), or
        ``peft`` (adapters alone, for the published model).
      dtype: of the stored weights; None: as they are. GGUF also takes ``q8_0`` and ``q4_0``.

    Raises:
      ConfigError: unknown format or dtype, or a setting that the format cannot express.
      CheckpointError: the folder holds a checkpoint already, or cannot be written.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    dtypes = gguf_export.DTYPES if format == "gguf" else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise unknown_name("dtype", dtype, dtypes)
    writers = {"checkpoint": _save_checkpoint, "huggingface": _save_published, "gguf": _save_gguf,
               "peft": _save_adapters}  # fmt: skip
    writers[format](bundle, Path(path), dtype)


def _save_published(bundle: Bundle, path: Path, dtype: str | None) -> None:
    files, bundle = _text_files(bundle), merge_lora(bundle)
    hf_export.save_folder(path, bundle.config, _readable_weights(bundle), files=files, dtype=dtype)


def _save_gguf(bundle: Bundle, path: Path, dtype: str | None) -> None:
    bundle = merge_lora(bundle)
    gguf_export.save_folder(
        path,
        bundle.config,
        _readable_weights(bundle),
        tokenizer=bundle.tokenizer,
        chat_template=bundle.chat_template,
        dtype=dtype or gguf_export.PACKED_DTYPES.get(bundle.quantization, bundle.config.param_dtype),
    )


def _readable_weights(bundle: Bundle) -> dict[str, Any]:
    """The plain network's weights by name; packed ones are unpacked when they are read."""
    return quantize.readable_weights(bundle_weights(bundle), bundle.config.param_dtype)


def _save_adapters(bundle: Bundle, path: Path, dtype: str | None) -> None:
    weights = {name: leaf for name, leaf in bundle_weights(bundle).items() if is_adapter(name)}
    if dtype is not None:
        weights = {name: leaf.astype(dtype) for name, leaf in weights.items()}
    peft_export.save_folder(path, bundle.config, weights)


def _save_checkpoint(bundle: Bundle, path: Path, dtype: str | None) -> None:
    config, weights = bundle.config, bundle_weights(bundle)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
        weights = _cast(weights, dtype)
    files = {"config.json": json.dumps(config.to_dict(), indent=2) + "\n", **_text_files(bundle)}
    checkpoints.save(path, {checkpoints.PARAMS: trees.unflatten(weights)}, files=files)


def add_lora(bundle: Bundle, config: LoraConfig, seed: int = 0) -> Bundle:
    """The same function with new adapters, whose arrays alone are new; ``seed`` is of their random halves.

    Raises:
      ConfigError: there are adapters already, or ``config.targets`` do not fit (see ``model.lora.add_adapters``).
    """
    if bundle.config.lora is not None:
        raise ConfigError("the bundle has adapters already; merge_lora makes them part of its weights")
    model, drafter = Network(bundle.config).merge(bundle_weights(bundle))
    modules = {"model": model} | ({"drafter": drafter} if drafter else {})
    add_adapters(modules, config, jax.random.key(seed))
    new = dataclasses.replace(bundle.config, lora=config)
    return dataclasses.replace(bundle, config=new, model=model, drafter=drafter)


def merge_lora(bundle: Bundle) -> Bundle:
    """The same function with its adapters, if it has any, added to the weights beside them, in the weights' dtype.

    Packed weights are unpacked to ``param_dtype`` first: the sum would not fit their formats.
    """
    if bundle.config.lora is None:
        return bundle
    if bundle.config.quantization is not None:
        bundle = quantize.dequantize(bundle)
    config = dataclasses.replace(bundle.config, lora=None)
    weights = merge_adapters(bundle_weights(bundle), bundle.config.lora)
    model, drafter = Network(config).merge(weights)
    return dataclasses.replace(bundle, config=config, model=model, drafter=drafter)


def bundle_weights(bundle: Bundle) -> dict[str, jax.Array]:
    """All weights of target and drafter by flat name."""
    modules = {"model": bundle.model} | ({"drafter": bundle.drafter} if bundle.drafter else {})
    return Network(bundle.config).weights(modules)


def _text_files(bundle: Bundle) -> dict[str, str]:
    """Tokenizer, chat template and processor configuration, by file name."""
    files = {}
    if bundle.tokenizer is not None:
        files["tokenizer.json"] = bundle.tokenizer.to_json()
        files["tokenizer_config.json"] = bundle.tokenizer.settings_json()
    if bundle.chat_template is not None:
        files[TEMPLATE] = bundle.chat_template
    if bundle.processor is not None:
        files["processor_config.json"] = bundle.processor.options.to_json()
    return files
