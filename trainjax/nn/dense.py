"""A matrix product whose matrix may be anything that knows `x @ w`, and an embedding table."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from trainjax.ops.lookup import lookup
from trainjax.ops.matmul import matmul, rows
from trainjax.types import Weight


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axis, in x's dtype.

    Attributes:
        features: size of the output.
        use_bias: whether there is a bias.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        shape = (x.shape[-1], self.features)
        kernel = weight(self, "kernel", nn.initializers.lecun_normal(), shape)
        # Two-dimensional on purpose: XLA's CPU backend differentiates a product over [batch, seq, in]
        # into one that is 1.9 times slower than over [batch * seq, in].
        flat = x.reshape(-1, x.shape[-1])
        y = matmul(flat, kernel)
        if isinstance(kernel, Weight) and self.is_mutable_collection("reports"):
            for name, value in kernel.reports(flat).items():
                self.sow("reports", name, value, reduce_fn=latest, init_fn=lambda: None)
        if self.use_bias:
            y += weight(self, "bias", nn.initializers.zeros, shape[1:]).astype(x.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def latest(old: Any, new: Any) -> Any:
    """The later of two values that a layer leaves under one name."""
    return new


class Embed(nn.Module):
    """Rows of a table, by token id.

    Attributes:
        num_embeddings, features: the table's shape.
        dtype: what the rows are returned in.
        mesh: the mesh that table and tokens are laid out over, or None.
    """

    num_embeddings: int
    features: int
    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch seq"], parts: int = 1
    ) -> Float[Array, "batch seq embed"]:
        shape = (self.num_embeddings, self.features)
        table = weight(self, "embedding", nn.initializers.normal(0.02), shape)
        return rows(
            lambda table: lookup(table, tokens, dtype=self.dtype, mesh=self.mesh, parts=parts),
            table,
        )


def weight(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """The module's parameter, which is declared at init and only read afterwards.

    Linen's own `param` compares shapes leaf by leaf, so it refuses a `Weight` in an array's place.
    """
    if module.is_initializing():
        return module.param(name, init, shape, jnp.float32)
    return module.get_variable("params", name)
