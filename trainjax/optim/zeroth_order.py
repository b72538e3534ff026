"""Gradients without a backward pass: from differences, and in forward mode. The memory is inference's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from trainjax import derivatives, tree
from trainjax.types import Gradient, Metrics, Objective, Params


def two_point(scale: float = 1e-3, directions: int = 1) -> Gradient:
    """`(f(theta + scale z) - f(theta - scale z)) / (2 scale) z`, the mean over random directions z.

    Its expectation is the gradient, up to `scale^2`; its variance is some `numbers / directions` times the
    gradient's square, so learning rates are far smaller and few trained numbers (an adapter) do better. For
    `make_step(tx, gradient=two_point())`.

    Args:
        scale: of the difference. The loss is of float32: differences below 1e-7 of it are noise, so that
            too small a scale is as bad as too large a one.
        directions: averaged; each costs two forward passes.

    Returns:
        `gradient(objective, trained)`; its metrics are the loss's own of one side, and `loss`, the mean
        of both.

    Raises:
        ValueError: a scale that is not positive, or no direction.

    Source: Spall 1992 (SPSA); Malladi et al. 2023, arXiv:2305.17333, algorithm 1, with z from a normal.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale} of the differences is above 0, such as 1e-3")
    _check(directions)

    def of_one(objective: Objective, trained: Params, z: Params) -> tuple[Array, Metrics]:
        def value(sign: float) -> tuple[Array, Metrics]:
            moved = jax.tree.map(lambda x, d: x + (sign * scale) * d, trained, z)
            return objective.total(lambda batch, key: objective.loss(moved, batch, key))

        above, metrics = value(1.0)
        below, _ = value(-1.0)
        return (above - below) / (2 * scale), metrics | {"loss": (above + below) / 2}

    return _averaged(of_one, directions)


def forward_gradient(directions: int = 1) -> Gradient:
    """`(grad f . z) z`, the mean over random directions z: exact slopes, by forward-mode differentiation.

    As `two_point` in expectation and variance, without a scale and its rounding; a direction costs about
    two forward passes. For `make_step(tx, gradient=forward_gradient())`.

    Args:
        directions: averaged.

    Returns:
        `gradient(objective, trained)`, as `two_point`.

    Raises:
        ValueError: no direction.

    Source: Baydin et al. 2022, arXiv:2202.08587.
    """
    _check(directions)

    def of_one(objective: Objective, trained: Params, z: Params) -> tuple[Array, Metrics]:
        def one(batch: Any, key: Any) -> tuple[Array, Metrics]:
            def loss(trained: Params) -> tuple[Array, Metrics]:
                return objective.loss(trained, batch, key)

            with derivatives.any_order():
                value, slope, metrics = jax.jvp(loss, (trained,), (z,), has_aux=True)
            return slope, metrics | {"loss": value}

        return objective.total(one)

    return _averaged(of_one, directions)


def _averaged(of_one: Any, directions: int) -> Gradient:
    def gradient(objective: Objective, trained: Params) -> tuple[Params, Metrics]:
        def add(total: tuple[Params, Metrics], key: Any) -> tuple[tuple[Params, Metrics], None]:
            z = _normal(key, trained)
            slope, metrics = of_one(objective, trained, z)
            grads = jax.tree.map(lambda g, d: g + slope / directions * d, total[0], z)
            sums = jax.tree.map(lambda old, new: old + new / directions, total[1], metrics)
            return (grads, sums), None

        keys = jax.random.split(objective.key, directions)
        like = jax.eval_shape(
            lambda key: of_one(objective, trained, _normal(key, trained)), keys[0]
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (trained, like[1]))
        return jax.lax.scan(add, zeros, keys)[0]

    return gradient


def _normal(key: Any, like: Params) -> Params:
    def leaf(name: str, x: Array) -> Array:
        return jax.random.normal(tree.key_for(key, name), x.shape, x.dtype)

    return tree.map_named(leaf, like)


def _check(directions: int) -> None:
    if directions < 1:
        raise ValueError(f"directions={directions}: an estimate takes at least one")
