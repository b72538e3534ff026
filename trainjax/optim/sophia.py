"""Sophia: steps of momentum over curvature, clipped to one size where the curvature says too little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from trainjax import derivatives, tree
from trainjax.optim.settings import settings_of
from trainjax.types import Loss, Metrics, Objective, Params

Estimate = Callable[..., Params]
"""`(objective, trained, **extra) -> tree`: an estimate of the diagonal of the loss's Hessian."""


class SophiaState(NamedTuple):
    """What Sophia remembers.

    Attributes:
        step: steps done.
        mu: average of the gradients.
        curvature: average of the estimates of the Hessian's diagonal.
        metrics: `clipped`, the share of the last update's entries that were clipped.
    """

    step: Int[Array, ""]
    mu: Params
    curvature: Params
    metrics: Metrics


def gauss_newton(
    objective: Objective, trained: Params, *, curvature: Loss | None = None, **_: Any
) -> Params:
    """Gauss-Newton-Bartlett: `(sum_t sqrt(w_t) d log p(y_t) / d theta)^2`, labels y drawn from the model.

    The expectation over the labels is `sum_t w_t F_t`, the diagonal of the Gauss-Newton matrix of the
    weighted loss: the gradients of drawn labels have mean 0, so the products of different tokens vanish. With
    N tokens of weight 1/N it is N times the squared mean gradient, as the paper writes it. Micro-batches and
    devices add up before the square. At least 0 everywhere.

    Args:
        objective: of the step.
        trained: where it is taken.
        curvature: `losses.drawn(policy)`, or another loss whose gradient is the sum above.

    Raises:
        ValueError: the step was called without it.

    Source: Liu et al. 2023, arXiv:2305.14342, algorithm 2.
    """
    if curvature is None:
        raise ValueError(
            "gauss_newton takes a loss on drawn labels: step(state, loss, batch, "
            "curvature=losses.drawn(policy)); hutchinson (sophia_h) takes any loss"
        )
    loss = objective.bind(curvature)

    def one(batch: Any, key: Any) -> Params:
        return jax.grad(lambda trained: loss(trained, batch, key)[0])(trained)

    return jax.tree.map(jnp.square, objective.total(one))


def hutchinson(objective: Objective, trained: Params, **_: Any) -> Params:
    """Hutchinson: `u * (H u)` with u of random signs, whose expectation is the diagonal of H.

    The product is exact, forward mode over reverse mode; the loss must have a second derivative there. Where
    the curvature is negative the estimate is, and Sophia clips.

    Args:
        objective: of the step.
        trained: where it is taken.

    Source: Liu et al. 2023, arXiv:2305.14342, algorithm 1, which draws u from a normal distribution; signs
    have the same mean and the least variance (Hutchinson 1990).
    """
    signs = _signs(objective.key, trained)

    def one(batch: Any, key: Any) -> Params:
        slope = jax.grad(lambda trained: objective.loss(trained, batch, key)[0])
        with derivatives.any_order():
            return jax.jvp(slope, (trained,), (signs,))[1]

    return jax.tree.map(jnp.multiply, signs, objective.total(one))


def _signs(key: Any, like: Params) -> Params:
    def leaf(name: str, x: Array) -> Array:
        return jax.random.rademacher(tree.key_for(key, name), x.shape, x.dtype)

    return tree.map_named(leaf, like)


def scale_by_sophia(
    estimate: Estimate,
    *,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.05,
    eps: float = 1e-12,
    clip: float = 1.0,
    every: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """`clip(m / max(gamma h, eps), clip)`; see `sophia`."""
    if every < 1:
        raise ValueError(f"every={every}: the curvature is estimated at every step at the most")
    for name, value in {"gamma": gamma, "clip": clip}.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name}={value} is above 0")

    def init(params: Params) -> SophiaState:
        mu, curvature = (optax.tree.zeros_like(params) for _ in range(2))
        metrics = {"clipped": jnp.zeros((), jnp.float32)}
        return SophiaState(jnp.zeros((), jnp.int32), mu, curvature, metrics)

    def update(
        updates: Params,
        state: SophiaState,
        params: Params | None = None,
        *,
        objective: Objective | None = None,
        **extra: Any,
    ) -> tuple[Params, SophiaState]:
        if params is None or objective is None:
            raise ValueError(
                "sophia needs the params and the loss: tx.update(grads, state, params, objective=...), as "
                "the step of make_step calls it"
            )

        def estimated() -> Params:
            found = estimate(objective, params, **extra)
            return jax.tree.map(
                lambda old, new: (b2 * old + (1 - b2) * new).astype(old.dtype),
                state.curvature,
                found,
            )

        curvature = jax.lax.cond(state.step % every == 0, estimated, lambda: state.curvature)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        ratio = jax.tree.map(lambda m, h: m / jnp.maximum(gamma * h, eps), mu, curvature)
        clipped = sum(jnp.sum(jnp.abs(r) >= clip) for r in jax.tree.leaves(ratio))
        metrics = {"clipped": jnp.asarray(clipped / max(1, tree.count(ratio)), jnp.float32)}
        updates = jax.tree.map(lambda r: jnp.clip(r, -clip, clip), ratio)
        return updates, SophiaState(state.step + 1, mu, curvature, metrics)

    return optax.GradientTransformationExtraArgs(init, update)


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    estimate: Estimate,
    *,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.05,
    eps: float = 1e-12,
    clip: float = 1.0,
    every: int = 10,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`theta <- theta - lr (clip(m / max(gamma h, eps), clip) + weight_decay theta)`.

    `m <- b1 m + (1 - b1) g` at every step and `h <- b2 h + (1 - b2) estimate` at every so-manyth, the first
    among them; neither is corrected for its start. Where h is small or negative the step is that of the
    momentum's sign.

    As the paper, and other than `optax.contrib.sophia` (Optax 0.2.8): no correction for the start of m and h,
    which there makes the first steps others; the curvature is not computed at the steps that do not need it
    (`lax.cond`; Optax's estimator has it too); labels of Gauss-Newton-Bartlett are drawn from the model; the
    estimate is of the whole batch, over micro-batches and devices, where Optax's is of what `obj_fn` sees.

    Args:
        learning_rate: a rate, or a schedule of them; some 0.8 times what suits AdamW, as the paper advises.
        estimate: `gauss_newton` (Sophia-G; the step is then called with `curvature=losses.drawn(policy)`),
            `hutchinson` (Sophia-H; any loss), or a function of your own.
        b1: of the gradients' average.
        b2: of the curvature's.
        gamma: the larger, the fewer entries are clipped; the paper aims at 10 to 50% that are not, and has
            0.05 for G and 0.01 for H.
        eps: least curvature.
        clip: largest entry of an update, before the learning rate.
        every: steps from one estimate to the next.
        weight_decay: decoupled, times the learning rate.
        mask: what decays, as in `optax.adamw`.

    Raises:
        ValueError: fewer than one step between estimates, a `gamma` or `clip` that is not positive; a step
            without the loss.

    Source: Liu et al. 2023, arXiv:2305.14342, algorithm 3.
    """
    return optax.chain(
        scale_by_sophia(estimate, b1=b1, b2=b2, gamma=gamma, eps=eps, clip=clip, every=every),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@settings_of(sophia, "estimate")
def sophia_g(learning_rate: optax.ScalarOrSchedule, *, gamma: float = 0.05, **settings: Any) -> Any:
    """`sophia` with `gauss_newton`; the step is called with `curvature=losses.drawn(policy)`."""
    return sophia(learning_rate, gauss_newton, gamma=gamma, **settings)


@settings_of(sophia, "estimate")
def sophia_h(learning_rate: optax.ScalarOrSchedule, *, gamma: float = 0.01, **settings: Any) -> Any:
    """`sophia` with `hutchinson`, of any loss."""
    return sophia(learning_rate, hutchinson, gamma=gamma, **settings)
