"""Which average over tokens a policy gradient's loss is: a weight of each token.

A batch holds these weights as `weights`, so they are made where the batch is made. Their denominators
are counts over the *global* batch, which micro-batches and devices share: give them where a batch is
only a part of it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from trainjax.losses.sequences import Segments, at_tokens, segment_sums


def token_mean(
    mask: Bool[Array, "batch seq"], num_tokens: ArrayLike | None = None
) -> Float[Array, "batch seq"]:
    """`1 / N`: every action of the batch counts the same (DAPO).

    Args:
        mask: which tokens are actions.
        num_tokens: N, the number of actions in the global batch; by default in this one.
    """
    return _divided(mask, jnp.sum(mask) if num_tokens is None else num_tokens)


def sequence_mean_token_mean(
    mask: Bool[Array, "batch seq"],
    num_sequences: ArrayLike | None = None,
    segments: Segments = None,
) -> Float[Array, "batch seq"]:
    """`1 / (S |y|)`: every sequence counts the same, and within it every action (GRPO, GSPO).

    Args:
        mask: which tokens are actions.
        num_sequences: S of the global batch; by default the sequences with an action in this one.
        segments: of packed rows; without them a row is a sequence.
    """
    share = _share_of_sequence(mask, segments)
    return _divided(share, _num_sequences(share) if num_sequences is None else num_sequences)


def sequence_mean_token_sum(
    mask: Bool[Array, "batch seq"],
    num_sequences: ArrayLike | None = None,
    segments: Segments = None,
) -> Float[Array, "batch seq"]:
    """`1 / S`: the mean over sequences of the sum over their actions (REINFORCE, RLOO).

    Args:
        mask: which tokens are actions.
        num_sequences: S of the global batch; by default the sequences with an action in this one.
        segments: of packed rows; without them a row is a sequence.
    """
    if num_sequences is None:
        num_sequences = _num_sequences(_share_of_sequence(mask, segments))
    return _divided(mask, num_sequences)


def constant_length(
    mask: Bool[Array, "batch seq"],
    length: ArrayLike,
    num_sequences: ArrayLike | None = None,
    segments: Segments = None,
) -> Float[Array, "batch seq"]:
    """`1 / (S length)`: a sum over actions that no sequence's own length divides (Dr. GRPO).

    Args:
        mask: which tokens are actions.
        length: a constant of the run, the longest completion that it allows.
        num_sequences: S of the global batch; by default the sequences with an action in this one.
        segments: of packed rows; without them a row is a sequence.
    """
    return sequence_mean_token_sum(mask, num_sequences, segments) / jnp.float32(length)


def sum_over_sequence(
    x: Float[Array, "batch seq"], segments: Segments
) -> Float[Array, "batch seq"]:
    """The sum over a token's own sequence, at each token."""
    return jnp.broadcast_to(at_tokens(segment_sums(x, segments), segments), x.shape)


def _share_of_sequence(
    mask: Bool[Array, "batch seq"], segments: Segments
) -> Float[Array, "batch seq"]:
    """`1 / |y|` at the actions of each sequence: every sequence that has any sums to 1."""
    actions = mask.astype(jnp.float32)
    return actions / jnp.maximum(sum_over_sequence(actions, segments), 1.0)


def _num_sequences(share: Float[Array, "batch seq"]) -> Array:
    return jnp.round(jnp.sum(share))


def _divided(x: Array, count: ArrayLike) -> Float[Array, "batch seq"]:
    """In float32; zeros stay zeros where nothing was counted."""
    return x.astype(jnp.float32) / jnp.maximum(jnp.asarray(count).astype(jnp.float32), 1.0)
