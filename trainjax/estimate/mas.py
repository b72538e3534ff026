"""Memory-aware synapses: how much the output moves when a parameter does."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax.estimate.per_example import mean_over_examples
from trainjax.types import Batch, Encoder, Loss, Metrics, Params


def mas(policy: Encoder, params: Params, batches: Iterable[Batch], *, chunk: int = 1) -> Params:
    """`Omega_i = 1/N sum_n |d ||f(x_n)||^2 / d theta_i|`; it needs no labels.

    The output f is here the final hidden states at the positions with weight, not the logits, which
    nobody holds all of: an output head of its own gets no importance.

    Args:
        policy: `policy.hidden(params, batch) -> [batch, seq, embed]`.
        params: where it is taken.
        batches: a finite number, of one example a row. `weights` above 0 choose the positions.
        chunk: rows whose gradients are held at once.

    Returns:
        A tree like the params, in float32: for `losses.ewc(anchor, omega, strength=2 * lambda)`.

    Raises:
        ValueError: packed rows; no positions with weight.

    Source: Aljundi et al. 2018, arXiv:1711.09601.
    """
    return mean_over_examples(jnp.abs, Loss(_squared_norm, policy), params, batches, chunk)


def _squared_norm(
    policy: Encoder, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    hidden = policy.hidden(params, batch).astype(jnp.float32)
    where = batch["weights"] != 0
    return jnp.sum(jnp.where(where[..., None], hidden, 0.0) ** 2), {}
