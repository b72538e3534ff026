"""A format as functions, and params with their matrices in one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trainjax import tree
from trainjax.quant.quantised import Quantised, layout
from trainjax.types import Checkpoint, Params

LAYERS = r"^layers/.*kernel$"
"""The matrices of the layers: not embeddings, norms, biases and the output head."""


def plain(checkpoint: Checkpoint, tensor: str) -> np.ndarray:
    """A tensor that can be quantised, on the host.

    Raises:
        ValueError: its numbers are no floats, or some of them not finite.
    """
    value = checkpoint.read(tensor)
    _check_dtype(tensor, value.dtype)
    if not np.isfinite(value).all():
        raise ValueError(_not_finite(tensor))
    return value


class Format(NamedTuple):
    """How matrices are kept in memory, as pure functions.

    Attributes:
        encode: `(rows) -> Quantised`, of a matrix `[*stack, out, in]` or of what `read` gives.
        read: `(checkpoint, tensor)`: a tensor on the host, as `encode` takes it.
    """

    encode: Callable[[Any], Quantised]
    read: Callable[[Checkpoint, str], Any] = plain


def quantise(params: Params, to: Format, target: str = LAYERS) -> Params:
    """The params with the matrices whose name matches in another format; one at a time is in both.

    To load a model so that it never is in memory as it was, use `load(source, quantise=format)`.

    Args:
        params: with plain arrays.
        to: `nf4()`, `int8()` and the like.
        target: regex over names.

    Raises:
        ValueError: a matrix that is quantised already, or anything but an array; of integers; with a
            number that is not finite; that blocks do not fit; each by name.
    """
    found = {name: _quantised(name, w, to) for name, w in tree.select(params, target).items()}
    return tree.replace(params, found)


def dense(params: Params, dtype: Any = jnp.float32) -> Params:
    """The params with arrays in the place of quantised matrices: what products with these are of.

    Not what they were made from; rounding to a few bits cannot be undone.
    """
    return tree.map_named(
        lambda name, w: _dense(w, dtype) if isinstance(w, Quantised) else w, params
    )


@functools.partial(jax.jit, static_argnums=1)
def _dense(w: Quantised, dtype: Any) -> Array:
    return w.dense().astype(dtype)


def _quantised(name: str, w: Any, to: Format) -> Quantised:
    if not isinstance(w, jax.Array):
        raise ValueError(f"{name} is a {type(w).__name__} already; only an array can be quantised")
    _check_dtype(name, w.dtype)
    if not bool(jnp.isfinite(w).all()):
        raise ValueError(_not_finite(name))
    encode = functools.partial(_turned, to.encode)
    try:
        shardings = layout(jax.eval_shape(encode, w), w.sharding)
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantised: {error}") from error
    return jax.jit(encode, out_shardings=shardings)(w)


def _turned(encode: Callable[[Any], Quantised], w: Float[Array, "*stack in out"]) -> Quantised:
    return encode(jnp.swapaxes(w, -1, -2))


def _check_dtype(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} is of {dtype}; only floating-point numbers can be quantised")


def _not_finite(name: str) -> str:
    return f"{name} holds a number that is not finite, which no scale can express; is the file damaged?"
