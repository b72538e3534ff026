import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import bigram, helpers
from trainjax import losses, optim, peft, train, tree, types
from trainjax.policies import policy


def cubic(inputs, params, batch, key):
    del inputs, key
    x = params["x"]
    value = jnp.sum(batch["weights"][:, None] * batch["c"] * x) + jnp.sum(x**3) * jnp.sum(
        batch["weights"]
    )
    return value, {"largest": jnp.max(jnp.abs(x)) * jnp.sum(batch["weights"])}


START = np.asarray([0.5, -1.0, 0.25, 2.0], np.float32)
ROWS = {
    "weights": np.full(4, 0.25, np.float32),
    "c": np.arange(16, dtype=np.float32).reshape(4, 4) / 8,
}
EXACT = ROWS["c"].mean(0) + 3 * START**2


def gradients(estimator, count, parts=1):
    """By so many keys, each of the whole batch in so many micro-batches; and the last one's metrics."""

    def one(key):
        def total(fn):
            of_each = [
                fn({name: x[i::parts] for name, x in ROWS.items()}, jax.random.fold_in(key, i))
                for i in range(parts)
            ]
            return jax.tree.map(lambda *x: sum(x), *of_each)

        objective = types.Objective(types.Loss(cubic, ()), lambda loss: loss, total, key)
        return estimator(objective, {"x": jnp.asarray(START)})

    keys = jax.random.split(jax.random.key(0), count)
    found, metrics = jax.device_get(jax.jit(jax.vmap(one))(keys))
    return np.asarray(found["x"], np.float64), {name: x[-1] for name, x in metrics.items()}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "estimator", [optim.two_point(1e-2), optim.forward_gradient()], ids=["two_point", "forward"]
)
def test_over_many_directions_it_is_the_gradient(estimator, parts):
    found, metrics = gradients(estimator, 3000, parts)
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - EXACT) < 4.5 * error).all()
    assert error.max() < 0.1 * np.abs(EXACT).max()
    assert float(metrics["largest"]) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("make", [optim.two_point, optim.forward_gradient])
def test_more_directions_have_less_variance(make):
    one, _ = gradients(make(directions=1), 400)
    many, _ = gradients(make(directions=16), 100)
    assert many.var(0).sum() < one.var(0).sum() / 8


def test_a_forward_gradient_is_exact_along_its_direction():
    """`(g.z) z` for one z: parallel to z, and g's component along it: `|found| = |g.z| |z|`."""
    step = train.make_step(helpers.keep_gradients, gradient=optim.forward_gradient())
    state = train.init({"x": jnp.asarray(START)}, helpers.keep_gradients)
    state, metrics = step(state, types.Loss(cubic, ()), ROWS)
    key = jax.random.fold_in(jax.random.key(0), 0)
    keys = jax.random.split(tree.key_for(key, "optimizer"), 1)
    z = np.asarray(jax.random.normal(tree.key_for(keys[0], "x"), (4,)), np.float64)
    np.testing.assert_allclose(state.opt_state["x"], (EXACT @ z) * z, rtol=1e-5)
    exact, _ = cubic((), {"x": jnp.asarray(START)}, ROWS, None)
    assert float(metrics["loss"]) == pytest.approx(float(exact), rel=1e-6)


def toy():
    return losses.sft(bigram.Narrow()), bigram.narrow_params()


def adapter():
    model, method = helpers.tiny(), peft.lora(rank=2, alpha=2.0)
    params = helpers.randomised(method.init(jax.random.key(1), model.params))
    return losses.sft(policy(model, method)), params


def whole():
    model = helpers.tiny()
    return losses.sft(policy(model)), model.params


@pytest.mark.parametrize(
    ("estimator", "setting"),
    [
        (optim.two_point(3e-3, directions=64), toy),
        (optim.forward_gradient(directions=64), toy),
        pytest.param(optim.two_point(3e-3, directions=64), adapter, marks=pytest.mark.slow),
        pytest.param(optim.forward_gradient(directions=64), adapter, marks=pytest.mark.slow),
        pytest.param(optim.two_point(3e-3, directions=64), whole, marks=pytest.mark.slow),
        pytest.param(optim.forward_gradient(directions=64), whole, marks=pytest.mark.slow),
    ],
    ids=[
        "two_point",
        "forward",
        "two_point-lora",
        "forward-lora",
        "two_point-full",
        "forward-full",
    ],
)
def test_of_a_language_model_its_mean_points_along_the_gradient(estimator, setting):
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 2, [[0], [1]], 12)
    loss, params = setting()
    _, exact = helpers.loss_and_gradients(loss, params, batch)
    step = train.make_step(helpers.keep_gradients, accumulate=2, gradient=estimator)
    state, _ = step(train.init(params, helpers.keep_gradients), loss, batch)
    found = jax.device_get(tree.flatten(state.opt_state))
    flat = [
        np.concatenate([np.ravel(g[n]) for n in sorted(g)]).astype(np.float64)
        for g in (found, exact)
    ]
    # Along the gradient the estimate has its length, up to sqrt(2 / directions) of it.
    assert flat[0] @ flat[1] / (flat[1] @ flat[1]) == pytest.approx(1.0, abs=0.6)


def test_a_model_learns_without_a_backward_pass():
    tx = optax.adam(0.1)
    step = train.make_step(tx, gradient=optim.two_point(1e-2, directions=4))
    state, values = train.init({"x": jnp.asarray([3.0, 3.0])}, tx), []
    for _ in range(80):
        state, metrics = step(state, types.Loss(bowl, ()), {"weights": np.ones(1, np.float32)})
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.02 * values[0]


def bowl(inputs, params, batch, key):
    return jnp.sum(batch["weights"]) * jnp.sum(params["x"] ** 2), {}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: optim.two_point(0.0), "scale=0.0 of the differences is above 0"),
        (lambda: optim.two_point(directions=0), "directions=0: an estimate takes"),
        (lambda: optim.forward_gradient(0), "directions=0: an estimate takes"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
