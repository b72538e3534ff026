"""Products of 8-bit floats: the numbers are those of the formats, simulated where there is no hardware."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from tests import helpers
from trainjax import derivatives, losses, peft, train
from trainjax.ops import fp8
from trainjax.policies import policy

RNG = np.random.default_rng(0)
X = RNG.standard_normal((24, 32)).astype(np.float32)
W = (0.05 * RNG.standard_normal((32, 16))).astype(np.float32)
G = (1e-6 * RNG.standard_normal((24, 16))).astype(np.float32)


def simulated(x, dtype):
    """Rounded to the format by NumPy's own types, in float64."""
    scale = np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)
    return (x / scale).astype(dtype).astype(np.float64) * scale


def test_product_and_gradients_are_those_of_rounded_operands():
    out, pull = jax.vjp(jax.jit(fp8.product), jnp.asarray(X), jnp.asarray(W))
    dx, dw = pull(jnp.asarray(G))
    x, w = (simulated(a, ml_dtypes.float8_e4m3fn) for a in (X, W))
    g = simulated(G, ml_dtypes.float8_e5m2)
    for found, expected in [(out, x @ w), (dx, g @ w.T), (dw, x.T @ g)]:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_rounding_is_what_three_bits_of_mantissa_do():
    error = np.abs(np.asarray(fp8.product(jnp.asarray(X), jnp.asarray(W))) - X @ W)
    assert 0.005 < error.mean() / np.abs(X @ W).mean() < 0.06


def test_scales_keep_tiny_and_huge_numbers():
    out = fp8.product(jnp.asarray(X * 1e-20), jnp.asarray(W * 1e15))
    np.testing.assert_allclose(out * 1e5, fp8.product(jnp.asarray(X), jnp.asarray(W)), rtol=1e-4)
    assert not np.asarray(fp8.product(jnp.zeros((2, 3)), jnp.ones((3, 2)))).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_inputs_dtype_and_gradients_their_own(dtype):
    x, w = jnp.asarray(X, dtype), jnp.asarray(W)
    out, pull = jax.vjp(fp8.product, x, w)
    dx, dw = pull(out)
    assert (out.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)


def test_other_derivatives_are_of_the_product_itself():
    with derivatives.any_order():
        found = jax.jvp(lambda x: fp8.product(x, jnp.asarray(W)), (X,), (X,))[1]
    np.testing.assert_allclose(found, X @ W, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [None, peft.lora(rank=4)], ids=["full", "lora"])
def test_a_model_in_fp8_is_near_and_learns_as_well(method):
    plain = helpers.tiny(std=0.1, remat=None)
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 2, [[0], [1]], 12)
    finals = []
    for model in (plain, plain.with_fp8()):
        params = plain.params if method is None else method.init(jax.random.key(0), plain.params)
        loss = losses.sft(policy(model, method))

        tx = optax.adamw(1e-2)
        state, step = train.init(params, tx), train.make_step(tx)
        values = []
        for _ in range(20):
            state, metrics = step(state, loss, batch)
            values.append(float(metrics["loss"]))
        finals.append(values)
    assert finals[0][0] != finals[1][0]
    assert finals[1][0] == pytest.approx(finals[0][0], rel=0.02)
    assert finals[1][-1] < 0.6 * finals[1][0]
    assert finals[1][-1] == pytest.approx(finals[0][-1], rel=0.15)
