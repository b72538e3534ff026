"""The likelihood of labels that the model draws itself: what curvature is estimated from."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from trainjax.losses.sft import nll
from trainjax.types import Batch, Loss, Metrics, Params, SamplingPolicy


def drawn(policy: SamplingPolicy) -> Loss:
    """`-sum_t sqrt(w_t) log p(y_t | the data's tokens before t)`, with `y_t` drawn from the model there.

    Nothing to minimise: its gradient has mean 0. Its square is an unbiased estimate of the diagonal of the
    Gauss-Newton matrix of `sft` with the same weights, which is its Fisher information. For
    `optim.gauss_newton`: `step(state, loss, batch, curvature=losses.drawn(policy))`.

    Args:
        policy: `draw(params, batch, key) -> [batch, seq]`, and called as in `sft`. Nothing random is on but
            the labels.

    Source: Liu et al. 2023, arXiv:2305.14342, section 2.3, generalised to tokens of different weight.
    """
    return Loss(_drawn, policy)


def _drawn(
    policy: SamplingPolicy, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    if key is None:
        raise ValueError("drawn draws labels and needs a key: loss(params, batch, key)")
    batch = {**batch, "targets": policy.draw(params, batch, key)}
    stats = policy(params, batch, where=batch["weights"] != 0)
    return nll(stats.logprobs, jnp.sqrt(batch["weights"])), {}
