"""Gradient combiners: their textbook cases, optimality, and the step that they are part of."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import bigram, helpers
from trainjax import parallel, tree
from trainjax.losses import on, sft, uncertainty, with_log_variances
from trainjax.peft import lora
from trainjax.train import Checkpoints, Combiner, cagrad, gradnorm, init, make_step, mgda, pcgrad
from trainjax.train import combiners as c
from trainjax.types import Loss

COMBINERS = {
    "pcgrad": pcgrad(),
    "mgda": mgda(),
    "cagrad": cagrad(0.4),
    "gradnorm": gradnorm(alpha=0.5),
}
EACH = pytest.mark.parametrize("combine", COMBINERS.values(), ids=COMBINERS)


def products(gradients) -> jax.Array:
    g = np.asarray(gradients, np.float32)
    return jnp.asarray(g @ g.T)


def combined(combine: Combiner, gradients, key=0) -> np.ndarray:
    """The combiner's gradient of some vectors, given as a tree of two leaves."""
    named = {
        str(i): {"x": jnp.asarray(g[:1]), "y": jnp.asarray(g[1:])} for i, g in enumerate(gradients)
    }
    losses = dict.fromkeys(named, jnp.float32(1.0))
    out, _, _ = combine.update(named, losses, combine.init(named), jax.random.key(key))
    return np.concatenate([out["x"], out["y"]])


def random_gradients(tasks: int, size: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tasks, size)).astype(np.float32)


# --- PCGrad ------------------------------------------------------------------------------------


def test_pcgrad_projects_two_opposed_gradients_on_each_others_normal_plane():
    """g1 = (1, 0), g2 = (-1, 1): g1 -> (1/2, 1/2), g2 -> (0, 1); the sum is (1/2, 3/2)."""
    found = combined(pcgrad(), np.array([[1, 0], [-1, 1]], np.float32))
    np.testing.assert_allclose(found, [0.5, 1.5], rtol=1e-6)


def test_pcgrad_adds_gradients_that_do_not_conflict():
    g = np.array([[1, 0, 0], [1, 2, 0], [0, 1, 3]], np.float32)
    np.testing.assert_allclose(combined(pcgrad(), g), g.sum(axis=0), rtol=1e-6)


def pcgrad_in_float64(gradients: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper on the vectors themselves."""
    gradients = np.asarray(gradients, np.float64)
    total = np.zeros(gradients.shape[1])
    for i, order in enumerate(orders):
        g = gradients[i].copy()
        for j in order:
            if j != i and g @ gradients[j] < 0:
                g -= g @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += g
    return total


@pytest.mark.parametrize("tasks", [3, 5])
def test_pcgrad_follows_the_order_that_is_drawn(tasks):
    rng = np.random.default_rng(tasks)
    for seed in range(20):
        g = random_gradients(tasks, size=4, seed=seed)
        orders = np.stack([rng.permutation(tasks) for _ in range(tasks)])
        weights = jax.jit(c.pcgrad_weights)(products(g), jnp.asarray(orders))
        np.testing.assert_allclose(weights @ g, pcgrad_in_float64(g, orders), rtol=0, atol=2e-5)


def test_pcgrad_never_projects_a_gradient_on_its_own():
    """At 0, 100 and 185 degrees: the first is turned to 10, then to 95, against what it began as."""
    angles = np.deg2rad([0.0, 100.0, 185.0])
    g = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    orders = np.array([[1, 2, 0]] * 3)
    found = c.pcgrad_weights(products(g), jnp.asarray(orders)) @ g
    np.testing.assert_allclose(found, pcgrad_in_float64(g, orders), rtol=0, atol=1e-5)


def test_pcgrads_order_is_the_keys():
    """Three mutual conflicts in the plane, so that the order matters."""
    g = np.array([[1, 0.2], [-0.6, 1], [-0.5, -1]], np.float32)
    found = {tuple(np.round(combined(pcgrad(), g, key), 4)) for key in range(20)}
    orders = [[0, 1, 2], [2, 1, 0]]
    possible = {
        tuple(np.round(pcgrad_in_float64(g, np.array([a, b, d])), 4))
        for a in orders for b in orders for d in orders
    }  # fmt: skip
    assert 1 < len(found) <= len(possible)
    distance = [min(np.abs(np.subtract(f, p)).max() for p in possible) for f in found]
    assert max(distance) < 2e-4
    np.testing.assert_array_equal(combined(pcgrad(), g, 3), combined(pcgrad(), g, 3))


# --- MGDA and CAGrad ---------------------------------------------------------------------------


def test_mgda_of_two_gradients_is_the_closed_form():
    """`w_1 = clip((g_2 - g_1) . g_2 / |g_1 - g_2|^2, 0, 1)`, and one iteration finds it."""
    weigh = jax.jit(functools.partial(c.mgda_weights, iterations=1))
    for seed in range(50):
        g = random_gradients(2, size=3, seed=seed)
        g[1] *= 1 + seed % 4
        difference = np.float64(g[1]) - g[0]
        first = np.clip(difference @ g[1] / (difference @ difference), 0, 1)
        weights = weigh(products(g))
        np.testing.assert_allclose(weights, [first, 1 - first], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tasks", [3, 6])
def test_mgdas_direction_makes_no_task_worse(tasks):
    """At the least norm `g . g_i >= |g|^2` for all i, with equality where the weight is not zero."""
    for seed in range(20):
        g = random_gradients(tasks, size=8, seed=seed) + 0.3
        weights = np.asarray(jax.jit(c.mgda_weights)(products(g)), np.float64)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        least = weights @ g
        along = g @ least - least @ least
        assert along.min() > -1e-4
        assert np.abs(along[weights > 1e-3]).max() < 1e-4


def cagrad_worst(w: np.ndarray, g: np.ndarray, radius: float) -> float:
    """The dual objective that CAGrad's weights minimise."""
    return (w @ g) @ g.mean(axis=0) + radius * np.linalg.norm(w @ g)


@pytest.mark.parametrize("factor", [0.0, 0.4, 0.8])
def test_cagrad_is_the_best_for_the_worst_task_within_the_ball(factor):
    """The least of the dual over a grid of the simplex; the primal meets it at our gradient."""
    grid = [(i, j, 40 - i - j) for i in range(41) for j in range(41 - i)]
    for seed in range(10):
        g = random_gradients(3, size=4, seed=seed).astype(np.float64)
        mean, radius = g.mean(axis=0), factor * np.linalg.norm(g.mean(axis=0))
        direction = np.asarray(c.cagrad_weights(products(g), factor)) @ g
        assert np.linalg.norm(direction - mean) <= radius * (1 + 1e-4) + 1e-6
        worst = (g @ direction).min()
        least = min(cagrad_worst(np.array(w) / 40, g, radius) for w in grid)
        assert worst <= least + 1e-5  # weak duality: the grid is feasible
        if factor:
            assert worst > least - 0.02 * abs(least) - 1e-3
        else:
            np.testing.assert_allclose(direction, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, -0.1])
def test_cagrad_refuses_a_ball_that_holds_the_origin(factor):
    with pytest.raises(ValueError, match=rf"c={factor} .* \[0, 1\)"):
        cagrad(factor)


EXTREMES = {
    "all zero": np.zeros((3, 4)),
    "one zero": np.array([[0, 0, 0, 0], [1, 2, 3, 4], [-1, 0, 1, 0]]),
    "opposed": np.array([[1, 2, 3, 4], [-1, -2, -3, -4], [1, 2, 3, 4]]),
    "equal": np.ones((3, 4)),
    "tiny": 1e-12 * random_gradients(3, 4),
    "huge": 1e12 * random_gradients(3, 4),
    "unlike": np.array([[1e-8, 0, 0, 0], [0, 1e8, 0, 0], [-1, 1, 1, 1]]),
}


@EACH
@pytest.mark.parametrize("gradients", EXTREMES.values(), ids=EXTREMES)
def test_combined_gradients_are_finite_and_in_scale(combine, gradients):
    g = np.asarray(gradients, np.float32)
    found = combined(combine, g)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 10 * np.abs(g).max()


# --- GradNorm ----------------------------------------------------------------------------------


def linear(inputs, params, batch, key):
    """A loss whose gradient never changes: `slope . w + 10 share`, kept positive by the constant."""
    slope, name = inputs["slope"], inputs["index"]
    share = jnp.sum(batch["weights"])
    return share * (jnp.sum(slope * params["w"][name]) + 10.0), {}


def lines(*slopes: float) -> dict[str, Loss]:
    return {
        str(i): Loss(linear, {"slope": jnp.float32(s), "index": jnp.int32(i)})
        for i, s in enumerate(slopes)
    }


def test_gradnorm_without_alpha_makes_the_norms_equal():
    """Slopes 1 and 4 that never change: the weights 8/5 and 2/5 sum to 2 and give norms of 8/5."""
    losses, combine, tx = lines(1.0, 4.0), gradnorm(alpha=0.0, learning_rate=0.01), optax.sgd(0.0)
    step = make_step(tx, combine=combine)
    state = init({"w": jnp.zeros(2)}, tx, combiner_state=combine.init(losses))
    for _ in range(200):
        state, metrics = step(state, losses, {"weights": np.ones((1, 1), np.float32)})
    np.testing.assert_allclose(
        [metrics["0/weight"], metrics["1/weight"]], [1.6, 0.4], rtol=0, atol=0.04
    )


plain_sum = Combiner(
    lambda tasks: (), lambda gradients, *_: (jax.tree.map(jnp.add, *gradients.values()), (), {})
)


def square(inputs, params, batch, key):
    scale, name = inputs["scale"], inputs["index"]
    return jnp.sum(batch["weights"]) * scale * (params["w"][name] - 3.0) ** 2 + 0.0, {}


def test_gradnorm_lets_two_tasks_of_unlike_scale_train_at_one_rate():
    """Losses of one shape, one ten times the other: in plain descent its rate is ten times as high."""
    losses = {
        str(i): Loss(square, {"scale": jnp.float32(s), "index": jnp.int32(i)})
        for i, s in enumerate([0.3, 3.0])
    }
    batch, tx, rates = {"weights": np.ones((1, 1), np.float32)}, optax.sgd(5e-3), []
    for combine in (plain_sum, gradnorm(alpha=1.5, learning_rate=0.1)):
        step = make_step(tx, combine=combine)
        state = init({"w": jnp.zeros(2)}, tx, combiner_state=combine.init(losses))
        for _ in range(200):
            state, metrics = step(state, losses, batch)
        left = np.array([metrics["0/loss"] / 2.7, metrics["1/loss"] / 27])
        rates.append(-np.log(left) / 200)
    assert rates[0][1] / rates[0][0] == pytest.approx(10, rel=0.05)
    assert 0.5 < rates[1][1] / rates[1][0] < 2  # 1.6, over the steps in which it learns too


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorms_step_is_descent_on_its_objective(alpha):
    """The slope by finite differences in float64, the targets and the denominator held."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights, norms, progress = rng.uniform(0.5, 2.0, (3, 4))
        weights *= 4 / weights.sum()
        mean = (weights * norms).mean()
        target = mean * (progress / progress.mean()) ** alpha
        objective = lambda w, n=norms, t=target, m=mean: np.abs(w * n - t).sum() / m  # noqa: E731
        slope = [(objective(weights + e) - objective(weights - e)) / 2e-6 for e in 1e-6 * np.eye(4)]
        expected = weights - 0.01 * np.array(slope)
        f32 = (jnp.asarray(x, jnp.float32) for x in (weights, norms, progress))
        found = c.gradnorm_weights(*f32, alpha, 0.01)
        np.testing.assert_allclose(found, expected * 4 / expected.sum(), rtol=1e-5)


def test_gradnorm_refuses_a_state_that_does_not_know_the_tasks():
    losses, combine, tx = lines(1.0, 4.0), gradnorm(), optax.sgd(0.1)
    batch, params = {"weights": np.ones((1, 1), np.float32)}, {"w": jnp.zeros(2)}
    step = make_step(tx, combine=combine)
    with pytest.raises(ValueError, match=r"tasks \[\] .* of \['0', '1'\]; begin with train.init"):
        step(init(params, tx), losses, batch)
    other = init(params, tx, combiner_state=combine.init(["0", "one"]))
    with pytest.raises(ValueError, match=r"tasks \['0', 'one'\] and the losses are of"):
        step(other, losses, batch)
    with pytest.raises(ValueError, match="learning_rate=0"):
        gradnorm(learning_rate=0.0)


# --- in the step -------------------------------------------------------------------------------


def two_tasks(mesh=None):
    """Two tasks on batches of their own, the losses, the params: laid out over the mesh's devices."""
    loss = sft(bigram.policy)
    losses = {"code": 0.5 * on("code", loss), "maths": on("maths", loss)}
    batch = {"code": helpers.random_batch(rows=8, seed=1), "maths": helpers.random_batch(rows=4)}
    if mesh is not None:
        batch = jax.device_put(batch, parallel.rows(mesh))
    return losses, batch, parallel.place(bigram.params(), mesh)


def one_step(combine, accumulate=1, mesh=None):
    losses, batch, params = two_tasks(mesh)
    tx = helpers.keep_gradients
    state = init(params, tx, combiner_state=combine.init(losses))
    state, metrics = make_step(tx, accumulate=accumulate, combine=combine)(state, losses, batch)
    gradient = state.opt_state.optimizer if combine.init(losses) else state.opt_state
    return jax.device_get(tree.flatten(gradient)), jax.device_get(metrics)


@EACH
def test_micro_batches_and_devices_change_nothing(combine):
    expected, numbers = one_step(combine)
    assert np.abs(expected["table"]).max() > 1e-3
    four, two = helpers.mesh_of(4, 1, 1), helpers.mesh_of(1, 2, 1)
    for accumulate, mesh in ((4, None), (1, four), (2, two)):
        found, metrics = one_step(combine, accumulate, mesh)
        helpers.assert_close(found, expected, 2e-5)
        helpers.assert_close(metrics, numbers, 2e-5)


def test_tasks_report_their_own_metrics_and_the_sum_of_their_losses():
    _, metrics = one_step(pcgrad())
    each = {
        f"{t}/{m}" for t in ("code", "maths") for m in ("loss", "weight", "mean_token_accuracy")
    }
    assert metrics.keys() == each | {"loss", "grad_norm", "is_finite"}
    total = metrics["code/loss"] + metrics["maths/loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


@pytest.mark.parametrize("name", ["pcgrad", "gradnorm"])
def test_fifty_steps_and_new_coefficients_are_one_compilation(name, caplog):
    combine, tx = COMBINERS[name], optax.adamw(1e-2)
    losses, _, params = two_tasks()
    state = init(params, tx, combiner_state=combine.init(losses))
    step, seen = make_step(tx, accumulate=2, combine=combine), []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number in range(50):
            batch = {n: helpers.random_batch(rows=4, seed=number % 3) for n in losses}
            scaled = {n: (0.5 + number % 2) * loss for n, loss in losses.items()}
            state, metrics = step(state, scaled, batch)
            seen.append(float(metrics["loss"]) / (0.5 + number % 2))
    compilations = [r for r in caplog.messages if "Finished XLA compilation of jit(step)" in r]
    assert len(compilations) == 1
    assert np.mean(seen[-9:]) < np.mean(seen[:9])


def narrow(mesh):
    return bigram.Narrow(), bigram.narrow_params(mesh)


def adapted(mesh):
    """A real model, sharded three ways."""
    method, model = lora(rank=2, target="query|up", dropout=0.1), helpers.tiny(mesh=mesh)
    return tj.policy(model, method), method.init(jax.random.key(0), model.params)


@pytest.mark.parametrize(
    ("setting", "rate"), [(narrow, 5e-2), pytest.param(adapted, 1e-2, marks=pytest.mark.slow)]
)
def test_over_a_mesh_policies_train_with_a_combiner(setting, rate):
    """The two tasks are rows of their own."""
    mesh, combine, tx = helpers.mesh_of(1, 2, 2), pcgrad(), optax.adamw(rate)
    policy, params = setting(mesh)
    losses = {name: on(name, sft(policy)) for name in ("code", "maths")}
    state = init(params, tx)
    step, seen = make_step(tx, accumulate=2, combine=combine), []
    batch = {name: helpers.random_batch(rows=4, seed=i) for i, name in enumerate(losses)}
    batch = jax.device_put(batch, parallel.rows(mesh))
    for _ in range(20):
        state, metrics = step(state, losses, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.9 * seen[0]
    assert metrics["code/weight"] >= 1  # a projection adds of the other's gradient, or nothing


def test_the_combiners_state_is_checkpointed_and_a_resumed_run_is_bitwise_the_same(tmp_path):
    combine, tx = gradnorm(alpha=0.5), optax.adamw(1e-2)
    losses, batch, params = two_tasks()
    fresh = lambda: init(params, tx, combiner_state=combine.init(losses))  # noqa: E731
    step = make_step(tx, combine=combine)
    state, _ = step(fresh(), losses, batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    restored = checkpoints.restore(fresh()).state
    for number in range(3):
        state, metrics = step(state, losses, batch)
        restored, again = step(restored, losses, batch)
        assert float(metrics["loss"]) == float(again["loss"]), number
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    assert restored.opt_state.combiner == state.opt_state.combiner
    checkpoints.close()


def test_a_state_without_a_combiners_state_is_the_one_that_older_checkpoints_hold():
    params, tx = {"w": jnp.ones(2)}, optax.adam(1e-2)
    without, stateless = init(params, tx), init(params, tx, combiner_state=pcgrad().init(["a"]))
    assert jax.tree.structure(without) == jax.tree.structure(stateless)
    assert without._fields == ("step", "params", "opt_state", "key")
    assert type(without.opt_state) is type(tx.init(params))


def test_a_step_that_is_not_finite_leaves_the_combiners_state_as_it_was():
    losses, combine, tx = lines(1.0, 4.0), gradnorm(), optax.sgd(0.1)
    step = make_step(tx, combine=combine)
    state = init({"w": jnp.zeros(2)}, tx, combiner_state=combine.init(losses))
    state, _ = step(state, losses, {"weights": np.ones((1, 1), np.float32)})
    kept = jax.device_get(state.opt_state)
    state, metrics = step(state, losses, {"weights": np.full((1, 1), np.nan, np.float32)})
    assert not bool(metrics["is_finite"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), kept)


def test_losses_and_combiner_that_do_not_fit_are_refused():
    losses, batch, params = two_tasks()
    tx, wrong = optax.sgd(0.1), {"coding": batch["code"], "maths": batch["maths"]}
    with pytest.raises(ValueError, match=r"\['code', 'maths'\] need make_step\(tx, combine="):
        make_step(tx)(init(params, tx), losses, batch)
    with pytest.raises(ValueError, match="a combiner needs a dict of losses"):
        make_step(tx, combine=pcgrad())(init(params, tx), losses["code"], batch)
    with pytest.raises(
        ValueError, match="no batch named 'code' among .*'coding', 'maths'.*did you"
    ):
        make_step(tx, combine=pcgrad())(init(params, tx), losses, wrong)
    with pytest.raises(ValueError, match="the batch's key 'step'"):
        make_step(tx)(init(params, tx), losses["code"], batch | {"step": np.zeros(8)})


def test_uncertainty_trains_through_micro_batches_as_on_the_whole_batch():
    losses, batch, params = two_tasks()
    loss, params = uncertainty(losses), with_log_variances(params, losses)
    batch = {name: helpers.random_batch(rows=4, seed=i) for i, name in enumerate(batch)}
    expected = helpers.loss_and_gradients(loss, params, batch)
    found = helpers.loss_and_gradients(loss, params, batch, 4)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    helpers.assert_close(found[1], expected[1], 1e-5)
