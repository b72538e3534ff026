"""KTO: completions that are each called good or bad, with no pairs."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax.losses.sequences import sequences
from trainjax.types import Batch, Loss, Metrics, Params, Policy, Reference


def prospect(
    logratios: Float[Array, "*batch"],
    labels: Float[Array, "*batch"],
    baseline: Float[Array, ""],
    beta: float | Array = 0.1,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
) -> Float[Array, "*batch"]:
    """`lambda_D (1 - s(beta (x - z0)))` for the desirable, `lambda_U (1 - s(beta (z0 - x)))` for others.

    Args:
        logratios: `x = log pi(y|x) - log ref(y|x)` of each completion.
        labels: 1 for a desirable completion, 0 for another.
        baseline: `z0`, how far the policy is from the reference; no gradient goes through it.
        beta: strength of the tie to the reference, above 0.
        desirable_weight, undesirable_weight: `lambda_D` and `lambda_U`.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8. Agrees with TRL 1.16.
    """
    chex.assert_equal_shape([logratios, labels])
    gain = beta * (logratios - jax.lax.stop_gradient(baseline))
    good = desirable_weight * jax.nn.sigmoid(-gain)
    return jnp.where(labels > 0, good, undesirable_weight * jax.nn.sigmoid(gain))


def kto(
    policy: Policy,
    reference: Reference,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """`prospect` on a batch of labelled completions, each with another row's beside it.

    The baseline is the mean log-ratio of those others, at least 0. It is of the rows that one
    micro-batch holds, so the result depends on `accumulate`, as TRL's does.

    Metrics: `kl`, the baseline; `rewards/accuracies`, the share of completions whose log-ratio lies on
    its label's side of it; `rewards/margins`, beta times the log-ratio with the label's sign.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`.
        reference: `(batch, where) -> TokenStats`.
        beta: above 0.
        desirable_weight, undesirable_weight: where one kind is rarer, the paper has their ratio make
            up for it to within 4/3.

    Raises:
        ValueError: beta not above 0, a negative weight.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: it is above 0")
    if min(desirable_weight, undesirable_weight) < 0:
        raise ValueError(
            f"desirable_weight={desirable_weight}, undesirable_weight={undesirable_weight}: weights "
            "are not negative"
        )
    numbers = tuple(np.float32(x) for x in (beta, desirable_weight, undesirable_weight))
    return Loss(_kto, (policy, reference, numbers))


def _kto(
    inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    policy, reference, numbers = inputs
    where = batch["completions"] > 0
    ours = policy(params, batch, key, where=where).logprobs
    logratios = sequences(ours - reference(batch, where=where).logprobs, batch, size=2).sums
    own, other = logratios[..., 0], jax.lax.stop_gradient(logratios[..., 1])
    weights, labels = batch["groups"], batch["labels"]
    total = jnp.sum(weights)
    baseline = jnp.maximum(jnp.sum(weights * other) / jnp.where(total > 0, total, 1.0), 0.0)
    loss = jnp.sum(weights * prospect(own, labels, baseline, *numbers))
    rewards = jax.lax.stop_gradient(numbers[0] * own)
    right = ((rewards > numbers[0] * baseline) == (labels > 0)).astype(jnp.float32)
    return loss, {
        "kl": total * baseline,
        "rewards/accuracies": jnp.sum(weights * right),
        "rewards/margins": jnp.sum(weights * jnp.where(labels > 0, rewards, -rewards)),
    }
