"""Gradient combiners: from the gradients of several tasks to the one that the optimizer sees.

`make_step(tx, combine=pcgrad())` takes a dict of losses by the name of their task, keeps their
gradients apart, and hands them to the combiner. Every method here multiplies each task's gradient by
a number, and finds these numbers from the inner products of the gradients alone: a matrix `[tasks,
tasks]`, however large and however sharded the params. So each method is a function on small arrays.

The gradients of all tasks are in memory at once: `tasks` times the trainable params.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trainjax.tree import wide
from trainjax.types import Metrics, Params


class Combiner(NamedTuple):
    """A way to combine gradients, as pure functions in the manner of an Optax transform.

    Attributes:
        init: `(names of the tasks) -> state`; give it to `train.init(..., combiner_state=...)`. Without
            a state it returns `()`, which may be left out there.
        update: `(gradients by task, losses by task, state, key) -> (gradient, state, metrics)`.
    """

    init: Callable[[Iterable[str]], Any]
    update: Callable[
        [Mapping[str, Params], Mapping[str, Array], Any, PRNGKeyArray],
        tuple[Params, Any, Metrics],
    ]


# --- PCGrad ------------------------------------------------------------------------------------


def pcgrad() -> Combiner:
    """Projecting conflicting gradients: each task gives up what points against another's gradient.

    For each task i, over the other tasks j in random order, where `g . g_j < 0`:
    `g <- g - (g . g_j) / |g_j|^2 g_j`, begun with `g = g_i`; the results are added.

    Source: Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1.
    """

    def weigh(products: Array, key: PRNGKeyArray) -> Array:
        tasks = len(products)
        orders = jax.vmap(lambda k: jax.random.permutation(k, tasks))(jax.random.split(key, tasks))
        return pcgrad_weights(products, orders)

    return _stateless(weigh)


def pcgrad_weights(
    products: Float[Array, "tasks tasks"], orders: Int[Array, "tasks tasks"]
) -> Float[Array, " tasks"]:
    """The multiples of each gradient whose sum is PCGrad's.

    Args:
        products: inner products of the gradients.
        orders: row i is the order in which task i meets the tasks; its place in it is passed over.
    """
    chex.assert_rank([products, orders], 2)
    squares = jnp.diagonal(products)

    def projected(task: Array, order: Array) -> Array:
        def meet(g: Array, other: Array) -> tuple[Array, None]:
            along = jnp.sum(g * products[:, other])
            conflicts = (along < 0) & (other != task)  # a zero gradient never conflicts
            square = jnp.where(conflicts, squares[other], 1.0)
            return g.at[other].add(jnp.where(conflicts, -along / square, 0.0)), None

        return jax.lax.scan(meet, _one_hot(task, products), order)[0]

    return jnp.sum(jax.vmap(projected)(jnp.arange(len(products)), orders), axis=0)


# --- MGDA and CAGrad ---------------------------------------------------------------------------


def mgda(iterations: int = 64) -> Combiner:
    """Multiple-gradient descent: the shortest convex combination of the gradients.

    `g = sum_i w_i g_i` with `w = argmin |sum_i w_i g_i|^2` over `w >= 0, sum w = 1`: a direction in
    which no task gets worse, and zero where there is none. It is about the size of the smallest
    gradient.

    Args:
        iterations: of the solver, at most; two tasks need one.

    Source: Desideri 2012; Sener and Koltun 2018, "Multi-Task Learning as Multi-Objective
    Optimization".
    """
    return _stateless(lambda products, key: mgda_weights(products, iterations))


def mgda_weights(
    products: Float[Array, "tasks tasks"], iterations: int = 64
) -> Float[Array, " tasks"]:
    """The convex combination of least norm, from the gradients' inner products."""
    chex.assert_rank(products, 2)
    longest = jnp.sqrt(jnp.max(jnp.diagonal(products)))  # any factor has the same minimum
    return _least_on_simplex(products, jnp.zeros_like(products[0]), longest, iterations)


def cagrad(c: float = 0.4, iterations: int = 64) -> Combiner:
    """Conflict-averse descent: the best for the worst task within a ball around the mean gradient.

    With `g_0` the mean gradient and `g_w = sum_i w_i g_i`, w on the simplex minimises
    `g_w . g_0 + c |g_0| |g_w|`, and the gradient is `g_0 + c |g_0| / |g_w| g_w`.

    Args:
        c: radius of the ball in units of `|g_0|`; 0 is the mean gradient.
        iterations: of the solver, at most.

    Raises:
        ValueError: c outside [0, 1).

    Source: Liu et al. 2021, "Conflict-Averse Gradient Descent", algorithm 1, without rescaling.
    """
    if not 0 <= c < 1:
        raise ValueError(f"c={c} does not keep CAGrad near the mean gradient; use one in [0, 1)")
    return _stateless(lambda products, key: cagrad_weights(products, c, iterations))


def cagrad_weights(
    products: Float[Array, "tasks tasks"], c: float, iterations: int = 64
) -> Float[Array, " tasks"]:
    """The multiples of each gradient whose sum is CAGrad's, from their inner products."""
    chex.assert_rank(products, 2)
    radius = c * jnp.sqrt(jnp.maximum(jnp.mean(products), 0.0))  # c |g_0|
    w = _least_on_simplex(products, jnp.mean(products, axis=1), radius, iterations)
    # Where opposed gradients cancel, a norm shorter than this is rounding and has no direction.
    noise = jnp.sqrt(jnp.finfo(products.dtype).eps * jnp.max(jnp.diagonal(products)))
    return 1 / len(products) + radius / _safe(jnp.maximum(_norm(products, w), noise)) * w


def _least_on_simplex(products: Array, linear: Array, scale: Array, iterations: int) -> Array:
    """`argmin linear . w + scale |sum_i w_i g_i|` over the simplex.

    Frank-Wolfe with pairwise steps (Lacoste-Julien and Jaggi 2015): weight moves from the task in use
    with the steepest slope to that with the least, by an exact line search. Unlike plain Frank-Wolfe
    it does not zigzag near an edge of the simplex.
    """
    tasks = len(products)
    unit = _safe(jnp.max(jnp.diagonal(products)))
    products, linear, scale = products / unit, linear / unit, scale / jnp.sqrt(unit)

    def slope(w: Array) -> Array:
        return linear + scale * _dot(products, w) / _safe(_norm(products, w))

    def move(_: Array, w: Array) -> Array:
        steep = slope(w)
        least, most = jnp.argmin(steep), jnp.argmax(jnp.where(w > 0, steep, -jnp.inf))
        direction = _one_hot(least, products) - _one_hot(most, products)
        size = _line_search(products, linear, scale, w, direction)
        size = jnp.clip(size, 0.0, w[most])
        new = w.at[least].add(size).at[most].add(-size)
        return jnp.where(least == most, w, new)

    return jax.lax.fori_loop(0, iterations, move, jnp.full_like(products[0], 1 / tasks))


def _line_search(products: Array, linear: Array, scale: Array, w: Array, direction: Array) -> Array:
    """Where `linear . (w + t d) + scale |g_(w + t d)|` is least over `t >= 0`, for a descending d.

    With `u = t + b / c` the norm is `sqrt(c u^2 + rest)`, and its slope balances `p = linear . d` at
    `u = -p sqrt(rest / (c (scale^2 c - p^2)))`; where `|p|` is steeper than the norm can be, nowhere.
    """
    a, b, c = (
        jnp.sum(x * _dot(products, y)) for x, y in ((w, w), (w, direction), (direction, direction))
    )
    p = jnp.sum(linear * direction)
    rest = jnp.maximum(a - b * b / _safe(c), 0.0)
    bend = c * (scale**2 * c - p * p)
    u = -p * jnp.sqrt(rest / _safe(bend))
    return jnp.where(bend > 0, u - b / _safe(c), jnp.inf)


# --- GradNorm ----------------------------------------------------------------------------------


class GradNormState(NamedTuple):
    """What GradNorm learns and remembers, by the name of the task.

    Attributes:
        weights: of the tasks; they sum to the number of tasks.
        initial: the losses of the first step; 0 before it.
    """

    weights: dict[str, Float[Array, ""]]
    initial: dict[str, Float[Array, ""]]


def gradnorm(alpha: float = 1.5, learning_rate: float = 0.025) -> Combiner:
    """Gradient normalisation: task weights, learned so that the tasks train at similar rates.

    The gradient is `sum_i w_i g_i`. With `G_i = w_i |g_i|` and `r_i = (L_i / L_i(0)) / mean_j(L_j /
    L_j(0))`, the weights descend on `sum_i |G_i - mean(G) r_i^alpha| / mean(G)`, whose targets and
    denominator are held constant, and are scaled to sum to the number of tasks. The losses must be
    positive.

    The norms are over all params that train, where the paper takes the last shared layer. The
    denominator is ours: it frees `learning_rate` from the gradients' unit.

    Args:
        alpha: how strongly a task that lags is pulled along; 0 makes all the norms equal.
        learning_rate: of the weights.

    Raises:
        ValueError: `learning_rate` that is not positive; when stepping, a state that was begun
            without the tasks' names or with others.

    Source: Chen et al. 2018, "GradNorm".
    """
    if learning_rate <= 0:
        raise ValueError(f"learning_rate={learning_rate} moves no weight; use one above 0")

    def init(tasks: Iterable[str]) -> GradNormState:
        names = sorted(tasks)
        return GradNormState(
            {name: jnp.ones(()) for name in names}, {name: jnp.zeros(()) for name in names}
        )

    def update(gradients, losses, state, key):
        del key
        _check_tasks(state, gradients)
        initial = {n: jnp.where(old == 0, losses[n], old) for n, old in state.initial.items()}
        weights, values, firsts = map(_stacked, (state.weights, losses, initial))
        norms = jnp.sqrt(jnp.diagonal(inner_products(_ordered(gradients))))
        new = gradnorm_weights(weights, norms, values / _safe(firsts), alpha, learning_rate)
        combined, metrics = _weighted(gradients, weights)
        return combined, GradNormState(_named(new, gradients), initial), metrics

    return Combiner(init, update)


def gradnorm_weights(
    weights: Float[Array, " tasks"],
    norms: Float[Array, " tasks"],
    progress: Float[Array, " tasks"],
    alpha: float,
    learning_rate: float,
) -> Float[Array, " tasks"]:
    """One step of GradNorm's weights.

    Args:
        weights: before the step.
        norms: of the tasks' gradients without their weights.
        progress: each loss as a share of its first value.
        alpha: strength of the pull on tasks that lag.
        learning_rate: of the weights.
    """
    chex.assert_equal_shape([weights, norms, progress])
    weighted = weights * norms
    mean = _safe(jnp.mean(weighted))
    rates = _safe(progress)
    target = mean * (rates / jnp.mean(rates)) ** alpha
    slope = jnp.sign(weighted - target) * norms / mean
    new = jnp.maximum(weights - learning_rate * slope, 1e-3)  # a task at 0 could never come back
    return new * len(new) / jnp.sum(new)


def _check_tasks(state: Any, gradients: Mapping[str, Params]) -> None:
    known = sorted(state.weights) if isinstance(state, GradNormState) else []
    if known != sorted(gradients):
        raise ValueError(
            f"GradNorm's state is of the tasks {known} and the losses are of {sorted(gradients)}; "
            "begin with train.init(params, tx, combiner_state=combiner.init(losses))"
        )


# --- what they share ---------------------------------------------------------------------------


def inner_products(gradients: Sequence[Params]) -> Float[Array, "tasks tasks"]:
    """`g_i . g_j` of every two gradients, over all their leaves, in float32."""
    leaves = [jax.tree.leaves(gradient) for gradient in gradients]
    tasks = range(len(leaves))
    upper = {(i, j): _inner(leaves[i], leaves[j]) for i in tasks for j in tasks if i <= j}
    return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in tasks]) for i in tasks])


def _inner(a: Sequence[Array], b: Sequence[Array]) -> Array:
    # A product and a sum, not a dot: a dot may run in bf16 on an accelerator.
    return functools.reduce(
        jnp.add, (jnp.sum(wide(x) * wide(y)) for x, y in zip(a, b, strict=True))
    )


def _stateless(weigh: Callable[[Array, PRNGKeyArray], Array]) -> Combiner:
    """The combiner that weighs the gradients by a function of their inner products."""

    def update(gradients, losses, state, key):
        del losses
        combined, metrics = _weighted(gradients, weigh(inner_products(_ordered(gradients)), key))
        return combined, state, metrics

    return Combiner(lambda tasks: (), update)


def _weighted(gradients: Mapping[str, Params], weights: Array) -> tuple[Params, Metrics]:
    """`sum_i weights_i g_i`, and the weights as metrics."""

    def add(*leaves: Array) -> Array:
        parts = (w.astype(x.dtype) * x for w, x in zip(weights, leaves, strict=True))
        return functools.reduce(jnp.add, parts)

    named = _named(weights, gradients)
    return jax.tree.map(add, *_ordered(gradients)), {f"{n}/weight": w for n, w in named.items()}


def _ordered(by_task: Mapping[str, Any]) -> list[Any]:
    return [by_task[name] for name in sorted(by_task)]


def _stacked(by_task: Mapping[str, Array]) -> Array:
    return jnp.stack(_ordered(by_task))


def _named(values: Array, tasks: Iterable[str]) -> dict[str, Array]:
    return dict(zip(sorted(tasks), values, strict=True))


def _one_hot(task: Array, products: Array) -> Array:
    return jax.nn.one_hot(task, len(products), dtype=products.dtype)


def _dot(products: Array, w: Array) -> Array:
    return jnp.sum(products * w, axis=1)


def _norm(products: Array, w: Array) -> Array:
    return jnp.sqrt(jnp.maximum(jnp.sum(w * _dot(products, w)), 0.0))


def _safe(x: Array) -> Array:
    """A denominator that is not zero; where it was, the numerator is too."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
