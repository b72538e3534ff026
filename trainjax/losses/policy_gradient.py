"""Policy gradients: from rewards to advantages, from advantages to a loss.

The parts are array functions that a training loop puts together:

- rewards: `soft_overlong_punishment`, `token_rewards`, `dynamic_sampling_mask`, and for several at once
  `reward.weighted_objectives`;
- advantages: `gae`, `discounted_returns`, `whiten`, and one function for each way of making a
  baseline from a group of samples (GRPO, Dr. GRPO, GDPO, RLOO, ReMax, REINFORCE++);
- weights: which average over tokens the loss is (`token_mean` and its like);
- estimates of the KL divergence, importance ratios, surrogates, the value loss.

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

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trainjax.losses.reward import weighted_objectives
from trainjax.ops.vocab import Extras
from trainjax.types import Batch, Loss, Metrics, Params, pytree, static

# --- rewards ----------------------------------------------------------------------------------------


def soft_overlong_punishment(
    lengths: Int[Array, "*shape"], max_length: int, cache: int
) -> Float[Array, "*shape"]:
    """A penalty to add to the reward: 0 up to `max_length - cache` tokens, -1 from `max_length` on.

    Linear in between: `(max_length - cache - |y|) / cache`.

    Args:
        lengths: number of tokens of each completion.
        max_length: L_max, the length at which the penalty is full.
        cache: L_cache, the number of tokens over which it grows.

    Raises:
        ValueError: a `cache` that is not within `[1, max_length]`.

    Source: DAPO, arXiv:2503.14476, eq. 13; agrees with `get_soft_overlong_punishment` of TRL 1.16.
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache={cache} is not within [1, max_length={max_length}]")
    over = (lengths - (max_length - cache)).astype(jnp.float32)
    return -jnp.clip(over / cache, 0.0, 1.0)


def token_rewards(
    scores: Float[Array, " batch"],
    penalties: Float[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "batch seq"]:
    """`r_t = -penalty_t`, and the sequence's score on top at its last action: KL in the reward.

    Args:
        scores: reward of each sequence.
        penalties: of each token, e.g. `beta * k1(old_logprobs, reference_logprobs)`.
        mask: which tokens are actions; the others get no reward.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2, token by token.
    """
    chex.assert_equal_shape([penalties, mask])
    position = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)
    return jnp.where(mask, jnp.where(position == last, scores[:, None], 0.0) - penalties, 0.0)


def dynamic_sampling_mask(rewards: Float[Array, "prompts samples"]) -> Bool[Array, " prompts"]:
    """Which prompts teach something: those whose samples did not all get the same reward.

    The group advantage of the others is zero; sample new prompts in their place.

    Source: dynamic sampling of DAPO, arXiv:2503.14476, eq. 11.
    """
    return jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)


# --- advantages over time ---------------------------------------------------------------------------


def gae(
    rewards: Float[Array, "batch seq"],
    values: Float[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gamma: ArrayLike = 1.0,
    lam: ArrayLike = 0.95,
    terminal_values: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """Generalised advantage estimation over the actions of each row.

    `delta_t = r_t + gamma V_{t'} - V_t` and `A_t = delta_t + gamma lam A_{t'}`, where t' is the next
    action: a tool's answer in between takes no time, and its rewards and values are not read. A reward
    for such an answer belongs on the action that asked for it.

    Args:
        rewards: given for each action.
        values: V_t, predicted before the action is chosen.
        mask: which tokens are actions.
        gamma: discount per action; 1 is usual for text.
        lam: trades bias (0) for variance (1).
        terminal_values: value of the state after a row's last action: 0 (the default) where the
            episode ended, the prediction where it was cut off.

    Returns:
        Advantages, and the value function's targets `A_t + V_t`. Both are 0 where no action is.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; agrees with verl 0.9.1 before whitening.
    """
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = _wide(rewards), _wide(values)
    end = jnp.zeros_like(values[:, 0]) if terminal_values is None else _wide(terminal_values)

    def step(following, now):
        next_value, next_advantage = following
        reward, value, is_action = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (
            jnp.where(is_action, value, next_value),
            jnp.where(is_action, advantage, next_advantage),
        )
        return carry, jnp.where(is_action, advantage, 0.0)

    along_time = jax.tree.map(jnp.transpose, (rewards, values, mask))
    _, advantages = lax.scan(step, (end, jnp.zeros_like(end)), along_time, reverse=True)
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def discounted_returns(
    rewards: Float[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gamma: ArrayLike = 1.0,
    terminal_values: Float[Array, " batch"] | None = None,
) -> Float[Array, "batch seq"]:
    """`G_t = r_t + gamma G_{t'}`, t' the next action; 0 where no action is.

    Args:
        rewards: given for each action.
        mask: which tokens are actions.
        gamma: discount per action.
        terminal_values: the return after a row's last action, by default 0.
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0, terminal_values)[0]


def center(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x - mean(x)` over the mask, 0 elsewhere: the shift of `whiten` without its scale."""
    chex.assert_equal_shape([values, mask])
    values = jnp.where(mask, _wide(values), 0.0)
    mean = jnp.sum(values) / jnp.maximum(jnp.sum(mask, dtype=values.dtype), 1.0)
    return jnp.where(mask, values - mean, 0.0)


def whiten(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], eps: float = 1e-8
) -> Float[Array, "*shape"]:
    """`(x - mean(x)) / sqrt(var(x) + eps)` over the mask, 0 elsewhere; the mean stays removed.

    Args:
        values: advantages of a whole batch (all its devices').
        mask: which entries count.
        eps: added to the variance, which is the unbiased one.

    Source: agrees with `masked_whiten` of verl 0.9.1 on the mask.
    """
    centered = center(values, mask)
    count = jnp.sum(mask, dtype=centered.dtype)
    variance = jnp.sum(jnp.square(centered)) / jnp.maximum(count - 1.0, 1.0)
    return centered * lax.rsqrt(variance + eps)


def reinforce_plus_plus_advantages(
    rewards: Float[Array, "batch seq"], mask: Bool[Array, "batch seq"], gamma: ArrayLike = 1.0
) -> Float[Array, "batch seq"]:
    """Discounted returns, whitened over all actions of the batch: no critic and no groups.

    Args:
        rewards: of each action, with the KL penalty in them (`token_rewards`).
        mask: which tokens are actions.
        gamma: discount per action.

    Source: REINFORCE++, arXiv:2501.03262; agrees with verl 0.9.1 on rows without tool answers (verl
    forgets what comes after one).
    """
    return whiten(discounted_returns(rewards, mask, gamma), mask)


# --- advantages within a group of samples -----------------------------------------------------------


def grpo_advantages(
    rewards: Float[Array, "prompts samples"], eps: float = 1e-4
) -> Float[Array, "prompts samples"]:
    """`(r - mean) / (std + eps)` among the samples of each prompt.

    Args:
        rewards: of each sample.
        eps: added to the standard deviation, which is the unbiased one (ddof 1).

    Raises:
        ValueError: a single sample a prompt.

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2; agrees with TRL 1.16 `GRPOTrainer`.
    """
    centered = dr_grpo_advantages(rewards)
    return centered / (_std(centered, axis=1) + eps)


def dr_grpo_advantages(
    rewards: Float[Array, "prompts samples"],
) -> Float[Array, "prompts samples"]:
    """`r - mean` among the samples of each prompt: no division that favours easy and hard prompts.

    Raises:
        ValueError: a single sample a prompt.

    Source: Dr. GRPO, arXiv:2503.20783; TRL 1.16 `GRPOTrainer` with `scale_rewards="none"`.
    """
    _check_samples(rewards.shape[1])
    rewards = _wide(rewards)
    return rewards - jnp.mean(rewards, axis=1, keepdims=True)


def gdpo_advantages(
    rewards: Float[Array, "prompts samples objectives"],
    weights: Float[Array, " objectives"],
    eps: float = 1e-4,
) -> Float[Array, "prompts samples"]:
    """Several rewards, each normalised in its group before they are added, the sum over the batch.

    No reward drowns another by its scale, as it would in `grpo_advantages(weighted_objectives(...))`.

    Args:
        rewards: of each sample by each reward function.
        weights: of the reward functions.
        eps: added to the standard deviations.

    Raises:
        ValueError: a single sample a prompt.

    Source: GDPO, arXiv:2601.05242; agrees with TRL 1.16 `GRPOTrainer` with
    `multi_objective_aggregation="normalize_then_sum"`.
    """
    each = jax.vmap(lambda r: grpo_advantages(r, eps), in_axes=-1, out_axes=-1)(rewards)
    total = weighted_objectives(each, weights)
    centered = total - jnp.mean(total)
    return centered / (_std(centered, axis=None) + eps)


def rloo_advantages(rewards: Float[Array, "prompts samples"]) -> Float[Array, "prompts samples"]:
    """`r_i - mean_{j != i} r_j`: the other samples of a prompt are the baseline of each.

    Raises:
        ValueError: a single sample a prompt.

    Source: RLOO, arXiv:2402.14740; agrees with TRL 1.16 `RLOOTrainer`.
    """
    samples = rewards.shape[1]
    return dr_grpo_advantages(rewards) * (samples / max(samples - 1, 1))


def remax_advantages(
    rewards: Float[Array, "prompts samples"], greedy_rewards: Float[Array, " prompts"]
) -> Float[Array, "prompts samples"]:
    """`r - r(greedy)`: the reward of the greedy completion of the prompt is the baseline.

    Source: ReMax, arXiv:2310.10505.
    """
    return _wide(rewards) - _wide(greedy_rewards)[:, None]


# --- constraints ------------------------------------------------------------------------------------


def lagrangian_advantages(
    task: Float[Array, "*shape"], constraint: Float[Array, "*shape"], multiplier: ArrayLike
) -> Float[Array, "*shape"]:
    """`(1 - s(mu)) A_task + s(mu) A_constraint`, s the logistic function.

    Args:
        task: advantages for the reward to maximise.
        constraint: advantages for the reward that has to reach a threshold.
        multiplier: mu, without bounds; 0 weighs both equally.

    Source: Moskovitz et al. 2023, arXiv:2310.04373, and its code ConstrainedRL4LMs.
    """
    share = jax.nn.sigmoid(multiplier)
    return (1.0 - share) * _wide(task) + share * _wide(constraint)


def ascend_multiplier(
    multiplier: ArrayLike, violation: ArrayLike, learning_rate: ArrayLike
) -> Float[Array, ""]:
    """One step of gradient ascent on the violation: `mu + learning_rate s'(mu) violation`.

    Args:
        multiplier: mu.
        violation: `threshold - E[constraint return]`, positive while the constraint fails, so that its
            weight grows.
        learning_rate: of mu.

    Source: the descent of ConstrainedRL4LMs on `s(mu) (return - threshold)`, without its momentum.
    """
    multiplier = jnp.asarray(multiplier)
    share = jax.nn.sigmoid(multiplier)
    return multiplier + learning_rate * share * (1.0 - share) * violation


# --- weights: which average the loss is -------------------------------------------------------------


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
    segments: Int[Array, "batch seq"] | None = None,
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
    segments: Int[Array, "batch seq"] | None = None,
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
    segments: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq"]:
    """`1 / (S length)`: a sum over actions that no sequence's own length divides (Dr. GRPO).

    Args:
        mask: which tokens are actions.
        length: a constant of the run, the longest completion that it allows.
        num_sequences: S of the global batch; by default the sequences with an action in this one.
        segments: of packed rows; without them a row is a sequence.
    """
    return sequence_mean_token_sum(mask, num_sequences, segments) / jnp.float32(length)


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
    return _wide(logprobs) - _wide(reference_logprobs)


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
    length = jnp.maximum(_sum_over_sequence(mask.astype(log_ratio.dtype), segments), 1.0)
    return _exp(_sum_over_sequence(log_ratio, segments) / length)


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


# --- surrogates: a loss for each token --------------------------------------------------------------


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
    return -_wide(advantages) * jnp.where(advantages < 0, bad, good)


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
    return -lax.stop_gradient(jnp.minimum(ratio, max_ratio)) * advantages * _wide(logprobs)


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
        jnp.where(mask, _wide(x), 0.0) for x in (values, old_values, returns)
    )
    near = jnp.clip(values, old_values - clip, old_values + clip)
    worse = jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))
    return 0.5 * jnp.sum(weights * worse)


# --- losses -----------------------------------------------------------------------------------------


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

    policy: Any
    bounds: Any
    beta: Any
    entropy_coef: Any
    max_sampler_ratio: Any
    estimator: KLEstimator = static()


def ppo(
    policy: Any,
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
    policy: Any,
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
    policy: Any,
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
    policy: Any,
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
    if _is_number(max_ratio) and not max_ratio > 0:
        raise ValueError(f"max_ratio={max_ratio} cuts every weight; use a positive one, such as 5")
    bounds = _coefficient(max_ratio)
    return Loss(_cispo, _inputs(policy, bounds, beta, estimator, entropy_coef, max_sampler_ratio))


def reinforce(
    policy: Any,
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
        return jnp.where(mask, _wide(x), 0.0)

    def read(name: str) -> Array:
        if name not in batch:
            raise ValueError(f"the batch has no `{name}`, [batch, seq] floats that this loss needs")
        return clean(batch[name])

    has_bonus = inputs.entropy_coef is not None
    wanted = {"extras": Extras(entropy=True)} if has_bonus else {}
    stats = inputs.policy(params, batch, key, where=mask, **wanted)
    logprobs = clean(stats.logprobs)
    return _Tokens(
        weights=batch["weights"],
        logprobs=logprobs,
        old_logprobs=lax.stop_gradient(logprobs) if is_fresh else read("old_logprobs"),
        advantages=read("advantages"),
        entropy=clean(stats.entropy) if has_bonus else -logprobs,
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
    if _is_number(beta) and not beta >= 0:
        raise ValueError(f"beta={beta} rewards distance from the reference; use 0 or more")
    if _is_number(entropy_coef) and not entropy_coef >= 0:
        raise ValueError(f"entropy_coef={entropy_coef} punishes entropy; use 0 or more")
    if _is_number(max_sampler_ratio) and not max_sampler_ratio > 0:
        raise ValueError(
            f"max_sampler_ratio={max_sampler_ratio} cuts every weight; use a positive one, such as 2"
        )
    return _Inputs(
        policy=policy,
        bounds=bounds,
        beta=_unless_zero(beta),
        entropy_coef=_unless_zero(entropy_coef),
        max_sampler_ratio=_coefficient(max_sampler_ratio),
        estimator=estimator,
    )


def _checked_clip(epsilon_low: Any, epsilon_high: Any, dual_clip: Any) -> _Clip:
    if _is_number(epsilon_low) and not 0 <= epsilon_low <= 1:
        raise ValueError(
            f"epsilon_low={epsilon_low} is not within [0, 1]: a ratio is never negative"
        )
    if _is_number(epsilon_high) and not epsilon_high >= 0:
        raise ValueError(f"epsilon_high={epsilon_high} clips at ratios below 1; use 0 or more")
    if _is_number(dual_clip) and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} is not above 1, the ratio of an unchanged policy")
    return _Clip(*map(_coefficient, (epsilon_low, epsilon_high, dual_clip)))


# --- shared -----------------------------------------------------------------------------------------

_LARGEST = 20.0
"""Log-ratios above this grow linearly in `_exp`: no token that the policy sampled comes near."""


def _exp(x: Array) -> Array:
    """`e^x`, continued by its tangent where it would overflow; value and gradient stay finite."""
    return jnp.exp(jnp.minimum(x, _LARGEST)) + _tangent(x)


def _tangent(x: Array) -> Array:
    """How far the tangent at the largest log-ratio has risen; 0 below it."""
    return np.float32(np.exp(_LARGEST)) * jnp.maximum(x - _LARGEST, 0.0)


def _wide(x: Array) -> Array:
    """At least float32: differences and sums of bf16 numbers lose what an advantage is made of."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _std(centered: Array, axis: int | None) -> Array:
    """The unbiased standard deviation of numbers whose mean is zero already."""
    count = centered.size if axis is None else centered.shape[axis]
    squares = jnp.sum(jnp.square(centered), axis=axis, keepdims=axis is not None)
    return jnp.sqrt(squares / (count - 1))


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise ValueError(f"a group of {samples} has no baseline; sample a prompt at least twice")


def _sum_over_sequence(
    x: Float[Array, "batch seq"], segments: Int[Array, "batch seq"] | None
) -> Float[Array, "batch seq"]:
    """The sum over a token's own sequence, at each token."""
    if segments is None:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)
    count = x.shape[1] + 1  # segments are numbered from 1, and there are no more than tokens
    return jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=count)[s])(x, segments)


def _share_of_sequence(
    mask: Bool[Array, "batch seq"], segments: Int[Array, "batch seq"] | None
) -> Float[Array, "batch seq"]:
    """`1 / |y|` at the actions of each sequence: every sequence that has any sums to 1."""
    actions = mask.astype(jnp.float32)
    return actions / jnp.maximum(_sum_over_sequence(actions, segments), 1.0)


def _num_sequences(share: Float[Array, "batch seq"]) -> Array:
    return jnp.round(jnp.sum(share))


def _divided(x: Array, count: ArrayLike) -> Float[Array, "batch seq"]:
    """In float32; zeros stay zeros where nothing was counted."""
    return x.astype(jnp.float32) / jnp.maximum(jnp.asarray(count).astype(jnp.float32), 1.0)


def _is_number(x: Any) -> TypeGuard[float]:
    return isinstance(x, int | float)


def _unless_zero(x: Any) -> Any:
    """None for the number 0: a term that is off costs nothing, the reference's forward pass least."""
    return None if _is_number(x) and x == 0 else _coefficient(x)


def _coefficient(x: Any) -> Any:
    """A Python number as float32, so that 1 and 0.5 run the same program of the step."""
    return np.float32(x) if _is_number(x) else x
