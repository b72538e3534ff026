"""Long rows over several devices: each row's parts become rows of their own, beside one another."""

from __future__ import annotations

import dataclasses

import jax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from trainjax import axes


@dataclasses.dataclass(frozen=True)
class Fold:
    """`[batch, seq, ...]` as `[batch * parts, seq / parts, ...]`: a device's tokens are rows of its own.

    All that is done token by token (products, norms, the head) then goes on as if the rows were short, and
    nothing but attention knows. The order is that of the devices: shards of the batch, in each of them the
    parts, in each part its rows.

    Attributes:
        mesh: the devices.
        shards: into how many the batch axis is split.
        parts: into how many a row is; 1 leaves arrays as they are.
    """

    mesh: Mesh | None = None
    shards: int = 1
    parts: int = 1

    @property
    def groups(self) -> int:
        """Shards of the folded rows."""
        return self.shards * self.parts

    def __call__(self, x: Shaped[Array, "batch seq *rest"]) -> Shaped[Array, "rows part *rest"]:
        if self.parts == 1:
            return x
        order = "(shards batch) (parts part) ... -> (shards parts batch) part ..."
        folded = rearrange(x, order, shards=self.shards, parts=self.parts)
        return jax.lax.with_sharding_constraint(folded, self._layout)

    def undo(self, x: Shaped[Array, "rows part *rest"]) -> Shaped[Array, "batch seq *rest"]:
        """The rows as they were."""
        if self.parts == 1:
            return x
        order = "(shards parts batch) part ... -> (shards batch) (parts part) ..."
        return rearrange(x, order, shards=self.shards, parts=self.parts)

    @property
    def _layout(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, P((*axes.rows(self.mesh), "sequence")))


def fold(mesh: Mesh | None, batch: int, seq: int) -> Fold:
    """How rows are folded for a mesh: not at all without a `sequence` axis, or where it does not divide them.

    Args:
        mesh: its `sequence` axis says into how many parts.
        batch: rows; where the mesh does not divide them, as one row under `vmap`, they stay.
        seq: tokens of each.
    """
    shards, parts = axes.num_row_shards(mesh), axes.length(mesh, "sequence")
    if batch % shards:
        return Fold()
    return Fold(mesh, shards, parts if seq % parts == 0 else 1)
