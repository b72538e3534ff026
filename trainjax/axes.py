"""The axes of a mesh by name, and what each is for.

| axis       | devices along it                                                                      |
|------------|---------------------------------------------------------------------------------------|
| `slice`    | are joined by a slow network: copies of the model, gradients alone go over it         |
| `data`     | have copies of the model, each with its rows of the batch                             |
| `fsdp`     | share every weight and optimizer state, each with its rows of the batch               |
| `expert`   | share the experts of a mixture, each with its rows of the batch                       |
| `sequence` | share the tokens of every row                                                         |
| `tensor`   | share every matrix product: heads and hidden units                                    |

A mesh has `data`, `fsdp` and `tensor`, and the others where they are longer than 1.
"""

from __future__ import annotations

import math

from jax.sharding import Mesh

ORDER = ("slice", "data", "fsdp", "expert", "sequence", "tensor")
"""From the slowest network to the fastest: what is said most often goes over the last."""

_ROWS = ("slice", "data", "fsdp", "expert")


def rows(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh that a batch's rows are split over."""
    return tuple(axis for axis in _ROWS if axis in mesh.axis_names)


def length(mesh: Mesh | None, axis: str) -> int:
    """Devices along an axis; 1 where the mesh does not have it."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def num_row_shards(mesh: Mesh | None) -> int:
    """Into how many parts a batch's rows are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rows(mesh))
