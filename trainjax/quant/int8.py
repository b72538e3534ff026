"""INT8: eight bits a number and a scale for each output."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Int8 as Int8Array

from trainjax.quant.format import Format
from trainjax.quant.quantised import Quantised, absmax
from trainjax.types import pytree

LARGEST = 127.0


@pytree
class Int8(Quantised):
    """`codes * scales`, symmetric around zero.

    Attributes:
        codes: from -127 to 127.
        scales: the largest magnitude of an output's weights, by 127.
    """

    codes: Int8Array[Array, "*stack out in"]
    scales: Float[Array, "*stack out 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, fan_out, fan_in = self.codes.shape
        return (*stack, fan_in, fan_out)

    def matrix(self, dtype: Any) -> Float[Array, "*stack out in"]:
        return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)


@functools.cache
def int8() -> Format:
    """Symmetric INT8 with a scale for each output: 8 bits a number.

    `codes = round(w 127 / max|w|)`, half to even. Codes and scales are those of `int8_vectorwise_quant` of
    bitsandbytes 0.50.2 (which keeps `max|w|` for the scale).
    """
    return Format(_encode)


def _encode(rows: Float[Array, "*stack out in"]) -> Int8:
    rows = rows.astype(jnp.float32)
    largest = absmax(rows)
    inverse = LARGEST / jnp.where(largest > 0, largest, 1.0)
    return Int8(jnp.round(rows * inverse).astype(jnp.int8), largest / LARGEST)
