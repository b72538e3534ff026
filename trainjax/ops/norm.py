"""Root-mean-square normalisation with a gradient that keeps only the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from trainjax.derivatives import own_gradient


@own_gradient(nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*rows embed"], scale: Float[Array, " embed"], epsilon: float = 1e-5
) -> Float[Array, "*rows embed"]:
    """`x / sqrt(mean(x^2) + epsilon) * scale`, computed in float32, returned in x's dtype.

    The backward pass recomputes the normaliser instead of storing it and its by-products, which
    autodiff would do at three arrays of x's size.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; epsilon inside the root as in Llama.
    """
    return _normalised(x, epsilon)[0].astype(x.dtype) * scale.astype(x.dtype)


def _normalised(x: Array, epsilon: float) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * inverse, inverse


def _row_means(product: Array) -> Array:
    """The mean over the last axis, kept.

    XLA's CPU backend turns a sum of products into as many products of a row and a column, 8 times
    slower than one product with a column of ones.
    """
    if jax.default_backend() != "cpu":
        return jnp.mean(product, axis=-1, keepdims=True)
    size = product.shape[-1]
    return product @ jnp.full((size, 1), 1.0 / size, product.dtype)


def _fwd(x, scale, epsilon):
    return rms_norm(x, scale, epsilon), (x, scale)


def _bwd(epsilon, residuals, g):
    x, scale = residuals
    unit, inverse = _normalised(x, epsilon)
    g = g.astype(jnp.float32)
    g_unit = g * scale.astype(jnp.float32)
    dx = inverse * (g_unit - unit * _row_means(g_unit * unit))
    dscale = jnp.sum((g * unit).reshape(-1, x.shape[-1]), axis=0)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_fwd, _bwd)
