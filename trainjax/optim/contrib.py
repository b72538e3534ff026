"""Optimizers of `optax.contrib` for models whose layers are stacked, and what they evaluate with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from trainjax import tree
from trainjax.optim.average import AverageState
from trainjax.optim.settings import settings_of
from trainjax.types import Gradient, Metrics, Objective, Params


@settings_of(contrib.muon, "adam_weight_decay", "muon_weight_dimension_numbers")
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float = 0.95,
    weight_decay: float = 0.0,
    adam: str = r"embed|head",
    consistent_rms: float | None = 0.2,
    **settings: Any,
) -> optax.GradientTransformation:
    """`optax.contrib.muon`: momentum made orthogonal, matrix by matrix, and AdamW for the rest.

    Each layer of a stack is a matrix of its own, which Optax would take for an array of three axes and
    leave to Adam.

    Args:
        learning_rate: of both; with `consistent_rms` at 0.2 what suits AdamW suits Muon.
        beta: of the momentum.
        weight_decay: of both, decoupled, times the learning rate.
        adam: regex of the matrices that Muon is not for.
        consistent_rms: root mean square of an update's entries; None scales by width as the original does.
        settings: the others of `optax.contrib.muon`.

    Source: Jordan 2024; Liu et al. 2025, arXiv:2502.16982, for the constant size of updates.
    """
    pattern = tree.regex(adam)

    def dimensions(params: Params) -> Params:
        def leaf(name: str, x: Any) -> Any:
            is_matrix = x.ndim >= (3 if name.startswith("layers/") else 2)
            return (
                contrib.MuonDimensionNumbers(-2, -1)
                if is_matrix and not pattern.search(name)
                else None
            )

        return tree.map_named(leaf, params)

    return contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=dimensions,
        **settings,
    )


def schedule_free(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW without a schedule: steps are averaged instead, and no end has to be known.

    `optax.contrib.schedule_free` around RMSprop as `optax.contrib.schedule_free_adamw` has it, but with a
    schedule of yours, which is to warm up and then stay: `optim.constant(rate, steps, warmup)`. The params
    that training holds are those where gradients are taken; evaluate and save
    `eval_params(opt_state, params)`.

    Args:
        learning_rate: a rate or a warm-up; larger than with a schedule, by 1 to 10.
        b1: between the average (1) and the newest point (0) is where gradients are taken.
        b2, eps: Adam's.
        weight_decay: at that point, times the learning rate.
        weight_lr_power: of the rate, in the average's weights.

    Source: Defazio et al. 2024, arXiv:2405.15682.
    """
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, bias_correction=True, eps_in_sqrt=False),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return contrib.schedule_free(base, learning_rate, b1, weight_lr_power)


def prodigy(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    estim_lr0: float = 1e-6,
    weight_decay: float = 0.0,
    safeguard_warmup: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.prodigy`: AdamW that finds the size of its own steps.

    With a warm-up that begins at 0 Optax's divides 0 by 0 in the first step and has NaN ever after; here
    a rate is at least 1e-10.

    Args:
        learning_rate: times the rate that it finds: 1, or a schedule with that peak.
        betas, eps: Adam's.
        estim_lr0: where its estimate of the rate begins, far too small.
        weight_decay: decoupled, times the rate.
        safeguard_warmup: keeps the warm-up's small rates out of the estimate.

    Source: Mishchenko and Defazio 2023, arXiv:2306.06101, algorithm 3.
    """

    def rate(step: Any) -> Any:
        now = learning_rate(step) if callable(learning_rate) else learning_rate
        return jnp.maximum(now, 1e-10)

    return contrib.prodigy(
        rate,
        betas,
        eps=eps,
        estim_lr0=estim_lr0,
        weight_decay=weight_decay,
        safeguard_warmup=safeguard_warmup,
    )


def sharpness_aware(rho: float = 0.05) -> Gradient:
    """SAM: the gradient at the worst place nearby, `g(theta + rho g(theta) / |g(theta)|)`.

    For `make_step(tx, gradient=sharpness_aware())`: each step takes two gradients of the same batch and
    makes an update, where `optax.contrib.sam` as a chain takes two steps to an update.

    Args:
        rho: radius, in the norm of all params.

    Raises:
        ValueError: a radius that is not positive.

    Source: Foret et al. 2020, arXiv:2010.01412, equation 2 and algorithm 1.
    """
    if not rho > 0:
        raise ValueError(f"rho={rho} is a radius above 0, such as 0.05")

    def gradient(objective: Objective, trained: Params) -> tuple[Params, Metrics]:
        def at(params: Params) -> tuple[Params, Metrics]:
            def one(batch: Any, key: Any) -> tuple[Params, Metrics]:
                (value, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
                    params, batch, key
                )
                return grads, metrics | {"loss": value}

            return objective.total(one)

        grads, metrics = at(trained)
        size = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
        worst = jax.tree.map(lambda x, g: x + (size * g).astype(x.dtype), trained, grads)
        return at(worst)[0], metrics

    return gradient


def eval_params(opt_state: Any, params: Params) -> Params:
    """What to evaluate and save of a run: the average that its optimizer keeps, or the params themselves.

    Of `schedule_free` its averaged point, of `average_params` (`Chain.average`) the average.

    Args:
        opt_state: the optimizer's state, chains and groups included.
        params: that it belongs to.
    """
    kinds = (AverageState, contrib.ScheduleFreeState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    for node in nodes:
        if isinstance(node, AverageState):
            return node.average
    for node in nodes:
        if isinstance(node, contrib.ScheduleFreeState):
            params = _average_of(node, params)
    return params


def _average_of(state: Any, params: Params) -> Params:
    """`x = (y - (1 - b1) z) / b1`, where the state is of that part of the params."""

    def leaf(z: Any, y: Any) -> Any:
        return y if isinstance(z, optax.MaskedNode) else (y - (1.0 - state.b1) * z) / state.b1

    return jax.tree.map(
        leaf, state.z, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
