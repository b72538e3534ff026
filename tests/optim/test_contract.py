"""What every optimizer of the command line promises, by its name there."""

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


def parabola(params, batch):
    return jnp.sum(batch["weights"]) * jnp.sum((params["x"] - 3.0) ** 2)


def rosenbrock(params, batch):
    """Of two parameters in turn, as many as the array has pairs; 0 where all are 1."""
    x, y = params["x"][..., 0::2], params["x"][..., 1::2]
    return jnp.sum(batch["weights"]) * jnp.mean((1 - x) ** 2 + 100 * (y - x * x) ** 2)


def valley(f, params, batch, key):
    del key
    return f(params, batch), {}


def noisy(f, params, batch, key):
    """For an estimate of curvature: a slope whose square is that of a unit Gaussian's labels."""
    noise = jax.random.normal(key, params["x"].shape)
    return jnp.sum(noise * params["x"]) * jnp.sum(jnp.sqrt(batch["weights"])), {}


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


def descended(name, f, rate, steps, start):
    tx = made(name, optim.linear(rate, steps) if name != "schedule_free" else rate, clip=None)
    state, step = train.init({"x": start}, tx), train.make_step(tx)
    loss, slope = (types.Loss(_bound[g, f], ()) for g in (valley, noisy))
    for _ in range(steps):
        state, _ = step(state, loss, {"weights": np.ones(1, np.float32)}, curvature=slope)
    return float(f({"x": optim.eval_params(state.opt_state, state.params)["x"]}, ONE)), state


ONE = {"weights": jnp.ones(1)}


def _with(g, f):
    return lambda inputs, params, batch, key: g(f, params, batch, key)


_bound = {(g, f): _with(g, f) for g in (valley, noisy) for f in (parabola, rosenbrock)}


@EVERY
def test_it_finds_the_bottom_of_a_parabola(name):
    start = jnp.asarray(np.random.default_rng(0).uniform(-1, 2, (4, 8)), jnp.float32)
    rate = RATES.get(name, (0.1, 0))[0]
    found, _ = descended(name, parabola, rate, 400, start)
    assert found < 1e-2 * float(parabola({"x": start}, ONE))


@EVERY
def test_it_goes_down_rosenbrocks_valley(name):
    """From (-1.2, 1) and places near it: below a fifth of where it began."""
    spread = np.random.default_rng(0).uniform(-0.1, 0.1, (4, 8))
    start = jnp.asarray(np.tile([-1.2, 1.0], (4, 4)) + spread, jnp.float32)
    found, _ = descended(name, rosenbrock, RATES.get(name, (0, 0.02))[1], 800, start)
    assert found < 0.2 * float(rosenbrock({"x": start}, ONE))


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


def squares(inputs, params, batch, key):
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


def trained(name, steps=6, *, params=PARAMS, accumulate=1, batch=None, step=None, **settings):
    tx = made(name, optim.warmup_cosine(1e-2, 12, 2.0), weight_decay=0.1, **settings)
    state = train.init(jax.tree.map(jnp.asarray, params), tx)
    step, losses = step or train.make_step(tx, accumulate=accumulate), []
    for _ in range(steps):
        state, metrics = step(state, LOSS, rows() if batch is None else batch, curvature=DRAWN)
        losses.append(float(metrics["loss"]))
    return state, losses


@EVERY
def test_a_step_keeps_dtypes_shapes_and_program(name):
    traces = []

    def counted(inputs, params, batch, key):
        traces.append(1)
        return squares(inputs, params, batch, key)

    tx = made(name, optim.warmup_cosine(1e-2, 12, 2.0))
    state = train.init(jax.tree.map(jnp.asarray, PARAMS), tx)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    step = train.make_step(tx)
    for number in range(4):
        state, _ = step(state, types.Loss(counted, ()), rows(), curvature=DRAWN)
        count = len(traces) if number == 0 else count
    assert len(traces) == count
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before


@EVERY
def test_frozen_leaves_are_not_touched(name):
    groups = [Group("head|layers/0/", learning_rate=0.0), Group(".*")]
    state, _ = trained(name, groups=groups)
    np.testing.assert_array_equal(state.params["head"]["kernel"], PARAMS["head"]["kernel"])
    now, before = state.params["layers"]["kernel"], PARAMS["layers"]["kernel"]
    np.testing.assert_array_equal(now[0], before[0])
    assert (np.asarray(now[1]) != before[1]).any()


@EVERY
def test_its_learning_rate_can_be_injected(name):
    tx = optax.inject_hyperparams(lambda learning_rate: made(name, learning_rate))(0.1)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, step = train.init(params, tx), train.make_step(tx)
    state.opt_state.hyperparams["learning_rate"] = jnp.zeros(())
    state, _ = step(state, LOSS, rows(), curvature=DRAWN)
    helpers.assert_close(tree.flatten(state.params), tree.flatten(PARAMS), 1e-6)
    state.opt_state.hyperparams["learning_rate"] = jnp.full((), 0.1)
    state, _ = step(state, LOSS, rows(), curvature=DRAWN)
    assert not np.array_equal(state.params["bias"], PARAMS["bias"])


@EVERY
def test_a_checkpoint_in_the_middle_of_the_schedule_goes_on_as_if_nothing_had_been(name, tmp_path):
    tx = made(name, optim.warmup_cosine(1e-2, 12, 2.0), weight_decay=0.1)
    step, (state, _) = train.make_step(tx), trained(name, 3)
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(state, {})
    saved.wait()
    restored = saved.restore(train.init(jax.tree.map(jnp.zeros_like, PARAMS), tx))
    saved.close()
    again = restored.state
    for _ in range(3):
        state, expected = step(state, LOSS, rows(), curvature=DRAWN)
        again, found = step(again, LOSS, rows(), curvature=DRAWN)
        assert float(found["loss"]) == float(expected["loss"])


@EVERY
def test_four_micro_batches_give_what_one_batch_gives(name):
    _, one = trained(name)
    _, four = trained(name, accumulate=4)
    np.testing.assert_allclose(four, one, rtol=2e-3 if "8bit" in name else 1e-4)


@EVERY
def test_four_devices_give_what_one_gives(name):
    mesh = helpers.mesh_of(1, 2, 2)
    spread = jax.tree.map(jnp.asarray, PARAMS)
    for path, spec in {"layers": P(None, "fsdp", "tensor"), "head": P("fsdp", "tensor")}.items():
        spread[path]["kernel"] = jax.device_put(spread[path]["kernel"], NamedSharding(mesh, spec))
    spread["bias"] = jax.device_put(spread["bias"], NamedSharding(mesh, P()))
    batch = jax.device_put(rows(), parallel.rows(mesh))
    state, found = trained(name, params=spread, batch=batch)
    _, expected = trained(name)
    np.testing.assert_allclose(found, expected, rtol=2e-3 if "8bit" in name else 1e-4)
    assert state.params["head"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert tree.count(state.params) == tree.count(PARAMS)
