"""Names for weights: nested pure dicts, flat dicts keyed by ``a/b/c``, and any other tree turned into them and back.

Inside the trainer all weights live in one flat dict, so that filters, masks and sharding rules are comprehensions over
names. On disk they are nested dicts of strings, which any program can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

SEPARATOR = "/"


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → ``{"a/b/c": leaf}``, in the order of the names' first appearance. Keys may be strings or ints."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, name + SEPARATOR))
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of ``flatten`` with string keys throughout."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(SEPARATOR)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def key_name(key: Any) -> str:
    """The text of one step of a ``jax.tree_util`` path (dict key, attribute or index)."""
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    if isinstance(key, jax.tree_util.SequenceKey):
        return str(key.idx)
    return str(key.key)  # FlattenedIndexKey


def named_leaves(tree: Any) -> dict[str, Any]:
    """Any pytree (an optax state) → flat dict of its leaves, named by their paths."""
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {SEPARATOR.join(key_name(k) for k in path): leaf for path, leaf in paths_and_leaves}


def from_named_leaves(target: Any, leaves: Mapping[str, Any]) -> Any:
    """Inverse of ``named_leaves``: the structure of ``target`` with the leaves of that name."""
    structure = jax.tree_util.tree_structure(target)
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in named_leaves(target)])
