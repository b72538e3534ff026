"""Differentially private training: gradients of single rows, clipped and blurred, and what they give away."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from trainjax import tree
from trainjax.types import Gradient, Metrics, Objective, Params


def private(max_norm: float = 1.0, noise: float = 1.0) -> Gradient:
    """DP-SGD: `(sum_i g_i min(1, C / |g_i|) + noise C z) / rows`, with z from a normal distribution.

    `g_i` is the gradient of row i's own mean loss: what other rows weigh has no part in it. For
    `make_step(tx, gradient=private(0.1, 1.2))`, of losses that are a weighted sum over rows, such as
    `losses.sft`. What is kept private is a row, so give each person one, unpacked. The gradients of a
    micro-batch's rows are in memory at once, which for an adapter is little.

    Args:
        max_norm: C, the largest norm of a row's gradient.
        noise: the noise's standard deviation over C, as `privacy_epsilon` takes it; 0 only clips.

    Returns:
        `gradient(objective, trained)`; the metrics are the loss's own, `loss`, and `rows_clipped`, the share
        of rows whose gradient was longer than C.

    Raises:
        ValueError: a norm that is not positive, or noise below 0.

    Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1. `optax.contrib.dpsgd` takes the gradients of
    all rows at once, which a step with micro-batches never has.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: a norm to clip at is above 0")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise} is 0 or more, in units of max_norm")

    def gradient(objective: Objective, trained: Params) -> tuple[Params, Metrics]:
        longest = max_norm * objective.scale

        def one(batch: Any, key: Any) -> tuple[Params, Metrics, Array, Array]:
            rows, step = {**batch}, {"step": batch["step"]}
            del rows["step"]
            keys = jax.random.split(key, len(rows["weights"]))
            norms, clipped, metrics = jax.vmap(lambda row, key: of_row(row, step, key))(rows, keys)
            total = jax.tree.map(lambda x: x.sum(0), (clipped, metrics))
            return *total, jnp.sum(norms > longest), jnp.asarray(norms.size)

        def of_row(row: Any, step: Any, key: Any) -> tuple[Array, Params, Metrics]:
            batch = jax.tree.map(lambda x: x[None], row) | step
            (value, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
                trained, batch, key
            )
            weight = jnp.sum(row["weights"])
            grads = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1.0), grads)
            norm = optax.tree.norm(grads)
            factor = jnp.minimum(1.0, longest / jnp.maximum(norm, 1e-30))
            return norm, jax.tree.map(lambda g: g * factor, grads), metrics | {"loss": value}

        grads, metrics, clipped, rows = objective.total(one)

        def blurred(name: str, g: Array) -> Array:
            z = jax.random.normal(tree.key_for(objective.key, name), g.shape, g.dtype)
            return (g + (noise * longest * z).astype(g.dtype)) / rows

        return tree.map_named(blurred, grads), metrics | {"rows_clipped": clipped / rows}

    return gradient


def privacy_epsilon(noise: float, share: float, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after so many steps of `private`.

    Of batches into which every row comes with the probability `share`, independently (Poisson sampling).
    Batches of a shuffled epoch are usually given this number too, though the proof is not of them.

    Args:
        noise: as in `private`, above 0.
        share: of the rows that a batch has: batch size over rows, in (0, 1].
        steps: taken, at least 1.
        delta: in (0, 1); well below one over the rows.

    Raises:
        ValueError: a number outside of these.

    Source: Mironov, Talwar and Zhang 2019, arXiv:1908.10530, section 3.3, for divergences of integer order;
    Canonne, Kamath and Steinke 2020, arXiv:2004.00010, proposition 12, from there to epsilon.

    >>> round(privacy_epsilon(noise=1.0, share=0.01, steps=1000, delta=1e-5), 2)
    2.11
    """
    ranges = {"noise": (noise, math.inf), "share": (share, 1.0), "delta": (delta, 1.0)}
    for name, (value, top) in ranges.items():
        if not 0 < value <= top:
            raise ValueError(f"{name}={value} is above 0" + (", at most 1" if top == 1 else ""))
    if steps < 1:
        raise ValueError(f"steps={steps}: privacy is of at least one step")

    def of_order(order: int) -> float:
        divergence = steps * _renyi(noise, share, order)
        rest = math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        return divergence + rest

    return max(0.0, min(map(of_order, range(2, 512))))


def _renyi(noise: float, share: float, order: int) -> float:
    """`log(sum_k C(order, k) (1 - q)^(order - k) q^k exp((k^2 - k) / (2 noise^2))) / (order - 1)`."""
    if share == 1:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * math.log(share)
        + (order - k) * math.log1p(-share)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    top = max(terms)
    return (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)
