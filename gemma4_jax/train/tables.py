"""What trains and what stays, as a table for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def name_pattern(name: str) -> str:
    """A parameter name with ``*`` for numbers of layers and for the halves of an adapter."""
    name = re.sub(r"/\d+(?=/|$)", "/*", name)
    return re.sub(r"/lora/[ab]$", "/lora/*", name)


def trainable_table(
    shapes: Mapping[str, Any], names: Iterable[str], masks: Mapping[str, np.ndarray] | None = None
) -> str:
    """Lines of name pattern, number of weights and their share of all; what is frozen is one line.

    Args:
      shapes: leaves with ``shape`` by parameter name, trained or not.
      names: those that train.
      masks: which layers of stacked ones do, where not all do.
    """
    total = sum(_size(leaf) for leaf in shapes.values())
    names, counts = set(names), {}
    for name in shapes:
        if name in names:
            pattern = name_pattern(name)
            share = masks[name].mean() if masks and name in masks else 1.0
            counts[pattern] = counts.get(pattern, 0) + round(share * _size(shapes[name]))
    trained = sum(counts.values())
    rows = [*counts.items(), ("all that trains", trained), ("all that is frozen", total - trained)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {count:>15,}  {100 * count / total:8.4f} %" for name, count in rows)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape)
