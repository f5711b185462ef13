"""Run configurations: load a config file, set fields from text, compare, make JSON of them.

A config file is plain Python with ``get_config(arg=None)`` that returns an ``ml_collections.ConfigDict``, and may hold
``sweep_NAME()`` generators of override dicts. The dict is locked: an unknown field is an error that names it.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import ConfigError

PLACEMENT = ("mesh", "distributed")  # sections about where a run is placed, not what it computes
OPEN_SECTIONS = ("model_overrides",)  # hold whatever ModelConfig has; checked when the model configuration is built
_BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def load_config(spec: str, root: Path) -> tuple[ConfigDict, types.ModuleType, str]:
    """Run ``get_config`` of ``PATH.py[:ARG]``, or read the ``config.json`` of a run, to repeat it.

    Args:
      spec: a path, relative to the working directory or to ``root``, with an optional argument.
      root: folder of the repository.

    Returns:
      The locked config, the config file's module, and the run's name (file name, and the argument if any; of a run's
      ``config.json`` that run's name and ``again``).

    Raises:
      ConfigError: no such file (lists the choices), or an argument that the file does not know.
    """
    filename, _, arg = spec.partition(":")
    path = next((p for p in (Path(filename), root / filename) if p.is_file()), None)
    if path is None:
        choices = sorted(f"configs/{p.name}" for p in (root / "configs").glob("*.py") if p.stem not in ("__init__",))
        raise unknown_name("config file", filename, choices)
    if path.suffix == ".json":
        return _read_resolved(path), types.ModuleType("config"), f"{path.resolve().parent.name}-again"
    module = _import_file(path)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{filename} has no get_config() function")
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    if arg and not takes_argument:
        raise ConfigError(f"{filename} takes no argument, got {arg!r}")
    config = module.get_config(arg or None) if takes_argument else module.get_config()
    config.lock()
    return config, module, path.stem + (f"-{arg}" if arg else "")


def _import_file(path: Path) -> types.ModuleType:
    name = f"_run_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _read_resolved(path: Path) -> ConfigDict:
    """The inverse of ``resolved``. Raises ConfigError for a file that is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{path} is not JSON: not the config.json of a run") from None
    if not isinstance(values, dict) or "experiment" not in values:
        raise ConfigError(f"{path} has no field 'experiment': not the config.json of a run")
    return ConfigDict(_with_tuples(values)).lock()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(entry) for name, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def set_field(config: ConfigDict, dotted: str, value: Any) -> None:
    """Set ``config.a.b`` to a value (a sweep's override) or to the value that a text stands for (command line).

    The field keeps its type; whole numbers are accepted for floats, lists for tuples.

    Raises:
      ConfigError: unknown field (lists the section's fields), or a value of another type.
    """
    *sections, name = dotted.split(".")
    node = config
    for depth, section in enumerate(sections):
        if section not in node and _is_open(sections[: depth + 1]):
            with node.unlocked():
                node[section] = ConfigDict()
        if section not in node or not isinstance(node[section], ConfigDict):
            raise _unknown_field(node, sections[:depth], section)
        node = node[section]
    if name in node and isinstance(node[name], ConfigDict):
        raise ConfigError(f"config.{dotted} is a section; set one of its fields: {', '.join(sorted(node[name]))}")
    if _is_open(sections):
        with node.unlocked(), node.ignore_type():
            node[name] = _literal(value) if isinstance(value, str) else value
        return
    if name not in node:
        raise _unknown_field(node, sections, name)
    kind = node.get_type(name)
    with node.ignore_type():
        node[name] = convert(value, kind, dotted)


def convert(value: Any, kind: type, field: str) -> Any:
    """A value, or the text of one, as the given type. Raises ConfigError naming the field and the type."""
    wrong = ConfigError(f"config.{field} must be {_type_name(kind)}, got {value!r}")
    if isinstance(value, str) and kind is not str:
        if value.lower() == "none" and kind is type(None):
            return None
        if kind is bool:
            if value.lower() not in _BOOLS:
                raise wrong
            return _BOOLS[value.lower()]
        value = _literal(value)
    if kind is type(None):
        return value
    if kind in (tuple, list):
        if isinstance(value, str):
            value = [_literal(part) for part in value.split(",") if part]
        if not isinstance(value, (list, tuple)):
            value = [value]
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def resolved(config: ConfigDict) -> dict[str, Any]:
    """JSON-ready nested dict (tuples become lists), fields in the config's order."""
    return json.loads(json.dumps(config.to_dict()))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """``(dotted field, old value, new value)`` of every field that differs; a lacking field counts as ``None``."""
    a, b = dict(_fields(old)), dict(_fields(new))
    names = [*a, *(name for name in b if name not in a)]
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def _fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_open(sections: list[str]) -> bool:
    return bool(sections) and sections[0] in OPEN_SECTIONS


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)


def _unknown_field(node: ConfigDict, sections: list[str], name: str) -> ConfigError:
    prefix = "".join(f"{s}." for s in sections)
    return unknown_name("config field", f"{prefix}{name}", [f"{prefix}{key}" for key in sorted(node)])


def _type_name(kind: type) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}.get(
        kind.__name__, f"a {kind.__name__}"
    )


def is_placement(field: str) -> bool:
    """Whether a dotted field only says where a run is placed."""
    return field.partition(".")[0] in PLACEMENT
