"""Rewards and advantages: each formula against numpy, TRL's trainers and verl's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.rollouts import (
    SEEDS,
    TRL,
    VERL,
    arrays,
    assert_both,
    in_both_precisions,
    random_tokens,
)
from trainjax.losses import advantages as adv
from trainjax.losses.reward import weighted_objectives

# --- rewards ----------------------------------------------------------------------------------------


def test_overlong_punishment_is_that_of_trl():
    lengths = jnp.asarray(TRL["overlong"]["lengths"])
    ours = adv.soft_overlong_punishment(lengths, max_length=100, cache=20)
    np.testing.assert_allclose(ours, TRL["overlong"]["rewards"], rtol=1e-6)


@pytest.mark.parametrize("cache", [0, 101])
def test_overlong_punishment_names_a_cache_that_makes_no_sense(cache):
    with pytest.raises(ValueError, match=f"cache={cache} is not within"):
        adv.soft_overlong_punishment(jnp.asarray([1]), max_length=100, cache=cache)


def test_prompts_whose_samples_all_got_one_reward_are_masked():
    rewards = jnp.asarray([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert adv.dynamic_sampling_mask(rewards).tolist() == [False, True, False]


def test_the_score_is_on_the_last_action_and_the_penalty_on_every_one():
    mask = jnp.asarray([[False, True, True, False, True, False], [False] * 6])
    penalties = jnp.asarray([[9.0, 1.0, 2.0, 9.0, 3.0, jnp.nan]] * 2)
    rewards = adv.token_rewards(jnp.asarray([10.0, 5.0]), penalties, mask)
    assert rewards.tolist() == [[0.0, -1.0, -2.0, 0.0, 7.0, 0.0], [0.0] * 6]


# --- advantages over time ---------------------------------------------------------------------------


def gae_of_actions(rewards, values, end, gamma, lam):
    """The definition, a double sum over the actions of one row: `A_t = sum_l (gamma lam)^l delta_{t+l}`."""
    deltas = rewards + gamma * np.append(values[1:], end) - values
    powers = (gamma * lam) ** np.arange(len(deltas))
    return np.array([deltas[t:] @ powers[: len(deltas) - t] for t in range(len(deltas))])


def gae_reference(data, gamma, lam):
    out = np.zeros_like(data["rewards"])
    for row, mask in enumerate(data["mask"]):
        if mask.any():
            rewards, values = data["rewards"][row, mask], data["values"][row, mask]
            out[row, mask] = gae_of_actions(
                rewards, values, data["terminal_values"][row], gamma, lam
            )
    return out


def test_one_reward_at_the_end_gives_geometric_advantages():
    zeros, gamma, lam = jnp.zeros((1, 6)), 0.9, 0.8
    advantages, returns = adv.gae(zeros.at[0, 5].set(1.0), zeros, zeros == 0, gamma, lam)
    np.testing.assert_allclose(advantages[0], (gamma * lam) ** np.arange(5, -1, -1), rtol=1e-6)
    np.testing.assert_array_equal(advantages, returns)


def test_gae_is_the_sum_over_actions_on_random_batches():
    def ours(rewards, values, mask, end):
        return adv.gae(rewards, values, mask, 0.97, 0.9, end)

    jitted = jax.jit(ours)
    for seed in SEEDS:
        data = random_tokens(seed)
        args = [data[k] for k in ("rewards", "values", "mask", "terminal_values")]
        expected = gae_reference(data, 0.97, 0.9)
        targets = np.where(data["mask"], expected + data["values"], 0.0)
        for advantages, tolerance in (
            (jitted(*(a if a.dtype == bool else np.float32(a) for a in args)), 1e-5),
            (helpers.in_float64(jitted, *args), 1e-9),
        ):
            np.testing.assert_allclose(advantages[0], expected, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(advantages[1], targets, rtol=tolerance, atol=tolerance)


def test_tool_tokens_take_no_time_and_are_not_read():
    """Inserting them, filled with nan, between the actions changes no action's advantage."""
    rng = np.random.default_rng(0)
    rewards, values = np.float32(rng.standard_normal((2, 1, 5)))
    gae = jax.jit(lambda rewards, values, mask: adv.gae(rewards, values, mask, 0.9, 0.8))
    plain, _ = gae(rewards, values, np.ones((1, 5), bool))
    actions = np.array([1, 2, 5, 6, 9])
    wide = np.full((2, 1, 11), np.nan, np.float32)
    wide[0, :, actions], wide[1, :, actions] = rewards.T, values.T
    mask = np.isin(np.arange(11), actions)[None]
    advantages, returns = jax.device_get(gae(*wide, mask))
    np.testing.assert_allclose(advantages[:, actions], plain, rtol=1e-6)
    assert np.all(np.isfinite(returns))
    assert not np.any(advantages[~mask])


def test_lambda_one_is_the_return_less_the_value_and_zero_one_step_ahead():
    data = {k: jnp.asarray(v) for k, v in random_tokens(3).items() if v.dtype == bool}
    data |= {k: jnp.float32(v) for k, v in random_tokens(3).items() if v.dtype != bool}
    rewards, values, mask, end = (data[k] for k in ("rewards", "values", "mask", "terminal_values"))
    monte_carlo, targets = adv.gae(rewards, values, mask, 0.9, 1.0, end)
    returns = adv.discounted_returns(rewards, mask, 0.9, end)
    np.testing.assert_allclose(monte_carlo, jnp.where(mask, returns - values, 0.0), atol=1e-6)
    np.testing.assert_allclose(targets, returns, atol=1e-6)
    one_step, _ = adv.gae(rewards, values, jnp.ones_like(mask), 0.9, 0.0, end)
    following = jnp.concatenate([values[:, 1:], end[:, None]], axis=1)
    np.testing.assert_allclose(one_step, rewards + 0.9 * following - values, atol=1e-6)


@pytest.mark.parametrize("case", VERL["rollouts"])
def test_gae_whitened_and_its_targets_are_those_of_verl(case):
    data, mask = arrays(case["data"]), np.asarray(case["data"]["mask"], bool)

    def ours(rewards, values, mask):
        advantages, returns = adv.gae(rewards, values, mask, VERL["gamma"], VERL["lam"])
        return jnp.stack([adv.whiten(advantages, mask), returns])

    expected = np.stack([case["gae_whitened"], case["gae_returns"]])
    single, double = in_both_precisions(ours, data["rewards"], data["old_values"], mask)
    np.testing.assert_allclose(double, expected, rtol=1e-6, atol=1e-7)  # verl counts tokens + 1e-8
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", VERL["rollouts"])
def test_reinforce_plus_plus_is_that_of_verl_without_tools(case):
    rewards, mask = arrays(case["data"])["rewards"], np.asarray(case["no_tools"], bool)
    ours = functools.partial(adv.reinforce_plus_plus_advantages, gamma=VERL["gamma"])
    single, double = in_both_precisions(ours, rewards, mask)
    np.testing.assert_allclose(double, case["reinforce_plus_plus"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(single, case["reinforce_plus_plus"], rtol=1e-5, atol=1e-5)


def test_whitened_numbers_have_mean_zero_and_variance_one_on_the_mask():
    """The mean really is removed; what is outside the mask is not read, and comes out as zero."""
    values = np.float32(5.0 + 3.0 * np.random.default_rng(0).standard_normal((3, 50)))
    mask = np.random.default_rng(1).random((3, 50)) < 0.5
    values[~mask] = np.nan
    out = np.asarray(jax.jit(adv.whiten)(values, mask), np.float64)
    assert abs(out[mask].mean()) < 1e-6
    assert abs(out[mask].var(ddof=1) - 1.0) < 1e-5
    assert not np.any(out[~mask])
    centered = np.asarray(jax.jit(adv.center)(values, mask))
    np.testing.assert_allclose(centered[mask], values[mask] - values[mask].mean(), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_whitening_of_few_or_equal_numbers_is_zero(count):
    mask = jnp.arange(5)[None] < count
    assert not np.any(adv.whiten(jnp.full((1, 5), 7.0), mask))


# --- advantages within a group ----------------------------------------------------------------------

GROUPS: dict[str, Callable[..., Any]] = {
    "grpo": lambda r, w: adv.grpo_advantages(r[..., 0]),
    "dr_grpo": lambda r, w: adv.dr_grpo_advantages(r[..., 0]),
    "weighted": lambda r, w: adv.grpo_advantages(weighted_objectives(r, w)),
    "gdpo": adv.gdpo_advantages,
    "rloo": lambda r, w: adv.rloo_advantages(r[..., 0]),
}


@pytest.mark.parametrize("name", TRL["advantages"])
def test_group_advantages_are_those_of_trl(name):
    rewards, weights = np.asarray(TRL["rewards"]), np.asarray(TRL["reward_weights"])
    for ours in in_both_precisions(GROUPS[name], rewards, weights):  # TRL's are in float32
        np.testing.assert_allclose(ours, TRL["advantages"][name], rtol=1e-5, atol=1e-5)


def test_group_advantages_are_their_formulas_on_random_rewards():
    def ours(r):
        return jnp.stack(
            [adv.grpo_advantages(r), adv.dr_grpo_advantages(r), adv.rloo_advantages(r)]
        )

    for seed in SEEDS:
        r = np.random.default_rng(seed).standard_normal((3, 5))
        others = np.stack([np.delete(r, i, axis=1).mean(axis=1) for i in range(5)], axis=1)
        centered = r - r.mean(axis=1, keepdims=True)
        scaled = centered / (r.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        assert_both(ours, [r], np.stack([scaled, centered, r - others]))


def test_remax_subtracts_the_reward_of_the_greedy_completion():
    rewards = jnp.asarray([[1.0, 0.0], [0.5, 2.0]])
    ours = adv.remax_advantages(rewards, jnp.asarray([1.0, 0.5]))
    assert ours.tolist() == [[0.0, -1.0], [0.0, 1.5]]


@pytest.mark.parametrize(
    "advantages", [adv.grpo_advantages, adv.dr_grpo_advantages, adv.rloo_advantages]
)
def test_a_group_of_one_is_an_error(advantages):
    with pytest.raises(ValueError, match="a group of 1 has no baseline"):
        advantages(jnp.ones((3, 1)))


# --- constraints ------------------------------------------------------------------------------------


def test_lagrangian_advantages_weigh_task_and_constraint():
    task, constraint = jnp.asarray([1.0, 2.0]), jnp.asarray([-3.0, 5.0])
    share = 1 / (1 + np.exp(-0.7))
    expected = (1 - share) * np.array([1.0, 2.0]) + share * np.array([-3.0, 5.0])
    np.testing.assert_allclose(
        adv.lagrangian_advantages(task, constraint, 0.7), expected, rtol=1e-6
    )
    middle = adv.lagrangian_advantages(task, constraint, 0.0)
    np.testing.assert_allclose(middle, (task + constraint) / 2, rtol=1e-6)


def test_the_multiplier_descends_on_its_lagrangian():
    """`s(mu) (return - threshold)` is what the original code minimises; ours is one step of that."""
    objective = lambda mu: jax.nn.sigmoid(mu) * (0.3 - 0.8)  # noqa: E731
    expected = 0.4 - 0.1 * jax.grad(objective)(0.4)
    np.testing.assert_allclose(adv.ascend_multiplier(0.4, 0.8 - 0.3, 0.1), expected, rtol=1e-6)


def test_the_multiplier_finds_the_policy_that_just_meets_the_constraint():
    """Two actions, rewards (1, 0) and constraint rewards (0, 1), of which 0.3 are asked for."""
    task, constraint = jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])

    def step(carry, _):
        logits, mu = carry
        p = jax.nn.softmax(logits)
        advantages = adv.lagrangian_advantages(task, constraint, mu)
        logits = logits + 0.5 * p * (advantages - p @ advantages)
        mu = adv.ascend_multiplier(mu, 0.3 - p @ constraint, 0.5)
        return (logits, mu), p[1]

    _, share = jax.lax.scan(step, (jnp.zeros(2), jnp.float32(0.0)), length=20_000)
    assert abs(float(jnp.mean(share[10_000:])) - 0.3) < 0.01
