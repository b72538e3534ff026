"""Adapters on the layers of Flax: each computes what it computes with the merged kernel, never making it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import helpers
from trainjax import tree
from trainjax.models import FlaxModel, from_linen, from_nnx
from trainjax.peft import dora, lora
from trainjax.types import Peft, Weight, pytree

METHODS = {
    "lora": lora(rank=2, alpha=3.0, target="kernel"),
    "dora": dora(rank=2, alpha=3.0, target="kernel"),
}


class Case(NamedTuple):
    """A layer, in Linen and in NNX if it is there, and the shape of its input."""

    linen: nn.Module
    nnx: Callable[[nnx.Rngs], nnx.Module] | None
    shape: tuple[int, ...]


def conv(groups: int = 1, size: tuple[int, ...] = (3, 2), shape=(2, 9, 8, 6), **settings) -> Case:
    """A convolution to 10 channels."""
    settings |= {"kernel_size": size, "feature_group_count": groups}
    return Case(
        nn.Conv(10, **settings),
        lambda rngs: nnx.Conv(shape[-1], 10, rngs=rngs, **settings),
        shape,
    )


def einsum(equation: str, kernel: tuple[int, ...], bias: tuple[int, ...], shape) -> Case:
    return Case(
        nn.Einsum(kernel, equation),
        lambda rngs: nnx.Einsum(equation, kernel, bias, rngs=rngs),
        shape,
    )


LAYERS = {
    "dense": Case(nn.Dense(5), lambda rngs: nnx.Linear(7, 5, rngs=rngs), (2, 3, 7)),
    "no bias": Case(
        nn.Dense(5, use_bias=False), lambda rngs: nnx.Linear(7, 5, use_bias=False, rngs=rngs), (7,)
    ),
    "features": Case(
        nn.DenseGeneral((3, 4)), lambda rngs: nnx.LinearGeneral(7, (3, 4), rngs=rngs), (2, 5, 7)
    ),
    "axes": Case(
        nn.DenseGeneral(9, axis=(-1, 1)),
        lambda rngs: nnx.LinearGeneral((3, 4), 9, axis=(-1, 1), rngs=rngs),
        (2, 3, 5, 4),
    ),
    "batch dims": Case(
        nn.DenseGeneral((3, 2), axis=(-2, -1), batch_dims=(0,)),
        lambda rngs: nnx.LinearGeneral((4, 7), (3, 2), axis=(-2, -1), batch_axis={0: 2}, rngs=rngs),
        (2, 5, 4, 7),
    ),
    "einsum": einsum("abc,cde->abde", (7, 3, 4), (3, 4), (2, 5, 7)),
    "einsum that orders": einsum("...cb,dbc->d...", (9, 4, 3), (9,), (2, 5, 3, 4)),
    "einsum of experts": einsum("end,edf->enf", (3, 7, 5), (3, 5), (3, 2, 7)),
    "conv": conv(),
    "conv of one axis": conv(size=(3,), shape=(2, 11, 6), padding="CAUSAL"),
    "conv of three axes": conv(size=(2, 1, 3), shape=(2, 4, 3, 5, 6)),
    "strides": conv(strides=(2, 3), padding="VALID"),
    "padding": conv(padding=((2, 1), (0, 3))),
    "circular": conv(padding="CIRCULAR"),
    "dilation": conv(kernel_dilation=2, input_dilation=(1, 2), padding=2),
    "groups": conv(groups=2),
    "one image": conv(shape=(9, 8, 6)),
    "images of images": conv(shape=(2, 3, 9, 8, 6), strides=2),
    "rematerialised": Case(nn.remat(nn.Conv)(10, (3, 2)), None, (2, 9, 8, 6)),
    "vmapped": Case(
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5),
        None,
        (3, 2, 7),
    ),
    "jitted": Case(nn.jit(nn.Dense)(5), None, (2, 3, 7)),
    "attention": Case(
        nn.MultiHeadDotProductAttention(2),
        lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
        (3, 5, 8),
    ),
}
IN_NNX = {
    *("dense", "no bias", "axes", "batch dims", "einsum that orders", "einsum of experts"),
    *("conv", "circular", "groups", "attention"),
}
"""What NNX is tested with too: its layers hand the same arguments to the same products."""

KINDS = [("linen", name) for name in LAYERS] + [("nnx", name) for name in LAYERS if name in IN_NNX]


class Made(NamedTuple):
    """A layer with random weights as a model, an input, and its own function of its weights and that."""

    model: FlaxModel
    x: jax.Array
    own: Callable[[Any, jax.Array], jax.Array]
    weights: Any


WITH_DORA = {"conv", "attention", "einsum of experts"}
"""Of NNX. Every layer has LoRA, and in Linen DoRA too."""


def drawn(shapes: Any, std: float = 0.25) -> Any:
    """Random arrays of these shapes."""
    zeros = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)
    return helpers.randomised(zeros, std)


def made(kind: str, case: Case) -> Made:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.shape, np.float32))
    if kind == "linen":
        variables = drawn(jax.eval_shape(case.linen.init, jax.random.key(0), x))
        model = from_linen(case.linen, variables, x)
        weights = variables["params"]
        return Made(model, x, lambda w, x: case.linen.apply({"params": w}, x), weights)
    module = case.nnx(nnx.Rngs(0))
    graph, weights = nnx.split(module)
    return Made(from_nnx(module), x, lambda w, x: nnx.merge(graph, w)(x), weights)


class Found(NamedTuple):
    """What one program finds: a layer's own outputs, the model's, and by method the adapters'."""

    own: np.ndarray
    plain: np.ndarray
    methods: dict[str, dict[str, np.ndarray]]


@pytest.fixture(params=KINDS, ids=[f"{kind} {name}" for kind, name in KINDS], scope="module")
def which(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def layer(which) -> Made:
    kind, name = which
    return made(kind, LAYERS[name])


@pytest.fixture(scope="module")
def found(which, layer) -> Found:
    kind, name = which
    names = list(METHODS) if kind == "linen" or name in WITH_DORA else ["lora"]
    return answers(layer, {name: METHODS[name] for name in names})


def answers(layer: Made, methods: dict[str, Peft]) -> Found:
    def first(method, params):
        return method.init(jax.random.key(0), params)

    @jax.jit
    def run(model, weights, x, factors):
        params, by_method = model.params, {}
        for name, method in methods.items():
            start = first(method, params)
            adapter = tree.with_trained(start, factors[name])
            by_method[name] = {
                "start": model.apply(method.attach(params, start), x),
                "attached": model.apply(method.attach(params, adapter), x),
                "merged": model.apply(method.merge(params, adapter), x),
            }
        return Found(layer.own(weights, x), model.apply(params, x), by_method)

    factors = {
        name: drawn(
            jax.eval_shape(lambda p, m=method: tree.trainable(first(m, p)), layer.model.params), 0.5
        )
        for name, method in methods.items()
    }
    return jax.device_get(run(layer.model, layer.weights, layer.x, factors))


def test_a_model_computes_what_its_module_does(found):
    np.testing.assert_array_equal(found.plain, found.own)


def test_kernels_are_matrices_in_the_model_and_come_back_as_they_were(layer):
    for name, leaf in tree.flatten(layer.model.params).items():
        assert not name.endswith("kernel") or leaf.ndim in (2, 3)
    back = layer.model.to_flax()
    back = nnx.state(back) if isinstance(back, nnx.Module) else back["params"]
    jax.tree.map(np.testing.assert_array_equal, back, layer.weights)


def test_an_adapter_starts_as_the_modules_own_function(found):
    for name, outputs in found.methods.items():
        helpers.assert_close({name: outputs["start"]}, {name: found.own}, 1e-6)


def test_attached_and_merged_are_the_same_function(found):
    for name, outputs in found.methods.items():
        helpers.assert_close({name: outputs["attached"]}, {name: outputs["merged"]}, 1e-5)
        assert np.abs(outputs["attached"] - found.own).max() > 0.1


def test_no_matrix_of_the_kernels_size_is_made(layer):
    """Neither A B nor W + A B, forward or backward."""
    model, method = layer.model, METHODS["lora"]

    def loss(adapter):
        return jnp.sum(jnp.square(model.apply(method.attach(model.params, adapter), layer.x)))

    adapter = jax.eval_shape(method.init, jax.random.key(0), model.params)
    made = helpers.shapes_in(jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr)
    kernels = {
        leaf.shape for name, leaf in tree.flatten(model.params).items() if name.endswith("kernel")
    }
    if kernels != {(8, 8)}:  # attention's scores and states may be of that shape
        assert not kernels & made


# --- other weights, other numbers ---------------------------------------------------------------


@pytree
class Scaled(Weight):
    """`scale * w`, which knows nothing of layers."""

    w: Any
    scale: Any

    def __rmatmul__(self, x):
        return x @ self.w * self.scale

    @property
    def shape(self):
        return self.w.shape

    def dense(self):
        return self.w * self.scale


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["axes", "einsum that orders", "groups", "attention"])
def test_any_weight_may_stand_for_a_kernel(kind, name):
    model, x, *_ = made(kind, LAYERS[name])

    def scaled(name, leaf):
        scale = np.full(leaf.shape[:-2], 3.0, np.float32)
        return Scaled(leaf, scale) if name.endswith("kernel") else leaf

    def tripled(name, leaf):
        return leaf * 3 if name.endswith("kernel") else leaf

    @jax.jit
    def run(model, x):
        return [model.apply(tree.map_named(f, model.params), x) for f in (scaled, tripled)]

    found, expected = run(model, x)
    helpers.assert_close({"y": found}, {"y": expected}, 1e-5)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["dense", "einsum", "conv"])
def test_a_base_of_bfloat16_computes_in_bfloat16_with_an_adapter(kind, name):
    model, x, *_ = made(kind, LAYERS[name])
    method = METHODS["lora"]

    def outputs(params, x):
        adapter = method.init(jax.random.key(0), params)
        return model.apply(params, x), model.apply(method.attach(params, adapter), x)

    half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)  # noqa: E731
    plain, adapted = jax.eval_shape(outputs, *jax.tree.map(half, (model.params, x)))
    assert plain.dtype == adapted.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dropout_of_the_adapter_follows_its_key(kind):
    model, x, *_ = made(kind, LAYERS["conv"])
    method = lora(rank=2, target="kernel", dropout=0.5)
    adapter = drawn(jax.eval_shape(method.init, jax.random.key(0), model.params))

    @jax.jit
    def run(model, adapter, x):
        keys = (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
        return [model.apply(method.attach(model.params, adapter, key), x) for key in keys]

    first, again, other, off = jax.device_get(run(model, adapter, x))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - off).max() > 0.1


HIGHEST = jax.lax.Precision.HIGHEST


@pytest.mark.parametrize("precision", [HIGHEST, (HIGHEST, HIGHEST), "highest"])
def test_a_layers_precision_is_that_of_its_products_with_an_adapter(precision):
    x, method = jnp.ones((2, 3)), METHODS["lora"]
    layer = nn.Dense(4, precision=precision)
    model = from_linen(layer, layer.init(jax.random.key(0), x), x)
    params = method.attach(model.params, method.init(jax.random.key(0), model.params))
    products = [
        line for line in str(jax.make_jaxpr(model.apply)(params, x)).split(" = ") if "dot_" in line
    ]
    assert len(products) == 3
    assert all("HIGHEST" in product for product in products)


def test_two_precisions_of_a_product_with_an_adapter_are_refused():
    x, layer = jnp.ones((2, 3)), nn.Dense(4, precision=(jax.lax.Precision.DEFAULT, HIGHEST))
    model = from_linen(layer, layer.init(jax.random.key(0), x), x)
    weights = model.params | {"kernel": Scaled(model.params["kernel"], 1.0)}
    with pytest.raises(ValueError, match=r"precision=\(.*DEFAULT.*HIGHEST.*both operands have one"):
        model.apply(weights, x)


# --- what cannot be adapted ---------------------------------------------------------------------


class Own(nn.Module):
    """A layer of the user's that multiplies by itself."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], 4))


class OwnNnx(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, x):
        return x @ self.kernel[...]


def dot_general(*args, **settings):
    return jax.lax.dot_general(*args, **settings)


REFUSED = {
    "own": (Own(), lambda _: OwnNnx(), "Own.*a way of its own"),
    "transposed": (
        nn.ConvTranspose(4, (3,)),
        lambda rngs: nnx.ConvTranspose(4, 4, (3,), rngs=rngs),
        "ConvTranspose, which computes in a way of its own",
    ),
    "local": (nn.ConvLocal(4, (3,)), None, "ConvLocal"),
    "masked": (
        nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4))),
        lambda rngs: nnx.Conv(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=rngs),
        "masks its kernel",
    ),
    "dot_general": (
        nn.Dense(4, dot_general=dot_general),
        lambda rngs: nnx.Linear(4, 4, dot_general=dot_general, rngs=rngs),
        "dot_general of its own",
    ),
    "sum": (
        nn.Einsum((4, 3), "abc,cd->ab", use_bias=False),
        lambda rngs: nnx.Einsum("abc,cd->ab", (4, 3), rngs=rngs),
        "'abc,cd->ab' sums over 'd' of one operand alone",
    ),
    "diagonal": (
        nn.Einsum((4, 4), "abc,cc->abc", use_bias=False),
        None,
        "'abc,cc->abc' takes a diagonal",
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for name, case in REFUSED.items()
        for kind in ("linen", "nnx")[: 1 + (case[1] is not None)]
    ],
)
def test_a_kernel_that_is_no_matrix_is_refused_with_the_reason(kind, name):
    linen, nnx_layer, message = REFUSED[name]
    model, x, own, weights = made(kind, Case(linen, nnx_layer, (2, 4, 4)))
    np.testing.assert_array_equal(model.apply(model.params, x), own(weights, x))
    weights = model.params | {"kernel": Scaled(model.params["kernel"], 1.0)}
    with pytest.raises(
        ValueError, match=f"'kernel' cannot have an adapter: .*{message}.*leaves it out"
    ):
        model.apply(weights, x)


def test_variables_without_params_are_refused():
    with pytest.raises(ValueError, match=r"the collection 'params'.*\['bias', 'kernel'\]"):
        from_linen(nn.Dense(2), {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, jnp.ones((1, 2)))
