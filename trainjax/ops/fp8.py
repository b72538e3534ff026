"""Matrix products of 8-bit floats, with scales found as they are made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from trainjax.derivatives import is_any_order, own_gradient

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


def narrowed(x: Array, dtype: Any) -> tuple[Array, Float[Array, ""]]:
    """`x / scale` in an 8-bit format, and the scale: the largest magnitude over the format's largest number.

    Args:
        x: of any shape.
        dtype: `FORWARD` has three bits of mantissa and ends at 448, `BACKWARD` two, and ends at 57344.
    """
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x))
    scale = jnp.where(top > 0, top, 1.0) / float(jnp.finfo(dtype).max)
    return (x / scale).astype(dtype), scale


def product(x: Float[Array, "rows in"], w: Float[Array, "in out"]) -> Float[Array, "rows out"]:
    """`x @ w` of 8-bit operands, summed in float32, in x's dtype; its gradients are such products too.

    Activations and weights are e4m3, their gradients e5m2, each with one scale an array that is found
    anew every time (current scaling, so that no history is to be kept). Between forward and backward
    pass the operands are kept in 8 bits. Nvidia from Ada and Hopper on and TPUs from v7 on have such
    products; elsewhere the numbers are the same, and nothing is faster.

    Args:
        x: any float dtype.
        w: any float dtype; in training float32, which stays the master.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, sections 3 and 4.
    """
    return x @ w.astype(x.dtype) if is_any_order() else _product(x, w)


@own_gradient()
def _product(x: Array, w: Array) -> Array:
    return _forward(x, w)[0]


def _forward(x: Array, w: Array) -> tuple[Array, Any]:
    narrow_x, narrow_w = narrowed(x, FORWARD), narrowed(w, FORWARD)
    out = _dot(narrow_x, narrow_w, 1, 0).astype(x.dtype)
    kinds = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype)
    return out, (narrow_x, narrow_w, kinds)


def _backward(residuals: Any, g: Array) -> tuple[Array, Array]:
    narrow_x, narrow_w, (of_x, of_w) = residuals
    narrow_g = narrowed(g, BACKWARD)
    dx, dw = _dot(narrow_g, narrow_w, 1, 1), _dot(narrow_x, narrow_g, 0, 0)
    return dx.astype(of_x.dtype), dw.astype(of_w.dtype)


_product.defvjp(_forward, _backward)


def _dot(a: tuple[Array, Array], b: tuple[Array, Array], axis_a: int, axis_b: int) -> Array:
    (x, scale_x), (y, scale_y) = a, b
    if jax.default_backend() == "cpu":  # no such product there, and sums in float32 are what it is
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    contract = (((axis_a,), (axis_b,)), ((), ()))
    out = lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)
    return out * (scale_x * scale_y)
