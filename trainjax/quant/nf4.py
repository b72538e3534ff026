"""NF4: four bits a number, the quantiles of a normal distribution, a scale for each block of 64."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from trainjax.quant.format import Format
from trainjax.quant.quantised import Quantised, absmax
from trainjax.types import pytree, static

BLOCK, OUTER = 64, 256

TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""What the codes 0 to 15 stand for (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


def _dynamic_table() -> np.ndarray:
    """256 numbers: zero, one, and for each of seven decades twice as many as for the one below it."""
    positive = []
    for decade in range(7):
        edges = _linspace(np.float32(0.1), np.float32(1.0), 2**decade + 1)
        centres = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (decade - 6)) * centres)
    half: np.ndarray = np.concatenate(positive)
    return np.sort(np.concatenate([half, -half, np.array([0.0, 1.0], np.float32)]))


def _linspace(first: np.float32, last: np.float32, count: int) -> np.ndarray:
    """As torch rounds it: from both ends to the middle, by a step in float32."""
    step = np.float64((last - first) / np.float32(count - 1))
    place = np.arange(count)
    ends = np.float64(first) + step * place, np.float64(last) - step * (count - 1 - place)
    return np.where(place < count // 2, *ends).astype(np.float32)


DYNAMIC = _dynamic_table()
"""What the codes of scales stand for: `create_dynamic_map()` of bitsandbytes."""


@pytree
class Scales:
    """The scales of blocks in eight bits each: `dynamic[codes] * absmax + offset`.

    Attributes:
        codes: one a block.
        absmax: one for each 256 codes in a row, whatever the rows of the matrix.
        offset: the mean of the scales, taken away before.
    """

    codes: UInt8[Array, "*stack rows blocks"]
    absmax: Float[Array, "*stack outer"]
    offset: Float[Array, "*stack"]

    def decoded(self) -> Float[Array, "*stack rows blocks"]:
        """The scales in float32."""
        *stack, rows, blocks = self.codes.shape
        outer = jnp.repeat(self.absmax, OUTER, axis=-1)[..., : rows * blocks]
        values = jnp.asarray(DYNAMIC).at[self.codes].get(mode="promise_in_bounds")
        return values * outer.reshape(*stack, rows, blocks) + self.offset[..., None, None]


@pytree
class Nf4(Quantised):
    """A matrix in NF4, two codes a byte.

    Where 64 does not divide the inputs, blocks run on from one output to the next as in bitsandbytes:
    the matrix is held as one long row then, with zeros at its end where it is no whole block.

    Attributes:
        codes: the earlier number in the higher half of the byte.
        scales: the largest magnitude of each block, as it is or as `Scales`.
        sides: inputs and outputs of the matrix.
    """

    codes: UInt8[Array, "*stack rows bytes"]
    scales: Float[Array, "*stack rows blocks"] | Scales
    sides: tuple[int, int] = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.sides)

    def matrix(self, dtype: Any) -> Float[Array, "*stack out in"]:
        scales = self.scales.decoded() if isinstance(self.scales, Scales) else self.scales
        # One array of codes and no second for the lower halves: XLA then makes the numbers in one loop.
        codes = (self.codes[..., None] >> np.array([4, 0], np.uint8)) & np.uint8(15)
        values = jnp.asarray(TABLE).at[codes].get(mode="promise_in_bounds")
        numbers = values.reshape(*scales.shape, BLOCK) * scales[..., None]
        return _unrolled(numbers.astype(dtype), self.shape)


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def nf4(*, double: bool = True) -> Format:
    """NF4 in blocks of 64: 4.5 bits a number, or 4.13 with the scales in eight bits (`double`).

    Args:
        double: quantise the scales too, in blocks of 256 around their mean.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. Codes and scales are bit by bit those of
    bitsandbytes 0.50.2, `quantize_4bit(w, blocksize=64, quant_type="nf4")`. With `double` so are the
    codes of scales, if its eight-bit kernel is the one for GPUs or for float64; the kernel for float32
    on CPU does not always take the nearest.
    """
    return Format(functools.partial(_encode, double=double))


def _encode(rows: Float[Array, "*stack out in"], *, double: bool) -> Nf4:
    blocks = _rolled(rows)
    scales = absmax(blocks)
    codes = _nearest(_scaled(blocks, scales), TABLE).reshape(*blocks.shape[:-2], -1)
    packed = (codes[..., ::2] << np.uint8(4)) | codes[..., 1::2]
    fan_out, fan_in = rows.shape[-2:]
    scales = scales[..., 0]
    return Nf4(packed, _encode_scales(scales) if double else scales, (fan_in, fan_out))


def _encode_scales(scales: Float[Array, "*stack rows blocks"]) -> Scales:
    *stack, rows, count = scales.shape
    offset = jnp.mean(scales, axis=(-2, -1))
    flat = (scales - offset[..., None, None]).reshape(*stack, rows * count)
    padding = [(0, 0)] * len(stack) + [(0, -flat.shape[-1] % OUTER)]
    blocks = jnp.pad(flat, padding).reshape(*stack, -1, OUTER)
    outer = absmax(blocks)
    codes = _nearest(_scaled(blocks, outer), DYNAMIC).reshape(*stack, -1)
    return Scales(codes[..., : rows * count].reshape(scales.shape), outer[..., 0], offset)


def _scaled(blocks: Array, scales: Array) -> Array:
    """The blocks with magnitudes of at most 1; blocks of zeros stay."""
    # By the reciprocal, as in bitsandbytes: a division would round some numbers to another code.
    return jnp.clip(blocks * (1.0 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)), -1.0, 1.0)


def _nearest(x: Array, table: np.ndarray) -> UInt8[Array, "..."]:
    """The number's place in a sorted table: of the nearest entry, the lower one of two."""
    middles = jnp.asarray((table[:-1] + table[1:]) / np.float32(2))
    if len(table) > 16:
        return jnp.searchsorted(middles, x, method="scan").astype(jnp.uint8)
    # Comparisons in a row run in one loop, without an array for each.
    return sum((x > middle).astype(jnp.uint8) for middle in middles)


def _rolled(rows: Float[Array, "*stack out in"]) -> Float[Array, "*stack rows blocks 64"]:
    *stack, fan_out, fan_in = rows.shape
    rows = rows.astype(jnp.float32)
    if fan_in % BLOCK:
        padding = [(0, 0)] * len(stack) + [(0, 0), (0, -fan_out * fan_in % BLOCK)]
        rows = jnp.pad(rows.reshape(*stack, 1, fan_out * fan_in), padding)
    return rows.reshape(*rows.shape[:-1], -1, BLOCK)


def _unrolled(blocks: Array, shape: tuple[int, ...]) -> Float[Array, "*stack out in"]:
    *stack, fan_in, fan_out = shape
    if fan_in % BLOCK:
        blocks = blocks.reshape(*stack, -1)[..., : fan_out * fan_in]
    return blocks.reshape(*stack, fan_out, fan_in)
