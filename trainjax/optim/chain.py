"""From a few settings to an Optax chain: clipping, the optimizer with its groups, averages."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from trainjax import tree
from trainjax.optim.average import average_params
from trainjax.optim.groups import Group, Layers, grouped
from trainjax.types import Params

Optimizer = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """What an optimizer is made of.

    Attributes:
        optimizer: `optax.adamw`, `optim.sophia_g`, any `(learning_rate, **settings) -> optimizer`.
        learning_rate: a rate, or a schedule of them.
        weight_decay: decoupled, times the learning rate.
        settings: the optimizer's own, such as `{"b1": 0.95}`.
        groups: other rates and decays by name; see `Group`. None is one group of all.
        layers: for `groups` over adapters of some layers.
        clip: largest global norm of the gradients; None does not clip.
        clip_layers: largest norm of each matrix's gradient, one by one within a stack of layers.
        plateau: settings of `optax.contrib.reduce_on_plateau`, such as `{"factor": 0.5, "patience": 20}`: the
            steps are scaled down where the loss does not fall any more; None does not.
        average: decay of an average of the params, kept beside them; None keeps none.
        accumulate: steps whose gradients are averaged before one update is made; the schedule counts updates.
    """

    optimizer: Optimizer = optax.adamw
    learning_rate: optax.ScalarOrSchedule
    weight_decay: Any = 0.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Sequence[Group] = ()
    layers: Layers | None = None
    clip: float | None = 1.0
    clip_layers: float | None = None
    plateau: Mapping[str, Any] | None = None
    average: float | None = None
    accumulate: int = 1


def chain(settings: Chain) -> optax.GradientTransformationExtraArgs:
    """The optimizer: clipping of gradients, then its step with decay, then the averages.

        tx = tj.optim.chain(tj.optim.Chain(optimizer=optax.lion, learning_rate=1e-4, weight_decay=0.1))

    An optimizer without a `weight_decay` of its own (SGD, RAdam, Adafactor) gets one as AdamW has it:
    `theta <- theta - lr weight_decay theta` beside its step.

    Raises:
        ValueError: a setting that the optimizer does not have, with the nearest that it has; a negative rate,
            decay or clip; fewer than one step accumulated; what `grouped` and `average_params` refuse.
    """
    _check(settings)
    parts = []
    if settings.clip is not None:
        parts.append(optax.clip_by_global_norm(settings.clip))
    if settings.clip_layers is not None:
        parts.append(clip_by_layer_norm(settings.clip_layers))
    make = functools.partial(_optimizer, settings)
    if settings.groups:
        parts.append(grouped(make, settings.groups, settings.weight_decay, layers=settings.layers))
    else:
        parts.append(make(settings.weight_decay))
    if settings.plateau is not None:
        parts.append(optax.contrib.reduce_on_plateau(**settings.plateau))
    if settings.average is not None:
        parts.append(average_params(settings.average))
    tx = optax.with_extra_args_support(optax.chain(*parts))
    if settings.accumulate == 1:
        return tx
    steps = optax.MultiSteps(tx, settings.accumulate)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def _optimizer(settings: Chain, weight_decay: Any) -> optax.GradientTransformation:
    parameters = inspect.signature(settings.optimizer).parameters
    rate, own = settings.learning_rate, dict(settings.settings)
    if "weight_decay" in parameters or _takes_all(parameters):
        return settings.optimizer(rate, weight_decay=weight_decay, **own)
    if not isinstance(weight_decay, int | float) or weight_decay:
        return optax.chain(settings.optimizer(rate, **own), decayed(rate, weight_decay))
    return settings.optimizer(rate, **own)


class DecayedState(NamedTuple):
    """Optimizer steps done."""

    step: Int[Array, ""]


def decayed(learning_rate: optax.ScalarOrSchedule, weight_decay: Any) -> Any:
    """`update - lr weight_decay theta`: decoupled decay, after an optimizer that has none. Last of the two.

    Args:
        learning_rate: the optimizer's.
        weight_decay: times it.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101, with the rate as torch and Optax have it.
    """

    def update(updates: Params, state: DecayedState, params: Any = None) -> tuple[Params, Any]:
        if params is None:
            raise ValueError("weight decay needs the params: tx.update(grads, state, params)")
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        factor = jnp.asarray(rate * weight_decay)
        new = jax.tree.map(lambda u, p: u - (factor * p).astype(u.dtype), updates, params)
        return new, DecayedState(state.step + 1)

    return optax.GradientTransformation(
        lambda params: DecayedState(jnp.zeros((), jnp.int32)), update
    )


def clip_by_layer_norm(max_norm: float) -> optax.GradientTransformation:
    """`g min(1, max_norm / |g|)` for each leaf alone, and within a stack for each layer.

    Args:
        max_norm: in the units of the gradient, above 0.

    Raises:
        ValueError: it is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_layers={max_norm}: a norm to clip at is above 0")

    def leaf(name: str, g: Array) -> Array:
        axes = tuple(range(1 if name.startswith("layers/") else 0, g.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(tree.wide(g)), axis=axes, keepdims=True))
        return (g * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))).astype(g.dtype)

    return optax.stateless(lambda updates, params: tree.map_named(leaf, updates))


def _takes_all(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _check(settings: Chain) -> None:
    parameters = inspect.signature(settings.optimizer).parameters
    if not _takes_all(parameters):
        for name in settings.settings:
            if name not in parameters:
                known = [p for p in parameters if p != "learning_rate"]
                called = getattr(settings.optimizer, "__name__", "the optimizer")
                raise ValueError(
                    f"{called} has no setting {name!r}{tree.nearest(name, known)}; its settings are "
                    f"{', '.join(known)}"
                )
    rates = {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay}
    for name, rate in rates.items():
        if isinstance(rate, int | float) and not 0 <= rate < float("inf"):
            raise ValueError(f"{name}={rate} is 0 or more")
    if settings.clip is not None and not settings.clip > 0:
        raise ValueError(f"clip={settings.clip}: a norm to clip at is above 0; None does not clip")
    if settings.accumulate < 1:
        raise ValueError(f"accumulate={settings.accumulate}: an update takes at least one step")
