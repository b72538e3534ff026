"""Policy gradients: from advantages to a loss. `losses.advantages` makes them from rewards.

The parts are array functions that a training loop puts together: `losses.averages` says which average
over tokens the loss is, `losses.divergence` estimates the KL and importance ratios, `losses.surrogates`
has what is differentiated, and the value function's loss.

The wrappers `ppo`, `grpo`, `gspo`, `cispo` and `reinforce` differ in the surrogate alone. Their batch
holds, besides `tokens` and `weights`, arrays of shape `[batch, seq]` aligned with the tokens:

| key                  | meaning                                                                       |
|----------------------|-------------------------------------------------------------------------------|
| `advantages`         | of each token that the policy chose; a sequence's own repeated over its tokens |
| `old_logprobs`       | of the policy that sampled, computed by the trainer (not read by `reinforce`) |
| `reference_logprobs` | of the reference policy; needed if `beta` is not 0                            |
| `sampler_logprobs`   | as the sampling engine reported them; with them the gap to the trainer is corrected |

A token is an *action* if the policy chose it: prompts, padding and what a tool or an environment
answered are none. In a batch the actions are the tokens of weight other than zero; what the other
arrays hold elsewhere is never read. Metrics are sums with the batch's weights, means therefore if
these sum to 1; otherwise divide them by `total_weight`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from trainjax.losses.coefficients import as_input, is_number
from trainjax.losses.divergence import (
    KLEstimator,
    k3,
    kl,
    sequence_ratio,
    token_ratio,
    truncated_importance,
)
from trainjax.losses.surrogates import cispo_surrogate, clipped_surrogate, is_clipped
from trainjax.tree import wide
from trainjax.types import Batch, Extras, Loss, Metrics, Params, Policy, pytree, static


class _Clip(NamedTuple):
    epsilon_low: Any
    epsilon_high: Any
    dual_clip: Any


@pytree
class _Inputs:
    """What a loss needs: the policy, the bounds of its surrogate, the terms that all have.

    Attributes:
        bounds: as the surrogate takes them.
        beta: None where there is no KL term.
        entropy_coef: None where there is no entropy bonus.
    """

    policy: Policy
    bounds: Any
    beta: Any
    entropy_coef: Any
    max_sampler_ratio: Any
    estimator: KLEstimator = static()


def ppo(
    policy: Policy,
    *,
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.2,
    dual_clip: ArrayLike = np.inf,
    beta: ArrayLike = 0.0,
    estimator: KLEstimator = kl,
    entropy_coef: ArrayLike = 0.0,
    max_sampler_ratio: ArrayLike = 2.0,
) -> Loss:
    """PPO's policy loss: `sum_t w_t (clipped surrogate + beta KL - entropy_coef H)`.

    Advantages are those of `gae`, whitened, with the KL in the rewards (`token_rewards`) or here. The
    value function has its own loss, `clipped_value_loss`.

    Metrics: `clip_fraction`, `ratio`, `approx_kl` (of the old policy from the new, by k3), `entropy` (exact
    with a bonus, else `-log pi` of the samples), `total_weight`; with a KL term `kl`; with a sampler's
    log-probabilities `sampler_ratio`.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`, called with `extras` for an entropy bonus.
        epsilon_low: the ratio is clipped below `1 - epsilon_low`.
        epsilon_high: the ratio is clipped above `1 + epsilon_high`.
        dual_clip: largest ratio of an action of negative advantage.
        beta: strength of the KL to the reference; other than 0 the batch has `reference_logprobs`.
        estimator: of that KL: `kl` (k3's value, k2's gradient), `k2`, `k3`.
        entropy_coef: strength of the entropy bonus.
        max_sampler_ratio: where `truncated_importance` cuts, if the batch has `sampler_logprobs`.

    Raises:
        ValueError: a coefficient out of its range, or a batch without an array that is needed.

    Source: PPO, arXiv:1707.06347.
    """
    clip = _checked_clip(epsilon_low, epsilon_high, dual_clip)
    return Loss(_ppo, _inputs(policy, clip, beta, estimator, entropy_coef, max_sampler_ratio))


def grpo(
    policy: Policy,
    *,
    epsilon_low: ArrayLike = 0.2,
    epsilon_high: ArrayLike = 0.2,
    dual_clip: ArrayLike = np.inf,
    beta: ArrayLike = 0.0,
    estimator: KLEstimator = k3,
    entropy_coef: ArrayLike = 0.0,
    max_sampler_ratio: ArrayLike = 2.0,
) -> Loss:
    """GRPO: PPO's surrogate on group advantages, with k3 as the KL in the loss.

    What else the literature names is a choice of advantages and weights: GRPO `grpo_advantages` and
    `sequence_mean_token_mean`; Dr. GRPO `dr_grpo_advantages` and `constant_length`; DAPO
    `epsilon_high=0.28`, `token_mean`, `soft_overlong_punishment` and `dynamic_sampling_mask`.

    Metrics, arguments and errors: those of `ppo`, whose loss it is with another default `estimator`.

    Source: DeepSeekMath, arXiv:2402.03300, eq. 3; agrees with TRL 1.16 `GRPOTrainer` (`epsilon`,
    `epsilon_high`, `delta`, `beta`; `loss_type` grpo, bnpo, dr_grpo, dapo by the weights).
    """
    clip = _checked_clip(epsilon_low, epsilon_high, dual_clip)
    return Loss(_ppo, _inputs(policy, clip, beta, estimator, entropy_coef, max_sampler_ratio))


def gspo(
    policy: Policy,
    *,
    epsilon_low: ArrayLike = 3e-4,
    epsilon_high: ArrayLike = 4e-4,
    dual_clip: ArrayLike = np.inf,
    beta: ArrayLike = 0.0,
    estimator: KLEstimator = k3,
    entropy_coef: ArrayLike = 0.0,
    max_sampler_ratio: ArrayLike = 2.0,
) -> Loss:
    """GSPO: the clipped surrogate of `sequence_ratio`, so that a sequence is clipped as a whole.

    Weights are those of `sequence_mean_token_mean`, advantages one number a sequence. Packed rows tell
    their sequences apart by the batch's `segments`.

    Metrics, arguments and errors: those of `ppo`. The bounds are far tighter, for a mean over a
    sequence moves less than a token.

    Source: GSPO, arXiv:2507.18071, eq. 5 and section 5.1; agrees with TRL 1.16
    `importance_sampling_level="sequence"`.
    """
    clip = _checked_clip(epsilon_low, epsilon_high, dual_clip)
    return Loss(_gspo, _inputs(policy, clip, beta, estimator, entropy_coef, max_sampler_ratio))


def cispo(
    policy: Policy,
    *,
    max_ratio: ArrayLike = 5.0,
    beta: ArrayLike = 0.0,
    estimator: KLEstimator = k3,
    entropy_coef: ArrayLike = 0.0,
    max_sampler_ratio: ArrayLike = 2.0,
) -> Loss:
    """CISPO: REINFORCE with cut importance weights, see `cispo_surrogate`; weights of `token_mean`.

    Metrics, the other arguments and errors: those of `ppo`. `clip_fraction` counts the cut weights.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`, called with `extras` for an entropy bonus.
        max_ratio: the largest importance weight.
        beta: strength of the KL to the reference.
        estimator: of that KL.
        entropy_coef: strength of the entropy bonus.
        max_sampler_ratio: where the correction for the sampler is cut.

    Source: MiniMax-M1, arXiv:2506.13585, eq. 4; agrees with TRL 1.16 `loss_type="cispo"`.
    """
    if is_number(max_ratio) and not max_ratio > 0:
        raise ValueError(f"max_ratio={max_ratio} cuts every weight; use a positive one, such as 5")
    bounds = as_input(max_ratio)
    return Loss(_cispo, _inputs(policy, bounds, beta, estimator, entropy_coef, max_sampler_ratio))


def reinforce(
    policy: Policy,
    *,
    beta: ArrayLike = 0.0,
    estimator: KLEstimator = kl,
    entropy_coef: ArrayLike = 0.0,
    max_sampler_ratio: ArrayLike = 2.0,
) -> Loss:
    """`-sum_t w_t A_t log pi(y_t)`: the gradient of the expected reward, on fresh samples.

    RLOO, ReMax and REINFORCE++ are this loss with their advantages and `sequence_mean_token_sum`.

    Metrics, arguments and errors: those of `ppo` that need no `old_logprobs`; the correction for the
    sampler goes from the policy as it is.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    return Loss(_reinforce, _inputs(policy, (), beta, estimator, entropy_coef, max_sampler_ratio))


def _ppo(
    inputs: _Inputs, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    now = _tokens(inputs, params, batch, key)
    return _clipped(inputs, now, token_ratio(now.logprobs, now.old_logprobs))


def _gspo(
    inputs: _Inputs, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    now = _tokens(inputs, params, batch, key)
    mask, segments = now.weights != 0, batch.get("segments")
    return _clipped(inputs, now, sequence_ratio(now.logprobs, now.old_logprobs, mask, segments))


def _cispo(
    inputs: _Inputs, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    now = _tokens(inputs, params, batch, key)
    ratio = token_ratio(now.logprobs, now.old_logprobs)
    losses = cispo_surrogate(now.logprobs, ratio, now.advantages, inputs.bounds)
    loss, metrics = _total(inputs, now, losses)
    return loss, metrics | _ratio_metrics(now, ratio, ratio > inputs.bounds)


def _reinforce(
    inputs: _Inputs, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    now = _tokens(inputs, params, batch, key, is_fresh=True)
    return _total(inputs, now, -now.advantages * now.logprobs)


class _Tokens(NamedTuple):
    """What the terms of a loss are made of, `[batch, seq]` in float32, zero where no action is."""

    weights: Array
    logprobs: Array
    old_logprobs: Array
    advantages: Array
    entropy: Array
    reference_logprobs: Array | None
    sampler_logprobs: Array | None


def _tokens(
    inputs: _Inputs,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    is_fresh: bool = False,
) -> _Tokens:
    """The policy's statistics and the batch's; if fresh, the policy that sampled is the policy."""
    mask = batch["weights"] != 0

    def clean(x: Array) -> Array:
        return jnp.where(mask, wide(x), 0.0)

    def read(name: str) -> Array:
        if name not in batch:
            raise ValueError(f"the batch has no `{name}`, [batch, seq] floats that this loss needs")
        return clean(batch[name])

    has_bonus = inputs.entropy_coef is not None
    wanted = {"extras": Extras(entropy=True)} if has_bonus else {}
    stats = inputs.policy(params, batch, key, where=mask, **wanted)
    logprobs, entropy = clean(stats.logprobs), -clean(stats.logprobs)
    if has_bonus:
        assert stats.entropy is not None  # asked for above
        entropy = clean(stats.entropy)
    return _Tokens(
        weights=batch["weights"],
        logprobs=logprobs,
        old_logprobs=lax.stop_gradient(logprobs) if is_fresh else read("old_logprobs"),
        advantages=read("advantages"),
        entropy=entropy,
        reference_logprobs=None if inputs.beta is None else read("reference_logprobs"),
        sampler_logprobs=read("sampler_logprobs") if "sampler_logprobs" in batch else None,
    )


def _clipped(inputs: _Inputs, now: _Tokens, ratio: Array) -> tuple[Array, Metrics]:
    """The loss and metrics of PPO and its like, for ratios of tokens or of sequences."""
    losses = clipped_surrogate(ratio, now.advantages, *inputs.bounds)
    loss, metrics = _total(inputs, now, losses)
    cut = is_clipped(ratio, now.advantages, *inputs.bounds)
    return loss, metrics | _ratio_metrics(now, ratio, cut)


def _total(inputs: _Inputs, now: _Tokens, losses: Array) -> tuple[Array, Metrics]:
    """`sum_t w_t (importance_t loss_t + beta KL_t - entropy_coef H_t)`, and what it is made of."""
    weights = now.weights
    metrics = {"entropy": jnp.sum(weights * now.entropy), "total_weight": jnp.sum(weights)}
    if now.sampler_logprobs is not None:
        importance = truncated_importance(
            now.old_logprobs, now.sampler_logprobs, inputs.max_sampler_ratio
        )
        losses = importance * losses
        metrics["sampler_ratio"] = jnp.sum(weights * importance)
    if now.reference_logprobs is not None:
        divergence = inputs.estimator(now.logprobs, now.reference_logprobs)
        losses += inputs.beta * divergence
        metrics["kl"] = jnp.sum(weights * divergence)
    if inputs.entropy_coef is not None:
        losses -= inputs.entropy_coef * now.entropy
    return jnp.sum(weights * losses), metrics


def _ratio_metrics(now: _Tokens, ratio: Array, cut: Array) -> Metrics:
    return {
        "ratio": jnp.sum(now.weights * ratio),
        "clip_fraction": jnp.sum(jnp.where(cut, now.weights, 0.0)),
        "approx_kl": jnp.sum(now.weights * k3(now.old_logprobs, now.logprobs)),
    }


def _inputs(policy, bounds, beta, estimator, entropy_coef, max_sampler_ratio) -> _Inputs:
    if is_number(beta) and not beta >= 0:
        raise ValueError(f"beta={beta} rewards distance from the reference; use 0 or more")
    if is_number(entropy_coef) and not entropy_coef >= 0:
        raise ValueError(f"entropy_coef={entropy_coef} punishes entropy; use 0 or more")
    if is_number(max_sampler_ratio) and not max_sampler_ratio > 0:
        raise ValueError(
            f"max_sampler_ratio={max_sampler_ratio} cuts every weight; use a positive one, such as 2"
        )
    return _Inputs(
        policy=policy,
        bounds=bounds,
        beta=_unless_zero(beta),
        entropy_coef=_unless_zero(entropy_coef),
        max_sampler_ratio=as_input(max_sampler_ratio),
        estimator=estimator,
    )


def _checked_clip(epsilon_low: Any, epsilon_high: Any, dual_clip: Any) -> _Clip:
    if is_number(epsilon_low) and not 0 <= epsilon_low <= 1:
        raise ValueError(
            f"epsilon_low={epsilon_low} is not within [0, 1]: a ratio is never negative"
        )
    if is_number(epsilon_high) and not epsilon_high >= 0:
        raise ValueError(f"epsilon_high={epsilon_high} clips at ratios below 1; use 0 or more")
    if is_number(dual_clip) and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} is not above 1, the ratio of an unchanged policy")
    return _Clip(*map(as_input, (epsilon_low, epsilon_high, dual_clip)))


def _unless_zero(x: Any) -> Any:
    """None for the number 0: a term that is off costs nothing, the reference's forward pass least."""
    return None if is_number(x) and x == 0 else as_input(x)
