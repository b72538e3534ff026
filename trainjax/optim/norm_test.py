"""The norm test: whether a batch is large enough for its gradient to be believed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from trainjax.types import Metrics, Objective, Params


def measured(objective: Objective, trained: Params) -> tuple[Params, Metrics]:
    """The gradient, and `gradient_noise`: the variance of its estimate over its square.

    With `g_k` the gradients of M micro-batches, whose mean is g,
    `sum_k |g_k - g|^2 / (M (M - 1)) / |g|^2`: above 1 the batch's gradient is mostly noise. For
    `make_step(tx, accumulate=M, gradient=measured)`, M at least 2; the micro-batches of a step must have
    rows of like kind (they are cut from the batch by turns). `batch_size` turns it into the next batch.

    Args:
        objective: of the step.
        trained: where the gradient is taken.

    Returns:
        The gradient; metrics of the loss, `loss` and `gradient_noise`.

    Source: Byrd, Chin, Nocedal and Wu 2012, section 3; Bollapragada, Byrd and Nocedal 2018, with
    micro-batches in the place of single examples.
    """

    def one(batch: Any, key: Any) -> tuple[Params, Metrics, Array, Array]:
        (value, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            trained, batch, key
        )
        square = optax.tree.norm(grads, squared=True).astype(jnp.float32)
        return grads, metrics | {"loss": value}, square, jnp.ones((), jnp.float32)

    grads, metrics, squares, count = objective.total(one)
    square = optax.tree.norm(grads, squared=True).astype(jnp.float32)
    # A micro-batch's part of the sum is 1/M of its own mean: g_k = M part_k, and sum |g_k|^2 = M^2 squares.
    spread = jnp.maximum(count * count * squares - count * square, 0.0)
    noise = spread / (jnp.maximum(count * (count - 1.0), 1.0) * jnp.maximum(square, 1e-30))
    return grads, metrics | {"gradient_noise": noise}


def batch_size(
    current: int, gradient_noise: float, *, theta: float = 1.0, most: int, multiple: int = 1
) -> int:
    """The rows that the next batches need for `gradient_noise <= theta^2`: the same, or more.

    The variance falls with the rows, so they are multiplied by `gradient_noise / theta^2` where that is
    above 1.

    Args:
        current: rows now.
        gradient_noise: of a step, better the mean of the last ones.
        theta: how much noise is allowed; in the literature 0.5 to 1.
        most: rows at the most.
        multiple: of which the result is one, such as micro-batches times devices.

    Raises:
        ValueError: numbers that are not positive; noise that is not finite; `most` below what there is.

    Source: Byrd et al. 2012, equation 3.10.
    """
    if not (theta > 0 and current > 0 and multiple > 0):
        raise ValueError(f"theta={theta}, current={current} and multiple={multiple} are above 0")
    if not 0 <= gradient_noise < math.inf:
        raise ValueError(f"gradient_noise={gradient_noise} is not a number of 0 or more")
    if most < current:
        raise ValueError(f"most={most} rows is less than the current {current}")
    wanted = current * max(1.0, gradient_noise / theta**2)
    rows = math.ceil(min(wanted, most) / multiple) * multiple
    return rows if rows <= most else max(current, most // multiple * multiple)
