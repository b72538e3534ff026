"""`x @ w` of a quantised matrix: values, gradients, what is kept, and layouts over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import helpers
from tests.quant.matrices import matrix
from tests.quant.test_formats import FORMATS, dense, encoded
from trainjax import quant
from trainjax.ops.matmul import matmul

X = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32)


@jax.jit
def of_x(x, w, g):
    """The gradient of x where that of `x @ w` is g."""
    _, pullback = jax.vjp(lambda x: matmul(x, w), x)
    return pullback(g)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_dense_matrix(name):
    w = encoded(name, matrix(24, 128))
    expected = helpers.in_float64(lambda x, m: x @ m, X, dense(w))
    np.testing.assert_allclose(np.asarray(jax.jit(matmul)(X, w)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_in_bfloat16_is_of_the_matrix_in_bfloat16(name):
    w = encoded(name, matrix(24, 128))
    x = jnp.asarray(X, jnp.bfloat16)
    y = jax.jit(matmul)(x, w)
    assert y.dtype == jnp.bfloat16
    narrow = np.asarray(dense(w)).astype(jnp.bfloat16)
    expected = helpers.in_float64(lambda x, m: x @ m, x, narrow)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_of_x_is_that_through_the_dense_matrix(name):
    w = encoded(name, matrix(24, 128))
    g = np.random.default_rng(2).standard_normal((6, 24)).astype(np.float32)
    gradient = of_x(X, w, g)
    expected = helpers.in_float64(lambda g, m: g @ m.T, g, dense(w))
    np.testing.assert_allclose(np.asarray(gradient), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["nf4", "int8", "q4_1"])
def test_codes_and_scales_get_no_gradient(name):
    w = encoded(name, matrix(24, 128))
    grads = jax.grad(lambda w: jnp.sum(matmul(jnp.asarray(X), w)), allow_int=True)(w)
    for leaf, grad in zip(jax.tree.leaves(w), jax.tree.leaves(grads), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_array_equal(np.asarray(grad), 0)
        else:
            assert grad.dtype == jax.dtypes.float0


@pytest.mark.parametrize("name", FORMATS)
def test_the_backward_pass_keeps_codes_and_nothing_dense(name):
    w = encoded(name, matrix(24, 128))
    _, pullback = jax.vjp(lambda x: matmul(x, w), jnp.asarray(X))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "nbytes"))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    assert 0 < kept <= held


def test_products_under_vmap_are_those_of_each():
    rows = np.stack([matrix(8, 64), 2 * matrix(8, 64)])
    stack = encoded("nf4", rows)
    x = np.random.default_rng(3).standard_normal((2, 5, 64)).astype(np.float32)
    together = jax.vmap(matmul)(x, stack)
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
        np.testing.assert_allclose(together[index], matmul(jnp.asarray(x[index]), one), atol=1e-5)


SHARDED = P(None, "fsdp", "tensor")


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales_are_split_as_their_matrix(name):
    mesh = helpers.mesh_of(1, 2, 2)
    rows = np.stack([matrix(24, 256), 2 * matrix(24, 256)])
    sharding = NamedSharding(mesh, SHARDED)
    params = {"layers": {"kernel": jax.device_put(np.swapaxes(rows, 1, 2), sharding)}}
    w = quant.quantise(params, FORMATS[name])["layers"]["kernel"]
    assert w.codes.sharding.spec == P(None, "tensor", "fsdp")
    assert w.codes.addressable_shards[0].data.size * 4 == w.codes.size
    assert w.sharding == sharding
    alone = encoded(name, rows)
    for ours, theirs in zip(jax.tree.leaves(w), jax.tree.leaves(alone), strict=True):
        wide = np.float64 if jnp.issubdtype(ours.dtype, jnp.floating) else ours.dtype
        np.testing.assert_allclose(np.asarray(ours, wide), np.asarray(theirs, wide), rtol=3e-7)


@pytest.mark.parametrize("name", ["nf4", "q4_1"])
def test_a_product_over_devices_is_that_on_one(name):
    mesh = helpers.mesh_of(1, 2, 2)
    one = {"layers": {"kernel": jnp.asarray(matrix(24, 256).T)}}
    split = jax.device_put(one, NamedSharding(mesh, P("fsdp", "tensor")))
    x = np.random.default_rng(1).standard_normal((6, 256))
    with jax.enable_x64(True):  # float32 sums in another order differ by as much as the tolerance
        expected, found = (
            jax.jit(matmul)(x, quant.quantise(params, FORMATS[name])["layers"]["kernel"])
            for params in (one, split)
        )
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-5)


def test_what_does_not_divide_is_whole_on_each_device():
    mesh = helpers.mesh_of(1, 4, 1)
    kernel = jax.device_put(matrix(8, 64).T, NamedSharding(mesh, P("fsdp", None)))
    w = quant.quantise({"layers": {"kernel": kernel}}, quant.nf4(double=False))["layers"]["kernel"]
    assert w.codes.sharding.spec == P(None, "fsdp")
    assert w.scales.sharding.spec == P(None, None)  # one block a row


def test_a_matrix_whose_blocks_cross_rows_has_no_layout_of_its_own():
    mesh = helpers.mesh_of(1, 2, 2)
    kernel = jax.device_put(matrix(20, 48).T, NamedSharding(mesh, P("fsdp", "tensor")))
    w = quant.quantise({"layers": {"kernel": kernel}}, quant.nf4())["layers"]["kernel"]
    assert w.sharding.spec == P()
    np.testing.assert_allclose(
        np.asarray(w.dense()), np.asarray(encoded("nf4", matrix(20, 48)).dense()), rtol=1e-6
    )
