"""One optimizer step: gradients over micro-batches, the update, and the metrics, as one program."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from trainjax import platform, sharing, tree
from trainjax.train.combiners import Combiner
from trainjax.train.state import TrainState, join_opt_state, split_opt_state
from trainjax.types import Batch, Gradient, Loss, Metrics, Objective, Params

Losses = Loss | dict[str, Loss]
Step = Callable[..., tuple[TrainState, Metrics]]
"""`(state, loss, batch, **extra) -> (state, metrics)`."""


def backpropagation(objective: Objective, trained: Params) -> tuple[Params, Metrics]:
    """The gradient of the loss: what a step descends along if it is told nothing else."""

    def one(batch: Batch, key: Any) -> tuple[Params, Metrics]:
        (value, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            trained, batch, key
        )
        return grads, metrics | {"loss": value}

    return objective.total(one)


def make_step(
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    combine: Combiner | None = None,
    gradient: Gradient = backpropagation,
) -> Step:
    """The jitted `step(state, loss, batch, **extra) -> (state, metrics)`; the state is donated.

    The batch is cut into `accumulate` micro-batches whose gradients are added. Its weights are
    normalised over the whole batch, so the result does not depend on the number. The loss is an
    input: other coefficients, references or base weights of equal shape run the same program. It sees
    the batch with one key more: `step`, the number of optimizer steps done before, for schedules.

    Parts of the params that are `Frozen` get neither gradient nor optimizer state and stay bit by bit.

    With a combiner the step takes a dict of losses by task and keeps their gradients apart until all
    micro-batches are in. Tasks may read one batch, or each its own of a dict of batches (`losses.on`).
    The key of a task's loss is made from the task's name.

    Metrics, all on the device: the loss's own, `loss`, `grad_norm` (global norm before the
    optimizer's clipping), and `is_finite`. Where loss or gradients are not finite the params and the
    optimizer state stay as they were, so that a run can stop on good weights. Of several tasks, each
    has its metrics and its loss under its name (`maths/loss`), and `loss` is their sum. An optimizer
    whose state has a field `metrics`, a dict of scalars, has them reported too. Of one whose state has a
    `scale_of_loss` (`optim.with_loss_scale`) the gradient is computed of the loss times that, and a step
    that overflows is skipped.

    An optimizer that takes extra arguments gets `value`, the loss; `objective`, through which it can
    evaluate the loss or its derivatives elsewhere; and whatever `extra` the step is called with, such as
    `curvature`, another loss. These are inputs of the program as the loss is.

    Args:
        tx: an Optax chain.
        accumulate: number of micro-batches; it divides the rows of the batch.
        combine: makes one gradient of those of several tasks; see `trainjax.train.combiners`.
        gradient: how the gradient of one loss is found, or what is descended along in its place.

    Raises:
        ValueError: rows that `accumulate` does not divide, or an `accumulate` below 1; a dict of
            losses without a combiner, or the reverse; a batch with a `step` of its own.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}: a batch is at least one micro-batch")
    tx = optax.with_extra_args_support(tx)

    def step(
        state: TrainState, loss: Losses, batch: Batch, extra: Mapping[str, Any]
    ) -> tuple[TrainState, Metrics]:
        _check(loss, batch, combine)
        key = jax.random.fold_in(state.key, state.step)
        optimizer, combiner = split_opt_state(state.opt_state)
        trained = tree.trainable(state.params)
        batch = {**batch, "step": state.step}

        def total(fn: Callable[[Batch, Any], Any]) -> Any:
            return _over_micro_batches(fn, batch, key, accumulate)

        def bind(loss: Loss) -> Any:
            return lambda trained, *rest: loss(tree.with_trained(state.params, trained), *rest)

        scale = optax.tree.get(optimizer, "scale_of_loss")
        if isinstance(loss, Loss):
            objective = Objective(bind(loss), bind, total, tree.key_for(key, "optimizer"))
            extra = {"objective": objective, **extra}
            grads, metrics = _scaled(gradient, scale)(objective, trained)
        elif combine is not None:
            grads, metrics = total(functools.partial(_of_each, loss, state.params))
            values = {name: metrics[f"{name}/loss"] for name in grads}
            key = tree.key_for(key, "combine")
            grads, combiner, more = combine.update(grads, values, combiner, key)
            metrics |= more
        return updated(state, tx, grads, metrics, combiner, extra)

    return with_fixed_layout(step)


def updated(
    state: TrainState,
    tx: optax.GradientTransformationExtraArgs,
    grads: Params,
    metrics: Metrics,
    beside: Any,
    extra: Mapping[str, Any],
) -> tuple[TrainState, Metrics]:
    """The end of a step: the state after the optimizer's update, or the same where something is not finite.

    Args:
        state: before the step.
        tx: the Optax chain.
        grads: of the whole batch.
        metrics: of the loss, `loss` among them.
        beside: what is new of the state that is kept beside the optimizer's (`split_opt_state`).
        extra: arguments of the update.
    """
    optimizer, _ = split_opt_state(state.opt_state)
    trained = tree.trainable(state.params)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    scale = optax.tree.get(optimizer, "scale_of_loss")
    if scale is not None:  # the optimizer skips the step and takes a smaller one
        is_finite |= scale > 1
    with jax.numpy_dtype_promotion("standard"):  # Optax counts on it (float ** int)
        updates, optimizer = tx.update(grads, optimizer, trained, value=metrics["loss"], **extra)
        params = optax.apply_updates(trained, updates)
    opt_state = join_opt_state(optimizer, beside)
    keep = lambda new, old: jnp.where(is_finite, new, old)  # noqa: E731
    new = TrainState(
        step=state.step + 1,
        params=tree.with_trained(state.params, jax.tree.map(keep, params, trained)),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        key=state.key,
    )
    told = _reported(optimizer) | {"grad_norm": grad_norm, "is_finite": is_finite}
    return new, metrics | told


def _scaled(gradient: Gradient, scale: Array | None) -> Gradient:
    """The same gradient, computed of `scale * loss`: numbers that float16 can hold."""
    if scale is None:
        return gradient

    def of_scaled(objective: Objective, trained: Params) -> tuple[Params, Metrics]:
        def loss(*args: Any) -> tuple[Array, Metrics]:
            value, metrics = objective.loss(*args)
            return value * scale, metrics

        grads, metrics = gradient(objective._replace(loss=loss, scale=scale), trained)
        grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
        return grads, metrics | {"loss": metrics["loss"] / scale}

    return of_scaled


def _reported(opt_state: Any) -> Metrics:
    """What the parts of an optimizer's state report of themselves."""
    found: Metrics = {}
    for _, metrics in optax.tree.get_all_with_path(opt_state, "metrics"):
        found |= metrics
    return found


def _check(loss: Losses, batch: Batch, combine: Combiner | None) -> None:
    if isinstance(loss, Loss) and combine is not None:
        raise ValueError("a combiner needs a dict of losses by task, and this step got one loss")
    if not isinstance(loss, Loss) and combine is None:
        raise ValueError(
            f"losses of the tasks {sorted(loss)} need make_step(tx, combine=...); or add them up"
        )
    if "step" in batch:
        raise ValueError("the batch's key 'step' is the optimizer step's number; rename yours")


def _over_micro_batches(
    fn: Callable[[Batch, Any], Any], batch: Batch, key: Any, accumulate: int
) -> Any:
    """The sum of what the function gives for each micro-batch, with a key of its own."""
    number = {"step": batch["step"]}
    if accumulate == 1:
        return fn(batch, key)
    rows = {name: value for name, value in batch.items() if name != "step"}
    micro = jax.tree.map(lambda x: _split(x, accumulate), rows)
    keys = jax.random.split(key, accumulate)

    def one(part: Batch, key: Any) -> Any:
        return fn({**part, **number}, key)

    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first, keys[0]))

    def add(total: Any, part: tuple[Batch, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*part)), None

    return jax.lax.scan(add, zeros, (micro, keys))[0]


def _of_one(loss: Loss, params: Params, batch: Batch, key: Any) -> tuple[Params, Metrics]:
    def of_trained(trained: Params) -> tuple[Array, Metrics]:
        return loss(tree.with_trained(params, trained), batch, key)

    (value, metrics), grads = jax.value_and_grad(of_trained, has_aux=True)(tree.trainable(params))
    return grads, metrics | {"loss": value}


def _of_each(
    losses: dict[str, Loss], params: Params, batch: Batch, key: Any
) -> tuple[dict[str, Params], Metrics]:
    grads: dict[str, Params] = {}
    metrics: Metrics = {}
    for name, loss in losses.items():
        grads[name], own = _of_one(loss, params, batch, tree.key_for(key, name))
        metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
    total = functools.reduce(jnp.add, (metrics[f"{name}/loss"] for name in losses))
    return grads, metrics | {"loss": total}


def _split(x: Array, parts: int) -> Array:
    """`[rows, ...] -> [parts, rows / parts, ...]`, each part taking every `parts`-th row.

    Rows are split over devices in contiguous pieces; taken so, a micro-batch needs none moved.
    """
    if x.shape[0] % parts:
        raise ValueError(f"accumulate={parts} does not divide a batch of {x.shape[0]} rows")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def with_fixed_layout(step: Callable[..., tuple[TrainState, Metrics]]) -> Step:
    """Jits the step so that the new state is laid out over devices exactly as the old one.

    Left to itself the compiler may choose another layout for some output, and the second call would
    then be a second program.
    """
    programs: dict[Any, Any] = {}

    def run(
        state: TrainState, loss: Losses, batch: Batch, **extra: Any
    ) -> tuple[TrainState, Metrics]:
        places, structure = jax.tree.flatten(_layout(state))
        arrays, restore = sharing.distinct((loss, extra))
        key = structure, tuple(places), tuple(x.shape for x in jax.tree.leaves(batch)), restore
        if key not in programs:
            programs[key] = _jitted(step, restore, _layout(state))
            programs[key].lower(state, arrays, batch).compile()  # the call finds it compiled
            _return_freed_memory()
        return programs[key](state, arrays, batch)

    def lower(state: TrainState, loss: Losses, batch: Batch, **extra: Any) -> jax.stages.Lowered:
        arrays, restore = sharing.distinct((loss, extra))
        return _jitted(step, restore, _layout(state)).lower(state, arrays, batch)

    run.__dict__["lower"] = lower
    return run


def lowered(
    step: Step, state: TrainState, loss: Losses, batch: Batch, **extra: Any
) -> jax.stages.Lowered:
    """The program that a step would run, before it is compiled; of `ShapeDtypeStruct`s too.

    Args:
        step: as `make_step` gives it.
        state: arrays, or shapes with a sharding each.
        loss: of such.
        batch: of such.
        **extra: of such.
    """
    return step.__dict__["lower"](state, loss, batch, **extra)


def _layout(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _jitted(
    step: Callable[..., tuple[TrainState, Metrics]], restore: sharing.Restore, layout: TrainState
) -> Any:
    @functools.wraps(step)
    def of_arrays(state: TrainState, arrays: list[Any], batch: Batch) -> Any:
        loss, extra = restore(arrays)
        return step(state, loss, batch, extra)

    return jax.jit(
        of_arrays,
        donate_argnums=0,
        out_shardings=(layout, None),
        compiler_options=platform.compiler_options(),
    )


def _return_freed_memory() -> None:
    """Gives what the compiler has freed back to the system before the step takes its own.

    glibc would keep it: 200 MB of the peak of a run whose model has 540.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
