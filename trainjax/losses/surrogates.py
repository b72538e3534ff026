"""Surrogates: a loss for each token whose gradient is that of the expected reward, kept near the sampler.

The value function's loss is clipped in the same way, and stands here too.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from trainjax.tree import wide


def clipped_surrogate(
    ratio: Float[Array, "batch seq"],
    advantages: Float[Array, "batch seq"],
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.2,
    dual_clip: ArrayLike = np.inf,
) -> Float[Array, "batch seq"]:
    """`-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)`, and for `A < 0` at most `-c A`.

    Args:
        ratio: rho, of tokens or of sequences.
        advantages: A.
        epsilon_low: how far the ratio may fall before a bad action has no gradient any more.
        epsilon_high: how far it may rise before a good one has none.
        dual_clip: c, the ratio from which a bad action has no gradient either; above 1, by default
            none.

    Source: PPO, arXiv:1707.06347, eq. 7; apart low and high, DAPO, arXiv:2503.14476, eq. 10; dual clip,
    arXiv:1912.09729 (`delta` in TRL 1.16).
    """
    chex.assert_equal_shape([ratio, advantages])
    # One side of the interval binds for each sign of A, which needs no product with an infinite c.
    good = jnp.minimum(ratio, 1.0 + epsilon_high)
    bad = jnp.clip(ratio, 1.0 - epsilon_low, dual_clip)
    return -wide(advantages) * jnp.where(advantages < 0, bad, good)


def is_clipped(
    ratio: Float[Array, "batch seq"],
    advantages: Float[Array, "batch seq"],
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.2,
    dual_clip: ArrayLike = np.inf,
) -> Bool[Array, "batch seq"]:
    """Where `clipped_surrogate` has no gradient because a bound is reached."""
    good = (advantages > 0) & (ratio > 1.0 + epsilon_high)
    bad = (advantages < 0) & ((ratio < 1.0 - epsilon_low) | (ratio > dual_clip))
    return good | bad


def cispo_surrogate(
    logprobs: Float[Array, "batch seq"],
    ratio: Float[Array, "batch seq"],
    advantages: Float[Array, "batch seq"],
    max_ratio: ArrayLike = 5.0,
) -> Float[Array, "batch seq"]:
    """`-stop_gradient(min(rho, max_ratio)) A log pi`: the weight is cut, no token loses its gradient.

    Args:
        logprobs: of the policy that trains.
        ratio: rho, of tokens.
        advantages: A.
        max_ratio: the largest weight, `1 + epsilon_high` in the paper.

    Source: CISPO of MiniMax-M1, arXiv:2506.13585, eq. 4-5, without a lower bound as there; agrees with
    TRL 1.16 `loss_type="cispo"`, whose `epsilon_high` is `max_ratio`.
    """
    chex.assert_equal_shape([logprobs, ratio, advantages])
    return -lax.stop_gradient(jnp.minimum(ratio, max_ratio)) * advantages * wide(logprobs)


def clipped_value_loss(
    values: Float[Array, "batch seq"],
    old_values: Float[Array, "batch seq"],
    returns: Float[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    clip: ArrayLike = 0.2,
) -> Float[Array, ""]:
    """`sum_t w_t max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`.

    Args:
        values: V, predicted now.
        old_values: V_old, predicted when sampling.
        returns: R, targets from `gae`.
        weights: of the tokens, summing to 1 over the global batch.
        clip: how far a prediction is drawn in one go; infinite for plain squared error.

    Source: Schulman et al.'s PPO implementation; agrees with verl 0.9.1 `compute_value_loss`.
    """
    chex.assert_equal_shape([values, old_values, returns, weights])
    mask = weights != 0
    values, old_values, returns = (
        jnp.where(mask, wide(x), 0.0) for x in (values, old_values, returns)
    )
    near = jnp.clip(values, old_values - clip, old_values + clip)
    worse = jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))
    return 0.5 * jnp.sum(weights * worse)
