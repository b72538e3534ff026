"""What all formats share: a quantised matrix as a `Weight`, its product, its layout over devices."""

from __future__ import annotations

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from trainjax.derivatives import own_gradient
from trainjax.ops.matmul import dot
from trainjax.types import Weight


class Quantised(Weight):
    """A frozen matrix in fewer bits, as checkpoints hold it: outputs first, blocks along the inputs.

    A format is a final `pytree` of arrays. The first field is `codes`, of shape `[*stack, out, n]` with
    n codes or bytes of them for the inputs; scales are `[*stack, out, m]`, or of lower rank where they
    are too few to be split over devices.
    """

    codes: Any

    @abc.abstractmethod
    def matrix(self, dtype: Any) -> Float[Array, "*stack out in"]:
        """The numbers that the codes stand for, computed in float32 and rounded to the dtype."""

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        return product(x, self)

    def dense(self) -> Float[Array, "*stack in out"]:
        """The dequantised matrix in float32: what products with it are of, not what it was made from."""
        return jnp.swapaxes(self.matrix(jnp.float32), -1, -2)

    @property
    def sharding(self) -> Sharding:
        """How the matrix `[*stack, in, out]` is laid out over devices, as its codes are."""
        sharding = self.codes.sharding
        if not isinstance(sharding, NamedSharding):
            return sharding
        if (
            self.codes.shape[-2] != self.shape[-1]
        ):  # flattened: its axes are not those of the matrix
            return NamedSharding(sharding.mesh, PartitionSpec())
        return NamedSharding(sharding.mesh, _turned(sharding, len(self.shape)))


@own_gradient()
def product(x: Float[Array, "rows in"], w: Quantised) -> Float[Array, "rows out"]:
    """`x @ w` in x's dtype. Each pass dequantises anew, so that nothing dense is kept between them.

    The gradient is of `x` alone: that of codes and scales is none (symbolic zeros, of the type `float0`
    for integers), so the backward pass does no work for them.
    """
    return dot(x, w.matrix(x.dtype), 1, 1)


def _forward(x: Array, w: Quantised) -> tuple[Array, Quantised]:
    return product(x, w), w


def _backward(w: Quantised, g: Array) -> tuple[Array, None]:
    # The barrier keeps XLA from finding that the forward pass, which remat puts just before this one, has
    # dequantised the same codes: it would keep each matrix from there to here.
    g, w = lax.optimization_barrier((g, w))
    return dot(g, w.matrix(g.dtype), 1, 0), None


product.defvjp(_forward, _backward)


def layout(w: Quantised, sharding: Sharding) -> Any:
    """A sharding for each array of a quantised matrix (or of its shapes), from that of the matrix.

    An axis of the mesh that does not divide an array's axis is left out, as in `parallel.spec`.

    Args:
        w: the matrix, or a pytree like it of `ShapeDtypeStruct`.
        sharding: of the matrix `[*stack, in, out]`.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, w)
    rank = len(w.shape)
    turned = _turned(sharding, rank)

    def leaf(x: Any) -> NamedSharding:
        whole = (None,) * (x.ndim - rank + 2)  # of the last axes; the stack's come first
        axes = turned if x.ndim == rank else (*turned[: rank - 2], *whole)
        return NamedSharding(
            sharding.mesh, PartitionSpec(*map(_if_divides(sharding), axes, x.shape))
        )

    return jax.tree.map(leaf, w)


def _turned(sharding: NamedSharding, rank: int) -> PartitionSpec:
    """The spec with the last two axes exchanged."""
    spec = tuple(sharding.spec)
    *stack, first, second = spec + (None,) * (rank - len(spec))
    return PartitionSpec(*stack, second, first)


def _if_divides(sharding: NamedSharding) -> Any:
    def axis(name: Any, size: int) -> Any:
        names = name if isinstance(name, tuple) else () if name is None else (name,)
        return name if size % math.prod(sharding.mesh.shape[n] for n in names) == 0 else None

    return axis


def absmax(rows: Float[Array, "*stack n"]) -> Float[Array, "*stack 1"]:
    """The largest magnitude along the last axis."""
    return jnp.max(jnp.abs(rows), axis=-1, keepdims=True)


def blocks_of(
    rows: Float[Array, "*stack out in"], size: int
) -> Float[Array, "*stack out blocks size"]:
    """The rows in float32, cut into blocks.

    Raises:
        ValueError: the blocks do not divide a row.
    """
    *shape, fan_in = rows.shape
    if fan_in % size:
        raise ValueError(f"its {fan_in} inputs are not whole blocks of {size}")
    return rows.astype(jnp.float32).reshape(*shape, fan_in // size, size)
