"""Loss scaling and stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import bigram, helpers
from trainjax import losses, optim, train, types
from trainjax.policies import policy
from trainjax.train import Checkpoints

# --- stochastic rounding ------------------------------------------------------------------------


def rounded(x, times):
    """By so many keys."""
    keys = jax.random.split(jax.random.key(0), times)
    return jax.jit(jax.vmap(optim.round_stochastically, (None, 0)))(x, keys)


def test_rounding_is_to_one_of_the_neighbours_and_right_on_average():
    x = jnp.asarray([1.0 + 1 / 512, -3.0 - 1 / 300, 1e-30, 7e30, 0.1], jnp.float32)
    draws = np.asarray(rounded(x, 4000), np.float64)
    for value, drawn in zip(np.asarray(x, np.float64), draws.T, strict=True):
        neighbours = np.unique(drawn)
        assert len(neighbours) == 2
        assert neighbours[0] < value < neighbours[1]
        gap = neighbours[1] - neighbours[0]
        assert abs(drawn.mean() - value) < 4 * gap / 2 / np.sqrt(len(drawn))


def test_what_bfloat16_holds_is_not_rounded_and_infinities_stay():
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, 3e38, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    x = x.at[4].set(jnp.float32(jnp.finfo(jnp.bfloat16).max))
    for one in np.asarray(rounded(x, 20), np.float32):
        np.testing.assert_array_equal(one, x)


def drift(inputs, params, batch, key):
    """A slope of 1 in every parameter."""
    return jnp.sum(batch["weights"]) * jnp.sum(params["x"].astype(jnp.float32)), {}


def after(tx, dtype, steps=200):
    step = train.make_step(tx)
    state = train.init({"x": jnp.ones(512, dtype)}, tx)
    for _ in range(steps):
        state, _ = step(state, types.Loss(drift, ()), {"weights": np.ones(1, np.float32)})
    assert state.params["x"].dtype == dtype
    return np.asarray(state.params["x"], np.float64)


def test_a_bf16_master_loses_an_update_that_float32_keeps_and_stochastic_rounding_on_average():
    """200 steps of 1e-4 from 1: bfloat16's neighbours below 1 are 1/256 apart, so each is rounded away."""
    sgd = optax.sgd(1e-4)
    assert (after(sgd, jnp.bfloat16) == 1.0).all()
    np.testing.assert_allclose(after(sgd, jnp.float32), 0.98, rtol=1e-5)
    found = after(optim.with_stochastic_rounding(sgd), jnp.bfloat16)
    assert len(np.unique(found)) > 3
    assert abs(found.mean() - 0.98) < 4 * found.std() / np.sqrt(512)


def test_moments_are_of_float32_and_other_dtypes_are_updated_as_ever():
    tx = optim.with_stochastic_rounding(optax.adamw(1e-2))
    params = {"narrow": jnp.ones(64, jnp.bfloat16), "wide": jnp.ones(64)}
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner[0].nu)} == {jnp.dtype("float32")}
    grads = {"narrow": jnp.ones(64, jnp.bfloat16), "wide": jnp.ones(64)}
    updates, _ = tx.update(grads, state, params)
    plain = optax.adamw(1e-2)
    expected, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_array_equal(updates["wide"], expected["wide"])


def test_a_language_model_in_bfloat16_learns_as_far_as_in_float32():
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 2, [[0], [1]], 12)
    loss, final = losses.sft(bigram.Narrow()), {}
    rounded = optim.with_stochastic_rounding(optax.adamw(1e-4))
    for name, tx, dtype in [
        ("float32", optax.adamw(1e-4), jnp.float32),
        ("nearest", optax.adamw(1e-4), jnp.bfloat16),
        ("stochastic", rounded, jnp.bfloat16),
    ]:
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), bigram.narrow_params())
        state, step = train.init(params, tx), train.make_step(tx)
        for _ in range(40):
            state, metrics = step(state, loss, batch)
        final[name] = float(metrics["loss"])
    assert abs(final["stochastic"] - final["float32"]) < 0.3 * abs(
        final["nearest"] - final["float32"]
    )


# --- dynamic loss scaling -----------------------------------------------------------------------


def through_float16(inputs, params, batch, key):
    """`x * w` whose gradient passes through float16, as that of layers computed in it does."""
    inner = (params["x"] * batch["factor"]).astype(jnp.float16)
    return jnp.sum(inner.astype(jnp.float32)) * jnp.sum(batch["weights"]), {}


def rows(factor=1.0):
    return {"weights": np.ones(1, np.float32), "factor": np.full(1, factor, np.float32)}


def test_an_overflow_is_skipped_and_the_scale_recovers():
    tx = optim.with_loss_scale(optax.adam(0.1), initial=2.0**17, every=4)
    step, state, told = train.make_step(tx), train.init({"x": jnp.ones(3)}, tx), []
    first = np.asarray(state.params["x"])
    for _ in range(9):
        state, metrics = step(state, types.Loss(through_float16, ()), rows())
        told.append([float(metrics[n]) for n in ("loss_scale", "skipped_steps", "is_finite")])
        if len(told) == 2:  # 2^17 and 2^16 are above float16's 65504
            np.testing.assert_array_equal(state.params["x"], first)
            assert int(state.opt_state.inner[0].count) == 0
    scales, skipped, finite = np.asarray(told).T
    assert skipped.tolist() == [1, 2, 2, 2, 2, 2, 3, 3, 3]
    assert np.log2(scales).tolist() == [16, 15, 15, 15, 15, 16, 15, 15, 15]
    assert finite.all()
    assert int(state.opt_state.inner[0].count) == 6
    assert np.isfinite(np.asarray(state.params["x"])).all()


def test_a_small_gradient_vanishes_in_float16_and_scaled_it_does_not():
    """1e-9 is less than half of float16's least number, 6e-8."""
    small = rows(1.0) | {"weights": np.full(1, 1e-9, np.float32)}
    for tx, expected in [
        (helpers.keep_gradients, 0.0),
        (optim.with_loss_scale(helpers.keep_gradients), 1e-9),
    ]:
        state = train.init({"x": jnp.ones(3)}, tx)
        state, metrics = train.make_step(tx)(state, types.Loss(through_float16, ()), small)
        found = state.opt_state["x"] if expected == 0 else state.opt_state.inner["x"]
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert float(metrics["loss"]) == pytest.approx(3e-9, rel=1e-5)


def test_at_the_least_scale_a_gradient_that_is_not_finite_is_told():
    tx = optim.with_loss_scale(optax.sgd(0.1), initial=4.0)
    step, state, finite = train.make_step(tx), train.init({"x": jnp.ones(1)}, tx), []
    for _ in range(4):
        state, metrics = step(state, types.Loss(through_float16, ()), rows(np.inf))
        finite.append(bool(metrics["is_finite"]))
    assert finite == [True, True, False, False]
    assert np.asarray(state.params["x"]).tolist() == [1.0]


def test_where_nothing_overflows_scaling_changes_nothing():
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 4, [[0], [1], [2], [3]], 12)
    loss, params, traces = losses.sft(bigram.Narrow()), bigram.narrow_params(), []
    for tx in (optax.adamw(1e-2), optim.with_loss_scale(optax.adamw(1e-2))):
        step, state, values = train.make_step(tx, accumulate=2), train.init(params, tx), []
        for _ in range(4):
            state, metrics = step(state, loss, batch)
            values.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        traces.append(values)
    np.testing.assert_allclose(traces[0], traces[1], rtol=1e-6)


def test_a_model_computed_in_float16_learns():
    model = helpers.tiny(compute_dtype=jnp.float16)
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 4, [[0], [1], [2], [3]], 12)
    tx = optim.with_loss_scale(optax.adamw(1e-2))
    step, state, values = train.make_step(tx), train.init(model.params, tx), []
    for _ in range(10):
        state, metrics = step(state, losses.sft(policy(model)), batch)
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.6 * values[0]


def test_the_scale_is_in_the_checkpoint(tmp_path):
    tx = optim.with_loss_scale(optax.adam(0.1), initial=2.0**17)
    step, state = train.make_step(tx), train.init({"x": jnp.ones(3)}, tx)
    for _ in range(3):
        state, _ = step(state, types.Loss(through_float16, ()), rows())
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(state, {})
    saved.wait()
    restored = saved.restore(train.init({"x": jnp.ones(3)}, tx))
    saved.close()
    assert restored is not None
    assert float(restored.state.opt_state.scale_of_loss) == 2.0**15
    assert int(restored.state.opt_state.metrics["skipped_steps"]) == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"initial": 0.5}, "initial=0.5 of the loss scale is between 1 and"),
        ({"growth": 1.0}, "growth=1.0 of the loss scale is above 1"),
        ({"every": 0}, "every=0: the scale grows"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        optim.with_loss_scale(optax.sgd(0.1), **settings)
