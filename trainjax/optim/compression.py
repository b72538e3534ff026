"""Gradient compression: what workers send one another when they add up their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from trainjax import tree
from trainjax.types import Metrics, Params


class CompressionState(NamedTuple):
    """What a worker keeps.

    Attributes:
        step: steps done.
        error: what its gradients had and was not sent, like the params.
        basis: of PowerSGD, the right factors of the last step; an empty dict otherwise.
        metrics: `bytes_sent` by a worker in the last step, and `compression`, that over float32's.
    """

    step: Int[Array, ""]
    error: Params
    basis: Params
    metrics: Metrics


Sum = Callable[[Any], Any]
"""The all-reduce: `jax.lax.psum` over the workers' axis."""


def int8(axis_name: str) -> optax.GradientTransformation:
    """Gradients in 8 bits, with one scale an array: `q = round(127 (g + e) / max|g + e|)`.

    The scale is of all workers, so their codes can be added as they are. A transform of a worker's own
    gradient to the sum over all, under `jax.shard_map` or `jax.pmap` with the axis; every other part of
    the chain comes after it. What rounding has lost is added to the next gradient (error feedback).

    Args:
        axis_name: of the workers.

    Source: Seide et al. 2014 and Karimireddy et al. 2019, arXiv:1901.09847, for error feedback; codes as in
    Dettmers 2015, arXiv:1511.04561, on a linear scale.
    """

    def leaf(g: Array, basis: None) -> tuple[Array, Array, None, int]:
        top = jax.lax.pmax(jnp.max(jnp.abs(g)), axis_name)
        scale = jnp.where(top > 0, top, 1.0) / 127
        codes = jnp.round(g / scale).astype(jnp.int8)
        # On the wire a code is one byte; sums of up to 2^24 workers' codes fit the accumulator.
        total = jax.lax.psum(codes.astype(jnp.int32), axis_name).astype(g.dtype) * scale
        return total, codes.astype(g.dtype) * scale, basis, g.size + 4

    return _with_feedback(leaf, lambda params: {})


def power_sgd(axis_name: str, rank: int = 2, seed: int = 0) -> optax.GradientTransformation:
    """Gradients as products of two thin matrices: one step of a power iteration, warm from the last.

    `P = orth(sum_workers M Q)`, `Q = sum_workers M^T P`, sent: `rank (rows + columns)` numbers for a
    matrix of `rows * columns`; the sum of the gradients is taken as `P Q^T`. Error feedback, and use, as
    in `int8`. Arrays that are no matrices, or that the factors would not make smaller, are sent whole.
    The matrices of a stack are each their own.

    Args:
        axis_name: of the workers.
        rank: of the product.
        seed: of the first Q, the same for all workers.

    Raises:
        ValueError: a rank below 1.

    Source: Vogels et al. 2019, arXiv:1905.13727, algorithms 1 and 2.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} of the factors is at least 1")

    def basis(params: Params) -> Params:
        def first(name: str, p: Array) -> Array:
            if not _is_smaller(p, rank):
                return jnp.zeros((0,), p.dtype)
            key = tree.key_for(jax.random.key(seed), name)
            return jax.random.normal(key, (*p.shape[:-2], p.shape[-1], rank), p.dtype)

        return tree.map_named(first, params)

    def leaf(g: Array, q: Array) -> tuple[Array, Array, Array, int]:
        workers = jax.lax.psum(1, axis_name)
        if not _is_smaller(g, rank):
            return jax.lax.psum(g, axis_name), g, q, 4 * g.size
        p = jnp.linalg.qr(jax.lax.psum(g @ q, axis_name))[0]
        own = jnp.swapaxes(g, -1, -2) @ p
        total = jax.lax.psum(own, axis_name)
        found = p @ jnp.swapaxes(total, -1, -2)
        return found, found / workers, total, 4 * (p.size + own.size)

    return _with_feedback(leaf, basis)


def one_bit(axis_name: str, warmup: int = 100) -> optax.GradientTransformation:
    """After a warm-up the signs of the gradients and one size an array: `sign(g + e) mean|g + e|`.

    Before it whole gradients are sent, so that an optimizer's averages of squares are what they should
    be: with `optax.adam` behind it, and its second moment as good as frozen by a `b2` near 1, this is
        what 1-bit Adam
    sends. Error feedback, and use, as in `int8`.

    Args:
        axis_name: of the workers.
        warmup: steps sent whole.

    Raises:
        ValueError: a negative warm-up.

    Source: Tang et al. 2021, arXiv:2102.02888, section 3, whose momentum is what is sent; Karimireddy et
    al. 2019, arXiv:1901.09847, algorithm 2 (scaled signs), of gradients.
    """
    if warmup < 0:
        raise ValueError(f"warmup={warmup} is a number of steps, 0 or more")

    def leaf(g: Array, basis: None) -> tuple[Array, Array, None, int]:
        sent = jnp.where(g >= 0, 1.0, -1.0).astype(g.dtype) * jnp.mean(jnp.abs(g))
        return jax.lax.psum(sent, axis_name), sent, basis, -(-g.size // 8) + 4

    small = _with_feedback(leaf, lambda params: {})

    def update(updates: Params, state: CompressionState, params: Any = None) -> Any:
        def whole(updates: Params, state: CompressionState) -> tuple[Params, CompressionState]:
            size = jnp.asarray(4.0 * tree.count(updates))
            total = jax.lax.psum(updates, axis_name)
            metrics = {"bytes_sent": size, "compression": jnp.ones_like(size)}
            return total, state._replace(step=state.step + 1, metrics=metrics)

        return jax.lax.cond(state.step < warmup, whole, small.update, updates, state)

    return optax.GradientTransformation(small.init, update)


def _with_feedback(
    leaf: Callable[..., tuple[Array, Array, Any, int]], first: Callable[[Params], Params]
) -> optax.GradientTransformation:
    """A transform from `leaf(g + error, basis) -> (sum over workers, own part of it, basis, bytes)`."""

    def init(params: Params) -> CompressionState:
        told = {"bytes_sent": jnp.zeros(()), "compression": jnp.ones(())}
        zeros = optax.tree.zeros_like(params)
        return CompressionState(jnp.zeros((), jnp.int32), zeros, first(params), told)

    def update(updates: Params, state: CompressionState, params: Any = None) -> Any:
        wanted = jax.tree.map(jnp.add, updates, state.error)
        named, bases = tree.flatten(wanted), tree.flatten(state.basis)
        found = {name: leaf(g, bases.get(name)) for name, g in named.items()}
        size = float(sum(sent for *_, sent in found.values()))
        told = {
            "bytes_sent": jnp.asarray(size),
            "compression": jnp.asarray(size / (4 * tree.count(updates))),
        }
        pick = lambda part: tree.replace(wanted, {n: f[part] for n, f in found.items()})  # noqa: E731
        error = jax.tree.map(jnp.subtract, wanted, pick(1))
        basis = tree.replace(state.basis, {n: f[2] for n, f in found.items()}) if bases else {}
        return pick(0), CompressionState(state.step + 1, error, basis, told)

    return optax.GradientTransformation(init, update)


def _is_smaller(p: Array, rank: int) -> bool:
    return p.ndim >= 2 and rank * (p.shape[-2] + p.shape[-1]) < p.shape[-2] * p.shape[-1]
