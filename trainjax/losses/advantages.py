"""From rewards to advantages, the first half of a policy gradient; `losses.policy` is the other.

- rewards: `soft_overlong_punishment`, `token_rewards`, `dynamic_sampling_mask`, and for several at once
  `reward.weighted_objectives`;
- advantages over time: `gae`, `discounted_returns`, `whiten`;
- advantages within a group of samples, one function for each way of making a baseline from it (GRPO,
  Dr. GRPO, GDPO, RLOO, ReMax, REINFORCE++);
- advantages under a constraint.

A token is an *action* if the policy chose it: prompts, padding and what a tool or an environment
answered are none, and what arrays hold there is never read.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from trainjax.losses.reward import weighted_objectives
from trainjax.tree import wide

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
    rewards, values = wide(rewards), wide(values)
    end = jnp.zeros_like(values[:, 0]) if terminal_values is None else wide(terminal_values)

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
    values = jnp.where(mask, wide(values), 0.0)
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
    rewards = wide(rewards)
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
    return wide(rewards) - wide(greedy_rewards)[:, None]


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
    return (1.0 - share) * wide(task) + share * wide(constraint)


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


# --- shared ----------------------------------------------------------------------------------------


def _std(centered: Array, axis: int | None) -> Array:
    """The unbiased standard deviation of numbers whose mean is zero already."""
    count = centered.size if axis is None else centered.shape[axis]
    squares = jnp.sum(jnp.square(centered), axis=axis, keepdims=axis is not None)
    return jnp.sqrt(squares / (count - 1))


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise ValueError(f"a group of {samples} has no baseline; sample a prompt at least twice")
