"""Compressed sums of gradients, on four workers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import bigram, helpers
from trainjax import losses, parallel, types
from trainjax.optim import compression
from trainjax.train.workers import init_workers, make_worker_step

MESH = helpers.mesh_of(4, 1, 1)
ALL = {
    "int8": compression.int8("data"),
    "power_sgd": compression.power_sgd("data", rank=2),
    "one_bit": compression.one_bit("data", warmup=4),
}
plain_sum = optax.GradientTransformation(
    lambda params: optax.EmptyState(), lambda u, s, p=None: (jax.lax.psum(u, "data"), s)
)


def linear(inputs, params, batch, key):
    """Its gradient is the weighted sum of the rows' own matrices."""
    return jnp.sum(batch["weights"][:, None, None] * batch["m"] * params["layers"]["w"]), {}


def rows(seed=0, shape=(6, 8)):
    m = np.random.default_rng(seed).standard_normal((8, *shape)).astype(np.float32)
    return {"m": m, "weights": np.full(8, 1 / 8, np.float32)}


def sums(transform, count=1, batch=None):
    """What the optimizer sees in each of so many steps, and the metrics of the last."""
    tx = helpers.keep_gradients
    state = init_workers({"layers": {"w": jnp.zeros((6, 8))}}, tx, transform, MESH)
    step, found = make_worker_step(tx, transform, MESH), []
    batch = jax.device_put(batch or rows(), parallel.rows(MESH))
    for _ in range(count):
        state, metrics = step(state, types.Loss(linear, ()), batch)
        found.append(np.asarray(state.opt_state.optimizer["layers"]["w"], np.float64))
    return np.asarray(found), metrics


EXACT = rows()["m"].mean(0).astype(np.float64)


def test_the_plain_sum_is_the_gradient_of_the_whole_batch():
    tx = helpers.keep_gradients
    state = init_workers({"layers": {"w": jnp.zeros((6, 8))}}, tx, plain_sum, MESH)
    batch = jax.device_put(rows(), parallel.rows(MESH))
    state, metrics = make_worker_step(tx, plain_sum, MESH)(state, types.Loss(linear, ()), batch)
    np.testing.assert_allclose(state.opt_state["layers"]["w"], EXACT, rtol=1e-5, atol=1e-7)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(EXACT), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_with_error_feedback_the_mean_over_steps_is_the_gradient(name):
    """Of one gradient again and again: what is not sent now is sent later, so the error of the mean
    falls as one over the number of steps."""
    found, _ = sums(ALL[name], 64)
    errors = [np.linalg.norm(found[4 : 4 + n].mean(0) - EXACT) for n in (1, 8, 60)]
    assert errors[1] < 0.6 * errors[0] + 1e-6
    assert errors[2] < 0.15 * errors[0] + 1e-6


def test_int8_is_its_formula():
    """Of one step, by worker: two rows each."""
    own = (rows()["m"] / 8).reshape(4, 2, 6, 8).sum(1).astype(np.float64)
    scale = np.abs(own).max() / 127
    expected = (np.round(own / scale) * scale).sum(0)
    found, metrics = sums(ALL["int8"])
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)
    assert float(metrics["bytes_sent"]) == 6 * 8 + 4
    assert float(metrics["compression"]) == pytest.approx((6 * 8 + 4) / (4 * 6 * 8))


def test_power_sgd_of_a_matrix_of_its_rank_is_exact_from_the_second_step():
    rng = np.random.default_rng(1)
    low = (rng.standard_normal((6, 2)) @ rng.standard_normal((2, 8))).astype(np.float32)
    batch = {
        "m": np.stack([low * n for n in range(1, 9)]),
        "weights": np.full(8, 1 / 8, np.float32),
    }
    found, metrics = sums(ALL["power_sgd"], 2, batch)
    np.testing.assert_allclose(found[1], low * 4.5, rtol=1e-3, atol=1e-4)
    assert float(metrics["bytes_sent"]) == 4 * 2 * (6 + 8)


def test_one_bit_sends_whole_gradients_in_the_warm_up_and_signs_after_it():
    found, metrics = sums(ALL["one_bit"], 5)
    np.testing.assert_allclose(found[:4], [EXACT] * 4, rtol=1e-5, atol=1e-7)
    own = (rows()["m"] / 8).reshape(4, 2, 6, 8).sum(1).astype(np.float64)
    sizes = np.abs(own).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(found[4], (np.sign(own) * sizes).sum(0), rtol=1e-4, atol=1e-6)
    assert float(metrics["bytes_sent"]) == 6 * 8 / 8 + 4


def test_vectors_and_small_matrices_go_whole_through_power_sgd():
    found, metrics = sums(compression.power_sgd("data", rank=4))
    np.testing.assert_allclose(found[0], EXACT, rtol=1e-5, atol=1e-7)
    assert float(metrics["compression"]) == 1.0


@pytest.mark.parametrize("name", ALL)
def test_a_language_model_learns_and_compiles_once(name):
    policy = bigram.Narrow()
    examples = [np.random.default_rng(n).integers(3, 60, 12).astype(np.int32) for n in range(8)]
    batch = helpers.packed(examples, [[n] for n in range(8)], 12)
    place = NamedSharding(MESH, P())
    params = jax.device_put(bigram.narrow_params(), place)
    tx, traces = optax.adamw(3e-2), []

    def counted(policy, params, batch, key):
        traces.append(1)
        return losses.sft(policy)(params, batch, key)

    state = init_workers(params, tx, ALL[name], MESH)
    step, values = make_worker_step(tx, ALL[name], MESH), []
    for _ in range(15):
        state, metrics = step(
            state, types.Loss(counted, policy), jax.device_put(batch, parallel.rows(MESH))
        )
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.7 * values[0]
    assert float(metrics["compression"]) < 0.6
    assert len(traces) <= 2  # shard_map traces its body once more for its types


def test_workers_that_share_the_model_are_refused():
    with pytest.raises(ValueError, match="every worker holds the whole model, and the mesh has"):
        make_worker_step(optax.sgd(0.1), ALL["int8"], helpers.mesh_of(2, 2, 1))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: compression.power_sgd("data", rank=0), "rank=0 of the factors"),
        (lambda: compression.one_bit("data", warmup=-1), "warmup=-1 is a number of steps"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
