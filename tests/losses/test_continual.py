"""Penalties against forgetting: their formulas, that they count once, and what they refuse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import bigram, helpers
from trainjax.losses import continual, sft
from trainjax.losses.continual import Anchored
from trainjax.train import init, make_step
from trainjax.types import Loss, pytree

RNG = np.random.default_rng(0)
SHAPES = {"layer": {"kernel": (3, 2), "bias": (2,)}, "scale": ()}
BATCH = {"weights": np.full((2, 4), 1 / 8, np.float32)}


def is_shape(node) -> bool:
    return isinstance(node, tuple)


def drawn(seed: int, positive: bool = False):
    """A tree of standard normal numbers, or of their squares."""
    rng = np.random.default_rng(seed)
    power = 2 if positive else 1
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape) ** power, jnp.float32),
        SHAPES,
        is_leaf=is_shape,
    )


THETA, ANCHOR, FISHER = drawn(0), drawn(1), drawn(2, positive=True)


def flat(params) -> np.ndarray:
    """All numbers of a tree in float64."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])


def exactly(f, *args):
    """`f` of the arguments in float64, as JAX's arrays."""
    return helpers.in_float64(lambda *wide: f(*jax.tree.map(jnp.asarray, wide)), *args)


@jax.jit
def run(loss: Loss, params, batch):
    return jax.value_and_grad(loss, has_aux=True)(params, batch)


def value_and_gradient(loss: Loss, params, batch=BATCH):
    (value, metrics), gradient = run(loss, params, batch)
    return float(value), metrics, gradient


# --- elastic weight consolidation ---------------------------------------------------------------


def test_ewc_is_half_the_fisher_times_the_squared_way_from_the_anchor():
    value, metrics, gradient = value_and_gradient(continual.ewc(ANCHOR, FISHER, 3.0), THETA)
    moved = flat(THETA) - flat(ANCHOR)
    np.testing.assert_allclose(value, 3.0 * 0.5 * np.sum(flat(FISHER) * moved**2), rtol=1e-6)
    np.testing.assert_allclose(flat(gradient), 3.0 * flat(FISHER) * moved, rtol=1e-5)
    assert metrics.keys() == {"ewc"}
    assert float(metrics["ewc"]) == value


def test_l2_sp_is_ewc_where_all_params_matter_alike():
    ones = jax.tree.map(jnp.ones_like, ANCHOR)
    value, _, gradient = value_and_gradient(continual.l2_sp(ANCHOR, 0.7), THETA)
    wanted, _, slope = value_and_gradient(continual.ewc(ANCHOR, ones, 0.7), THETA)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(flat(gradient), flat(slope), rtol=1e-6)


@pytest.mark.parametrize(
    "loss", [continual.ewc(ANCHOR, FISHER, 5.0), continual.l2_sp(ANCHOR, 5.0)], ids=["ewc", "l2_sp"]
)
def test_at_the_anchor_value_and_gradient_are_zero(loss):
    value, _, gradient = value_and_gradient(loss, ANCHOR)
    assert value == 0
    assert not flat(gradient).any()


def test_the_gradient_is_that_of_finite_differences():
    theta, anchor, fisher = (exactly(lambda x: x, x) for x in (THETA, ANCHOR, FISHER))
    gradient = exactly(jax.jit(jax.grad(continual.quadratic)), theta, anchor, fisher)
    base, step = theta["layer"]["kernel"], 1e-3
    for index in np.ndindex(base.shape):
        ends = []
        for sign in (1, -1):
            moved = base.copy()
            moved[index] += sign * step
            shifted = theta | {"layer": theta["layer"] | {"kernel": moved}}
            way = flat(shifted) - flat(anchor)
            ends.append(0.5 * np.sum(flat(fisher) * way**2))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradient["layer"]["kernel"][index], slope, rtol=1e-5)


def squared_error(data, theta, batch, key):
    """Minus the Gaussian log-likelihood of one unit of noise, summed, up to a constant."""
    x, y = data
    return 0.5 * jnp.sum((x @ theta - y) ** 2), {}


def test_ewc_after_a_linear_gaussian_task_is_training_on_both_tasks():
    """An old task with orthogonal inputs has a diagonal Fisher, so its likelihood is the penalty.

    The minimum of `0.5 |X_b t - y_b|^2 + n_a 0.5 sum_i F_i (t_i - a_i)^2`, with a the least squares
    of task A and F = diag(X_a^T X_a) / n_a, is the least squares of both tasks together.
    """
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((20, 4)))
    old_x, new_x = basis * [1.0, 2.0, 3.0, 0.5], rng.standard_normal((7, 4))
    old_y, new_y = rng.standard_normal(20), rng.standard_normal(7)
    joint = np.linalg.lstsq(
        np.concatenate([old_x, new_x]), np.concatenate([old_y, new_y]), rcond=None
    )[0]
    anchor = np.linalg.lstsq(old_x, old_y, rcond=None)[0]
    fisher = np.mean(old_x**2, axis=0)
    data = jnp.asarray(new_x, jnp.float32), jnp.asarray(new_y, jnp.float32)
    penalty = continual.ewc(
        {"t": jnp.asarray(anchor, jnp.float32)}, {"t": jnp.asarray(fisher, jnp.float32)}, 20.0
    )

    def total(theta):
        return squared_error(data, theta, BATCH, None)[0] + penalty({"t": theta}, BATCH)[0]

    start = np.zeros(4, np.float32)  # a quadratic: one Newton step is its minimum
    hessian, slope = jax.jit(lambda x: (jax.hessian(total)(x), jax.grad(total)(x)))(start)
    found = start - np.linalg.solve(hessian, slope)
    np.testing.assert_allclose(found, joint, rtol=0, atol=1e-5)
    alone = np.linalg.lstsq(new_x, new_y, rcond=None)[0]
    assert np.abs(alone - joint).max() > 0.1  # the penalty is what brings it there


def test_pooled_penalties_are_their_sum_but_for_a_constant():
    first, second = Anchored(ANCHOR, FISHER), Anchored(drawn(3), drawn(4, positive=True))
    pooled = continual.pooled(first, second)
    apart = [
        continual.ewc(*task, 2.0).named(name)
        for name, task in zip("ab", (first, second), strict=True)
    ]
    constants = []
    for seed in (5, 6):
        one, _, slope = value_and_gradient(continual.ewc(*pooled, 2.0), drawn(seed))
        two, _, wanted = value_and_gradient(apart[0] + apart[1], drawn(seed))
        np.testing.assert_allclose(flat(slope), flat(wanted), rtol=0, atol=1e-4)
        constants.append(two - one)
    np.testing.assert_allclose(constants[0], constants[1], rtol=1e-4)


def test_what_matters_to_neither_task_is_anchored_at_the_second():
    zeros = jax.tree.map(jnp.zeros_like, FISHER)
    pooled = continual.pooled(Anchored(ANCHOR, zeros), Anchored(THETA, zeros))
    jax.tree.map(np.testing.assert_array_equal, pooled.anchor, THETA)


# --- once over micro-batches --------------------------------------------------------------------


def data_term(inputs, params, batch, key):
    """A loss of the batch, weighted as all are."""
    return jnp.sum(batch["weights"].sum(axis=1) * batch["x"] * params["w"].sum()), {}


def uneven_batch() -> dict[str, np.ndarray]:
    """Rows of very different weight, and one of none."""
    weights = np.outer([1.0, 7.0, 0.0, 3.0], [0.0, 1.0, 2.0]).astype(np.float32)
    return {"weights": weights / weights.sum(), "x": np.arange(4, dtype=np.float32)}


def penalties() -> dict[str, Loss]:
    theta = {"w": jnp.arange(4.0)}
    factors = {"m": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}}
    entries = continual.key_entries(factors, 0.5)
    return {
        "ewc": (continual.ewc(theta, theta, 2.0), {"w": jnp.ones(4)}),
        "l2_sp": (continual.l2_sp(theta, 2.0), {"w": jnp.ones(4)}),
        "o_lora": (continual.o_lora([factors], 2.0), factors),
        "reg_lora": (continual.reg_lora(entries, 2.0), factors),
    }


@pytest.mark.parametrize(
    ("name", "accumulate"), [("ewc", 2), ("l2_sp", 4), ("o_lora", 2), ("reg_lora", 4)]
)
def test_a_penalty_counts_once_however_many_micro_batches_there_are(name, accumulate):
    loss, params = penalties()[name]
    value, _, gradient = value_and_gradient(loss, params, uneven_batch())
    found = helpers.loss_and_gradients(loss, params, uneven_batch(), accumulate)
    assert value > 1
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    helpers.assert_close(found[1], tj.tree.flatten(gradient), 1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_penalty_beside_a_loss_of_the_data_is_added_once(accumulate):
    penalty, params = penalties()["ewc"]
    batch = uneven_batch()
    found, _ = helpers.loss_and_gradients(Loss(data_term) + penalty, params, batch, accumulate)
    data = float(np.sum(batch["weights"].sum(1) * batch["x"]) * 4)
    theta = np.arange(4.0)
    np.testing.assert_allclose(found, data + np.sum(theta * (1 - theta) ** 2), rtol=1e-6)


def test_a_batch_without_weights_is_refused():
    with pytest.raises(ValueError, match="the sum of its 'groups' or 'weights'; it has"):
        continual.l2_sp(ANCHOR, 1.0)(THETA, {"tokens": np.zeros((1, 2), np.int32)})


# --- in a step ----------------------------------------------------------------------------------


def test_the_anchor_survives_a_step_that_donates_the_params_it_was_made_of():
    tx = optax.sgd(0.1)
    state = init(THETA, tx)
    loss = continual.ewc(anchor=state.params, fisher=FISHER, strength=1.0)
    before, first, step = jax.tree.map(np.array, state.params), state, make_step(tx)
    for _ in range(2):
        state, metrics = step(state, continual.l2_sp(ANCHOR, 1.0) + loss, uneven_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert float(metrics["ewc"]) > 0
    value, _, _ = value_and_gradient(loss, before)
    assert value == 0


def test_another_strength_anchor_or_fisher_is_the_same_program():
    traces = []

    @jax.jit
    def value(loss, params):
        traces.append(1)
        return loss(params, BATCH)[0]

    found = [value(continual.ewc(ANCHOR, FISHER, c), THETA) for c in (1.0, 2.0)]
    value(continual.ewc(drawn(7), drawn(8), 0.0), THETA)
    np.testing.assert_allclose(2 * found[0], found[1], rtol=1e-6)
    assert len(traces) == 1


def test_ewc_holds_params_where_they_were_while_they_learn():
    """Ten steps of size h on one batch, so that the gradient g hardly changes: without a penalty they go
    `10 h g`; with a strength of `1 / (2 h)` half of the way is taken back at each, so they go `h g (1 +
    1/2 + ...)`, a fifth.
    """
    start, tx = bigram.narrow_params(), optax.sgd(1e-5)
    ones = jax.tree.map(jnp.ones_like, start)
    step, moved = make_step(tx, accumulate=2), []
    for strength in (0.0, 5e4):
        loss = sft(bigram.Narrow()) + continual.ewc(start, ones, strength)
        state = init(start, tx)
        for _ in range(10):
            state, _ = step(state, loss, helpers.random_batch(rows=4))
        moved.append(np.linalg.norm(flat(state.params) - flat(start)))
    assert moved[1] == pytest.approx(moved[0] / 5, rel=0.05)


# --- what is refused ----------------------------------------------------------------------------


def test_a_fisher_of_another_tree_is_refused_by_the_first_leaf_that_differs():
    wrong = FISHER | {"layer": {"kernel": FISHER["layer"]["kernel"]}}
    with pytest.raises(ValueError, match="the Fisher and the anchor.*'layer/bias' is missing in"):
        continual.ewc(ANCHOR, wrong, 1.0)
    wrong = FISHER | {"scale": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"'scale' is \(3,\) in Fisher and \(\) in the anchor"):
        continual.ewc(ANCHOR, wrong, 1.0)


@pytest.mark.parametrize(
    "loss", [continual.ewc(ANCHOR, FISHER, 1.0), continual.l2_sp(ANCHOR, 1.0)], ids=["ewc", "l2_sp"]
)
def test_an_anchor_of_other_params_is_refused_by_the_first_leaf_that_differs(loss):
    other = THETA | {"new": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'new' is \(2,\) in params and missing in the anchor"):
        loss(other, BATCH)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_a_strength_below_zero_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength={strength} of a penalty is at least 0"):
        continual.l2_sp(ANCHOR, strength)


# --- low-rank updates ---------------------------------------------------------------------------


def adapter(seed: int, rank: int = 2, stack=(3,)):
    rng = np.random.default_rng(seed)
    sides = {"query": (6, 5), "up": (6, 8)}
    draw = lambda *shape: jnp.asarray(rng.standard_normal((*stack, *shape)), jnp.float32)  # noqa: E731
    return {name: {"a": draw(i, rank), "b": draw(rank, o)} for name, (i, o) in sides.items()}


def test_o_lora_is_the_sum_over_tasks_of_squared_products_of_a():
    now, earlier = adapter(0, rank=4), [adapter(1, rank=2), adapter(2, rank=3)]
    value, metrics, gradient = value_and_gradient(continual.o_lora(earlier, 0.5), now)
    wanted = 0.0
    for task in earlier:
        for name, factors in task.items():
            for layer in range(3):
                old, new = (np.asarray(f["a"][layer], np.float64) for f in (factors, now[name]))
                wanted += np.linalg.norm(old.T @ new) ** 2
    np.testing.assert_allclose(value, 0.5 * wanted, rtol=1e-5)
    assert metrics.keys() == {"o_lora"}
    assert not flat(gradient["query"]["b"]).any()
    assert flat(gradient["query"]["a"]).all()


def test_o_lora_leaves_orthogonal_adapters_alone():
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))
    b = jnp.ones((2, 5))
    one, two = (
        {"query": {"a": jnp.asarray(part, jnp.float32), "b": b}}
        for part in (basis[:, :2], basis[:, 2:4])
    )
    value, _, gradient = value_and_gradient(continual.o_lora([one], 1.0), two)
    assert abs(value) < 1e-12
    np.testing.assert_allclose(flat(gradient), 0, atol=1e-6)


def test_key_entries_are_the_largest_of_the_update():
    factors = adapter(0)
    found = continual.key_entries(factors, 0.1)
    for name, matrix in factors.items():
        for layer in range(3):
            a, b = (np.asarray(matrix[f][layer], np.float64) for f in "ab")
            update = np.abs(a @ b).ravel()
            assert len(found[name][layer]) == int(0.1 * update.size)
            wanted = set(np.argsort(-update)[: int(0.1 * update.size)].tolist())
            assert set(np.asarray(found[name][layer]).tolist()) == wanted


def test_reg_lora_is_the_mean_over_matrices_of_the_mean_size_at_the_key_entries():
    now, old = adapter(0), [adapter(1), adapter(2)]
    keys = [continual.key_entries(task, 0.2) for task in old]
    joined = {name: jnp.concatenate([k[name] for k in keys], axis=-1) for name in keys[0]}
    value, _, _ = value_and_gradient(continual.reg_lora(joined, 10.0), now)
    sizes = []
    for name, matrix in now.items():
        for layer in range(3):
            update = np.asarray(matrix["a"][layer], np.float64) @ np.asarray(matrix["b"][layer])
            sizes.append(np.abs(update.ravel()[np.asarray(joined[name][layer])]).mean())
    np.testing.assert_allclose(value, 10.0 * np.mean(sizes), rtol=1e-5)


def test_reg_lora_never_makes_the_update():
    now = adapter(0)
    loss = continual.reg_lora(continual.key_entries(adapter(1), 0.1), 1.0)
    shapes = helpers.shapes_in(jax.make_jaxpr(jax.grad(lambda p: loss(p, BATCH)[0]))(now).jaxpr)
    assert not shapes & {(3, 6, 5), (3, 6, 8), (6, 5), (6, 8), (3, 30), (3, 48)}


def test_a_new_adapter_starts_at_no_penalty_of_reg_lora():
    now = adapter(0)
    fresh = {name: {"a": f["a"], "b": jnp.zeros_like(f["b"])} for name, f in now.items()}
    loss = continual.reg_lora(continual.key_entries(now), 1.0)
    value, _, gradient = value_and_gradient(loss, fresh)
    assert value == 0
    assert np.isfinite(flat(gradient)).all()


def test_low_rank_penalties_refuse_what_is_no_adapter_or_of_other_matrices():
    other = {"query": adapter(0)["query"]}
    with pytest.raises(ValueError, match="'up' is in only one of the two"):
        continual.o_lora([adapter(0), other], 1.0)
    with pytest.raises(ValueError, match="'up' is in only one of the two"):
        continual.reg_lora(continual.key_entries(adapter(0)), 1.0)(other, BATCH)
    with pytest.raises(
        ValueError, match="not an adapter of pairs a and b: 'm/a' has no counterpart"
    ):
        continual.o_lora([{"m": {"w": jnp.ones(2)}}], 1.0)
    with pytest.raises(ValueError, match="at least one earlier task, and got none"):
        continual.o_lora([], 1.0)
    with pytest.raises(ValueError, match="fraction=0.0 of a matrix's entries"):
        continual.key_entries(adapter(0), 0.0)


# --- learning without forgetting ----------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def test_the_grouped_kl_is_the_kl_of_the_grouped_distributions_and_below_the_whole():
    new, old = (
        log_softmax(np.random.default_rng(s).standard_normal((2, 3, 9)) * 2) for s in (0, 1)
    )
    found = exactly(continual.grouped_kl, new[..., :4], old[..., :4])

    def grouped(x):
        p = np.exp(x)
        return np.concatenate([p[..., :4], p[..., 4:].sum(-1, keepdims=True)], axis=-1)

    p, q = grouped(new), grouped(old)
    np.testing.assert_allclose(found, np.sum(q * np.log(q / p), axis=-1), rtol=0, atol=1e-4)
    whole = np.sum(np.exp(old) * (old - new), axis=-1)
    assert np.all(found < whole)


def test_the_grouped_kl_has_the_gradient_of_finite_differences():
    new, old = (log_softmax(np.random.default_rng(s).standard_normal((1, 2, 5))) for s in (0, 1))
    new, old = new[..., :2], old[..., :2]
    total = jax.jit(lambda x, y: jnp.sum(continual.grouped_kl(x, y)))
    gradient = exactly(jax.jit(jax.grad(total)), new, old)
    for index in np.ndindex(new.shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = new.copy()
            moved[index] += step
            ends.append(exactly(total, moved, old))
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


def test_the_grouped_kl_is_finite_whatever_the_probabilities():
    @jax.jit
    @jax.vmap
    def value_and_slope(new, old):
        value = lambda x, y: continual.grouped_kl(x, y).sum()  # noqa: E731
        return jax.value_and_grad(value)(new[None, None, None], old[None, None, None])

    each = np.float32([0.0, -1e-8, -1.0, -1e4])
    new, old = (x.ravel() for x in np.meshgrid(each, each))
    values, slopes = value_and_slope(new, old)
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    assert not np.asarray(values)[new == old].any()


@pytree
class NarrowReference:
    """A reference that needs no model."""

    params: Any

    def __call__(self, batch, where=None):
        return bigram.Narrow()(self.params, batch, None, where)


def test_lwf_is_zero_and_flat_at_the_old_model_and_not_elsewhere():
    start, batch = bigram.narrow_params(), helpers.random_batch(rows=2)
    loss = continual.lwf(bigram.Narrow(), NarrowReference(start))
    value, metrics, gradient = value_and_gradient(loss, start, batch)
    assert abs(value) < 1e-6
    np.testing.assert_allclose(flat(gradient), 0, atol=1e-5)
    moved, _, slope = value_and_gradient(loss, bigram.narrow_params(seed=1), batch)
    assert moved > 0.01
    assert np.abs(flat(slope)).max() > 0.01
    assert metrics.keys() == {"lwf"}


def test_lwf_of_stored_log_probabilities_is_that_of_the_old_model():
    policy, old = bigram.Narrow(), NarrowReference(bigram.narrow_params())
    batch, after = helpers.random_batch(rows=2), bigram.narrow_params(seed=1)
    logprobs = jax.jit(lambda reference, batch: reference(batch).logprobs)(old, batch)
    stored = batch | {"reference_logprobs": np.asarray(logprobs)}
    wanted, _, gradient = value_and_gradient(continual.lwf(policy, old), after, batch)
    found = helpers.loss_and_gradients(continual.lwf(policy), after, stored, accumulate=2)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5)
    helpers.assert_close(found[1], tj.tree.flatten(gradient), 1e-5)


def test_cross_entropy_on_drawn_targets_is_the_old_models_whole_cross_entropy_on_average():
    """One draw at each of 256 * 3 places with one context each; four standard errors."""
    model = helpers.tiny(std=0.1)
    rows = 256
    batch = {
        "tokens": np.tile(np.array([[3, 5, 7, 9]], np.int32), (rows, 1)),
        "weights": np.tile(np.array([[0, 1, 1, 1]], np.float32) / (3 * rows), (rows, 1)),
    }
    old = tj.policy(model)
    other = helpers.randomised(model.params, 0.1, seed=1)
    drawn = jax.jit(lambda p, w, b, k: p.draw(w, b, k))(old, model.params, batch, jax.random.key(0))
    assert bool((drawn[:, 0] == 3).all())
    targets = dict(batch, targets=drawn)
    found = float(jax.jit(lambda loss, *args: loss(*args))(sft(old), other, targets)[0])
    q = log_softmax(np.asarray(model.logits(batch["tokens"][:1]), np.float64))[0, :3]
    p = log_softmax(np.asarray(model.with_params(other).logits(batch["tokens"][:1]), np.float64))[
        0, :3
    ]
    mean = -np.sum(np.exp(q) * p, axis=-1)
    variance = np.sum(np.exp(q) * p**2, axis=-1) - mean**2
    error = np.sqrt(variance.mean() / (3 * rows))
    assert abs(found - mean.mean()) < 4 * error
    assert error < 0.1 * mean.mean()
