"""Layouts over the devices of what trains: an adapter's parts lie as the matrices that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec


def like_matrix(name: str, x: Any, base: Mapping[str, Any], whole: NamedSharding) -> NamedSharding:
    """The layout of what trains: its own, or of an adapter's part that of its matrix's sides."""
    path = name.split("/")
    prefixes = ("/".join(path[:length]) for length in range(len(path), 0, -1))
    of = next((prefix for prefix in prefixes if prefix in base), None)
    matrix = None if of is None else base[of]
    layout = getattr(matrix, "sharding", None)  # a quantised matrix has none
    if matrix is None or not isinstance(layout, NamedSharding):
        return whole
    if of == name:  # the leaf itself, or some layers of it
        return layout
    *stack, fan_in, fan_out = matrix.shape
    spec = tuple(layout.spec) + (None,) * len(matrix.shape)
    rows, columns = spec[len(stack)], spec[len(stack) + 1]
    sides = x.shape[len(stack) :]
    if len(sides) == 2 and sides[0] == fan_in:
        last = (rows, None)
    elif sides and sides[-1] == fan_out:
        last = (*(None,) * (len(sides) - 1), columns)
    else:
        return whole
    return NamedSharding(whole.mesh, PartitionSpec(*spec[: len(stack)], *last))
