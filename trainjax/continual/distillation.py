"""Learning without forgetting: what the old model says about the new task's rows stays."""

from __future__ import annotations

from trainjax import losses
from trainjax.continual.method import Method, checked_strength
from trainjax.policies import Policy, Reference
from trainjax.types import Loss, Params


def lwf(strength: float = 1.0) -> Method:
    """Distillation from the params that the last task has left, on the new task's rows.

    It costs one forward pass more from the second task on.

    Args:
        strength: weight of `losses.lwf` beside the new task's loss.

    Raises:
        ValueError: a strength that is not above 0.

    Source: Li and Hoiem 2016, arXiv:1606.09282; see `losses.lwf` for what it compares.
    """
    checked_strength(strength)

    def penalty(old: Params, policy: Policy, number: int) -> Loss | None:
        return strength * losses.lwf(policy, Reference(policy, old)) if number else None

    return Method(
        init=lambda params, tasks: params,
        penalty=penalty,
        learned=lambda old, task: task.params,
    )
