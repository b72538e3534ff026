"""Q8_0 of llama.cpp: eight bits a number and a float16 scale for each block of 32 inputs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jaxtyping import Int8 as Int8Array

from trainjax.quant.format import Format
from trainjax.quant.quantised import Quantised, absmax, blocks_of
from trainjax.types import Blocks, pytree

BLOCK, LARGEST = 32, 127.0


@pytree
class Q80(Quantised):
    """`codes * scales`.

    Attributes:
        codes: from -127 to 127.
        scales: float16, one for each 32 inputs of an output.
    """

    codes: Int8Array[Array, "*stack out in"]
    scales: Float[Array, "*stack out blocks"]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, fan_out, fan_in = self.codes.shape
        return (*stack, fan_in, fan_out)

    def matrix(self, dtype: Any) -> Float[Array, "*stack out in"]:
        codes = self.codes.reshape(*self.scales.shape, BLOCK).astype(jnp.float32)
        numbers = codes * self.scales.astype(jnp.float32)[..., None]
        return numbers.astype(dtype).reshape(self.codes.shape)


@functools.cache
def q8_0() -> Format:
    """Q8_0: 8.5 bits a number. What `gguf.quants.quantize` makes, half away from zero."""
    return Format(_encode)


def from_blocks(blocks: Blocks) -> Q80:
    """The file's bytes, 34 a block: the scale, then the codes."""
    *shape, count, _ = blocks.data.shape
    codes = jax.lax.bitcast_convert_type(blocks.data[..., 2:], jnp.int8)
    scales = jax.lax.bitcast_convert_type(blocks.data[..., :2], jnp.float16)
    return Q80(codes.reshape(*shape, count * BLOCK), scales)


def _encode(rows: Float[Array, "*stack out in"]) -> Q80:
    blocks = blocks_of(rows, BLOCK)
    scales = absmax(blocks) / LARGEST
    scaled = blocks * jnp.where(scales > 0, 1.0 / jnp.where(scales > 0, scales, 1.0), 0.0)
    rounded = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + np.float32(0.5))
    codes = rounded.astype(jnp.int8).reshape(rows.shape)
    return Q80(codes, scales[..., 0].astype(jnp.float16))
