"""What every optimizer of the command line promises, by its name there."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import helpers
from trainjax import optim, parallel, train, tree, types
from trainjax.optim import Chain, Group, chain
from trainjax.recipes._optim import OPTIMIZERS
from trainjax.train import Checkpoints

EVERY = pytest.mark.parametrize("name", OPTIMIZERS)
SETTINGS = {"fira": {"rank": 2, "every": 3}, "galore": {"rank": 2, "every": 3}}
SETTINGS |= {name: {"every": 2} for name in ("sophia_g", "sophia_h")}


def made(name, learning_rate, **settings):
    optimizer = OPTIMIZERS[name]
    if name.endswith("_8bit"):  # arrays are small here, and are to be in 8 bits all the same
        plain = OPTIMIZERS[name.removesuffix("_8bit")]

        def optimizer(learning_rate, weight_decay=0.0):
            tx = plain(learning_rate, weight_decay=weight_decay)
            return optim.in_eight_bits(tx, at_least=16, elementwise=True)

    own = SETTINGS.get(name, {})
    return chain(Chain(optimizer=optimizer, learning_rate=learning_rate, settings=own, **settings))


# --- two valleys --------------------------------------------------------------------------------


def parabola(params):
    return ((params["x"] - 3.0) ** 2).sum()


def rosenbrock(params):
    """Of two parameters in turn, as many as the array has pairs; 0 where all are 1."""
    x, y = params["x"][..., 0::2], params["x"][..., 1::2]
    return ((1 - x) ** 2 + 100 * (y - x * x) ** 2).mean()


def noisy(inputs, params, batch, key):
    """For an estimate of curvature: a slope whose square is that of a unit Gaussian's labels."""
    noise = jax.random.normal(key, params["x"].shape)
    return jnp.sum(noise * params["x"]), {}


RATES = {  # for the parabola and for Rosenbrock's valley
    "sgd": (0.1, 1e-3),
    "swats": (0.1, 0.02),
    "prodigy": (1.0, 1.0),
    "schedule_free": (0.5, 0.1),
    "lion": (0.02, 2e-3),
    "lion_8bit": (0.02, 2e-3),
    "lamb": (0.05, 5e-3),
    "adafactor": (0.1, 0.02),
    "sophia_g": (0.05, 5e-3),
    "sophia_h": (0.05, 5e-3),
    "muon": (0.3, 0.02),
    "fira": (0.5, 0.02),
    "galore": (0.5, 0.05),
}


STEPS = 800


@functools.cache
def descent(name):
    """`(start, shares, rate, steps) -> loss` after `STEPS`, as one program for both valleys.

    `shares` say how much of the loss is the parabola and how much is Rosenbrock's. The rate has
    fallen to zero after `steps`, and nothing moves from there on.
    """

    def descended(start, shares, rate, steps):
        def falling(count):
            return rate * jnp.maximum(0.0, 1 - count / steps)

        def valley(params):
            return shares[0] * parabola(params) + shares[1] * rosenbrock(params)

        tx = made(name, rate if name == "schedule_free" else falling, clip=None)
        slope = types.Loss(noisy, ())

        def step(carry, key):
            params, state = carry
            objective = types.Objective(
                lambda params, batch, key: (valley(params), {}),
                bind=lambda loss: loss,
                total=lambda fn: fn({}, key),
                key=key,
            )
            value, grads = jax.value_and_grad(valley)(params)
            extra = {"value": value, "objective": objective, "curvature": slope}
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        params = {"x": start}
        keys = jax.random.split(jax.random.key(0), STEPS)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return valley(optim.eval_params(state, params))

    return jax.jit(descended)


@EVERY
def test_it_finds_the_bottom_of_a_parabola(name):
    start = np.random.default_rng(0).uniform(-1, 2, (4, 8)).astype(np.float32)
    rate = RATES.get(name, (0.1, 0))[0]
    found = descent(name)(start, np.float32([1, 0]), np.float32(rate), 400)
    assert float(found) < 1e-2 * float(parabola({"x": start}))


@EVERY
def test_it_goes_down_rosenbrocks_valley(name):
    """From (-1.2, 1) and places near it: below a fifth of where it began."""
    spread = np.random.default_rng(0).uniform(-0.1, 0.1, (4, 8))
    start = (np.tile([-1.2, 1.0], (4, 4)) + spread).astype(np.float32)
    rate = RATES.get(name, (0, 0.02))[1]
    found = descent(name)(start, np.float32([0, 1]), np.float32(rate), STEPS)
    assert float(found) < 0.2 * float(rosenbrock({"x": start}))


# --- a small regression -------------------------------------------------------------------------

PARAMS = {
    "layers": {"kernel": np.random.default_rng(0).standard_normal((2, 8, 16)).astype(np.float32)},
    "head": {"kernel": np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)},
    "bias": np.zeros(16, np.float32),
}


def predicted(params, batch):
    up, down = params["layers"]["kernel"]
    hidden = jnp.tanh(batch["x"] @ up) + jnp.tanh(batch["x"] @ down)
    return hidden @ params["head"]["kernel"] + params["bias"]


TRACES = []  # of the loss below; grows while a program is made


def squares(inputs, params, batch, key):
    TRACES.append(1)
    error = predicted(params, batch) - batch["y"]
    return jnp.sum(batch["weights"][:, None] * error.astype(jnp.float32) ** 2) / 2, {}


def of_drawn(inputs, params, batch, key):
    """Labels from the model: the prediction and noise of variance 1. The same for a row wherever it is."""
    output = predicted(params, batch)
    draw = lambda row: jax.random.normal(jax.random.fold_in(jax.random.key(0), row), (16,))  # noqa: E731
    error = (
        output - jax.lax.stop_gradient(output) - jax.vmap(draw)(batch["row"]).astype(output.dtype)
    )
    return jnp.sum(jnp.sqrt(batch["weights"])[:, None] * error**2) / 2, {}


LOSS, DRAWN = types.Loss(squares, ()), types.Loss(of_drawn, ())


def rows(count=8):
    rng = np.random.default_rng(2)
    return {
        "x": rng.standard_normal((count, 8)).astype(np.float32),
        "y": rng.standard_normal((count, 16)).astype(np.float32),
        "weights": np.full(count, 1 / count, np.float32),
        "row": np.arange(count, dtype=np.int32),
    }


def optimizer(name):
    return made(name, optim.warmup_cosine(1e-2, 12, 2.0), weight_decay=0.1)


@functools.cache
def step_of(name):
    return train.make_step(optimizer(name))


def started(name, params=PARAMS):
    return train.init(jax.tree.map(jnp.asarray, params), optimizer(name))


def layout(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype), state)


class Run(NamedTuple):
    """Six steps on one device: the losses, how often the loss was traced by each step's end, the layouts."""

    losses: list[float]
    traces: list[int]
    before: train.TrainState
    after: train.TrainState


@functools.cache
def alone(name):
    state, losses, traces = started(name), [], [len(TRACES)]
    before = layout(state)
    for _ in range(6):
        state, metrics = step_of(name)(state, LOSS, rows(), curvature=DRAWN)
        losses.append(float(metrics["loss"]))
        traces.append(len(TRACES))
    return Run(losses, traces, before, layout(state))


@EVERY
def test_a_step_keeps_dtypes_shapes_and_program(name):
    run = alone(name)
    assert run.after == run.before
    assert set(run.traces[1:]) == {run.traces[1]}


@EVERY
def test_its_learning_rate_can_be_injected_and_frozen_leaves_are_not_touched(name):
    groups = [Group("head|layers/0/", learning_rate=0.0), Group(".*")]
    tx = optax.inject_hyperparams(
        lambda learning_rate: made(name, learning_rate, groups=groups, weight_decay=0.1)
    )(0.1)
    state, step = train.init(jax.tree.map(jnp.asarray, PARAMS), tx), train.make_step(tx)
    state.opt_state.hyperparams["learning_rate"] = np.zeros((), np.float32)
    state, _ = step(jax.device_put(state), LOSS, rows(), curvature=DRAWN)
    helpers.assert_close(tree.flatten(state.params), tree.flatten(PARAMS), 1e-6)
    for _ in range(4):
        state.opt_state.hyperparams["learning_rate"] = jax.device_put(np.float32(0.1))
        state, _ = step(state, LOSS, rows(), curvature=DRAWN)
    np.testing.assert_array_equal(state.params["head"]["kernel"], PARAMS["head"]["kernel"])
    now, before = np.asarray(state.params["layers"]["kernel"]), PARAMS["layers"]["kernel"]
    np.testing.assert_array_equal(now[0], before[0])
    assert (now[1] != before[1]).any()
    assert not np.array_equal(state.params["bias"], PARAMS["bias"])


@EVERY
def test_a_checkpoint_in_the_middle_of_the_schedule_goes_on_as_if_nothing_had_been(name, tmp_path):
    state, step = started(name), step_of(name)
    for _ in range(3):
        state, _ = step(state, LOSS, rows(), curvature=DRAWN)
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(state, {})
    saved.wait()
    state = saved.restore(started(name, jax.tree.map(np.zeros_like, PARAMS))).state
    saved.close()
    for expected in alone(name).losses[3:]:
        state, found = step(state, LOSS, rows(), curvature=DRAWN)
        assert float(found["loss"]) == expected


@EVERY
def test_four_micro_batches_on_four_devices_give_what_one_batch_on_one_gives(name):
    mesh = helpers.mesh_of(1, 2, 2)
    specs = {"layers": P(None, "fsdp", "tensor"), "head": P("fsdp", "tensor"), "bias": P()}
    places = {
        path: jax.tree.map(lambda _, spec=spec: NamedSharding(mesh, spec), PARAMS[path])
        for path, spec in specs.items()
    }
    state = started(name, jax.device_put(PARAMS, places))
    batch = jax.device_put(rows(), parallel.rows(mesh))
    step, found = train.make_step(optimizer(name), accumulate=4), []
    for _ in range(6):
        state, metrics = step(state, LOSS, batch, curvature=DRAWN)
        found.append(float(metrics["loss"]))
    rtol = 2e-3 if "8bit" in name else 1e-4
    np.testing.assert_allclose(found, alone(name).losses, rtol=rtol)
    assert state.params["head"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert tree.count(state.params) == tree.count(PARAMS)
