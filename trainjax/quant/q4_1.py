"""Q4_1 of llama.cpp: four bits a number, a float16 step and least number for each block of 32 inputs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from trainjax.quant.format import Format
from trainjax.quant.quantised import Quantised, blocks_of
from trainjax.types import Blocks, pytree

BLOCK, LARGEST = 32, 15.0


@pytree
class Q41(Quantised):
    """`codes * steps + least`, two codes a byte as the file has them.

    Attributes:
        codes: 16 bytes a block: numbers 0 to 15 of it in the lower halves, 16 to 31 in the higher.
        steps, least: float16, one for each 32 inputs of an output.
    """

    codes: UInt8[Array, "*stack out bytes"]
    steps: Float[Array, "*stack out blocks"]
    least: Float[Array, "*stack out blocks"]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, fan_out, half = self.codes.shape
        return (*stack, 2 * half, fan_out)

    def matrix(self, dtype: Any) -> Float[Array, "*stack out in"]:
        packed = self.codes.reshape(*self.steps.shape, 1, BLOCK // 2)
        codes = (packed >> np.array([[0], [4]], np.uint8)) & np.uint8(15)
        steps, least = (x.astype(jnp.float32)[..., None, None] for x in (self.steps, self.least))
        numbers = (codes.astype(jnp.float32) * steps + least).astype(dtype)
        *stack, fan_in, fan_out = self.shape
        return numbers.reshape(*stack, fan_out, fan_in)


@functools.cache
def q4_1() -> Format:
    """Q4_1: 5 bits a number. What `gguf.quants.quantize` makes."""
    return Format(_encode)


def from_blocks(blocks: Blocks) -> Q41:
    """The file's bytes, 20 a block: the step, the least number, then the codes."""
    data = jnp.asarray(blocks.data)
    *shape, count, _ = data.shape
    steps = jax.lax.bitcast_convert_type(data[..., :2], jnp.float16)
    least = jax.lax.bitcast_convert_type(data[..., 2:4], jnp.float16)
    return Q41(data[..., 4:].reshape(*shape, count * (BLOCK // 2)), steps, least)


def _encode(rows: Float[Array, "*stack out in"]) -> Q41:
    blocks = blocks_of(rows, BLOCK)
    least = jnp.min(blocks, axis=-1, keepdims=True)
    steps = (jnp.max(blocks, axis=-1, keepdims=True) - least) / LARGEST
    inverse = jnp.where(steps > 0, 1.0 / jnp.where(steps > 0, steps, 1.0), 0.0)
    codes = jnp.floor((blocks - least) * inverse + np.float32(0.5))
    codes = jnp.clip(codes, 0.0, LARGEST).astype(jnp.uint8)
    half = BLOCK // 2
    packed = codes[..., :half] | (codes[..., half:] << np.uint8(4))
    *shape, fan_in = rows.shape
    return Q41(
        packed.reshape(*shape, fan_in // 2),
        steps[..., 0].astype(jnp.float16),
        least[..., 0].astype(jnp.float16),
    )
