"""From tokens to sequences: sums over the completions of a batch, and over the segments of its rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trainjax.types import Batch


class Sequences(NamedTuple):
    """A value of each token, summed over completions.

    Attributes:
        sums, lengths: of the value, and the number of tokens.
        places: a token's place in its completion, from 1; 0 for tokens of none.
        values: the tokens' values, 0 for tokens of no completion.
    """

    sums: Float[Array, "batch groups size"]
    lengths: Float[Array, "batch groups size"]
    places: Float[Array, "batch seq"]
    values: Float[Array, "batch seq"]


def sequences(values: Float[Array, "batch seq"], batch: Batch, size: int) -> Sequences:
    """Sums over the completions of a batch.

    Args:
        values: of each token.
        batch: `completions` and `groups`.
        size: completions of a group.
    """
    completions, groups = batch["completions"], batch["groups"].shape[1]
    slots = jnp.arange(1, groups * size + 1)
    member = (completions[..., None] == slots).astype(jnp.float32)  # sums as products: no scatter
    values = jnp.where(completions > 0, values, 0.0)
    shape = (completions.shape[0], groups, size)
    sums = jnp.einsum("bs,bsk->bk", values, member).reshape(shape)
    lengths = jnp.sum(member, axis=1).reshape(shape)
    places = jnp.sum(member * jnp.cumsum(member, axis=1), axis=-1)
    return Sequences(sums, lengths, places, values)


Segments = Int[Array, "batch seq"] | None
"""1, 2, ... for the sequences of a packed row, 0 for padding; None where a row is one sequence."""


def segment_sums(
    values: Float[Array, "batch seq"], segments: Segments
) -> Float[Array, "batch slots"]:
    """The sum over each segment; one slot a row, or with segments `seq + 1`, of which most are empty."""
    if segments is None:
        return jnp.sum(values, axis=1, keepdims=True)
    slots = values.shape[1] + 1  # segments are numbered from 1, and there are no more than tokens
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=slots))(values, segments)


def at_tokens(slots: Float[Array, "batch slots"], segments: Segments) -> Float[Array, "batch _"]:
    """Each token's number of its segment; `[batch, 1]`, which is the same for all, without segments."""
    return slots if segments is None else jnp.take_along_axis(slots, segments, axis=1)
