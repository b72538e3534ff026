"""FP8: e4m3 numbers of eight bits, with a scale for each output or for the matrix."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from trainjax.quant.format import Format
from trainjax.quant.quantised import Quantised, absmax
from trainjax.types import pytree

LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448


@pytree
class Fp8(Quantised):
    """`codes * scales`, the codes floats with three bits of mantissa.

    A weight's error is relative to its own size (at most 1/16), not to the largest of its output as in
    INT8, down to 1/28672 of that one.

    Attributes:
        codes: in `float8_e4m3fn`.
        scales: the largest magnitude of an output's weights, or of all of a matrix, by 448.
    """

    codes: Float[Array, "*stack out in"]
    scales: Float[Array, "*stack outs 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, fan_out, fan_in = self.codes.shape
        return (*stack, fan_in, fan_out)

    def matrix(self, dtype: Any) -> Float[Array, "*stack out in"]:
        return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)


@functools.cache
def fp8(*, per_tensor: bool = False) -> Format:
    """E4M3 weights: 8 bits a number. Products are of the dequantised numbers, in the dtype of `x`.

    Args:
        per_tensor: one scale for a matrix, as hardware that multiplies FP8 itself asks for, and not one for
            each output.

    Source: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3: largest 448, no infinity). Codes and scales
    are those of qwix 0.1.8.
    """
    return Format(functools.partial(_encode, per_tensor=per_tensor))


def _encode(rows: Float[Array, "*stack out in"], *, per_tensor: bool) -> Fp8:
    rows = rows.astype(jnp.float32)
    largest = absmax(rows)
    if per_tensor:
        largest = jnp.max(largest, axis=-2, keepdims=True)
    scales = jnp.where(largest > 0, largest, LARGEST) / LARGEST
    # Rounding must not go past the largest: e4m3 has no infinity, and what is beyond becomes NaN.
    codes = jnp.clip(rows / scales, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
    return Fp8(codes, scales)
