"""Policy gradients: each loss against TRL's trainers, verl's functions, numpy, and what it promises."""

from __future__ import annotations

import functools
import itertools
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
    assert_gradient,
    random_tokens,
)
from trainjax.losses import averages, divergence, surrogates
from trainjax.losses import policy as pg
from trainjax.ops.vocab import TokenStats
from trainjax.policies import policy
from trainjax.types import Loss, pytree

# --- ratios and surrogates --------------------------------------------------------------------------


def surrogate_of_the_papers(ratio, advantages, low, high, dual):
    """`min` over products for PPO, `max` with `c A` for what is negative: as Ye et al. write it."""
    inner = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    return -np.where(advantages < 0, np.maximum(inner, dual * advantages), inner)


@pytest.mark.parametrize("dual", [1.4, 1e30])
def test_clipped_surrogate_is_its_formula_on_random_tokens(dual):
    ours = functools.partial(
        surrogates.clipped_surrogate, epsilon_low=0.2, epsilon_high=0.28, dual_clip=dual
    )
    for seed in SEEDS:
        data = random_tokens(seed)
        ratio, advantages = np.exp(data["logprobs"] - data["old_logprobs"]), data["advantages"]
        expected = surrogate_of_the_papers(ratio, advantages, 0.2, 0.28, dual)
        assert_both(ours, [ratio, advantages], expected)


@pytest.mark.parametrize("case", VERL["rollouts"])
def test_value_loss_and_gradient_are_those_of_verl(case):
    data, mask = arrays(case["data"]), np.asarray(case["data"]["mask"], bool)
    returns = np.asarray(case["gae_returns"])

    def ours(values, old_values, returns, mask):
        return surrogates.clipped_value_loss(
            values, old_values, returns, averages.token_mean(mask), 0.2
        )

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
        "grpo": averages.sequence_mean_token_mean,
        "dr_grpo": functools.partial(averages.constant_length, length=TRL["length"]),
    }.get(settings["loss_type"], averages.token_mean)
    return np.asarray(make(jnp.asarray(mask)))


@jax.jit
def run(loss: Loss, params, batch):
    return jax.value_and_grad(loss, has_aux=True)(params, batch)


def value_and_gradient(loss: Loss, params, batch):
    """Loss, metrics, and gradients in float64; of coefficients these are the same float32 numbers."""
    return helpers.in_float64(run, loss, params, batch)


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
    "ppo": (pg.ppo(Given(), epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.5), averages.token_mean),
    "gspo": (
        pg.gspo(Given(), epsilon_low=0.1, epsilon_high=0.3),
        averages.sequence_mean_token_mean,
    ),
    "cispo": (pg.cispo(Given(), max_ratio=1.3), averages.token_mean),
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
    return functools.partial(run, loss)


@functools.cache
def whole_and_parts() -> list[dict[str, Any]]:
    """What every loss makes of a batch and of its four micro-batches, all of them in one program."""
    made = {name: make(Bigram(), beta=0.1, entropy_coef=0.1) for name, make in MAKERS.items()}
    batch = random_rollout()
    parts = [{k: v[i::4] for k, v in batch.items()} for i in range(4)]

    @jax.jit
    def of_all(losses, params, batch):
        return {name: run(loss, params, batch) for name, loss in losses.items()}

    return jax.device_get([of_all(made, TABLE, rows) for rows in (batch, *parts)])


@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches_add_up_to_the_batch(name):
    """Loss, metrics and gradients: each is a sum over tokens with the weights of the whole batch."""
    whole, *parts = (found[name] for found in whole_and_parts())
    summed = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), summed, whole)
    np.testing.assert_allclose(whole[0][1]["total_weight"], 1.0, rtol=1e-6)


def decoder():
    model = helpers.tiny()
    return policy(model), model.params


def a_table():
    return Bigram(), TABLE


@pytest.mark.parametrize("setting", [a_table, pytest.param(decoder, marks=pytest.mark.slow)])
def test_a_model_learns_the_same_from_micro_batches(setting):
    (model, params), batch = setting(), random_rollout()
    loss = pg.grpo(model, beta=0.1, entropy_coef=0.1)
    whole, gradients = helpers.loss_and_gradients(loss, params, batch)
    parts, summed = helpers.loss_and_gradients(loss, params, batch, accumulate=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    helpers.assert_close(summed, gradients, 1e-5)
    assert any(np.any(gradient) for gradient in gradients.values())


@pytest.mark.parametrize("name", MAKERS)
def test_packed_sequences_have_the_loss_that_they_have_apart(name):
    """The ratio of GSPO among them, which is a mean over a sequence."""
    rng = np.random.default_rng(0)
    examples = [rng.integers(0, 61, n, np.int32) for n in (5, 7, 6, 6)]
    loss = MAKERS[name](Bigram())
    step = jax.jit(lambda params, batch: loss(params, batch))
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
    weights = np.asarray(
        averages.sequence_mean_token_mean(jnp.asarray(data["completion_mask"] != 0))
    )
    batch = batch_of(data, weights, reference_logprobs=True, sampler_logprobs=name != "reinforce")
    loss = MAKERS[name](Given(), beta=0.3, estimator=divergence.k3, entropy_coef=0.1)

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
    weights = np.asarray(averages.sequence_mean_token_mean(jnp.asarray(mask)))
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
    batch = batch_of(
        data, np.asarray(averages.token_mean(jnp.asarray(data["completion_mask"] != 0)))
    )
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
