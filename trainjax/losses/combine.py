"""Losses made of losses: scaled by a schedule, on one of several batches, weighed by their uncertainty,
of several members at once.

Sums and constant factors need no function: `dpo + 0.1 * sft`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.types import Batch, Loss, Metrics, Params

Schedule = Callable[[Any], Any]
"""`(number of optimizer steps done before) -> value`, as Optax has them."""


# --- schedules ---------------------------------------------------------------------------------


def scheduled(loss: Loss, schedule: Schedule) -> Loss:
    """`schedule(step) * loss`, where `step` counts the optimizer steps done before: 0 at first.

    The training step puts the number into the batch, under `step`, so nothing is counted twice and a
    resumed run goes on where it was. To evaluate such a loss outside a step, put it there yourself.

    Args:
        loss: any loss.
        schedule: pure, such as an Optax schedule. It is part of the program: make it once, not anew
            for each step.

    Raises:
        ValueError: when called, on a batch without `step`.

    >>> loss = Loss(lambda inputs, params, batch, key: (params**2, {}))
    >>> ramp = scheduled(loss, lambda step: step / 10)
    >>> float(ramp(jnp.float32(2), {"step": jnp.int32(5)})[0])
    2.0
    """
    return Loss(_scheduled, (loss, as_partial(schedule)))


def as_partial(function: Callable[..., Any]) -> Any:
    """A function as a pytree; one that is a pytree already keeps its arrays inputs of the program."""
    return Partial(function) if jax.tree_util.all_leaves([function]) else function


def _scheduled(
    inputs: tuple[Loss, Schedule], params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    loss, schedule = inputs
    value, metrics = loss(params, batch, key)
    return at_step(schedule, batch.get("step")) * value, metrics


def at_step(schedule: Schedule, step: Any) -> Float[Array, ""]:
    """The schedule's value in float32 at a batch's `step`, None where it has none."""
    if step is None:
        raise ValueError(
            "a schedule needs the step's number, which a training step puts into the batch; "
            "elsewhere call the loss with batch | {'step': number}"
        )
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules count on it (float ** int)
        return jnp.asarray(schedule(step), jnp.float32)


# --- several batches ---------------------------------------------------------------------------


def on(name: str, loss: Loss) -> Loss:
    """One task's loss, on the batch of that name where the batch is a dict of batches.

    `on("maths", sft).named("maths") + 0.5 * on("code", sft).named("code")`. Each named batch carries
    weights that sum to 1, so each task counts as much as its coefficient says, whatever the sizes of
    the batches: task-balanced training.

    Raises:
        ValueError: when called, on a dict without a batch of that name.
    """
    return Loss(_On(name), loss)


@dataclasses.dataclass(frozen=True)
class _On:
    name: str

    def __call__(
        self, loss: Loss, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Array, Metrics]:
        part = batch.get(self.name)
        if not isinstance(part, Mapping):
            known = sorted(name for name in batch if isinstance(batch[name], Mapping))
            raise ValueError(
                f"there is no batch named {self.name!r} among {known}{tree.nearest(self.name, known)}"
            )
        shared = {"step": batch["step"]} if "step" in batch else {}
        return loss(params, {**part, **shared}, key)


def at(name: str, loss: Loss) -> Loss:
    """A loss of one part of the params, `params[name]`.

    `uncertainty(losses) + at("policy", ewc(...))` is a penalty beside tasks that learn their weights.

    Args:
        name: of the part.
        loss: of that part, the same batch and key.

    Raises:
        ValueError: when called, with params that have no such part.
    """
    return Loss(_At(name), loss)


@dataclasses.dataclass(frozen=True)
class _At:
    name: str

    def __call__(
        self, loss: Loss, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Array, Metrics]:
        if not isinstance(params, Mapping) or self.name not in params:
            known = sorted(params) if isinstance(params, Mapping) else []
            raise ValueError(
                f"the params have no part {self.name!r}, but {known}{tree.nearest(self.name, known)}"
            )
        return loss(params[self.name], batch, key)


# --- uncertainty -------------------------------------------------------------------------------


def uncertainty(losses: Mapping[str, Loss]) -> Loss:
    """Tasks weighed by their learned uncertainty: `sum_i exp(-s_i) L_i + s_i`.

    The log-variances `s_i` train beside the params, from `with_log_variances`, and go where
    checkpoints and optimizers see them: `params["log_variances"][task]`; what the losses get is
    `params["policy"]`. At the optimum `s_i = log L_i`. So never on a loss that can reach zero: its
    weight would grow without end. The Gaussian likelihood of the paper is half of this form, plus a
    constant, with `L_i` the squared error.

    `s_i` does not depend on the data, so micro-batches take it by their `share`.

    Metrics: those of each loss under its name, with `loss` and `log_variance`.

    Args:
        losses: by task.

    Raises:
        ValueError: when called, with params that do not hold the log-variances of these tasks.

    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses",
    with `s = log sigma^2`.
    """
    return Loss(_uncertainty, dict(losses))


def with_log_variances(params: Params, losses: Mapping[str, Loss]) -> Params:
    """The params of `uncertainty(losses)`: these ones, and a log-variance of 0 for each task."""
    return {"policy": params, "log_variances": {name: jnp.zeros(()) for name in losses}}


def _uncertainty(
    losses: dict[str, Loss], params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    log_variances = _log_variances(losses, params)
    part = share(batch)
    total = jnp.zeros(())
    metrics: Metrics = {}
    for name, loss in losses.items():
        value, more = loss.named(name)(params["policy"], batch, key)
        constant = part * log_variances[name]
        total += jnp.exp(-log_variances[name]) * value + constant
        metrics |= more | {f"{name}/loss": value, f"{name}/log_variance": constant}
    return total, metrics


def _log_variances(losses: dict[str, Loss], params: Params) -> dict[str, Array]:
    found = params.get("log_variances", {}) if isinstance(params, Mapping) else {}
    if sorted(found) != sorted(losses):
        raise ValueError(
            f"the params hold log-variances of the tasks {sorted(found)} and the losses are of "
            f"{sorted(losses)}; begin with losses.with_log_variances(params, losses)"
        )
    return found


# --- ensembles ---------------------------------------------------------------------------------


def ensemble(loss: Loss) -> Loss:
    """`sum_k loss(params_k)`: members that train at once, each as if it were alone.

    The params' leading axis is the members', as `jax.vmap` of an `init` over keys makes it. The loss's
    own arrays, base weights above all, are there once for all members. A member's gradient is that of
    its own loss, and dropout has a key for each. Only what an optimizer makes of all gradients together
    couples members: clipping by the global norm.

    Metrics: means over the members.

    Args:
        loss: of one member.

    Raises:
        ValueError: when called, with params whose leading axes differ.

    >>> square = Loss(lambda inputs, params, batch, key: (params**2, {"value": params}))
    >>> value, metrics = ensemble(square)(jnp.asarray([1.0, 3.0]), {})
    >>> float(value), float(metrics["value"])
    (10.0, 2.0)
    """
    return Loss(_ensemble, loss)


def _ensemble(
    loss: Loss, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"the leading axes of an ensemble's params are its members, and these are {sorted(sizes)}; "
            "make them with jax.vmap(init)(keys)"
        )
    keys = None if key is None else jax.random.split(key, *sizes.pop())
    values, metrics = jax.vmap(loss, in_axes=(0, None, 0))(params, batch, keys)
    return jnp.sum(values), {name: jnp.mean(value, axis=0) for name, value in metrics.items()}


# --- shares ------------------------------------------------------------------------------------


def share(batch: Batch) -> Float[Array, ""]:
    """The batch's share of the global batch: the sum of its weights, 1 if it is whole.

    Losses of micro-batches are added. A term that does not depend on the data, such as a penalty on
    the params, is multiplied by this: the shares add up to 1, so it counts once however the batch is
    cut. Of a dict of batches it is the mean of their shares.

    Raises:
        ValueError: a batch without `groups` (weights of groups of completions) or `weights` (of tokens).
    """
    parts = [part for part in batch.values() if isinstance(part, Mapping)]
    if parts:
        return jnp.mean(jnp.stack([share(part) for part in parts]))
    weights = batch.get("groups", batch.get("weights"))
    if weights is None:
        raise ValueError(
            f"the share of a batch is the sum of its 'groups' or 'weights'; it has {sorted(batch)}"
        )
    return jnp.sum(weights)
