"""The term that belongs to a parameter-efficient method itself: orthogonality, balance of experts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from trainjax.losses.combine import share
from trainjax.types import Batch, Loss, Params


def adapter_penalty(policy: Any, strength: float = 1.0) -> Loss:
    """`strength * penalty(adapter)` as the policy's method defines it; add it to the task's loss.

    AdaLoRA keeps its factors orthogonal so, MoLoRA its experts in balance. A penalty of what the forward
    pass did shares that pass with the other terms. Counted once over the micro-batches (see
    `combine.share`); a statistic such as the balance of experts is of each micro-batch, whose devices
    count as one. Metrics: those of the method.

    Args:
        policy: `tj.policy(model, method)` of a method that has a penalty.
        strength: times the coefficients that the method has of its own.

    Raises:
        ValueError: the policy's method has no penalty.
    """
    if policy.peft is None or policy.peft.penalty is None:
        raise ValueError("the policy's method has no penalty; adalora and molora have one")
    return Loss(_adapter_penalty, (policy, np.float32(strength)))


def _adapter_penalty(inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None):
    policy, strength = inputs
    real = batch.get("segments", jnp.ones_like(batch["tokens"])).reshape(-1) > 0
    rows = real.astype(jnp.float32)
    rows = rows / jnp.maximum(jnp.sum(rows), 1.0)
    value, metrics = policy.peft.penalty(params, policy.reports(params, batch, key), rows)
    part = share(batch)
    return strength * part * value, {name: part * metric for name, metric in metrics.items()}
