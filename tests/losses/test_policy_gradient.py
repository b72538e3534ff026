"""Policy gradients: each formula against numpy, TRL's trainers, verl's functions, and what it promises."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.losses import policy_gradient as pg
from trainjax.losses.reward import weighted_objectives
from trainjax.ops.vocab import TokenStats
from trainjax.policies import policy
from trainjax.types import Loss, pytree

TRL = json.loads((helpers.GOLDEN / "policy_gradient_trl.json").read_text())
VERL = json.loads((helpers.GOLDEN / "policy_gradient_verl.json").read_text())
SEEDS = range(200)


def arrays(data: dict[str, Any], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, dtype) for name, value in data.items()}


def random_tokens(seed: int, batch: int = 3, seq: int = 8) -> dict[str, np.ndarray]:
    """Numbers of a rollout in float64, and a mask with gaps; the first row has no action at all."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, seq)) < 0.6
    mask[0], mask[1, 2] = False, True
    old = -rng.gamma(2.0, 0.8, (batch, seq))
    names = ("rewards", "values", "advantages", "returns")
    return {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": old + 0.5 * rng.standard_normal((batch, seq)),
        "terminal_values": rng.standard_normal(batch),
        **{name: rng.standard_normal((batch, seq)) for name in names},
    }


def in_both_precisions(f: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """`f` jitted in float32 and in float64."""
    jitted = jax.jit(f)
    narrow = [np.float32(a) if np.asarray(a).dtype == np.float64 else a for a in args]
    return jax.device_get(jitted(*narrow)), helpers.in_float64(jitted, *args)


def assert_both(f: Callable[..., Any], args: Any, expected: Any) -> None:
    """`f` is the expected array to 1e-5 in float32 and to 1e-6 (in fact far closer) in float64."""
    single, double = in_both_precisions(f, *args)
    np.testing.assert_allclose(double, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


def assert_gradient(f: Callable[[Any], Any], x: np.ndarray, step: float = 1e-6) -> None:
    """The gradient of a scalar function is that of central differences, in float64."""
    gradient = helpers.in_float64(jax.jit(jax.grad(f)), x)
    value = functools.partial(helpers.in_float64, jax.jit(f))
    numeric = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[at] = step
        numeric[at] = (value(x + moved) - value(x - moved)) / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)


# --- rewards ----------------------------------------------------------------------------------------


def test_overlong_punishment_is_that_of_trl():
    lengths = jnp.asarray(TRL["overlong"]["lengths"])
    ours = pg.soft_overlong_punishment(lengths, max_length=100, cache=20)
    np.testing.assert_allclose(ours, TRL["overlong"]["rewards"], rtol=1e-6)


@pytest.mark.parametrize("cache", [0, 101])
def test_overlong_punishment_names_a_cache_that_makes_no_sense(cache):
    with pytest.raises(ValueError, match=f"cache={cache} is not within"):
        pg.soft_overlong_punishment(jnp.asarray([1]), max_length=100, cache=cache)


def test_prompts_whose_samples_all_got_one_reward_are_masked():
    rewards = jnp.asarray([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert pg.dynamic_sampling_mask(rewards).tolist() == [False, True, False]


def test_the_score_is_on_the_last_action_and_the_penalty_on_every_one():
    mask = jnp.asarray([[False, True, True, False, True, False], [False] * 6])
    penalties = jnp.asarray([[9.0, 1.0, 2.0, 9.0, 3.0, jnp.nan]] * 2)
    rewards = pg.token_rewards(jnp.asarray([10.0, 5.0]), penalties, mask)
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
    advantages, returns = pg.gae(zeros.at[0, 5].set(1.0), zeros, zeros == 0, gamma, lam)
    np.testing.assert_allclose(advantages[0], (gamma * lam) ** np.arange(5, -1, -1), rtol=1e-6)
    np.testing.assert_array_equal(advantages, returns)


def test_gae_is_the_sum_over_actions_on_random_batches():
    def ours(rewards, values, mask, end):
        return pg.gae(rewards, values, mask, 0.97, 0.9, end)

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
    plain, _ = pg.gae(*map(jnp.asarray, (rewards, values)), jnp.ones((1, 5), bool), 0.9, 0.8)
    actions = np.array([1, 2, 5, 6, 9])
    wide = np.full((2, 1, 11), np.nan, np.float32)
    wide[0, :, actions], wide[1, :, actions] = rewards.T, values.T
    mask = np.isin(np.arange(11), actions)[None]
    advantages, returns = pg.gae(*map(jnp.asarray, (*wide, mask)), 0.9, 0.8)
    np.testing.assert_allclose(advantages[:, actions], plain, rtol=1e-6)
    assert np.all(np.isfinite(returns))
    assert not np.any(advantages[~mask])


def test_lambda_one_is_the_return_less_the_value_and_zero_one_step_ahead():
    data = {k: jnp.asarray(v) for k, v in random_tokens(3).items() if v.dtype == bool}
    data |= {k: jnp.float32(v) for k, v in random_tokens(3).items() if v.dtype != bool}
    rewards, values, mask, end = (data[k] for k in ("rewards", "values", "mask", "terminal_values"))
    monte_carlo, targets = pg.gae(rewards, values, mask, 0.9, 1.0, end)
    returns = pg.discounted_returns(rewards, mask, 0.9, end)
    np.testing.assert_allclose(monte_carlo, jnp.where(mask, returns - values, 0.0), atol=1e-6)
    np.testing.assert_allclose(targets, returns, atol=1e-6)
    one_step, _ = pg.gae(rewards, values, jnp.ones_like(mask), 0.9, 0.0, end)
    following = jnp.concatenate([values[:, 1:], end[:, None]], axis=1)
    np.testing.assert_allclose(one_step, rewards + 0.9 * following - values, atol=1e-6)


@pytest.mark.parametrize("case", VERL["rollouts"])
def test_gae_whitened_and_its_targets_are_those_of_verl(case):
    data, mask = arrays(case["data"]), np.asarray(case["data"]["mask"], bool)

    def ours(rewards, values, mask):
        advantages, returns = pg.gae(rewards, values, mask, VERL["gamma"], VERL["lam"])
        return jnp.stack([pg.whiten(advantages, mask), returns])

    expected = np.stack([case["gae_whitened"], case["gae_returns"]])
    single, double = in_both_precisions(ours, data["rewards"], data["old_values"], mask)
    np.testing.assert_allclose(double, expected, rtol=1e-6, atol=1e-7)  # verl counts tokens + 1e-8
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", VERL["rollouts"])
def test_reinforce_plus_plus_is_that_of_verl_without_tools(case):
    rewards, mask = arrays(case["data"])["rewards"], np.asarray(case["no_tools"], bool)
    ours = functools.partial(pg.reinforce_plus_plus_advantages, gamma=VERL["gamma"])
    single, double = in_both_precisions(ours, rewards, mask)
    np.testing.assert_allclose(double, case["reinforce_plus_plus"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(single, case["reinforce_plus_plus"], rtol=1e-5, atol=1e-5)


def test_whitened_numbers_have_mean_zero_and_variance_one_on_the_mask():
    """The mean really is removed; what is outside the mask is not read, and comes out as zero."""
    values = np.float32(5.0 + 3.0 * np.random.default_rng(0).standard_normal((3, 50)))
    mask = np.random.default_rng(1).random((3, 50)) < 0.5
    values[~mask] = np.nan
    out = np.asarray(pg.whiten(*map(jnp.asarray, (values, mask))), np.float64)
    assert abs(out[mask].mean()) < 1e-6
    assert abs(out[mask].var(ddof=1) - 1.0) < 1e-5
    assert not np.any(out[~mask])
    centered = pg.center(*map(jnp.asarray, (values, mask)))
    np.testing.assert_allclose(centered[mask], values[mask] - values[mask].mean(), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_whitening_of_few_or_equal_numbers_is_zero(count):
    mask = jnp.arange(5)[None] < count
    assert not np.any(pg.whiten(jnp.full((1, 5), 7.0), mask))


# --- advantages within a group ----------------------------------------------------------------------

GROUPS: dict[str, Callable[..., Any]] = {
    "grpo": lambda r, w: pg.grpo_advantages(r[..., 0]),
    "dr_grpo": lambda r, w: pg.dr_grpo_advantages(r[..., 0]),
    "weighted": lambda r, w: pg.grpo_advantages(weighted_objectives(r, w)),
    "gdpo": pg.gdpo_advantages,
    "rloo": lambda r, w: pg.rloo_advantages(r[..., 0]),
}


@pytest.mark.parametrize("name", TRL["advantages"])
def test_group_advantages_are_those_of_trl(name):
    rewards, weights = np.asarray(TRL["rewards"]), np.asarray(TRL["reward_weights"])
    for ours in in_both_precisions(GROUPS[name], rewards, weights):  # TRL's are in float32
        np.testing.assert_allclose(ours, TRL["advantages"][name], rtol=1e-5, atol=1e-5)


def test_group_advantages_are_their_formulas_on_random_rewards():
    def ours(r):
        return jnp.stack([pg.grpo_advantages(r), pg.dr_grpo_advantages(r), pg.rloo_advantages(r)])

    for seed in SEEDS:
        r = np.random.default_rng(seed).standard_normal((3, 5))
        others = np.stack([np.delete(r, i, axis=1).mean(axis=1) for i in range(5)], axis=1)
        centered = r - r.mean(axis=1, keepdims=True)
        scaled = centered / (r.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        assert_both(ours, [r], np.stack([scaled, centered, r - others]))


def test_remax_subtracts_the_reward_of_the_greedy_completion():
    rewards = jnp.asarray([[1.0, 0.0], [0.5, 2.0]])
    ours = pg.remax_advantages(rewards, jnp.asarray([1.0, 0.5]))
    assert ours.tolist() == [[0.0, -1.0], [0.0, 1.5]]


@pytest.mark.parametrize(
    "advantages", [pg.grpo_advantages, pg.dr_grpo_advantages, pg.rloo_advantages]
)
def test_a_group_of_one_is_an_error(advantages):
    with pytest.raises(ValueError, match="a group of 1 has no baseline"):
        advantages(jnp.ones((3, 1)))


# --- constraints ------------------------------------------------------------------------------------


def test_lagrangian_advantages_weigh_task_and_constraint():
    task, constraint = jnp.asarray([1.0, 2.0]), jnp.asarray([-3.0, 5.0])
    share = 1 / (1 + np.exp(-0.7))
    expected = (1 - share) * np.array([1.0, 2.0]) + share * np.array([-3.0, 5.0])
    np.testing.assert_allclose(pg.lagrangian_advantages(task, constraint, 0.7), expected, rtol=1e-6)
    middle = pg.lagrangian_advantages(task, constraint, 0.0)
    np.testing.assert_allclose(middle, (task + constraint) / 2, rtol=1e-6)


def test_the_multiplier_descends_on_its_lagrangian():
    """`s(mu) (return - threshold)` is what the original code minimises; ours is one step of that."""
    objective = lambda mu: jax.nn.sigmoid(mu) * (0.3 - 0.8)  # noqa: E731
    expected = 0.4 - 0.1 * jax.grad(objective)(0.4)
    np.testing.assert_allclose(pg.ascend_multiplier(0.4, 0.8 - 0.3, 0.1), expected, rtol=1e-6)


def test_the_multiplier_finds_the_policy_that_just_meets_the_constraint():
    """Two actions, rewards (1, 0) and constraint rewards (0, 1), of which 0.3 are asked for."""
    task, constraint = jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])

    def step(carry, _):
        logits, mu = carry
        p = jax.nn.softmax(logits)
        advantages = pg.lagrangian_advantages(task, constraint, mu)
        logits = logits + 0.5 * p * (advantages - p @ advantages)
        mu = pg.ascend_multiplier(mu, 0.3 - p @ constraint, 0.5)
        return (logits, mu), p[1]

    _, share = jax.lax.scan(step, (jnp.zeros(2), jnp.float32(0.0)), length=20_000)
    assert abs(float(jnp.mean(share[10_000:])) - 0.3) < 0.01


# --- weights ----------------------------------------------------------------------------------------

AVERAGES: dict[str, Callable[..., Any]] = {
    "token-mean": pg.token_mean,
    "seq-mean-token-sum": pg.sequence_mean_token_sum,
    "seq-mean-token-mean": pg.sequence_mean_token_mean,
    "seq-mean-token-sum-norm": functools.partial(pg.constant_length, length=VERL["length"]),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_weights_make_the_averages_of_verl(name):
    """A sequence without any action, as there is one, is not counted."""
    for case in VERL["rollouts"]:
        data, mask = arrays(case["data"], np.float32), np.asarray(case["data"]["mask"], bool)
        loss = np.sum(AVERAGES[name](jnp.asarray(mask)) * data["advantages"])
        np.testing.assert_allclose(loss, case["averages"][name], rtol=1e-5)


@pytest.mark.parametrize("name", AVERAGES)
def test_weights_of_parts_given_the_totals_are_those_of_the_whole(name):
    mask = jnp.asarray(random_tokens(0, batch=6)["mask"])
    total = np.sum(mask) if name == "token-mean" else np.sum(np.any(mask, axis=1))
    parts = [AVERAGES[name](mask[i : i + 2], **{TOTALS[name]: total}) for i in (0, 2, 4)]
    np.testing.assert_allclose(jnp.concatenate(parts), AVERAGES[name](mask), rtol=1e-6)


TOTALS = dict.fromkeys(AVERAGES, "num_sequences") | {"token-mean": "num_tokens"}


@pytest.mark.parametrize("name", AVERAGES)
def test_weights_of_a_batch_without_actions_are_zero(name):
    assert not np.any(AVERAGES[name](jnp.zeros((2, 3), bool)))


@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "token-mean"])
def test_weights_are_those_of_sequences_also_in_packed_rows(name):
    apart = jnp.asarray([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0]], bool)
    packed = jnp.concatenate([apart[:2], apart[2:]], axis=1)
    segments = jnp.asarray([[1] * 4 + [2] * 4] * 2)
    ours = AVERAGES[name](packed, segments=segments)
    np.testing.assert_allclose(
        ours, jnp.concatenate(jnp.split(AVERAGES[name](apart), 2), axis=1), rtol=1e-6
    )


# --- KL divergence ----------------------------------------------------------------------------------

ESTIMATORS = {"k1": pg.k1, "k2": pg.k2, "k3": pg.k3, "k3+": pg.kl}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_estimates_and_their_gradients_are_those_of_verl(name):
    """`k3+` is k3 with the gradient of k2."""
    for case in VERL["rollouts"]:
        data = arrays(case["data"])

        def ours(x, reference):
            value, pull = jax.vjp(lambda x: ESTIMATORS[name](x, reference), x)
            return jnp.stack([value, *pull(jnp.ones_like(value))])

        expected = np.stack([case["kl"][name]["value"], case["kl"][name]["gradient"]])
        assert_both(ours, [data["logprobs"], data["reference_logprobs"]], expected)


def expected_value_and_gradient(estimator):
    """Of an estimator, exactly: the sum over a categorical of five outcomes, by the logits."""
    rng = np.random.default_rng(0)
    logits, reference = rng.standard_normal((2, 5))

    def expectation(logits, reference):
        logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        p = jax.lax.stop_gradient(jnp.exp(logp))  # samples are drawn, then differentiated
        return jnp.sum(p * estimator(logp, logq))

    def divergences(logits, reference):
        logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        return jnp.sum(jnp.exp(logp) * (logp - logq)), jnp.sum(jnp.exp(logq) * (logq - logp))

    ours = helpers.in_float64(jax.value_and_grad(expectation), logits, reference)
    reverse, forward = helpers.in_float64(jax.jacobian(divergences), logits, reference)
    return ours, helpers.in_float64(divergences, logits, reference)[0], reverse, forward


def test_k1_has_the_value_of_the_kl_and_no_gradient():
    (value, gradient), kl, _, _ = expected_value_and_gradient(pg.k1)
    np.testing.assert_allclose(value, kl, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


def test_k2_has_the_gradient_of_the_kl_and_another_value():
    (value, gradient), kl, reverse, _ = expected_value_and_gradient(pg.k2)
    np.testing.assert_allclose(gradient, reverse, rtol=1e-10)
    assert abs(value - kl) > 0.01


def test_k3_has_the_value_of_the_kl_and_the_gradient_of_the_other_one():
    (value, gradient), kl, reverse, forward = expected_value_and_gradient(pg.k3)
    np.testing.assert_allclose(value, kl, rtol=1e-12)
    np.testing.assert_allclose(gradient, forward, rtol=1e-10)
    assert np.abs(gradient - reverse).max() > 0.01


def test_kl_has_both_the_value_and_the_gradient():
    (value, gradient), kl, reverse, _ = expected_value_and_gradient(pg.kl)
    np.testing.assert_allclose(value, kl, rtol=1e-12)
    np.testing.assert_allclose(gradient, reverse, rtol=1e-10)


def test_value_and_gradient_of_the_kl_are_chosen_apart():
    chosen = functools.partial(pg.kl, value=pg.k1, gradient=pg.k3)
    x, reference = jnp.asarray([-1.0, -2.0]), jnp.asarray([-3.0, -1.0])
    slope = lambda f: jax.grad(lambda x: jnp.sum(f(x, reference)))(x)  # noqa: E731
    np.testing.assert_array_equal(chosen(x, reference), pg.k1(x, reference))
    np.testing.assert_array_equal(slope(chosen), slope(pg.k3))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_estimates_of_extreme_tokens_are_finite_and_lead_to_the_reference(name):
    step = jax.jit(jax.value_and_grad(ESTIMATORS[name]))
    numbers = np.float32([-1e4, -60.0, -1e-4, 0.0])
    for logprob, reference in itertools.product(numbers, numbers):
        value, slope = step(logprob, reference)
        assert np.isfinite(value)
        assert np.isfinite(slope)
        if name != "k1":
            assert value >= 0
            assert np.sign(slope) == np.sign(logprob - reference)


# --- ratios and surrogates --------------------------------------------------------------------------


def surrogate_of_the_papers(ratio, advantages, low, high, dual):
    """`min` over products for PPO, `max` with `c A` for what is negative: as Ye et al. write it."""
    inner = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    return -np.where(advantages < 0, np.maximum(inner, dual * advantages), inner)


@pytest.mark.parametrize("dual", [1.4, 1e30])
def test_clipped_surrogate_is_its_formula_on_random_tokens(dual):
    ours = functools.partial(
        pg.clipped_surrogate, epsilon_low=0.2, epsilon_high=0.28, dual_clip=dual
    )
    for seed in SEEDS:
        data = random_tokens(seed)
        ratio, advantages = np.exp(data["logprobs"] - data["old_logprobs"]), data["advantages"]
        expected = surrogate_of_the_papers(ratio, advantages, 0.2, 0.28, dual)
        assert_both(ours, [ratio, advantages], expected)


def test_token_and_sequence_ratios_are_their_formulas_on_random_tokens():
    for seed in SEEDS:
        data = random_tokens(seed)
        gap, mask = data["logprobs"] - data["old_logprobs"], data["mask"]
        args = data["logprobs"], data["old_logprobs"]
        assert_both(pg.token_ratio, args, np.exp(gap))
        mean = np.array([g[m].mean() if m.any() else 0.0 for g, m in zip(gap, mask, strict=True)])
        expected = np.broadcast_to(np.exp(mean)[:, None], gap.shape)
        assert_both(pg.sequence_ratio, [*args, mask], expected)


def test_sequence_ratio_tells_packed_sequences_apart():
    data = random_tokens(5, batch=4)
    apart = pg.sequence_ratio(
        *(jnp.float32(data[k]) for k in ("logprobs", "old_logprobs")), jnp.asarray(data["mask"])
    )
    pack = lambda x: jnp.concatenate(jnp.split(x, 2), axis=1)  # noqa: E731
    new, old = (pack(jnp.float32(data[k])) for k in ("logprobs", "old_logprobs"))
    segments = jnp.asarray([[1] * 8 + [2] * 8] * 2)
    ours = pg.sequence_ratio(new, old, pack(jnp.asarray(data["mask"])), segments)
    np.testing.assert_allclose(ours, pack(apart), rtol=1e-6)


def test_importance_of_the_sampler_is_cut_and_has_no_gradient():
    trainer, sampler = jnp.log(jnp.asarray([[0.5, 0.9]])), jnp.log(jnp.asarray([[0.4, 0.1]]))
    np.testing.assert_allclose(
        pg.truncated_importance(trainer, sampler, 2.0), [[1.25, 2.0]], rtol=1e-6
    )
    assert not np.any(jax.grad(lambda x: jnp.sum(pg.truncated_importance(x, sampler)))(trainer))


@pytest.mark.parametrize("case", VERL["rollouts"])
def test_value_loss_and_gradient_are_those_of_verl(case):
    data, mask = arrays(case["data"]), np.asarray(case["data"]["mask"], bool)
    returns = np.asarray(case["gae_returns"])

    def ours(values, old_values, returns, mask):
        return pg.clipped_value_loss(values, old_values, returns, pg.token_mean(mask), 0.2)

    args = data["values"], data["old_values"], returns, mask
    value, gradient = helpers.in_float64(jax.jit(jax.value_and_grad(ours)), *args)
    np.testing.assert_allclose(value, case["value_loss"]["value"], rtol=1e-6)
    np.testing.assert_allclose(gradient, case["value_loss"]["gradient"], rtol=1e-6, atol=1e-9)
    assert_gradient(lambda v: ours(v, *map(jnp.asarray, args[1:])), data["values"])


# --- losses -----------------------------------------------------------------------------------------


@pytree
class Given:
    """A policy whose params are the numbers that it reports."""

    def __call__(self, params, batch, key, where, extras=None):
        logprobs = params["logprobs"]
        return TokenStats(logprobs, logprobs, logprobs, params.get("entropy"))


def batch_of(data, weights, **optional):
    """A batch with the numbers of a golden; advantages of sequences at each of their tokens."""
    advantages = data["advantages"]
    if advantages.ndim == 1:
        advantages = np.broadcast_to(advantages[:, None], weights.shape)
    named = {k: data[k] for k, wanted in optional.items() if wanted}
    return {
        "weights": weights,
        "old_logprobs": data["old_logprobs"],
        "advantages": advantages,
    } | named


def trl_loss(settings) -> Loss:
    shared = {"beta": settings["beta"], "entropy_coef": settings["entropy_coef"]}
    if settings["clip_max"] is not None:
        shared["max_sampler_ratio"] = settings["clip_max"]
    if settings["loss_type"] == "cispo":
        return pg.cispo(Given(), max_ratio=settings["epsilon_high"], **shared)
    make = pg.gspo if settings["level"] == "sequence" else pg.grpo
    dual = {} if settings["delta"] is None else {"dual_clip": settings["delta"]}
    clip = {k: settings[k] for k in ("epsilon_low", "epsilon_high")}
    return make(Given(), **clip, **dual, **shared)


def trl_weights(settings, mask) -> np.ndarray:
    make = {
        "grpo": pg.sequence_mean_token_mean,
        "dr_grpo": functools.partial(pg.constant_length, length=TRL["length"]),
    }.get(settings["loss_type"], pg.token_mean)
    return np.asarray(make(jnp.asarray(mask)))


def value_and_gradient(loss: Loss, params, batch):
    """Loss, metrics, and gradients in float64; coefficients stay the float32 numbers that they are."""
    f = jax.jit(lambda params, batch: jax.value_and_grad(loss, has_aux=True)(params, batch))
    return helpers.in_float64(f, params, batch)


@pytest.mark.parametrize("name", TRL["losses"])
def test_losses_and_gradients_are_those_of_trl(name):
    case = TRL["losses"][name]
    settings, data = case["settings"], arrays(case["data"])
    mask = data["completion_mask"] * (data["tool_mask"] if settings["with_tools"] else 1.0) != 0
    optional = {
        "reference_logprobs": settings["beta"] != 0,
        "sampler_logprobs": settings["clip_max"] is not None,
    }
    batch = batch_of(data, trl_weights(settings, mask), **optional)
    params = {k: data[k] for k in ("logprobs", "entropy")}
    (loss, metrics), gradients = value_and_gradient(trl_loss(settings), params, batch)
    # What differs is that weights and coefficients are float32 numbers.
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradients["logprobs"], case["gradient"], rtol=1e-6, atol=1e-8)
    if settings["entropy_coef"]:
        np.testing.assert_allclose(gradients["entropy"], case["entropy_gradient"], rtol=1e-6)
    is_mean_of_tokens = settings["loss_type"] in ("dapo", "bnpo") or settings["level"] == "sequence"
    for ours, theirs in {"kl": "kl", "clip_fraction": "clip_ratio/region_mean"}.items():
        if is_mean_of_tokens and theirs in case["metrics"]:
            np.testing.assert_allclose(metrics[ours], case["metrics"][theirs], rtol=1e-6)


VERL_LOSSES: dict[str, tuple[Loss, Callable[..., Any]]] = {
    "ppo": (pg.ppo(Given(), epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.5), pg.token_mean),
    "gspo": (pg.gspo(Given(), epsilon_low=0.1, epsilon_high=0.3), pg.sequence_mean_token_mean),
    "cispo": (pg.cispo(Given(), max_ratio=1.3), pg.token_mean),
}


@pytest.mark.parametrize("case", VERL["rollouts"])
@pytest.mark.parametrize("name", VERL_LOSSES)
def test_losses_gradients_and_clip_fractions_are_those_of_verl(name, case):
    data, mask = arrays(case["data"]), np.asarray(case["data"]["mask"], bool)
    if name == "gspo":
        data["advantages"] = data["advantages"][:, 0]
    loss, weigh = VERL_LOSSES[name]
    batch = batch_of(data, np.asarray(weigh(jnp.asarray(mask))))
    (value, metrics), gradients = value_and_gradient(loss, {"logprobs": data["logprobs"]}, batch)
    np.testing.assert_allclose(value, case[name]["value"], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(gradients["logprobs"], case[name]["gradient"], rtol=1e-6, atol=1e-8)
    if name != "gspo":  # whose fraction verl takes over tokens
        theirs = case[name]["metrics"]
        clipped = theirs["actor/pg_clipfrac"] + theirs["actor/pg_clipfrac_lower"]
        np.testing.assert_allclose(metrics["clip_fraction"], clipped, rtol=1e-6)


MAKERS = {
    "ppo": functools.partial(pg.ppo, dual_clip=3.0),
    "grpo": pg.grpo,
    "gspo": functools.partial(pg.gspo, epsilon_low=0.1, epsilon_high=0.1),
    "cispo": pg.cispo,
    "reinforce": pg.reinforce,
}
"""Bounds that some tokens reach and others do not."""


@pytree
class Bigram:
    """A policy whose params are a table: the logits of the next token, by the token before."""

    def __call__(self, params, batch, key=None, where=None, extras=None):
        logp = jax.nn.log_softmax(params["table"])[jnp.roll(batch["tokens"], 1, axis=1)]
        chosen = jnp.take_along_axis(logp, batch["tokens"][..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return TokenStats(chosen, jnp.zeros_like(chosen), jnp.zeros_like(chosen), entropy)


TABLE = {"table": np.float32(np.random.default_rng(2).standard_normal((61, 61)))}


def random_rollout(seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens, and numbers that a rollout of `TABLE` a few steps ago could have left."""
    data = helpers.random_batch(seed=seed)
    rng = np.random.default_rng([seed, 1])
    noise = lambda scale: scale * rng.standard_normal(data["tokens"].shape)  # noqa: E731
    old = np.asarray(jax.jit(Bigram())(TABLE, data).logprobs) + noise(0.2)
    arrays = {
        "old_logprobs": old,
        "advantages": noise(1.0),
        "reference_logprobs": old + noise(0.3),
        "sampler_logprobs": old + noise(0.1),
    }
    return data | {name: value.astype(np.float32) for name, value in arrays.items()}


def step_of(loss: Loss) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches_add_up_to_the_batch(name):
    """Loss, metrics and gradients: each is a sum over tokens with the weights of the whole batch."""
    batch = random_rollout()
    step = step_of(MAKERS[name](Bigram(), beta=0.1, entropy_coef=0.1))
    parts = [step(TABLE, {k: v[i::4] for k, v in batch.items()}) for i in range(4)]
    summed = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
    whole = step(TABLE, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), summed, whole)
    np.testing.assert_allclose(whole[0][1]["total_weight"], 1.0, rtol=1e-6)


def test_a_model_learns_the_same_from_micro_batches():
    model, batch = helpers.tiny(), random_rollout()
    loss = pg.grpo(policy(model), beta=0.1, entropy_coef=0.1)
    whole, gradients = helpers.loss_and_gradients(loss, model.params, batch)
    parts, summed = helpers.loss_and_gradients(loss, model.params, batch, accumulate=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    helpers.assert_close(summed, gradients, 1e-5)
    assert any(np.any(gradient) for gradient in gradients.values())


@pytest.mark.parametrize("name", MAKERS)
def test_packed_sequences_have_the_loss_that_they_have_apart(name):
    """The ratio of GSPO among them, which is a mean over a sequence."""
    rng = np.random.default_rng(0)
    examples = [rng.integers(0, 61, n, np.int32) for n in (5, 7, 6, 6)]
    step = jax.jit(MAKERS[name](Bigram()))
    losses = []
    for rows, seq in ((((0,), (1,), (2,), (3,)), 8), (((0, 1), (2, 3)), 12)):
        batch = {k: np.asarray(v) for k, v in helpers.packed(examples, rows, seq).items()}
        seeds = batch["tokens"] + 100 * batch["positions"]  # a token's own, wherever it is
        batch["old_logprobs"] = np.float32(-5.0 + np.sin(seeds))
        batch["advantages"] = np.float32(np.cos(3.0 * seeds))
        batch["weights"] = np.float32(batch["weights"])
        losses.append(step(TABLE, batch)[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "cispo"])
def test_gradients_are_those_of_finite_differences(name):
    """CISPO's is the derivative of no function: its weights are constants that depend on the policy.

    So are the weights of a sampler in REINFORCE, which are those of the policy as it is.
    """
    data = arrays(TRL["losses"]["grpo_kl"]["data"])
    weights = np.asarray(pg.sequence_mean_token_mean(jnp.asarray(data["completion_mask"] != 0)))
    batch = batch_of(data, weights, reference_logprobs=True, sampler_logprobs=name != "reinforce")
    loss = MAKERS[name](Given(), beta=0.3, estimator=pg.k3, entropy_coef=0.1)

    def value(x):
        params = {"logprobs": x[0], "entropy": x[1]}
        return loss(params, jax.tree.map(jnp.asarray, batch))[0]

    assert_gradient(value, np.stack([data["logprobs"], data["entropy"]]))


@pytest.mark.parametrize("name", ["ppo", "grpo", "cispo"])
def test_on_fresh_samples_every_gradient_is_that_of_reinforce(name):
    """And the ratio is 1, nothing is clipped, and the policy has not moved."""
    batch = random_rollout()
    batch["old_logprobs"] = np.asarray(jax.jit(Bigram())(TABLE, batch).logprobs)
    _, expected = step_of(pg.reinforce(Bigram()))(TABLE, batch)
    (_, metrics), gradients = step_of(MAKERS[name](Bigram()))(TABLE, batch)
    helpers.assert_close(gradients, expected, 1e-6)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["approx_kl"], 0.0, atol=1e-7)
    assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_of_tokens_that_are_no_actions_are_not_read(name):
    data = arrays(TRL["losses"]["tools"]["data"], np.float32)
    mask = data["completion_mask"] * data["tool_mask"] != 0
    weights = np.asarray(pg.sequence_mean_token_mean(jnp.asarray(mask)))
    batch = batch_of(data, weights, reference_logprobs=True, sampler_logprobs=True)
    loss = MAKERS[name](Given(), beta=0.1, entropy_coef=0.1)
    f = step_of(loss)
    params = {k: data[k] for k in ("logprobs", "entropy")}
    garbage = {k: np.where(mask, v, np.nan) for k, v in batch.items() if k != "weights"}
    expected = f(params, batch)
    actual = f({k: np.where(mask, v, np.nan) for k, v in params.items()}, batch | garbage)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_extreme_tokens_have_finite_losses_and_gradients(name):
    step = step_of(MAKERS[name](Given(), beta=0.1))
    full = functools.partial(np.full, (1, 2), dtype=np.float32)
    for new, old, advantage in itertools.product((-1e4, -1e-30), (-1e4, -1e-30), (-1e4, 0.0, 1e4)):
        batch = {"weights": full(0.5), "old_logprobs": full(old), "advantages": full(advantage)}
        batch |= {"reference_logprobs": full(old), "sampler_logprobs": full(new)}
        out = step({"logprobs": full(new)}, batch)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out)), (new, old, advantage)


def test_another_coefficient_runs_the_same_program():
    traces = []

    @jax.jit
    def f(loss, params, batch):
        traces.append(1)
        return loss(params, batch)[0]

    data = arrays(TRL["losses"]["grpo"]["data"], np.float32)
    batch = batch_of(data, np.float32(data["completion_mask"]), reference_logprobs=True)
    params = {"logprobs": data["logprobs"]}
    values = [
        float(f(pg.ppo(Given(), epsilon_low=e, epsilon_high=e, dual_clip=d, beta=b), params, batch))
        for e, d, b in ((0.1, 3, 0.1), (0.2, 1.1, 0.1), (0.2, 1.1, 1))
    ]
    assert len(set(values)) == 3
    assert len(traces) == 1


def test_without_a_bonus_the_policy_is_not_asked_for_its_entropy():
    data = arrays(TRL["losses"]["grpo"]["data"], np.float32)
    batch = batch_of(data, np.asarray(pg.token_mean(jnp.asarray(data["completion_mask"] != 0))))
    loss = pg.ppo(lambda params, batch, key, where: params)
    logprobs = jnp.asarray(data["logprobs"])
    _, metrics = loss(TokenStats(logprobs, logprobs, logprobs), jax.tree.map(jnp.asarray, batch))
    expected = -np.sum(batch["weights"] * data["logprobs"])
    np.testing.assert_allclose(metrics["entropy"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        (pg.ppo(Given()), "old_logprobs"),
        (pg.reinforce(Given()), "advantages"),
        (pg.grpo(Given(), beta=0.1), "reference_logprobs"),
    ],
)
def test_a_batch_without_a_needed_array_is_an_error_that_names_it(loss, missing):
    ones = jnp.ones((1, 2))
    batch = dict.fromkeys(("weights", "old_logprobs", "advantages", "reference_logprobs"), ones)
    del batch[missing]
    with pytest.raises(ValueError, match=f"the batch has no `{missing}`"):
        loss({"logprobs": ones}, batch)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (pg.ppo, {"epsilon_low": -0.1}),
        (pg.grpo, {"epsilon_low": 1.5}),
        (pg.gspo, {"epsilon_high": -0.1}),
        (pg.ppo, {"dual_clip": 1.0}),
        (pg.grpo, {"beta": -0.1}),
        (pg.ppo, {"beta": float("nan")}),
        (pg.reinforce, {"entropy_coef": -1.0}),
        (pg.cispo, {"max_ratio": 0.0}),
        (pg.cispo, {"max_sampler_ratio": 0.0}),
    ],
)
def test_a_coefficient_out_of_range_is_an_error_that_names_it(make, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make(Given(), **settings)
