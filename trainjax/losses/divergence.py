"""Two policies compared on sampled tokens: estimates of the KL divergence, and importance ratios.

All stay finite, with finite gradients, where one of the policies finds a token impossible.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from trainjax.losses.averages import sum_over_sequence
from trainjax.tree import wide

_LARGEST = 20.0
"""Log-ratios above this grow linearly in `_exp`: no token that the policy sampled comes near."""

# --- KL divergence from samples ---------------------------------------------------------------------

KLEstimator = Callable[[Array, Array], Array]
"""`(logprobs, reference_logprobs) -> estimates` of KL(policy || reference) from the policy's tokens."""


def k1(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`-log x` with `x = reference / policy`: unbiased, of high variance, of either sign.

    For rewards. Its gradient is zero in expectation, so as a term of a loss it does nothing.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return wide(logprobs) - wide(reference_logprobs)


def k2(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`(log x)^2 / 2`: biased, but on the policy's own samples its gradient is that of the KL.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return 0.5 * jnp.square(k1(logprobs, reference_logprobs))


def k3(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`x - 1 - log x`: unbiased, never negative, of low variance. GRPO's.

    Its gradient is that of the other divergence, KL(reference || policy).

    Source: Schulman 2020, "Approximating KL divergence"; DeepSeekMath, arXiv:2402.03300, eq. 4.
    """
    log_x = -k1(logprobs, reference_logprobs)
    return jnp.expm1(jnp.minimum(log_x, _LARGEST)) + _tangent(log_x) - log_x


def kl(
    logprobs: Float[Array, "*shape"],
    reference_logprobs: Float[Array, "*shape"],
    value: KLEstimator = k3,
    gradient: KLEstimator = k2,
) -> Float[Array, "*shape"]:
    """The value of one estimator with the gradient of another; by default the best of each.

    Args:
        logprobs: of the policy's tokens.
        reference_logprobs: of the same tokens under the reference.
        value: what is reported and added to the loss.
        gradient: what is differentiated.
    """
    slope = gradient(logprobs, reference_logprobs)
    # First the difference, which is exactly 0: next to a large slope the value would lose its digits.
    return lax.stop_gradient(value(logprobs, reference_logprobs)) + (
        slope - lax.stop_gradient(slope)
    )


# --- importance ratios ------------------------------------------------------------------------------


def token_ratio(
    logprobs: Float[Array, "batch seq"], old_logprobs: Float[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """`rho_t = pi(y_t) / pi_old(y_t)`; beyond e^20 its tangent there, so that it stays finite."""
    chex.assert_equal_shape([logprobs, old_logprobs])
    return _exp(k1(logprobs, old_logprobs))


def sequence_ratio(
    logprobs: Float[Array, "batch seq"],
    old_logprobs: Float[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    segments: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq"]:
    """`(pi(y) / pi_old(y))^(1/|y|)`, the geometric mean of a sequence's ratios, at each of its tokens.

    Args:
        logprobs: of the policy that trains.
        old_logprobs: of the policy that sampled.
        mask: which tokens are actions.
        segments: of packed rows; without them a row is a sequence.

    Source: GSPO, arXiv:2507.18071, eq. 7.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    log_ratio = jnp.where(mask, k1(logprobs, old_logprobs), 0.0)
    length = jnp.maximum(sum_over_sequence(mask.astype(log_ratio.dtype), segments), 1.0)
    return _exp(sum_over_sequence(log_ratio, segments) / length)


def truncated_importance(
    logprobs: Float[Array, "batch seq"],
    sampler_logprobs: Float[Array, "batch seq"],
    max_ratio: ArrayLike = 2.0,
) -> Float[Array, "batch seq"]:
    """`min(pi_trainer / pi_sampler, max_ratio)`, a constant factor of each token's loss.

    Engines that sample fast compute other probabilities than the trainer, from the same weights.

    Args:
        logprobs: of the sampled tokens, computed by the trainer with the weights that sampled.
        sampler_logprobs: as the engine reported them.
        max_ratio: where the weight is cut, against variance.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    agrees with TRL 1.16 `vllm_importance_sampling_mode="token_truncate"`.
    """
    return lax.stop_gradient(jnp.minimum(token_ratio(logprobs, sampler_logprobs), max_ratio))


def _exp(x: Array) -> Array:
    """`e^x`, continued by its tangent where it would overflow; value and gradient stay finite."""
    return jnp.exp(jnp.minimum(x, _LARGEST)) + _tangent(x)


def _tangent(x: Array) -> Array:
    """How far the tangent at the largest log-ratio has risen; 0 below it."""
    return np.float32(np.exp(_LARGEST)) * jnp.maximum(x - _LARGEST, 0.0)
