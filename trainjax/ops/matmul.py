"""Matrix products as each platform does them best, and the low-rank product of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from trainjax.derivatives import own_gradient
from trainjax.ops import fp8
from trainjax.types import Weight


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product of two matrices that contracts the given axes, in `a`'s dtype.

    XLA's CPU backend has a kernel for products of bfloat16 summed in float32, which is twice as fast
    as one of float32; asked for a bfloat16 result it casts both operands to float32 instead.
    """
    contract = (((axis_a,), (axis_b,)), ((), ()))
    kind = jnp.float32 if _is_narrow(a) else None
    return lax.dot_general(a, b, contract, preferred_element_type=kind).astype(a.dtype)


def _is_narrow(x: Array) -> bool:
    return jax.default_backend() == "cpu" and x.dtype == jnp.bfloat16


_products = jax.make_user_context("as they are")


def products(*, in_fp8: bool) -> Any:
    """A context in which `matmul` by an array is of 8-bit floats; see `ops.fp8`."""
    return _products("fp8" if in_fp8 else "as they are")


def matmul(x: Float[Array, "rows in"], w: Array | Weight) -> Float[Array, "rows out"]:
    """`x @ w` in x's dtype, for a matrix or what stands for one."""
    if isinstance(w, jax.Array):
        if _products.value == "fp8":
            return fp8.product(x, w)
        return _matmul(x, w) if _is_narrow(x) else x @ w.astype(x.dtype)
    return x @ w


def dense(w: Array | Weight) -> Array:
    """The matrix in float32, as an array."""
    return w.dense() if isinstance(w, Weight) else w.astype(jnp.float32)


def through(
    product: Callable[[Array, Array], Array], x: Array, w: Array | Weight
) -> Float[Array, "*rows out"]:
    """`product(x, w)` for a matrix or what stands for one; see `Weight.through`."""
    return w.through(product, x) if isinstance(w, Weight) else product(x, w.astype(x.dtype))


def rows(take: Callable[[Array], Array], w: Array | Weight) -> Float[Array, "*rows out"]:
    """`take(w)` for a matrix or what stands for one; see `Weight.rows`."""
    return w.rows(take) if isinstance(w, Weight) else take(w)


@own_gradient()
def _matmul(x: Array, w: Array) -> Array:
    """Product whose gradients are `dot`s too; a product that is cast afterwards would have them in float32.

    For bf16 on CPU alone: elsewhere autodiff gives the same products.
    """
    return dot(x, w.astype(x.dtype), 1, 0)


def _matmul_fwd(x: Array, w: Array) -> tuple[Array, Any]:
    return _matmul(x, w), (x, w)


def _matmul_bwd(residuals: Any, g: Array) -> tuple[Array, Array]:
    x, w = residuals
    return dot(g, w.astype(g.dtype), 1, 1), dot(x, g, 0, 0).astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@own_gradient()
def low_rank(
    x: Float[Array, "rows in"], a: Float[Array, "in rank"], b: Float[Array, "rank out"]
) -> Float[Array, "rows out"]:
    """`(x @ a) @ b`, and the gradients of all three.

    The backward pass keeps `x` alone and makes `x @ a` again: it costs `rank / out` of the layer's
    own product and saves an array a layer. `da` is computed as the transpose of `dz.T @ x`, which
    streams the wide `x` once; asked for directly, `x.T @ dz` is 4 times slower on CPU at rank 16.
    """
    return dot(dot(x, a, 1, 0), b, 1, 0)


def _low_rank_fwd(x: Array, a: Array, b: Array) -> tuple[Array, Any]:
    return low_rank(x, a, b), (x, a, b)


def _low_rank_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array]:
    x, a, b = residuals
    dz = dot(g, b, 1, 1)
    # The barrier keeps XLA from folding the transpose back into the slow order.
    da = lax.optimization_barrier(dot(dz, x, 0, 0))
    return dot(dz, a, 1, 1), da.T, dot(dot(x, a, 1, 0), g, 0, 0)


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


def low_rank_of_rows(
    x: Float[Array, "batch seq in"],
    a: Float[Array, " choices in rank"],
    b: Float[Array, " choices rank out"],
    choice: Int[Array, " batch"],
) -> Float[Array, "batch seq out"]:
    """`(x[i] @ a[choice[i]]) @ b[choice[i]]` for each row `i` of a batch, 0 where its choice is below 0.

    The factors are gathered: a row reads its own, whatever others there are. XLA's CPU backend has no
    kernel for batched products of bfloat16, so these are of float32 there.
    """
    kind = jnp.float32 if _is_narrow(x) else x.dtype
    own = jnp.maximum(choice, 0)
    inner = jnp.einsum("bsi,bir->bsr", x.astype(kind), a[own].astype(kind))
    inner = jnp.where((choice >= 0)[:, None, None], inner, jnp.zeros((), kind))
    return jnp.einsum("bsr,bro->bso", inner, b[own].astype(kind)).astype(x.dtype)
