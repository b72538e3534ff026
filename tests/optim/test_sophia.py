import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import bigram, helpers
from trainjax import losses, optim, train, types
from trainjax.policies import policy

RATES = np.asarray([0.5, 2.0, 8.0, -1.0, 0.01])
START = np.asarray([1.0, -2.0, 0.5, 0.3, 3.0])


def quadratic(rates, params, batch, key):
    del key
    return jnp.sum(batch["weights"]) * 0.5 * jnp.sum(rates * params["x"] ** 2), {}


def parabola(rates=RATES):
    return types.Loss(quadratic, np.asarray(rates, np.float32))


def one_row():
    return {"weights": np.full((4, 1), 0.25, np.float32)}


def in_numpy(rates, theta, steps, rate, b1, b2, gamma, every, clip=1.0, decay=0.0, eps=1e-12):
    """Algorithm 3 of the paper in float64; of a diagonal H the estimate is exact."""
    m, h, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t in range(1, steps + 1):
        g = rates * theta
        m = b1 * m + (1 - b1) * g
        if every == 1 or t % every == 1:
            h = b2 * h + (1 - b2) * rates
        theta = theta - rate * decay * theta
        theta = theta - rate * np.clip(m / np.maximum(gamma * h, eps), -clip, clip)
        path.append(theta)
    return np.asarray(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"b1": 0.96, "b2": 0.99, "gamma": 0.01, "every": 10},
        {"b1": 0.9, "b2": 0.5, "gamma": 2.0, "every": 3},
        {"b1": 0.5, "b2": 0.9, "gamma": 1.0, "every": 1},
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_papers_algorithm_on_a_quadratic(settings, decay):
    tx = optim.sophia(0.02, optim.hutchinson, weight_decay=decay, **settings)
    state = train.init({"x": jnp.asarray(START, jnp.float32)}, tx)
    step, path = train.make_step(tx), []
    for _ in range(25):
        state, metrics = step(state, parabola(), one_row())
        path.append(np.asarray(state.params["x"]))
    # Optax takes the decay and the clipped step at once, from the same theta: decay rate^2 apart.
    expected = in_numpy(RATES, START, 25, 0.02, decay=decay, **settings)
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=2e-3 * decay + 1e-6)
    assert 0 <= float(metrics["clipped"]) <= 1


def test_the_curvature_is_estimated_at_every_third_step_alone():
    def at_this_step(objective, trained, **_):
        return {
            "x": objective.total(lambda batch, key: batch["step"]) * jnp.ones_like(trained["x"])
        }

    tx = optim.scale_by_sophia(at_this_step, b2=0.0, every=3)
    state = train.init({"x": jnp.ones(2)}, tx)
    step, seen = train.make_step(tx), []
    for _ in range(8):
        state, _ = step(state, parabola(np.ones(2)), one_row())
        seen.append(float(state.opt_state.curvature["x"][0]))
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6]


# --- softmax regression -------------------------------------------------------------------------

FEATURES = np.random.default_rng(0).standard_normal((12, 3))
W = np.random.default_rng(1).standard_normal((3, 4))
TOKEN_WEIGHTS = np.arange(1.0, 13.0) / np.arange(1.0, 13.0).sum()
LABELS = np.random.default_rng(2).integers(0, 4, 12)


def regression(labels_of, params, batch, key):
    logprobs = jax.nn.log_softmax(batch["x"] @ params["w"])
    labels, weights = labels_of(logprobs, batch, key)
    return -jnp.sum(weights * jnp.take_along_axis(logprobs, labels[:, None], -1)[:, 0]), {}


def of_data(logprobs, batch, key):
    return batch["labels"], batch["weights"]


def of_model(logprobs, batch, key):
    return jax.random.categorical(key, logprobs), jnp.sqrt(batch["weights"])


def of_data_with_roots(logprobs, batch, key):
    return batch["labels"], jnp.sqrt(batch["weights"])


def rows():
    return {
        "x": FEATURES.astype(np.float32),
        "labels": LABELS.astype(np.int32),
        "weights": TOKEN_WEIGHTS.astype(np.float32),
    }


def exact_diagonal():
    """`sum_t w_t x_ti^2 p_tc (1 - p_tc)`: the Hessian of a softmax regression, for any labels."""
    logits = FEATURES @ W
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("t,ti,tc->ic", TOKEN_WEIGHTS, FEATURES**2, p * (1 - p))


def _regression_of_data(inputs, params, batch, key):
    return regression(of_data, params, batch, key)


def _regression_of_model(inputs, params, batch, key):
    return regression(of_model, params, batch, key)


def _regression_of_wrong_labels(inputs, params, batch, key):
    return regression(of_data_with_roots, params, batch, key)


def estimates(estimate, curvature, parts, count=1500):
    """The mean over many keys, of a batch in so many micro-batches, and its standard error."""
    loss = types.Loss(_regression_of_data, ())
    extra = {} if curvature is None else {"curvature": types.Loss(curvature, ())}

    def one(key):
        def total(fn):
            of_each = [
                fn({name: x[i::parts] for name, x in rows().items()}, jax.random.fold_in(key, i))
                for i in range(parts)
            ]
            return jax.tree.map(lambda *x: sum(x), *of_each)

        objective = types.Objective(loss, lambda loss: loss, total, key)
        return estimate(objective, {"w": jnp.asarray(W, jnp.float32)}, **extra)

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))
    found = np.asarray(found["w"], np.float64)
    return found.mean(0), found.std(0) / np.sqrt(count)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("estimate", "curvature"),
    [(optim.gauss_newton, _regression_of_model), (optim.hutchinson, None)],
    ids=["gauss_newton", "hutchinson"],
)
def test_estimates_have_the_exact_diagonal_as_their_mean(estimate, curvature, parts):
    mean, error = estimates(estimate, curvature, parts)
    assert (np.abs(mean - exact_diagonal()) < 5 * error + 1e-6).all()
    assert error.max() < 0.05 * exact_diagonal().max()


def test_labels_of_the_data_give_another_diagonal():
    """The empirical Fisher is not the Gauss-Newton matrix, and the test above would tell."""
    mean, error = estimates(optim.gauss_newton, _regression_of_wrong_labels, 1, count=20)
    assert not (np.abs(mean - exact_diagonal()) < 5 * error + 1e-6).all()


def test_a_language_models_drawn_labels_are_the_models_own():
    """The mean of sqrt(w) log p's gradient over draws is 0; over the data's labels it is not."""
    model = helpers.tiny()
    examples = [np.arange(3, 15, dtype=np.int32), np.arange(5, 14, dtype=np.int32)]
    batch = jax.tree.map(jnp.asarray, helpers.packed(examples, [[0], [1]], 12))
    loss = losses.drawn(policy(model))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def of_head(loss, params, key):
        def value(scale):
            scaled = {**params, "norm": {"scale": params["norm"]["scale"] * scale}}
            return loss(scaled, batch, key)[0]

        return jax.grad(value)(jnp.ones(()))

    keys = jax.random.split(jax.random.key(0), 300)
    drawn = np.asarray(of_head(loss, model.params, keys))
    assert abs(drawn.mean()) < 4 * drawn.std() / np.sqrt(len(drawn))
    data = types.Loss(_data_with_roots, policy(model))
    labels = np.asarray(of_head(data, model.params, keys[:1]))[0]
    assert abs(labels) > 8 * drawn.std() / np.sqrt(len(drawn))


def _data_with_roots(policy, params, batch, key):
    del key
    stats = policy(params, batch)
    return -jnp.sum(jnp.sqrt(batch["weights"]) * stats.logprobs), {}


def toy():
    return bigram.Narrow(), bigram.narrow_params()


def decoder():
    model = helpers.tiny()
    return policy(model), model.params


@pytest.mark.parametrize("make", [optim.sophia_g, optim.sophia_h])
@pytest.mark.parametrize("setting", [toy, pytest.param(decoder, marks=pytest.mark.slow)])
def test_a_language_model_learns_with_it(make, setting):
    model, params = setting()
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 4, [[0], [1], [2], [3]], 12)
    tx = make(1e-3 if setting is decoder else 1e-2, every=2)
    state, values = train.init(params, tx), []
    step = train.make_step(tx, accumulate=2)
    for _ in range(12):
        state, metrics = step(state, losses.sft(model), batch, curvature=losses.drawn(model))
        values.append(float(metrics["loss"]))
    assert np.isfinite(values).all()
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 0}, "every=0: the curvature"),
        ({"gamma": 0.0}, "gamma=0.0 is above 0"),
        ({"clip": -1.0}, "clip=-1.0 is above 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        optim.sophia(1e-3, optim.hutchinson, **settings)


def test_without_the_loss_it_says_what_it_needs():
    tx = optim.sophia_h(1e-3)
    with pytest.raises(ValueError, match="sophia needs the params and the loss"):
        tx.update({"x": jnp.ones(2)}, tx.init({"x": jnp.ones(2)}), {"x": jnp.ones(2)})


def test_drawn_labels_need_a_key():
    model = helpers.tiny()
    with pytest.raises(ValueError, match="needs a key"):
        losses.drawn(policy(model))(model.params, {"weights": jnp.ones((1, 4))})
