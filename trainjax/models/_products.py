"""What a Flax layer computes with its kernel, for a `Weight` in the kernel's place.

A layer of Flax does everything but the product itself: it promotes, pads, adds the bias. The product is
one of three functions of JAX, and these are they.
"""

from __future__ import annotations

import contextlib
import math
import string
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from trainjax.models._layouts import Layout, letters
from trainjax.ops.matmul import matmul, through
from trainjax.types import Weight


def dot_general(
    layout: Layout, x: Array, w: Weight, axes: Sequence[int], batch: Sequence[int], precision: Any
) -> Array:
    """`lax.dot_general` of x and a stack of matrices: `[*batch, *rest of x, *outer]`.

    Args:
        layout: of the kernel.
        x: the layer's input.
        w: `[*batch, in, out]`.
        axes: of x that are summed over, in the order of the kernel's.
        batch: of x that have a matrix each.
        precision: as in `jax.lax.dot_general`.
    """
    rest = [axis for axis in range(x.ndim) if axis not in (*axes, *batch)]
    places, free = ([x.shape[axis] for axis in group] for group in (batch, rest))
    fan_in = math.prod(layout.sizes(layout.inner))
    rows = x.transpose(*batch, *rest, *axes).reshape(*places, math.prod(free), fan_in)
    product: Callable[[Array, Weight], Array] = matmul
    for _ in batch:
        product = jax.vmap(product)
    with _at(precision):
        y = product(rows, w)
    return y.reshape(*places, *free, *layout.sizes(layout.outer))


def einsum(layout: Layout, equation: str, x: Array, w: Weight, precision: Any) -> Array:
    """`einsum(equation, x, kernel)`."""
    x_letters, kernel, out = letters(equation)
    unused = [c for c in string.ascii_letters if c not in equation]
    extra = "".join(unused[: x.ndim - len(x_letters.replace("...", ""))])
    x_letters, out = x_letters.replace("...", extra), out.replace("...", extra)
    batch, inner, outer = (
        [kernel[axis] for axis in axes] for axes in (layout.batch, layout.inner, layout.outer)
    )
    axes, places = ([x_letters.index(c) for c in group] for group in (inner, batch))
    y = dot_general(layout, x, w, axes, places, precision)
    made = [*batch, *(c for c in x_letters if c not in (*batch, *inner)), *outer]
    return y.transpose([made.index(c) for c in out])


def conv(layout: Layout, own: Callable[..., Array], x: Array, w: Weight, **settings: Any) -> Array:
    """A convolution of x, channels last, with the matrix of the kernel `[*window, in / groups, out]`.

    Args:
        layout: of the kernel.
        own: `lax.conv_general_dilated`, or what the layer has in its place.
        x: `[batch, *space, in]`.
        w: `[*window * in, out]`, or one such matrix a group.
        **settings: the convolution's.
    """
    groups = settings.pop("feature_group_count")
    window = layout.sizes(layout.inner)

    def product(x: Array, matrix: Array) -> Array:
        return own(x, matrix.reshape(*window, matrix.shape[-1]), **settings)

    if not layout.batch:
        return through(product, x, w)
    apart = x.reshape(*x.shape[:-1], groups, -1)
    each = jax.vmap(lambda x, w: through(product, x, w), in_axes=(-2, 0), out_axes=-2)(apart, w)
    return each.reshape(*each.shape[:-2], -1)


def stand_in(w: Weight) -> Array | None:
    """A number of the dtype that the kernel has in the promotion of a layer's arrays, if it has one.

    That of the frozen matrix, which is the first array of a `Weight`; codes of a quantised one are no
    numbers to compute with, and its products are in the input's dtype.
    """
    first = jax.tree.leaves(w)[0].dtype
    return jnp.zeros((), first) if jnp.issubdtype(first, jnp.floating) else None


def _at(precision: Any) -> AbstractContextManager[Any]:
    """The layer's own precision of products, if it has one."""
    if isinstance(precision, tuple):
        first, second = precision
        if first != second:
            raise ValueError(
                f"precision={precision} of a layer with an adapter: both operands have one and the same"
            )
        precision = first
    if precision is None:
        return contextlib.nullcontext()
    name = precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
    return jax.default_matmul_precision(name)
