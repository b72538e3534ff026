import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax import optim, train, types


def test_the_angle_of_each_matrix_is_told():
    """A quarter turn is 1, a half turn 2, stretching is 0; layers of a stack count one by one."""
    params = {
        "layers": {"kernel": jnp.asarray([[[1.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.0]]])},
        "head": {"kernel": jnp.asarray([[3.0, 0.0]])},
        "norm": {"scale": jnp.ones(2)},
    }
    tx = optim.watch_rotation()
    state = tx.init(params)
    assert float(state.metrics["rotation"]) == 0
    updates = {
        "layers": {
            "kernel": jnp.asarray([[[-1.0, 1.0]], [[-2.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
        },
        "head": {"kernel": jnp.asarray([[0.0, 3.0]])},
        "norm": {"scale": jnp.zeros(2)},
    }
    same, state = jax.jit(tx.update)(updates, state, params)
    jax.tree.map(np.testing.assert_array_equal, same, updates)
    told = {name: float(value) for name, value in state.metrics.items()}
    half = 1 - 1 / np.sqrt(2)
    assert told["rotation/layers/kernel"] == pytest.approx((1 + 2 + 0 + 1) / 4)
    assert told["rotation/head/kernel"] == pytest.approx(half)
    assert told["rotation"] == pytest.approx((1 + 2 + 0 + 1 + half) / 5)
    assert set(told) == {"rotation", "rotation/layers/kernel", "rotation/head/kernel"}


def test_the_step_reports_it():
    def loss(inputs, params, batch, key):
        return jnp.sum(params["kernel"] * batch["c"]), {}

    tx = optax.chain(optax.sgd(1.0), optim.watch_rotation())
    state = train.init({"kernel": jnp.asarray([1.0, 0.0])}, tx)
    c = {"c": np.asarray([1.0, 1.0], np.float32)}
    state, metrics = train.make_step(tx)(state, types.Loss(loss, ()), c)
    assert float(metrics["rotation"]) == pytest.approx(1.0)  # (1, 0) became (0, -1)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no parameter's name matches 'kernle'"):
        optim.watch_rotation("kernle").init({"kernel": jnp.ones(2)})
