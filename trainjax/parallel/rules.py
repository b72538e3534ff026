"""Which axis of the mesh splits which axis of a parameter: a table of names, first match wins."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from trainjax import axes, platform, tree

Rules = Sequence[tuple[str, P]]

# Products alternate: the first of a pair splits its outputs over `tensor`, the second its inputs, so
# that one sum a pair crosses devices (Shoeybi et al. 2019, arXiv:1909.08053). A spec is of the last
# axes; leading ones (layers, experts) are not split. Adapters need no rule: they follow their matrix.
DECODER: Rules = (
    (r"(query|key|value|gate|up|head)/kernel$", P("fsdp", "tensor")),
    (r"(output|down)/kernel$", P("tensor", "fsdp")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"", P()),
)


def spec(name: str, shape: Sequence[int], mesh: Mesh, rules: Rules = DECODER) -> P:
    """The `PartitionSpec` of a parameter: of the first rule that its name matches.

    An axis of the mesh that does not divide the parameter's axis is left out of it: the parameter is
    then whole on each of those devices, which is right and takes more memory.
    """
    wanted = next(s for pattern, s in rules if re.search(pattern, name))
    padded = (None,) * (len(shape) - len(wanted)) + tuple(wanted)
    return P(
        *(a if _divides(a, size, mesh) else None for a, size in zip(padded, shape, strict=True))
    )


def shardings(params: PyTree, mesh: Mesh, rules: Rules = DECODER) -> PyTree:
    """A `NamedSharding` for every leaf, by name and shape; works on abstract shapes too."""
    return tree.map_named(
        lambda name, leaf: NamedSharding(mesh, spec(name, leaf.shape, mesh, rules)), params
    )


def place(params: PyTree, mesh: Mesh | None, rules: Rules = DECODER) -> PyTree:
    """The params laid out over the mesh, or as they are where there is none."""
    if mesh is None:
        return params
    return jax.tree.map(platform.put, params, shardings(params, mesh, rules))


def rows(mesh: Mesh) -> NamedSharding:
    """How a batch is split: rows over `data`, `fsdp` and their like."""
    return NamedSharding(mesh, P(axes.rows(mesh)))


def _divides(axis: str | None, size: int, mesh: Mesh) -> bool:
    return axis is None or (axis in mesh.axis_names and size % mesh.shape[axis] == 0)
