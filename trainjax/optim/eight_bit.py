"""Optimizer states in 8 bits: dynamic codes with a scale for each block of a row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from trainjax import tree
from trainjax.optim.settings import settings_of
from trainjax.types import Params, pytree, static

_DECADES = 7


@pytree
class EightBit:
    """An array in 8 bits: `value = code's number * scale of its block`.

    A code's number is 0, 1, or `10^-d (0.1 + 0.9 (j + 1/2) / n)`, the middle of one of n equal parts of
    decade d: fine near 1 and seven decades deep. Signed codes have a half of the parts, for each sign.

    Attributes:
        codes: of the array's shape, so that it is laid out over devices as the array.
        scales: the largest magnitude of each block of the last axis.
        signed: whether there are negative numbers.

    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2; the numbers are bitsandbytes' dynamic map.
    Blocks divide the last axis here (up to 256 entries) and do not run over rows.
    """

    codes: UInt8[Array, "*shape"]
    scales: Float[Array, "*blocks"]
    signed: bool = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        return self.codes.shape

    @classmethod
    def of(cls, x: Float[Array, "*shape"], *, signed: bool, block: int) -> EightBit:
        """The nearest codes."""
        blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
        # The compiler for CPUs would write abs(x) to memory for the sake of one maximum.
        scales = jnp.maximum(jnp.max(blocks, axis=-1), -jnp.min(blocks, axis=-1))
        unit = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
        return cls(nearest(unit, signed=signed).reshape(x.shape), scales, signed)

    def like(self, x: Float[Array, "*shape"]) -> EightBit:
        """Another array, in codes and blocks as these."""
        return self.of(x, signed=self.signed, block=self.codes.shape[-1] // self.scales.shape[-1])

    def value(self) -> Float[Array, "*shape"]:
        """The array, in float32."""
        blocks = numbers(self.codes, signed=self.signed).reshape(*self.scales.shape, -1)
        return (blocks * self.scales[..., None]).reshape(self.shape)


def nearest(x: Array, *, signed: bool) -> Array:
    """The code whose number is nearest to x in [-1, 1] ([0, 1] without sign).

    Decade d has n = 2^(6 - d) parts (twice as many without sign), and the numbers are ordered so that a
    code is n + j: 64 to 127 are the first decade. Where a decade's lowest number and the highest of the
    next meet, halfway between them decides.
    """
    size, parts = jnp.abs(x), 1 if signed else 2
    first = jnp.full(x.shape, 1e-6, jnp.float32)
    count = jnp.full(x.shape, float(parts), jnp.float32)
    for power in range(1, _DECADES):
        # This decade's lowest number is 0.1 + 0.45 / n, the highest of the one below it, a tenth as large,
        # 0.1 - 0.045 / (n / 2).
        n = parts * 2.0**power
        top = 10.0 ** (power - _DECADES + 1)
        above = size > top * (0.1 + (0.45 - 0.09) / 2 / n)
        first, count = jnp.where(above, top, first), jnp.where(above, n, count)
    part = jnp.floor((size / first - 0.1) / 0.9 * count)
    code = count + jnp.clip(part, 0, count - 1)
    last = parts * 2.0 ** (_DECADES - 1)
    code = jnp.where(size < 1e-6 * (0.1 + 0.45 / parts) / 2, 0.0, code)
    is_one = size > (2.0 - 0.45 / last) / 2
    if signed:
        code = jnp.where(is_one, _ONE, code)
        negative = (x < 0) & (code > 0)  # there is no code for -1: it is the nearest number above
        code = jnp.where(negative, 128.0 + jnp.where(is_one, 2 * last - 1, code), code)
    else:
        code = jnp.where(is_one, 1.0, code)
    return code.astype(jnp.uint8)


def numbers(codes: Array, *, signed: bool) -> Array:
    """The codes' numbers in [-1, 1], the inverse of `nearest` up to rounding."""
    return jnp.take(jnp.asarray(table(signed=signed)), codes.astype(jnp.int32))


def table(*, signed: bool) -> np.ndarray:
    """The numbers of the 256 codes."""
    parts = 1 if signed else 2
    found = np.zeros(256, np.float32)
    for power in range(_DECADES):
        n = parts * 2**power
        middle = 0.1 + 0.9 * (np.arange(n) + 0.5) / n
        found[n : 2 * n] = 10.0 ** (power - _DECADES + 1) * middle
    if signed:
        found[129:] = -found[1:128]
        found[_ONE] = 1.0
    else:
        found[1] = 1.0
    return found


_ONE = 128  # of signed codes: what would be minus nothing


def in_eight_bits(
    tx: optax.GradientTransformation,
    *,
    block: int = 256,
    at_least: int = 4096,
    elementwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose state is kept in 8 bits between steps: a quarter of the memory of float32.

    Every array of the state with `at_least` numbers is stored as codes; the optimizer computes with what
    they stand for. Averages of squares (states called `nu`) have codes without a sign. Arrays whose last
    axis has no divisor between 16 and `block` stay as they are.

        tx = tj.optim.in_eight_bits(optax.adamw(1e-4), elementwise=True)

    Args:
        tx: any optimizer.
        block: numbers that share a scale, at the most.
        at_least: smaller arrays stay in float32; in bitsandbytes 4096.
        elementwise: `tx` treats every number by itself, as AdamW and Lion do; Muon and LAMB do not. Then
            the state is decoded one array at a time, and a stack of layers one layer at a time: less
            memory and time.

    Source: Dettmers et al. 2022, arXiv:2110.02861.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        def packed(name: str, x: Any) -> Any:
            if not _is_large(x, at_least) or (size := _block(x.shape[-1], block)) is None:
                return x
            return EightBit.of(x, signed="nu" not in name.split("/"), block=size)

        # Behind the barrier, the compiler does not work out the codes of millions of known zeros.
        return tree.map_named(packed, jax.lax.optimization_barrier(tx.init(params)))

    def update(updates: Params, state: Any, params: Any = None, **extra: Any) -> Any:
        values = jax.tree.map(lambda x: x.value() if is_packed(x) else x, state, is_leaf=is_packed)
        updates, new = tx.update(updates, values, params, **extra)
        like = lambda old, x: old.like(x) if is_packed(old) else x  # noqa: E731
        return updates, jax.tree.map(like, state, new, is_leaf=is_packed)

    if elementwise:
        return optax.GradientTransformationExtraArgs(init, functools.partial(_by_array, update))
    return optax.GradientTransformationExtraArgs(init, update)


def is_packed(x: Any) -> bool:
    """Whether a node of a state is an array in 8 bits."""
    return isinstance(x, EightBit)


def _by_array(
    update: Callable[..., Any], updates: Params, state: Any, params: Any = None, **extra: Any
) -> tuple[Params, Any]:
    """An elementwise `update` that is shown one array at a time."""
    grads: list[Array]
    structure: Any
    grads, structure = jax.tree.flatten(updates)
    if not grads:
        return update(updates, state, params, **extra)
    values = [None] * len(grads) if params is None else jax.tree.leaves(params)

    def is_moment(part: Any) -> bool:
        arrays, of_part = jax.tree.flatten(part, is_leaf=is_packed)
        return structure == of_part and [x.shape for x in arrays] == [x.shape for x in grads]

    # The state in parts: moments, which have an array for each of the params, and the rest, such as counts.
    whole: Any
    parts, whole = jax.tree.flatten(state, is_leaf=is_moment)
    moments = {
        n: jax.tree.leaves(x, is_leaf=is_packed) for n, x in enumerate(parts) if is_moment(x)
    }
    rest = {n: x for n, x in enumerate(parts) if not is_moment(x)}

    def join(moments: dict[int, Any], rest: dict[int, Any]) -> Any:
        return jax.tree.unflatten(whole, [x for _, x in sorted((moments | rest).items())])

    def of_array(n: int) -> tuple[dict[int, Any], dict[int, Any]]:
        def alone(leaf: Any) -> Any:
            nothing = [optax.MaskedNode()] * len(grads)
            return jax.tree.unflatten(structure, [*nothing[:n], leaf, *nothing[n + 1 :]])

        def step(arrays: dict[int, Any], rest: dict[int, Any], value: Any) -> Any:
            trees = {key: alone(x) for key, x in arrays.items()}
            param = None if value is None else alone(value)
            new, state = update(trees.pop(_GRAD), join(trees, rest), param, **extra)
            new = {_GRAD: new} | dict(enumerate(whole.flatten_up_to(state)))
            arrays = {key: jax.tree.leaves(new[key], is_leaf=is_packed)[0] for key in arrays}
            return arrays, {key: new[key] for key in rest}

        arrays = {_GRAD: grads[n]} | {key: x[n] for key, x in moments.items()}
        return _in_pieces(step, arrays, rest, values[n])

    done = [of_array(n) for n in range(len(grads))]
    trees = {key: jax.tree.unflatten(structure, [x[key] for x, _ in done]) for key in done[0][0]}
    return trees.pop(_GRAD), join(trees, done[0][1])


_GRAD = -1  # the update's place beside those of the moments


def _in_pieces(
    f: Callable[..., Any], arrays: dict[int, Any], rest: dict[int, Any], value: Any
) -> tuple[dict[int, Any], dict[int, Any]]:
    """`f(arrays, rest, value)` in a loop over pieces of the arrays and the value.

    A piece is a layer of a stack. Of a table it is some rows of each of up to 64 parts, so that a table
    whose rows are laid out over devices is not moved among them.
    """
    grad = arrays[_GRAD]
    if grad.ndim < 2 or grad.size <= _PIECE:
        return f(arrays, rest, value)
    *leading, width = grad.shape
    axis = 0
    if len(leading) == 1:
        parts = math.gcd(leading[0], 64)
        each = leading[0] // parts
        rows = max(
            n
            for n in range(1, each + 1)
            if each % n == 0 and (n == 1 or parts * n * width <= _PIECE)
        )
        leading, axis = [parts, each // rows, rows], 1

    def split(x: Array) -> Array:
        return x.reshape(*leading, x.shape[-1])

    def of_piece(n: Array) -> Any:
        at = lambda x: jax.lax.dynamic_index_in_dim(split(x), n, axis, keepdims=False)  # noqa: E731
        return f(jax.tree.map(at, arrays), rest, jax.tree.map(at, value))

    new, counts = jax.lax.map(of_piece, jnp.arange(leading[axis]))
    join = lambda x, old: jnp.moveaxis(x, 0, axis).reshape(old.shape)  # noqa: E731
    return jax.tree.map(join, new, arrays), jax.tree.map(lambda x: x[0], counts)


_PIECE = 2**20  # numbers


def _is_large(x: Any, at_least: int) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.size >= at_least


def _block(size: int, most: int) -> int | None:
    """The largest divisor that is a block's size."""
    return next((n for n in range(min(size, most), 15, -1) if size % n == 0), None)


@settings_of(optax.adamw)
def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule, *, block: int = 256, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with its two moments in 8 bits; see `in_eight_bits`."""
    return in_eight_bits(optax.adamw(learning_rate, **settings), block=block, elementwise=True)


@settings_of(optax.lion)
def lion_8bit(
    learning_rate: optax.ScalarOrSchedule, *, block: int = 256, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """`optax.lion` with its moment in 8 bits; see `in_eight_bits`."""
    return in_eight_bits(optax.lion(learning_rate, **settings), block=block, elementwise=True)
