import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import helpers
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


@pytest.fixture(scope="module")
def setting():
    """A model's loss, its params and six rows of different length, one of them empty."""
    model = helpers.tiny()
    rng = np.random.default_rng(0)
    weights = (np.arange(12) < np.asarray([[3], [12], [7], [0], [9], [5]])).astype(np.float32)
    weights[:, 0] = 0
    batch = {
        "tokens": rng.integers(0, model.config.vocab_size, weights.shape).astype(np.int32),
        "weights": weights / weights.sum(),
    }
    return losses.sft(policy(model.with_params(None))), model.params, batch


def gradient(setting, estimator, accumulate=1, seed=0):
    loss, params, batch = setting
    step = train.make_step(helpers.keep_gradients, accumulate=accumulate, gradient=estimator)
    state, metrics = step(train.init(params, helpers.keep_gradients, seed), loss, batch)
    return tree.flatten(state.opt_state), metrics


def of_each_row(setting):
    """The gradient of each row's mean loss."""
    loss, params, batch = setting
    slope = jax.jit(jax.grad(lambda params, loss, batch: loss(params, batch)[0]))
    rows = []
    for i in range(len(batch["tokens"])):
        row = {name: x[i : i + 1] for name, x in batch.items()}
        row["weights"] = row["weights"] / max(row["weights"].sum(), 1e-30)
        rows.append(slope(params, loss, row))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipped_rows_are_averaged_as_optax_does_it(setting, accumulate):
    found, metrics = gradient(setting, optim.private(0.5, 0.0), accumulate)
    each = of_each_row(setting)
    theirs = optax.contrib.differentially_private_aggregate(0.5, 0.0, jax.random.key(0))
    expected, _ = theirs.update(each, theirs.init(setting[1]))
    helpers.assert_close(found, tree.flatten(expected), 2e-5)
    norms = np.asarray(jax.vmap(optax.tree.norm)(each))
    assert 0 < (norms > 0.5).sum() < len(norms)
    assert float(metrics["rows_clipped"]) == pytest.approx((norms > 0.5).mean())
    _, plain = gradient(setting, train.backpropagation)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-5)


def test_a_scaled_loss_is_clipped_and_blurred_as_a_plain_one(setting):
    """Loss scaling multiplies gradients for the arithmetic's sake alone."""
    loss, params, batch = setting
    tx = optim.with_loss_scale(helpers.keep_gradients)
    step = train.make_step(tx, gradient=optim.private(0.5, 1.0))
    state, metrics = step(train.init(params, tx), loss, batch)
    found = tree.flatten(state.opt_state.inner)
    expected, plain = gradient(setting, optim.private(0.5, 1.0))
    helpers.assert_close(found, expected, 1e-5)
    assert float(metrics["rows_clipped"]) == float(plain["rows_clipped"]) > 0


def test_no_row_moves_the_sum_by_more_than_the_norm(setting):
    loss, params, batch = setting
    other = {name: x.copy() for name, x in batch.items()}
    other["tokens"][1] = 1
    other["weights"] = other["weights"] * 7  # what others weigh has no part in a row's gradient
    before, _ = gradient(setting, optim.private(0.1, 0.0))
    after, _ = gradient((loss, params, other), optim.private(0.1, 0.0))
    change = 6 * optax.tree.norm(jax.tree.map(jnp.subtract, before, after))
    assert 0.01 < float(change) <= 0.2


def test_the_noise_has_the_size_that_it_is_to_have(setting):
    plain, _ = gradient(setting, optim.private(0.1, 0.0))
    drawn = [gradient(setting, optim.private(0.1, 2.0), seed=seed)[0] for seed in range(2)]
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
