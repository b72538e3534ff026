"""Estimates of the KL and importance ratios: against verl, and against sums over all tokens."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.rollouts import (
    SEEDS,
    VERL,
    arrays,
    assert_both,
    random_tokens,
)
from trainjax.losses import divergence

ESTIMATORS = {"k1": divergence.k1, "k2": divergence.k2, "k3": divergence.k3, "k3+": divergence.kl}


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


def categoricals():
    """The logits of two over five outcomes."""
    return np.random.default_rng(0).standard_normal((2, 5))


@functools.cache
def exactly():
    """The KL of the two, and the gradients by the first's logits of the KL in either direction."""

    @jax.jit
    def divergences(logits, reference):
        logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        return jnp.sum(jnp.exp(logp) * (logp - logq)), jnp.sum(jnp.exp(logq) * (logq - logp))

    reverse, forward = helpers.in_float64(jax.jit(jax.jacobian(divergences)), *categoricals())
    return helpers.in_float64(divergences, *categoricals())[0], reverse, forward


def expected_value_and_gradient(estimator):
    """Of an estimator, exactly: the sum over a categorical of five outcomes, by the logits."""

    def expectation(logits, reference):
        logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        p = jax.lax.stop_gradient(jnp.exp(logp))  # samples are drawn, then differentiated
        return jnp.sum(p * estimator(logp, logq))

    ours = helpers.in_float64(jax.jit(jax.value_and_grad(expectation)), *categoricals())
    return ours, *exactly()


def test_k1_has_the_value_of_the_kl_and_no_gradient():
    (value, gradient), kl, _, _ = expected_value_and_gradient(divergence.k1)
    np.testing.assert_allclose(value, kl, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


def test_k2_has_the_gradient_of_the_kl_and_another_value():
    (value, gradient), kl, reverse, _ = expected_value_and_gradient(divergence.k2)
    np.testing.assert_allclose(gradient, reverse, rtol=1e-10)
    assert abs(value - kl) > 0.01


def test_k3_has_the_value_of_the_kl_and_the_gradient_of_the_other_one():
    (value, gradient), kl, reverse, forward = expected_value_and_gradient(divergence.k3)
    np.testing.assert_allclose(value, kl, rtol=1e-12)
    np.testing.assert_allclose(gradient, forward, rtol=1e-10)
    assert np.abs(gradient - reverse).max() > 0.01


def test_kl_has_both_the_value_and_the_gradient():
    (value, gradient), kl, reverse, _ = expected_value_and_gradient(divergence.kl)
    np.testing.assert_allclose(value, kl, rtol=1e-12)
    np.testing.assert_allclose(gradient, reverse, rtol=1e-10)


def test_value_and_gradient_of_the_kl_are_chosen_apart():
    chosen = functools.partial(divergence.kl, value=divergence.k1, gradient=divergence.k3)
    x, reference = jnp.asarray([-1.0, -2.0]), jnp.asarray([-3.0, -1.0])
    slope = lambda f: jax.grad(lambda x: jnp.sum(f(x, reference)))(x)  # noqa: E731
    np.testing.assert_array_equal(chosen(x, reference), divergence.k1(x, reference))
    np.testing.assert_array_equal(slope(chosen), slope(divergence.k3))


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


def test_token_and_sequence_ratios_are_their_formulas_on_random_tokens():
    for seed in SEEDS:
        data = random_tokens(seed)
        gap, mask = data["logprobs"] - data["old_logprobs"], data["mask"]
        args = data["logprobs"], data["old_logprobs"]
        assert_both(divergence.token_ratio, args, np.exp(gap))
        mean = np.array([g[m].mean() if m.any() else 0.0 for g, m in zip(gap, mask, strict=True)])
        expected = np.broadcast_to(np.exp(mean)[:, None], gap.shape)
        assert_both(divergence.sequence_ratio, [*args, mask], expected)


def test_sequence_ratio_tells_packed_sequences_apart():
    data = random_tokens(5, batch=4)
    given = [np.float32(data[k]) for k in ("logprobs", "old_logprobs")] + [data["mask"]]
    ratio = jax.jit(divergence.sequence_ratio)
    apart = np.asarray(ratio(*given))
    pack = lambda x: np.concatenate(np.split(x, 2), axis=1)  # noqa: E731
    segments = np.asarray([[1] * 8 + [2] * 8] * 2, np.int32)
    ours = ratio(*map(pack, given), segments)
    np.testing.assert_allclose(ours, pack(apart), rtol=1e-6)


def test_importance_of_the_sampler_is_cut_and_has_no_gradient():
    trainer, sampler = jnp.log(jnp.asarray([[0.5, 0.9]])), jnp.log(jnp.asarray([[0.4, 0.1]]))
    np.testing.assert_allclose(
        divergence.truncated_importance(trainer, sampler, 2.0), [[1.25, 2.0]], rtol=1e-6
    )
    assert not np.any(
        jax.grad(lambda x: jnp.sum(divergence.truncated_importance(x, sampler)))(trainer)
    )
