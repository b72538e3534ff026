"""SWATS: Adam until its steps look like SGD's, then SGD with the learning rate that they had."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from trainjax.types import Metrics, Params


class SwatsState(NamedTuple):
    """What both phases need.

    Attributes:
        step: steps done.
        mu: Adam's average of the gradients; after the switch SGD's momentum.
        nu: Adam's average of their squares.
        rate: running mean of the SGD learning rate that Adam's steps amount to, not corrected for its start.
        is_sgd: whether the switch has happened.
        metrics: `is_sgd`, and `sgd_rate`, the corrected mean: in units of the learning rate.
    """

    step: Int[Array, ""]
    mu: Params
    nu: Params
    rate: Float[Array, ""]
    is_sgd: Bool[Array, ""]
    metrics: Metrics


def swats(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    tolerance: float = 1e-5,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Adam, then SGD with momentum b1, switched once.

    While it is Adam, with p its step: `gamma = p.p / (-p.g)` is the rate with which SGD's step,
        projected onto
    p, would be p. Once the mean of the gammas, weighted by b2 and corrected for its start, is within
    `tolerance` of the newest, it becomes the rate: `v <- b1 v + g`, `theta <- theta - (1 - b1) rate v`.
    Everything is times the learning rate, whose schedule goes on through the switch.

    Args:
        learning_rate: Adam's; a rate or a schedule.
        b1, b2, eps: Adam's.
        tolerance: relative to the newest gamma. The paper's 1e-9 is absolute, and below what float32 tells.
        weight_decay: decoupled, times the learning rate.
        mask: what decays, as in `optax.adamw`.

    Source: Keskar and Socher 2017, arXiv:1712.07628, algorithm 1.
    """
    return optax.chain(
        _scale_by_swats(b1, b2, eps, tolerance),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_swats(
    b1: float, b2: float, eps: float, tolerance: float
) -> optax.GradientTransformation:
    def init(params: Params) -> SwatsState:
        zeros = optax.tree.zeros_like
        none = jnp.zeros((), jnp.float32)
        return SwatsState(
            step=jnp.zeros((), jnp.int32),
            mu=zeros(params),
            nu=zeros(params),
            rate=none,
            is_sgd=jnp.zeros((), bool),
            metrics={"is_sgd": none, "sgd_rate": none},
        )

    def adam(grads: Params, state: SwatsState) -> tuple[Params, SwatsState]:
        count = state.step + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        first, second = 1 - b1**count, 1 - b2**count
        step = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        slope = optax.tree.vdot(step, grads)
        gamma = jnp.where(slope != 0, optax.tree.vdot(step, step) / slope, 0.0)
        rate = jnp.where(slope != 0, b2 * state.rate + (1 - b2) * gamma, state.rate)
        close = jnp.abs(rate / second - gamma) < tolerance * jnp.abs(gamma)
        switches = (count > 1) & close & (rate > 0)
        mu = jax.tree.map(lambda m: jnp.where(switches, jnp.zeros_like(m), m), mu)
        rate = jnp.where(switches, rate / second, rate)
        told = jnp.where(switches, rate, rate / second)
        metrics = {"is_sgd": switches.astype(jnp.float32), "sgd_rate": told.astype(jnp.float32)}
        return step, SwatsState(count, mu, nu, rate, switches, metrics)

    def sgd(grads: Params, state: SwatsState) -> tuple[Params, SwatsState]:
        mu = jax.tree.map(lambda v, g: b1 * v + g, state.mu, grads)
        step = jax.tree.map(lambda v: (1 - b1) * state.rate * v, mu)
        metrics = {"is_sgd": jnp.ones((), jnp.float32), "sgd_rate": state.rate}
        return step, state._replace(step=state.step + 1, mu=mu, metrics=metrics)

    def update(updates: Params, state: SwatsState, params: Any = None) -> Any:
        return jax.lax.cond(state.is_sgd, sgd, adam, updates, state)

    return optax.GradientTransformation(init, update)
