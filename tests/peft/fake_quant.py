"""A quantised matrix for tests: int8 codes and one scale a column."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from trainjax import tree
from trainjax.types import Params, Weight, pytree


@pytree
class Codes(Weight):
    """`codes * scales`."""

    codes: Int8[Array, "*stack in out"]
    scales: Float[Array, "*stack out"]

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        return x @ self.dense().astype(x.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        return self.codes.astype(jnp.float32) * self.scales[..., None, :]


def quantised(params: Params) -> Params:
    """The params with the layers' matrices as codes, which the host computes."""

    def leaf(name: str, w: Any) -> Any:
        if not (name.startswith("layers/") and name.endswith("kernel")):
            return w
        w = np.asarray(w)
        scales = np.abs(w).max(axis=-2) / np.float32(127)
        codes = np.round(w / scales[..., None, :]).astype(np.int8)
        return Codes(jnp.array(codes), jnp.array(scales))

    return tree.map_named(leaf, params)


def dequantised(params: Params) -> Params:
    """The matrices that the codes stand for."""

    def leaf(w: Any) -> Any:
        if not isinstance(w, Codes):
            return w
        return jnp.array(np.asarray(w.codes, np.float32) * np.asarray(w.scales)[..., None, :])

    return jax.tree.map(leaf, params, is_leaf=lambda w: isinstance(w, Codes))
