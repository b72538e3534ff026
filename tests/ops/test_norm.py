"""RMS normalisation: the closed form, its gradient, and float32 inside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax.ops.norm import rms_norm


@functools.partial(jax.jit, static_argnums=3)
def with_gradients(x, scale, g, epsilon=1e-5):
    out, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, epsilon), x, scale)
    return out, *pull(g)


def closed_form(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (12,)])
def test_norm_and_its_gradients_are_the_closed_form(shape, epsilon):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, *shape))
    scale = rng.standard_normal(12)
    narrow = (array.astype(np.float32) for array in (x, scale, g))
    out, *pulled = with_gradients(*narrow, epsilon)
    np.testing.assert_allclose(out, closed_form(x, scale, epsilon), rtol=0, atol=2e-6)
    # With r = 1 / sqrt(mean(x^2) + eps): dx_i = r s_i g_i - r^3 x_i mean_j(g_j s_j x_j).
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    dx = r * scale * g - r**3 * x * (g * scale * x).mean(-1, keepdims=True)
    dscale = (g * x * r).reshape(-1, 12).sum(0)
    for found, expected in zip(pulled, (dx, dscale), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_norm_of_bf16_is_computed_in_float32():
    """In bf16 the squares of 256 numbers near 100 would sum with an error of several percent."""
    x = 100 + np.random.default_rng(0).standard_normal((4, 256))
    x16 = x.astype(jnp.bfloat16)
    out, dx, dscale = with_gradients(x16, np.ones(256, np.float32), np.ones_like(x16))
    exact = closed_form(np.asarray(x16, np.float64), 1.0, 1e-5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8)
    assert (dx.dtype, dscale.dtype) == (jnp.bfloat16, jnp.float32)


def test_norm_of_zeros_is_zero_with_a_finite_gradient():
    zeros, ones = np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32)
    out, *gradients = with_gradients(zeros, ones[0], ones)
    assert not np.any(out)
    assert all(np.isfinite(g).all() for g in gradients)
