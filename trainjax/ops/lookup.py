"""Rows of a table that devices share, by token id."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from trainjax import axes


def lookup(
    table: Float[Array, "vocab embed"],
    tokens: Int[Array, "batch seq"],
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    parts: int = 1,
) -> Float[Array, "batch seq embed"]:
    """`table[tokens]`, cast to the dtype.

    A table's columns are shared over `fsdp` and its rows over `tensor`. Each device looks up its part for the
    tokens of all that share it, and gets the other parts for its own: what it sends is as large as the
    result. (Left to itself the compiler makes the rows of the whole batch on every device as soon as the
    batch is split over a second axis beside `fsdp`.)

    Args:
        table: an embedding.
        tokens: ids, their rows split over the mesh; where it does not divide them, the lookup is plain.
        dtype: of the result.
        mesh: the mesh that both are laid out over, if any.
        parts: into how many parts rows are folded (`ops.fold`).
    """
    columns, entries = axes.length(mesh, "fsdp"), axes.length(mesh, "tensor")
    shards = axes.num_row_shards(mesh) * parts
    if mesh is None or columns * entries == 1 or tokens.shape[0] % shards:
        return table[tokens].astype(dtype)
    vocab, embed = table.shape
    columns, entries = (
        n if size % n == 0 else 1 for n, size in ((columns, embed), (entries, vocab))
    )

    def local(table: Array, tokens: Array) -> Array:
        if columns > 1:
            tokens = lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        if entries > 1:
            tokens = tokens - lax.axis_index("tensor") * table.shape[0]
            is_own = (tokens >= 0) & (tokens < table.shape[0])
            own = jnp.where(is_own[..., None], table[jnp.where(is_own, tokens, 0)], 0.0)
            rows = lax.psum(own.astype(dtype), "tensor")  # all but one are 0
        else:
            rows = table[tokens].astype(dtype)
        if columns > 1:
            rows = lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return rows

    over = (*axes.rows(mesh), "sequence") if parts > 1 else axes.rows(mesh)
    shared = P("tensor" if entries > 1 else None, "fsdp" if columns > 1 else None)
    whole = P(over, None, None)
    each = jax.shard_map(
        local, mesh=mesh, in_specs=(shared, P(over, None)), out_specs=whole, check_vma=False
    )
    return each(table, tokens)
