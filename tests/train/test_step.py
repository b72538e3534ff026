"""The step: one program, a donated state, a frozen base, and numbers that are not finite."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers
from trainjax import parallel, tree
from trainjax.losses import sft
from trainjax.peft import lora
from trainjax.train import init, make_step
from trainjax.types import Frozen, Loss

LORA = lora(rank=2, target="query|up", dropout=0.1)
BATCH = helpers.random_batch(rows=4)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@functools.cache
def step_of(accumulate: int = 1):
    """One for all tests that run the same program."""
    return make_step(TX, accumulate=accumulate)


def setting(mesh=None):
    """A loss and the state before its first step."""
    model = helpers.tiny(mesh=mesh)
    adapter = LORA.init(jax.random.key(0), model.params)
    return model, sft(tj.policy(model, LORA)), init(adapter, TX)


def square(inputs, params, batch, key):
    """`coefficient * sum((params - batch)^2)`; its gradient is `2 coefficient (params - batch)`."""
    return inputs * jnp.sum((params["w"] - batch["x"].sum(axis=0)) ** 2), {}


def toy(tx=TX):
    """A loss, its state and a batch that need no model."""
    return (
        Loss(square, jnp.float32(1.0)),
        init({"w": jnp.ones(3)}, tx),
        {"x": np.zeros((4, 3), np.float32)},
    )


def test_a_bf16_step_goes_where_a_float32_step_goes():
    """bf16 has programs of its own; over five steps of plain descent their params stay together."""
    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = helpers.tiny(compute_dtype=dtype)
        base = tree.cast(model.params, dtype)
        method, tx = lora(rank=2, target="query|up"), optax.sgd(1e-3)
        start = helpers.trained(method, model.params)
        loss = sft(tj.policy(model.with_params(base), method))
        state, step = init(start, tx), make_step(tx, accumulate=2)
        begin = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(start)])
        for number in range(5):
            state, _ = step(state, loss, helpers.random_batch(rows=4, seed=number))
        end = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])
        moved[dtype] = end - begin
    wide, narrow = moved.values()
    assert np.linalg.norm(wide) > 0.01
    assert np.linalg.norm(wide - narrow) < 0.25 * np.linalg.norm(wide)  # 0.15: the model is steep


@pytest.mark.parametrize("split", [None, (1, 2, 2)], ids=["one device", "mesh"])
def test_fifty_steps_are_one_compilation(split, caplog):
    mesh = split and helpers.mesh_of(*split)
    _, loss, state = setting(mesh)
    step = make_step(TX, accumulate=2)
    losses = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number in range(50):
            batch = helpers.random_batch(rows=4, seed=number % 3)
            batch = batch if mesh is None else jax.device_put(batch, parallel.rows(mesh))
            state, metrics = step(state, loss, batch)
            losses.append(float(metrics["loss"]))
    compilations = [r for r in caplog.messages if "Finished XLA compilation of jit(step)" in r]
    assert len(compilations) == 1
    assert int(state.step) == 50
    assert np.mean(losses[-9:]) < np.mean(losses[:9])


def test_other_numbers_in_a_loss_are_the_same_program():
    traces = []

    def counted(inputs, params, batch, key):
        traces.append(1)
        return square(inputs, params, batch, key)

    _, state, batch = toy(optax.sgd(0.25))
    step = make_step(optax.sgd(0.25))
    state, metrics = step(state, 1.0 * Loss(counted, jnp.float32(1.0)), batch)
    first = len(traces)
    assert float(metrics["loss"]) == 3.0
    # w is 1 - 0.25 * 2 = 0.5 by now, so the loss 3 * 2 * 0.5^2 each.
    _, metrics = step(state, 3.0 * Loss(counted, jnp.float32(2.0)), batch)
    assert float(metrics["loss"]) == 4.5
    assert len(traces) == first


def test_the_state_is_donated_and_what_the_caller_gave_is_not():
    loss, _, batch = toy()
    params, key = {"w": jnp.ones(3)}, jax.random.key(1)
    old = init(params, TX, key)
    new, _ = make_step(TX)(old, loss, batch)
    assert all(
        leaf.is_deleted() for leaf in (old.params["w"], old.key, *jax.tree.leaves(old.opt_state))
    )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, params, key)))


def test_an_optimizer_may_keep_the_first_params_in_its_state():
    """As averages do; one buffer cannot be donated twice."""
    keep = optax.GradientTransformation(lambda params: params, lambda g, state, p=None: (g, state))
    loss, state, batch = toy(tx := optax.chain(optax.sgd(0.5), keep))
    state, _ = make_step(tx)(state, loss, batch)
    np.testing.assert_array_equal(state.opt_state[1]["w"], np.ones(3))
    np.testing.assert_array_equal(state.params["w"], np.zeros(3))


def test_the_base_is_frozen_and_has_no_optimizer_state():
    model, loss, state = setting()
    before = jax.tree.map(np.array, model.params)
    first = jax.tree.map(np.array, state.params)
    assert (
        tree.count(state.opt_state) == 2 * tree.count(state.params) + 1
    )  # Adam's two moments and a count
    state, _ = step_of()(state, loss, BATCH)
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    changed = tree.flatten(jax.tree.map(lambda a, b: bool((a != b).any()), state.params, first))
    assert all(
        changed[name] for name in changed if name.endswith("/b")
    )  # A has no gradient while B is 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_params_and_optimizer_as_they_were(bad):
    loss, state, batch = toy()
    step = make_step(TX)
    state, metrics = step(state, loss, batch)
    assert bool(metrics["is_finite"])
    kept = jax.tree.map(np.array, (state.params, state.opt_state))
    state, metrics = step(state, loss, {"x": np.full((4, 3), bad, np.float32)})
    assert not bool(metrics["is_finite"])
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), kept)
    state, metrics = step(state, loss, batch)
    assert bool(metrics["is_finite"])


def test_a_gradient_that_is_not_finite_under_a_finite_loss_counts_too():
    """`sqrt` at 0 is 0 with an infinite slope."""
    root = Loss(lambda inputs, params, batch, key: (jnp.sum(jnp.sqrt(params["w"])), {}))
    state, metrics = make_step(TX)(init({"w": jnp.zeros(2)}, TX), root, {"x": np.zeros((1, 1))})
    assert float(metrics["loss"]) == 0.0
    assert not bool(metrics["is_finite"])
    np.testing.assert_array_equal(state.params["w"], np.zeros(2))


def test_metrics_are_the_losss_own_and_three_more():
    loss, state, batch = toy()
    _, metrics = make_step(TX)(state, loss, batch)
    assert metrics.keys() == {"loss", "grad_norm", "is_finite"}
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3 * 2.0**2), rtol=1e-6)  # not clipped
    _, loss, state = setting()
    _, metrics = step_of()(state, loss, BATCH)
    assert metrics.keys() == {"loss", "grad_norm", "is_finite", "mean_token_accuracy"}


def test_steps_and_micro_batches_draw_apart_and_the_same_seed_the_same():
    draw = Loss(
        lambda inputs, params, batch, key: (jax.random.uniform(key) + 0 * params["w"].sum(), {})
    )

    def draws(accumulate: int, seed: int) -> list[float]:
        step, state = make_step(TX, accumulate=accumulate), init({"w": jnp.ones(1)}, TX, seed)
        found = []
        for _ in range(3):
            state, metrics = step(state, draw, {"x": np.zeros((2, 1))})
            found.append(float(metrics["loss"]))
        return found

    assert draws(1, seed=0) == draws(1, seed=0) != draws(1, seed=1)
    assert len(set(draws(1, seed=0))) == 3
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = sum(float(jax.random.uniform(k)) for k in jax.random.split(key, 2))
    np.testing.assert_allclose(draws(2, seed=0)[0], expected, rtol=1e-6)


def test_micro_batches_that_do_not_divide_the_rows_are_refused():
    loss, state, batch = toy()
    with pytest.raises(ValueError, match="accumulate=3 does not divide a batch of 4 rows"):
        make_step(TX, accumulate=3)(state, loss, batch)


def test_a_state_begun_on_a_mesh_is_on_it_as_a_whole():
    mesh = helpers.mesh_of(1, 2, 2)
    *_, state = setting(mesh)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {mesh}


def test_promotion_is_strict_in_these_tests():
    """So a step that runs here mixes no dtypes by accident."""
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    with pytest.raises(jax.dtypes.TypePromotionError, match="bfloat16"):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_step_in_bf16_over_bf16_weights_mixes_no_dtypes_and_trains_in_float32(full):
    model = helpers.tiny(compute_dtype=jnp.bfloat16)
    half = model.with_params(tree.cast(model.params, jnp.bfloat16))
    params = model.params if full else LORA.init(jax.random.key(0), half.params)
    loss = sft(tj.policy(model) if full else tj.policy(half, LORA))
    state, metrics = make_step(TX)(init(params, TX), loss, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32
    assert bool(metrics["is_finite"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_frozen_has_no_optimizer_state_and_no_decay(accumulate):
    """The gradient of `w` is of the sum of both parts, though only one of them trains."""

    def square(inputs, params, batch, key):
        whole = tree.thawed(params)
        return jnp.sum((whole["w"] + whole["fixed"]) ** 2) * jnp.sum(batch["x"]), {}

    tx = optax.adamw(1e-2, weight_decay=0.5)
    state = init({"w": jnp.ones(3), "fixed": Frozen(jnp.full(3, 2.0))}, tx)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert moments.count((3,)) == 2
    batch = {"x": np.full(2, 0.5, np.float32)}
    new, metrics = make_step(tx, accumulate=accumulate)(state, Loss(square), batch)
    np.testing.assert_array_equal(new.params["fixed"].value, [2.0, 2.0, 2.0])
    assert float(metrics["loss"]) == 27.0
    np.testing.assert_allclose(metrics["grad_norm"], 6 * 3**0.5, rtol=1e-6)
    # Adam's first step is the rate itself, and decay takes rate * 0.5 * w.
    np.testing.assert_allclose(new.params["w"], 1 - 1e-2 * (1 + 0.5), rtol=1e-6)
