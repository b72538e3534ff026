import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax import optim
from trainjax.optim import Chain, chain

PARAMS = {"layers": {"kernel": jnp.ones((2, 3, 4))}, "norm": {"scale": jnp.full(4, 2.0)}}
GRADS = {
    "layers": {"kernel": jnp.asarray([[[3.0]], [[0.1]]]) * jnp.ones((2, 3, 4))},
    "norm": {"scale": jnp.asarray([0.0, 0.0, 3.0, 4.0])},
}


def updates(tx, count=1):
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(count):
        found, state = update(GRADS, state, PARAMS)
    return found, state


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("optimizer", [optax.adamw, optax.lion, optax.lamb])
def test_it_is_the_optax_chain_that_a_user_would_write(optimizer):
    ours = chain(
        Chain(optimizer=optimizer, learning_rate=0.1, weight_decay=0.3, settings={"b1": 0.8})
    )
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optimizer(0.1, b1=0.8, weight_decay=0.3))
    assert_equal(updates(ours, 3)[0], updates(theirs, 3)[0])


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.radam])
def test_an_optimizer_without_decay_gets_adamws(optimizer):
    schedule = optim.linear(0.1, 10)
    ours = chain(Chain(optimizer=optimizer, learning_rate=schedule, weight_decay=0.3, clip=None))
    found, _ = updates(ours, 3)
    plain, _ = updates(optimizer(schedule), 3)
    rate = float(schedule(2))
    assert_equal(found, jax.tree.map(lambda u, p: u - rate * 0.3 * p, plain, PARAMS))


def test_groups_clip_and_average_come_together():
    tx = chain(
        Chain(
            optimizer=optax.sgd,
            learning_rate=0.1,
            weight_decay=0.5,
            groups=[optim.Group("norm", weight_decay=0.0, learning_rate=2.0), optim.Group(".*")],
            clip=None,
            clip_layers=1.0,
            average=0.5,
        )
    )
    found, state = updates(tx)
    np.testing.assert_allclose(
        found["norm"]["scale"], -0.2 * np.asarray([0, 0, 0.6, 0.8]), rtol=1e-6
    )
    size = np.sqrt(12)
    expected = -0.1 * np.asarray([1 / size, 0.1]) - 0.1 * 0.5
    np.testing.assert_allclose(found["layers"]["kernel"][:, 0, 0], expected, rtol=1e-6)
    average = optax.tree.get(state, "average")
    np.testing.assert_allclose(average["norm"]["scale"], 2.0 + 0.5 * found["norm"]["scale"])


def test_layers_are_clipped_one_by_one():
    clipped, _ = optim.clip_by_layer_norm(0.5).update(GRADS, optax.EmptyState())
    norms = np.linalg.norm(np.asarray(clipped["layers"]["kernel"]).reshape(2, -1), axis=1)
    np.testing.assert_allclose(norms, [0.5, 0.1 * np.sqrt(12)], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(clipped["norm"]["scale"]), 0.5, rtol=1e-6)


def test_accumulation_updates_every_so_many_steps_with_the_mean():
    tx = chain(
        Chain(optimizer=optax.sgd, learning_rate=optim.linear(1.0, 2), clip=None, accumulate=2)
    )
    for count, rate in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 0.5)]:
        found, _ = updates(tx, count)
        assert_equal(found, jax.tree.map(lambda g, rate=rate: -rate * g, GRADS))


def test_lion_has_the_values_of_its_authors_implementation():
    """Three steps of lion-pytorch: rate and decay 0.1, betas 0.9 and 0.99."""
    tx = chain(Chain(optimizer=optax.lion, learning_rate=0.1, weight_decay=0.1, clip=None))
    params = jnp.asarray([1.0, -1.0, 2.0])
    state, path = tx.init(params), []
    for g in ([0.1, -0.2, 0.3], [-0.5, 0.1, 0.05], [0.2, 0.2, -0.9]):
        step, state = tx.update(jnp.asarray(g), state, params)
        params = params + step
        path.append(params)
    expected = [[0.89, -0.89, 1.88], [0.9811, -0.9811, 1.7612], [0.871289, -1.071289, 1.843588]]
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-6)


def test_steps_shrink_on_a_plateau():
    plateau = {"factor": 0.5, "patience": 2}
    tx = chain(Chain(optimizer=optax.sgd, learning_rate=1.0, clip=None, plateau=plateau))
    state, scales = tx.init(PARAMS), []
    for value in (3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        found, state = tx.update(GRADS, state, PARAMS, value=value)
        scales.append(float(-found["norm"]["scale"][3] / 4.0))
    assert scales == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_learning_rate_can_be_injected():
    tx = optax.inject_hyperparams(lambda learning_rate: chain(Chain(learning_rate=learning_rate)))
    state = tx(learning_rate=0.1).init(PARAMS)
    first, state = tx(learning_rate=0.1).update(GRADS, state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    second, _ = tx(learning_rate=0.1).update(GRADS, state, PARAMS)
    assert optax.tree.norm(first) > 0
    assert optax.tree.norm(second) == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"settings": {"bb1": 0.9}},
            "adamw has no setting 'bb1'; did you mean 'b1'\\?; its settings are b1",
        ),
        ({"learning_rate": -0.1}, "learning_rate=-0.1 is 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is 0 or more"),
        ({"clip": 0.0}, "clip=0.0: a norm to clip at is above 0"),
        ({"clip_layers": -1.0}, "clip_layers=-1.0: a norm to clip at"),
        ({"accumulate": 0}, "accumulate=0: an update takes at least one"),
        ({"average": 1.0}, "decay=1.0 of an average"),
    ],
)
def test_settings_that_make_no_sense_get_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        chain(Chain(**{"learning_rate": 0.1, **settings}))
