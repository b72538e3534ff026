"""Methods that hold the params near where the last task left them: EWC, online EWC, MAS, SI, L2-SP.

All but the last remember `Anchored` params: where the last task has left them, and how much each has
mattered so far: nothing before the first task, so that the penalty is 0 in it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from trainjax import estimate, losses, platform
from trainjax.continual.method import Learned, Memory, Method, checked_strength
from trainjax.losses import Anchored
from trainjax.policies import Policy
from trainjax.types import Loss, Params


def ewc(strength: float = 1000.0, samples: int = 64) -> Method:
    """Elastic weight consolidation: the sum of one penalty a task, `losses.ewc`, kept as one.

    Args:
        strength: of each task's penalty: the number of examples that the task counts for, beside the
            one that the loss is a mean over.
        samples: examples of a task that its empirical Fisher is estimated from.

    Raises:
        ValueError: a strength that is not above 0; fewer than one sample.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796; see `losses.ewc` and `losses.pooled`.
    """
    _check_samples(samples)

    def learned(memory: Anchored, task: Learned) -> Anchored:
        return _pooled(memory, Anchored(task.params, _fisher(task, samples)))

    return _quadratic(strength, learned)


def online_ewc(strength: float = 1000.0, samples: int = 64, decay: float = 0.9) -> Method:
    """EWC around the newest params alone, with the Fishers of all tasks: `F <- decay F + F_new`.

    Args:
        strength: as in `ewc`.
        samples: as in `ewc`.
        decay: how much of the earlier tasks' Fisher stays, from 0 to 1.

    Raises:
        ValueError: a strength that is not above 0; fewer than one sample; a decay outside.

    Source: Schwarz et al. 2018, arXiv:1805.06370; see `estimate.running`.
    """
    _check_samples(samples)
    estimate.running({}, {}, decay)  # says at once what is wrong with a decay

    def learned(memory: Anchored, task: Learned) -> Anchored:
        new = _fisher(task, samples)
        return Anchored(task.params, estimate.running(memory.fisher, new, decay))

    return _quadratic(strength, learned)


def mas(strength: float = 1.0, samples: int = 64) -> Method:
    """Memory-aware synapses: what moves the output matters; importances of the tasks add up.

    Args:
        strength: lambda: the penalty is `lambda sum_i Omega_i (theta_i - anchor_i)^2`, without a half.
        samples: examples of a task that its importances are estimated from.

    Raises:
        ValueError: a strength that is not above 0; fewer than one sample.

    Source: Aljundi et al. 2018, arXiv:1711.09601; see `estimate.mas`.
    """
    _check_samples(samples)

    def learned(memory: Anchored, task: Learned) -> Anchored:
        omega = estimate.mas(task.policy, task.params, task.batches(samples))
        return Anchored(task.params, jax.tree.map(jnp.add, memory.fisher, omega))

    return _quadratic(strength, learned, 2.0)


def si(strength: float = 1.0, damping: float = 0.1) -> Method:
    """Synaptic intelligence: what has lowered the loss on the way matters.

    The path is of the whole gradient, that of the penalty included; see `estimate.tracked`.

    Args:
        strength: c: the penalty is `c sum_i Omega_i (theta_i - anchor_i)^2`, without a half.
        damping: xi, above 0: of the division by how far a parameter has moved, squared.

    Raises:
        ValueError: a strength or a damping that is not above 0.

    Source: Zenke et al. 2017, arXiv:1703.04200; see `estimate.consolidated`.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping} divides by 0 where a parameter did not move")

    def optimizer(
        tx: optax.GradientTransformation, memory: Anchored, seed: int
    ) -> optax.GradientTransformation:
        return estimate.tracked(tx, memory.fisher)

    def learned(memory: Anchored, task: Learned) -> Anchored:
        _, path = task.opt_state
        return Anchored(task.params, estimate.consolidated(path, task.params, damping))

    return _quadratic(strength, learned, 2.0)._replace(optimizer=optimizer)


def l2_sp(strength: float = 0.1) -> Method:
    """All params matter alike: `losses.l2_sp` towards where the last task has left them.

    In the first task there is no penalty: nothing was learned that it could keep.

    Args:
        strength: of the penalty.

    Raises:
        ValueError: a strength that is not above 0.

    Source: Li et al. 2018, arXiv:1802.01483, who tune one task from the pretrained params.
    """
    checked_strength(strength)

    def penalty(anchor: Params, policy: Policy, number: int) -> Loss:
        return losses.l2_sp(anchor, strength if number else 0.0)

    return Method(
        init=lambda params, tasks: params,
        penalty=penalty,
        learned=lambda anchor, task: task.params,
    )


def _quadratic(
    strength: float, learned: Callable[[Anchored, Learned], Anchored], factor: float = 1.0
) -> Method:
    """The method of a penalty `factor * strength * 0.5 * sum_i F_i (theta_i - anchor_i)^2`."""
    checked_strength(strength)

    def penalty(memory: Memory, policy: Policy, number: int) -> Loss:
        return losses.ewc(memory.anchor, memory.fisher, factor * strength)

    return Method(init=_unimportant, penalty=penalty, learned=learned)


_pooled = platform.jit(losses.pooled)


def _unimportant(params: Params, tasks: int) -> Anchored:
    return Anchored(params, jax.tree.map(jnp.zeros_like, params))


def _fisher(task: Learned, samples: int) -> Params:
    return estimate.fisher(losses.sft(task.policy), task.params, task.batches(samples))


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples}: an estimate is from at least one example")
