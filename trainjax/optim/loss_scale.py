"""Dynamic loss scaling: gradients in float16 that neither vanish nor overflow."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from trainjax.types import Metrics, Params


class LossScaleState(NamedTuple):
    """The scale, and the optimizer's own state.

    Attributes:
        scale_of_loss: what the loss is multiplied with before its gradient is taken; the training step
            reads it.
        good_steps: finite ones since the scale last changed.
        metrics: `loss_scale`, of the next step, and `skipped_steps`, how many overflowed so far.
        inner: the optimizer's.
    """

    scale_of_loss: Float[Array, ""]
    good_steps: Int[Array, ""]
    metrics: Metrics
    inner: Any


def with_loss_scale(
    tx: optax.GradientTransformation,
    initial: float = 2.0**15,
    *,
    growth: float = 2.0,
    every: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for gradients of `loss_scale * loss`, computed in float16.

    The step multiplies the loss with the scale and divides the gradient by it, in float32. Where the
    gradient is not finite the update is nothing, the optimizer's state stays, and the scale is divided
    by `growth`; after `every` finite steps in a row it is multiplied. It stays within [1, 2^24]: at 1 a
    gradient that is not finite has another cause, and the step says so (`is_finite`). Around the whole
    chain: clipping sees true gradients.

    Args:
        tx: the optimizer.
        initial: first scale.
        growth: factor between scales, a power of 2 so that nothing is rounded.
        every: finite steps before it grows.

    Raises:
        ValueError: a scale, factor or number of steps that makes no sense.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; numbers as in torch's `GradScaler` (whose
    first scale is 2^16).
    """
    if not 1 <= initial <= _MOST:
        raise ValueError(f"initial={initial} of the loss scale is between 1 and {_MOST:.0f}")
    if not growth > 1:
        raise ValueError(f"growth={growth} of the loss scale is above 1, such as 2")
    if every < 1:
        raise ValueError(f"every={every}: the scale grows after at least one finite step")
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> LossScaleState:
        scale, none = jnp.asarray(initial, jnp.float32), jnp.zeros((), jnp.int32)
        return LossScaleState(scale, none, _told(scale, none), tx.init(params))

    def update(
        updates: Params, state: LossScaleState, params: Any = None, **extra: Any
    ) -> tuple[Params, LossScaleState]:
        finite = jnp.isfinite(optax.tree.norm(updates))
        new, inner = tx.update(updates, state.inner, params, **extra)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        new = jax.tree.map(lambda u: keep(u, jnp.zeros_like(u)), new)
        good = jnp.where(finite, state.good_steps + 1, 0)
        grown = good >= every
        factor = jnp.where(finite, jnp.where(grown, growth, 1.0), 1 / growth)
        scale = jnp.clip(state.scale_of_loss * factor, 1.0, _MOST).astype(jnp.float32)
        skipped = state.metrics["skipped_steps"] + jnp.where(finite, 0, 1)
        inner = jax.tree.map(keep, inner, state.inner)
        good = jnp.where(grown, 0, good)
        return new, LossScaleState(scale, good, _told(scale, skipped), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _told(scale: Array, skipped: Array) -> Metrics:
    return {"loss_scale": scale, "skipped_steps": skipped}


_MOST = 2.0**24
