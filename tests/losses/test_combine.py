"""Losses made of losses: schedules, named batches, learned uncertainty, the share of a micro-batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax.losses import at, ensemble, on, scheduled, uncertainty, with_log_variances
from trainjax.losses.combine import share
from trainjax.train import Checkpoints, init, make_step
from trainjax.types import Loss


def gaussian(inputs, params, batch, key):
    """`sum_i weights_i (y_i - mean)^2`: the squared error of one task."""
    return jnp.sum(batch["weights"] * (batch["y"] - params[inputs_name(inputs)]) ** 2), {}


def inputs_name(inputs) -> str:
    return "ab"[int(inputs.shape[0]) - 1]


def task(name: str) -> Loss:
    return Loss(gaussian, jnp.zeros("ab".index(name) + 1))


def draws(spread: float, seed: int, rows: int = 8) -> dict[str, np.ndarray]:
    y = spread * np.random.default_rng(seed).standard_normal(rows) + seed
    return {"y": y.astype(np.float32), "weights": np.full(rows, 1 / rows, np.float32)}


def linear(inputs, params, batch, key):
    return inputs * params["w"], {}


LINE = Loss(linear, jnp.float32(3.0))
W = {"w": jnp.float32(2.0)}


# --- parts of the params -------------------------------------------------------------------------


def test_a_loss_of_a_part_has_its_value_and_its_gradient_and_no_other():
    params = {"policy": W, "log_variances": {"a": jnp.float32(5.0)}}
    (value, metrics), slope = jax.value_and_grad(at("policy", LINE), has_aux=True)(params, {})
    assert (float(value), metrics) == (float(LINE(W, {})[0]), LINE(W, {})[1])
    assert float(slope["policy"]["w"]) == float(jax.grad(lambda p: LINE(p, {})[0])(W)["w"])
    assert float(slope["log_variances"]["a"]) == 0.0


def test_a_part_that_is_not_there_is_one_clear_sentence():
    with pytest.raises(
        ValueError, match=r"no part 'polcy', but \['policy'\]; did you mean 'policy'"
    ):
        at("polcy", LINE)({"policy": W}, {})
    with pytest.raises(ValueError, match=r"no part 'policy', but \[\]"):
        at("policy", LINE)(W["w"], {})


# --- ensembles -----------------------------------------------------------------------------------


def noisy(inputs, params, batch, key):
    value = jnp.sum(batch["weights"] * (batch["y"] - params["w"]) ** 2)
    noise = 0.0 if key is None else jax.random.normal(key)
    return value, {"value": value, "noise": jnp.asarray(noise, jnp.float32)}


def test_a_member_has_the_gradient_of_its_own_loss_and_metrics_are_means():
    params, batch = {"w": jnp.asarray([0.5, -1.0, 4.0])}, draws(1.0, 2)
    loss = Loss(noisy)
    (value, metrics), slope = jax.value_and_grad(ensemble(loss), has_aux=True)(params, batch)
    alone = [jax.value_and_grad(loss, has_aux=True)({"w": w}, batch) for w in params["w"]]
    np.testing.assert_allclose(value, sum(v for (v, _), _ in alone), rtol=1e-6)
    np.testing.assert_allclose(metrics["value"], np.mean([v for (v, _), _ in alone]), rtol=1e-6)
    np.testing.assert_allclose(slope["w"], [own["w"] for _, own in alone], rtol=1e-6)


def test_members_draw_apart():
    params = {"w": jnp.zeros(2)}
    noises = ensemble(Loss(lambda i, p, b, key: (jax.random.normal(key), {})))
    drawn = float(noises(params, {}, jax.random.key(0))[0])
    first, second = (float(jax.random.normal(k)) for k in jax.random.split(jax.random.key(0)))
    assert first != second
    np.testing.assert_allclose(drawn, first + second, rtol=1e-6)


@pytest.mark.parametrize("params", [{"a": jnp.ones(2), "b": jnp.ones((3, 2))}, jnp.float32(1.0)])
def test_params_without_one_axis_of_members_are_refused(params):
    with pytest.raises(ValueError, match="leading axes of an ensemble's params are its members"):
        ensemble(LINE)(params, {})


# --- schedules ---------------------------------------------------------------------------------


def test_a_schedule_scales_value_and_gradient_by_the_steps_number():
    loss = scheduled(LINE, optax.linear_schedule(0.0, 1.0, 4))
    for step, factor in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        value, slope = jax.value_and_grad(lambda p, n=step: loss(p, {"step": jnp.int32(n)})[0])(W)
        assert float(value) == pytest.approx(6 * factor)
        assert float(slope["w"]) == pytest.approx(3 * factor)


def test_the_step_counts_for_the_schedule_without_a_second_trace():
    traces = []

    def counted(inputs, params, batch, key):
        traces.append(1)
        return inputs * params["w"], {}

    tx = optax.sgd(0.0)
    step, state = make_step(tx), init(W, tx)
    schedule = optax.polynomial_schedule(1.0, 0.0, 2, 5)
    found, first = [], 0
    for number in range(5):
        loss = scheduled(Loss(counted, jnp.float32(1.0 + number)), schedule)
        state, metrics = step(state, loss, {"x": np.zeros((2, 1))})
        found.append(float(metrics["loss"]) / (1 + number))
        first = first or len(traces)
    np.testing.assert_allclose(found, [2 * (1 - n / 5) ** 2 for n in range(5)], rtol=1e-6)
    assert len(traces) == first


def test_micro_batches_are_at_one_step_and_a_restored_run_goes_on_at_the_next(tmp_path):
    tx, loss = optax.sgd(0.1), scheduled(LINE, lambda step: step + 1)
    step = make_step(tx, accumulate=2)
    batch = {"x": np.zeros((2, 1))}
    state, metrics = step(init(W, tx), loss, batch)
    assert float(metrics["loss"]) == 2 * 1 * 6.0  # both micro-batches at the first step's factor
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    restored = checkpoints.restore(init(W, tx)).state
    checkpoints.close()
    _, expected = step(state, loss, batch)
    _, found = step(restored, loss, batch)
    assert float(found["loss"]) == float(expected["loss"])
    assert float(found["loss"]) == pytest.approx(2 * 2 * 3 * (2.0 - 0.1 * 6))


def test_a_schedule_without_a_step_says_how_to_give_one():
    with pytest.raises(ValueError, match=r"call the loss with batch \| \{'step': number\}"):
        scheduled(LINE, optax.constant_schedule(1.0))(W, {"x": np.zeros(2)})


# --- named batches -----------------------------------------------------------------------------


def test_a_loss_reads_its_own_batch_and_the_steps_number():
    batch = {"a": draws(1.0, 1), "b": draws(3.0, 2), "step": jnp.int32(2)}
    params = {"a": jnp.float32(0.5), "b": jnp.float32(-1.0)}
    loss = on("a", task("a")) + on("b", scheduled(task("b"), lambda step: step / 4))
    expected = np.mean((batch["a"]["y"] - 0.5) ** 2) + 0.5 * np.mean((batch["b"]["y"] + 1) ** 2)
    assert float(loss(params, batch)[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch", [{"maths": {}, "code": {}, "step": 1}, {"maths": {}, "cod": 1.0}])
def test_a_batch_of_another_name_is_named(batch):
    with pytest.raises(ValueError, match=r"no batch named 'math' among .*; did you mean 'maths'\?"):
        on("math", LINE)(W, batch)


# --- uncertainty -------------------------------------------------------------------------------


def test_uncertainty_reaches_the_optimum_of_gaussian_tasks():
    """`exp(-s) v + s` is least at `s = log v`, v the task's variance about its mean: `1 + log v`."""
    losses = {name: on(name, task(name)) for name in "ab"}
    batch = {"a": draws(0.3, 1), "b": draws(4.0, 2)}
    loss, tx = uncertainty(losses), optax.adam(optax.exponential_decay(0.2, 200, 0.4))
    params = with_log_variances({"a": jnp.zeros(()), "b": jnp.zeros(())}, losses)
    step, state = make_step(tx, accumulate=4), init(params, tx)
    for _ in range(1600):
        state, metrics = step(state, loss, batch)
    for name in "ab":
        variance = np.var(np.float64(batch[name]["y"]))
        assert float(state.params["policy"][name]) == pytest.approx(
            batch[name]["y"].mean(), abs=1e-3
        )
        found = float(state.params["log_variances"][name])
        assert found == pytest.approx(np.log(variance), abs=2e-3)
        assert float(metrics[f"{name}/log_variance"]) == pytest.approx(found, abs=1e-3)
        assert float(metrics[f"{name}/loss"]) == pytest.approx(variance, rel=1e-2)
    optimum = sum(1 + np.log(np.var(np.float64(batch[name]["y"]))) for name in "ab")
    assert float(metrics["loss"]) == pytest.approx(optimum, abs=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_log_variance_counts_once_over_micro_batches(accumulate):
    """At s = (1, -1): `e^-1 L_a + 1 + e L_b - 1`, and `d/ds_i = 1 - exp(-s_i) L_i`."""
    losses = {name: on(name, task(name)) for name in "ab"}
    batch = {"a": draws(0.3, 1), "b": draws(2.0, 2, rows=4)}
    params = {
        "policy": {"a": jnp.float32(0.0), "b": jnp.float32(1.0)},
        "log_variances": {"a": jnp.float32(1.0), "b": jnp.float32(-1.0)},
    }
    tx = optax.sgd(1.0)
    step = make_step(tx, accumulate=accumulate)
    state, metrics = step(init(params, tx), uncertainty(losses), batch)
    a, b = (np.mean((np.float64(batch[n]["y"]) - m) ** 2) for n, m in (("a", 0.0), ("b", 1.0)))
    assert float(metrics["loss"]) == pytest.approx(np.exp(-1) * a + np.exp(1) * b, rel=1e-5)
    new = state.params["log_variances"]
    assert float(new["a"]) == pytest.approx(1 - (1 - np.exp(-1) * a), abs=1e-5)
    assert float(new["b"]) == pytest.approx(-1 - (1 - np.exp(1) * b), rel=1e-5)


def test_params_without_the_tasks_log_variances_are_refused():
    losses = {name: on(name, task(name)) for name in "ab"}
    wrong = with_log_variances({"a": jnp.zeros(()), "b": jnp.zeros(())}, {"a": LINE, "c": LINE})
    for params, found in ((W, r"\[\]"), (wrong, r"\['a', 'c'\]")):
        with pytest.raises(ValueError, match=rf"tasks {found} .* of \['a', 'b'\]; begin with"):
            uncertainty(losses)(params, {"a": draws(1, 1), "b": draws(1, 2)})


def test_the_shares_of_micro_batches_add_up_to_one():
    whole = np.random.default_rng(0).uniform(size=(4, 3)).astype(np.float32)
    whole /= whole.sum()
    parts = [jnp.asarray(whole[::2]), jnp.asarray(whole[1::2])]
    for wrap in (
        lambda x: {"weights": x},
        lambda x: {"groups": x, "weights": x * 7},
        lambda x: {"a": {"weights": x}, "b": {"groups": x}, "step": 3},
    ):
        assert float(share(wrap(jnp.asarray(whole)))) == pytest.approx(1, abs=1e-6)
        assert sum(float(share(wrap(part))) for part in parts) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="it has \\['x'\\]"):
        share({"x": parts[0]})
