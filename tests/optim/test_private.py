import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import bigram, helpers
from trainjax import losses, optim, train, tree
from trainjax.policies import policy

# Epsilons of Google's dp-accounting 0.6.0 (Python 3.11), an independent implementation:
#   event = PoissonSampledDpEvent(share, GaussianDpEvent(noise)), or without sampling where share is 1
#   accountant = rdp.RdpAccountant(range(2, 512)); accountant.compose(SelfComposedDpEvent(event, steps))
EPSILONS = [
    ((1.0, 0.01, 1000, 1e-5), 2.1077530754515745),
    ((0.7, 0.004, 5000, 1e-6), 5.199854529887828),
    ((4.0, 0.05, 300, 1e-5), 0.9076844103983024),
    ((1.5, 1.0, 10, 1e-5), 11.46835814670956),
    ((20.0, 0.1, 50, 1e-7), 0.1632750498091569),
]


@functools.cache
def batch():
    """Six rows of different length, one of them empty."""
    rng = np.random.default_rng(0)
    weights = (np.arange(12) < np.asarray([[3], [12], [7], [0], [9], [5]])).astype(np.float32)
    weights[:, 0] = 0
    tokens = rng.integers(0, 61, weights.shape).astype(np.int32)
    return {"tokens": tokens, "weights": weights / weights.sum()}


def toy():
    return losses.sft(bigram.Narrow()), bigram.narrow_params()


def decoder():
    model = helpers.tiny()
    return losses.sft(policy(model.with_params(None))), model.params


@functools.cache
def step_of(max_norm, noise, accumulate=1):
    gradient = optim.private(max_norm, noise)
    return train.make_step(helpers.keep_gradients, accumulate=accumulate, gradient=gradient)


def gradient(setting, step, rows=None, seed=0):
    loss, params = setting
    state = train.init(params, helpers.keep_gradients, seed)
    state, metrics = step(state, loss, batch() if rows is None else rows)
    return jax.device_get((tree.flatten(state.opt_state), metrics))


@jax.jit
def of_each_row(loss, params, batch):
    """Each row's mean loss, its gradient, and what Optax makes of these, clipped at 0.5."""

    def of_row(row):
        return jax.value_and_grad(lambda params: loss(params, mean(row))[0])(params)

    def mean(row):
        row = jax.tree.map(lambda x: x[None], row)
        return row | {"weights": row["weights"] / jnp.maximum(row["weights"].sum(), 1e-30)}

    values, each = jax.vmap(of_row)(batch)
    theirs = optax.contrib.differentially_private_aggregate(0.5, 0.0, jax.random.key(0))
    expected, _ = theirs.update(each, theirs.init(params))
    return values, jax.vmap(optax.tree.norm)(each), expected


@pytest.mark.parametrize(
    ("setting", "accumulate"),
    [(toy, 1), (toy, 3), pytest.param(decoder, 3, marks=pytest.mark.slow)],
)
def test_clipped_rows_are_averaged_as_optax_does_it(setting, accumulate):
    found, metrics = gradient(setting(), step_of(0.5, 0.0, accumulate))
    values, norms, expected = jax.device_get(of_each_row(*setting(), batch()))
    helpers.assert_close(found, tree.flatten(expected), 2e-5)
    assert 0 < (norms > 0.5).sum() < len(norms)
    assert float(metrics["rows_clipped"]) == pytest.approx((norms > 0.5).mean())
    plain = batch()["weights"].sum(axis=1) @ values
    assert float(metrics["loss"]) == pytest.approx(float(plain), rel=1e-5)


def test_a_scaled_loss_is_clipped_and_blurred_as_a_plain_one():
    """Loss scaling multiplies gradients for the arithmetic's sake alone."""
    loss, params = toy()
    tx = optim.with_loss_scale(helpers.keep_gradients)
    step = train.make_step(tx, gradient=optim.private(0.5, 1.0))
    state, metrics = step(train.init(params, tx), loss, batch())
    found = tree.flatten(state.opt_state.inner)
    expected, plain = gradient(toy(), step_of(0.5, 1.0))
    helpers.assert_close(found, expected, 1e-5)
    assert float(metrics["rows_clipped"]) == float(plain["rows_clipped"]) > 0


def test_no_row_moves_the_sum_by_more_than_the_norm():
    other = {name: x.copy() for name, x in batch().items()}
    other["tokens"][1] = 1
    other["weights"] = other["weights"] * 7  # what others weigh has no part in a row's gradient
    before, _ = gradient(toy(), step_of(0.1, 0.0))
    after, _ = gradient(toy(), step_of(0.1, 0.0), other)
    change = 6 * np.sqrt(sum(np.sum((before[name] - after[name]) ** 2) for name in before))
    assert 0.01 < float(change) <= 0.2


def test_the_noise_has_the_size_that_it_is_to_have():
    plain, _ = gradient(toy(), step_of(0.1, 0.0))
    drawn = [gradient(toy(), step_of(0.1, 2.0), seed=seed)[0] for seed in range(2)]
    noise = [
        np.concatenate([np.ravel(g[name] - plain[name]) for name in plain]) * 6 / 0.2 for g in drawn
    ]
    for one in noise:
        assert np.mean(one) == pytest.approx(0, abs=5 / np.sqrt(one.size))
        assert np.std(one) == pytest.approx(1, abs=5 / np.sqrt(2 * one.size))
    assert abs(np.corrcoef(*noise)[0, 1]) < 5 / np.sqrt(noise[0].size)


@pytest.mark.parametrize(("args", "expected"), EPSILONS)
def test_epsilon_is_that_of_an_accountant(args, expected):
    assert optim.privacy_epsilon(*args) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: optim.private(0.0), "max_norm=0.0: a norm to clip at is above 0"),
        (lambda: optim.private(1.0, -1.0), "noise=-1.0 is 0 or more"),
        (lambda: optim.privacy_epsilon(0.0, 0.1, 1, 1e-5), "noise=0.0 is above 0"),
        (lambda: optim.privacy_epsilon(1.0, 1.5, 1, 1e-5), "share=1.5 is above 0, at most 1"),
        (lambda: optim.privacy_epsilon(1.0, 0.5, 0, 1e-5), "steps=0: privacy is of at least one"),
    ],
)
def test_what_is_wrong_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
