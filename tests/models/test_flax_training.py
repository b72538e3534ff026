"""Whole Flax modules of a user's own: adapters train on them, and what they learnt can be kept."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import helpers
from trainjax import estimate, losses, tree
from trainjax.models import FlaxModel, from_linen, from_nnx
from trainjax.peft import lora
from trainjax.train import init, make_step
from trainjax.types import Loss

LORA = lora(rank=2, alpha=4.0, target="kernel", dropout=0.1)
CLASSES, SHAPE, MIXED = 4, (8, 8, 3), 0.7


# --- modules as users write them ------------------------------------------------------------------


class Cnn(nn.Module):
    """Convolutions with batch statistics, and a field that has no hash."""

    widths: list

    @nn.compact
    def __call__(self, x, train: bool = False):
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x += nn.Dropout(0.1, deterministic=not self.train)(nn.MultiHeadDotProductAttention(2)(y, y))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


class Vit(nn.Module):
    """Patches, positions, and blocks that are scanned and rematerialised."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (4, 4), strides=4, padding="VALID")(x).reshape(len(x), -1, 8)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = blocks(train)(x, None)
        return nn.Einsum((8, CLASSES), "nd,dc->nc", use_bias=False)(jnp.mean(x, axis=1))


class NnxCnn(nnx.Module):
    """A CNN with a list of layers, batch statistics and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in ((3, 6), (6, 8))])
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.LinearGeneral((8, 8, 8), CLASSES, axis=(1, 2, 3), rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(self.dropout(self.norm(x)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(nnx.gelu(self.attention(x)))


class NnxVit(nnx.Module):
    """Blocks that were made by `nnx.vmap` and run by `nnx.scan`, each rematerialised."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, 8, (4, 4), strides=4, padding="VALID", rngs=rngs)
        make = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
        self.blocks = make(rngs)
        self.head = nnx.Einsum("ntd,dtc->nc", (8, 4, CLASSES), rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), -1, 8)
        run = nnx.remat(lambda block, x: block(x))
        x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        return self.head(x)


def of_linen(module: nn.Module) -> FlaxModel:
    x = jnp.zeros((1, *SHAPE))
    return from_linen(module, jax.jit(module.init)(jax.random.key(0), x), x)


@functools.partial(nnx.jit, static_argnums=0)
def new(kind):
    return kind(nnx.Rngs(0))


def of_nnx(kind) -> FlaxModel:
    module = new(kind)
    module.eval()
    return from_nnx(module)


MODELS = {
    "cnn": functools.cache(lambda: of_linen(Cnn([6, 8]))),
    "vit": functools.cache(lambda: of_linen(Vit())),
    "nnx cnn": functools.cache(lambda: of_nnx(NnxCnn)),
    "nnx vit": functools.cache(lambda: of_nnx(NnxVit)),
}


@pytest.fixture(params=list(MODELS), scope="module")
def model(request) -> FlaxModel:
    return MODELS[request.param]()


@pytest.fixture(params=["cnn", "nnx cnn"], scope="module")
def cnn(request) -> FlaxModel:
    return MODELS[request.param]()


def images(task: int, rows: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise over a pattern for each class. Task 1 has new ones, mixed with task 0's of another class."""
    rng = np.random.default_rng([task, seed])
    patterns = np.random.default_rng(task).standard_normal((CLASSES, *SHAPE))
    if task:
        patterns += MIXED * np.roll(
            np.random.default_rng(0).standard_normal(patterns.shape), 1, axis=0
        )
    labels = rng.integers(0, CLASSES, rows)
    noisy = patterns[labels] + 0.5 * rng.standard_normal((rows, *SHAPE))
    return {
        "image": noisy.astype(np.float32),
        "label": labels.astype(np.int32),
        "weights": np.full(rows, 1 / rows, np.float32),
    }


def cross_entropy(model: FlaxModel, params, batch, key):
    logits = model.apply(params, batch["image"])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.sum(batch["weights"] * each), {}


def with_adapter(model: FlaxModel, adapter, batch, key):
    return cross_entropy(model, LORA.attach(model.params, adapter, key), batch, key)


TX = optax.adam(1e-2)
STEP = make_step(TX)
"""One for all tests: what it has compiled for a loss it runs for the next test with that loss."""


def trained(loss: Loss, params, task: int, steps: int):
    """Params after some steps on a task, and the losses on the way; each step sees other rows."""
    copied = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), params)
    state, trace = init(copied, TX), []
    for number in range(steps):
        state, metrics = STEP(state, loss, images(task, seed=number))
        trace.append(float(metrics["loss"]))
    return state.params, trace


@jax.jit
def new_adapter(params):
    return LORA.init(jax.random.key(0), params)


TRACES: list[int] = []


@jax.jit
def attached(model: FlaxModel, adapter, x):
    """What the model computes with an adapter; counts how often it is traced."""
    TRACES.append(1)
    return model.apply(LORA.attach(model.params, adapter), x)


value = jax.jit(lambda loss, params, batch: loss(params, batch))


# --- training -------------------------------------------------------------------------------------


def test_an_adapter_learns_and_the_base_stays_bit_for_bit(model):
    before = jax.tree.map(np.array, model.params)
    adapter, trace = trained(Loss(with_adapter, model), new_adapter(model.params), 0, 20)
    assert np.mean(trace[-3:]) < 0.7 * np.mean(trace[:3])
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    assert {name.rpartition("/")[2] for name in tree.flatten(adapter)} == {"a", "b"}


def test_the_whole_model_learns_too(cnn):
    _, trace = trained(Loss(cross_entropy, cnn), cnn.params, 0, 20)
    assert np.mean(trace[-3:]) < 0.7 * np.mean(trace[:3])


def test_micro_batches_change_nothing(cnn):
    params, batch = cnn.params, images(0)
    one, two = (
        helpers.loss_and_gradients(Loss(cross_entropy, cnn), params, batch, n) for n in (1, 2)
    )
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    helpers.assert_close(two[1], one[1], 1e-5)


def test_another_adapter_base_or_state_runs_the_same_program(model):
    x = images(0)["image"]
    first = new_adapter(model.params)
    attached(model, first, x)
    count = len(TRACES)
    assert count
    attached(model, helpers.randomised(first), x)
    moved = model.with_params(helpers.randomised(model.params))
    updated = jax.jit(lambda model, x: model.updated(model.params, x)[1])
    attached(updated(moved, x), first, x)
    assert len(TRACES) == count


def test_merged_weights_go_back_to_flax_and_compute_what_the_adapter_did(model):
    adapter = helpers.randomised(new_adapter(model.params), 0.1)
    x = images(0)["image"]
    back = model.to_flax(jax.jit(LORA.merge)(model.params, adapter))
    if isinstance(back, nnx.Module):
        found = nnx.jit(lambda module, x: module(x))(back, x)
    else:
        found = jax.jit(model.program.module.apply)(back, x)
    helpers.assert_close({"y": found}, {"y": attached(model, adapter, x)}, 1e-5)


# --- what a module has beside params ---------------------------------------------------------------


def test_batch_statistics_stay_until_the_model_is_updated():
    module, x = Cnn([6, 8]), images(0)["image"]
    variables = jax.jit(module.init)(jax.random.key(0), x)
    model = from_linen(module, variables, x)

    @jax.jit
    def run(variables, model, x):
        return (
            module.apply(variables, x, train=True, mutable=["batch_stats"]),
            model.apply(model.params, x, train=True),
            model.updated(model.params, x, train=True),
        )

    (expected, changed), applied, (outputs, updated) = run(variables, model, x)
    np.testing.assert_array_equal(applied, expected)
    np.testing.assert_array_equal(outputs, expected)
    jax.tree.map(np.testing.assert_array_equal, updated.state, changed)
    jax.tree.map(
        np.testing.assert_array_equal, model.state["batch_stats"], variables["batch_stats"]
    )


def numbers(state):
    """The arrays, those of keys as what numpy can compare."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def test_statistics_and_counters_of_nnx_stay_until_the_model_is_updated():
    module, x = new(NnxCnn), jnp.asarray(images(0)["image"])
    model = from_nnx(module)
    outputs, updated = model.updated(model.params, x)
    np.testing.assert_array_equal(model.apply(model.params, x), outputs)
    np.testing.assert_array_equal(module(x), outputs)
    found, expected = nnx.state(updated.to_flax()), nnx.state(module)
    jax.tree.map(np.testing.assert_array_equal, numbers(found), numbers(expected))
    assert not np.array_equal(updated.state["norm"]["mean"], model.state["norm"]["mean"])


@pytest.mark.parametrize("make", [MODELS["vit"], lambda: from_nnx(new(NnxCnn))])
def test_dropout_of_the_module_follows_the_key(make):
    model, x = make(), images(0)["image"]
    settings = {} if "dropout" in model.state else {"train": True}
    run = jax.jit(lambda model, key: model.apply(model.params, x, key=key, **settings))
    first, again, other = (np.asarray(run(model, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


class OtherAxis(nn.Module):
    """Scanned layers whose weights are stacked in the second axis."""

    @nn.compact
    def __call__(self, x):
        dense = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return dense()(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, use_bias=False)(x), None


def test_layers_that_are_stacked_in_another_axis_are_refused_with_the_reason():
    module, x = OtherAxis(), jnp.ones((2, 8))
    model = from_linen(module, jax.jit(module.init)(jax.random.key(0), x), x)
    params = LORA.attach(model.params, new_adapter(model.params))
    with pytest.raises(ValueError, match=r"another axis than the first: it is \(8, 3, 8\)"):
        model.apply(params, x)


# --- two tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "whole", "strength"),
    [("cnn", False, 1e2), ("nnx cnn", False, 1e3), ("cnn", True, 1e5)],
    ids=["adapter", "adapter of nnx", "whole model"],
)
def test_ewc_forgets_less(name, whole, strength):
    """Strengths differ as the Fisher does: it is small where the first task was learnt well."""
    model = MODELS[name]()
    loss = Loss(cross_entropy if whole else with_adapter, model)
    params = model.params if whole else new_adapter(model.params)
    first, trace = trained(loss, params, 0, 30)
    assert trace[-1] < 0.5 * trace[0]
    fisher = estimate.fisher(loss, first, [images(0, seed=n) for n in range(4)], chunk=32)
    forgotten = {}
    for weight in (0.0, strength):
        after, trace = trained(loss + losses.ewc(first, fisher, weight), first, 1, 30)
        assert trace[-1] < 0.7 * trace[0]
        forgotten[weight] = float(value(loss, after, images(0, seed=99))[0])
    assert forgotten[strength] < 0.6 * forgotten[0.0]


def test_the_fisher_of_a_flax_model_is_the_mean_square_of_its_examples_gradients():
    model, batch = MODELS["cnn"](), images(0, rows=6)
    found = estimate.fisher(Loss(cross_entropy, model), model.params, [batch], chunk=2)

    def one(params, x, y):
        alone = {"image": x[None], "label": y[None], "weights": jnp.ones(1)}
        return cross_entropy(model, params, alone, None)[0]

    each = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))
    grads = jax.device_get(each(model.params, batch["image"], batch["label"]))
    expected = jax.tree.map(lambda leaf: np.mean(leaf**2, axis=0), grads)
    helpers.assert_close(tree.flatten(found), tree.flatten(expected), 1e-6)
