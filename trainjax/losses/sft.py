"""Supervised fine-tuning: cross-entropy on the tokens that carry weight."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax.types import Batch, Loss, Metrics, Params


def nll(
    logprobs: Float[Array, "batch seq"], weights: Float[Array, "batch seq"]
) -> Float[Array, ""]:
    """`-sum_t weights_t log p(y_t)`: the token mean, if the weights say so.

    Args:
        logprobs: of each target given what comes before it.
        weights: of each token as a target, summing to 1 over the global batch.
    """
    chex.assert_rank([logprobs, weights], 2)
    chex.assert_equal_shape([logprobs, weights])
    return -jnp.sum(weights * logprobs)


def sft(policy: Any) -> Loss:
    """Cross-entropy on the batch's weighted tokens: completions, assistant turns or all text.

    Metrics: `mean_token_accuracy`, the weighted share of tokens that the model would pick greedily.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`.

    Source: agrees with TRL 1.16 `SFTTrainer` with its default loss on equal masks.
    """
    return Loss(_sft, policy)


def _sft(
    policy: Any, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    weights = batch["weights"]
    stats = policy(params, batch, key, where=weights != 0)
    loss = nll(stats.logprobs, weights)
    return loss, {"mean_token_accuracy": jnp.sum(weights * jax.lax.stop_gradient(stats.correct))}
