"""Curricula by loss: weights of the examples of a batch, from how hard the model finds them now.

An example is a segment of a packed row, or a row. Its loss is the weighted mean over its targets, and
its prior is the sum of their weights: 0 for a place that holds no example, and 1 over the batch. A
weighing is a function `(losses, priors, step) -> weights`, whose weights sum to 1 too and that sees no
gradient. So priors still say what counts as much as what (each token, or each example), and every
method below is a factor on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax.losses.combine import Schedule, as_partial, at_step
from trainjax.losses.sequences import Segments, at_tokens, segment_sums
from trainjax.losses.sft import nll
from trainjax.types import Batch, Loss, Metrics, Params, Policy

PerExample = Float[Array, " examples"]
Weigh = Callable[[PerExample, PerExample, Any], PerExample]
"""`(losses, priors, step) -> weights`; step counts optimizer steps done, None outside of training."""


# --- weights from losses -----------------------------------------------------------------------


def hard_weights(losses: PerExample, priors: PerExample, threshold: ArrayLike) -> PerExample:
    """Self-paced learning: the examples with `loss < threshold`, as the priors weigh them.

    All weights are 0 where no example is easy enough.

    Source: Kumar, Packer and Koller 2010, "Self-Paced Learning for Latent Variable Models".
    """
    return _normalised(priors, losses < threshold)


def soft_weights(losses: PerExample, priors: PerExample, threshold: ArrayLike) -> PerExample:
    """Self-paced learning with linear weights: `max(0, 1 - loss / threshold)` times the priors.

    Source: Jiang et al. 2014, "Easy Samples First", linear soft weighting.
    """
    return _normalised(priors, jnp.maximum(0.0, 1.0 - losses / threshold))


def lin_upper_weights(losses: PerExample, priors: PerExample, temperature: ArrayLike) -> PerExample:
    """LinUpper: a softmax that favours hard examples, but those beyond the middle all alike.

    `w ~ prior exp(min(h + 1, 1) / temperature)`, with h the losses scaled to [-1, 1] over the batch.

    Source: Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model
    Pretraining".
    """
    there = priors > 0
    least = jnp.min(jnp.where(there, losses, jnp.inf))
    most = jnp.max(jnp.where(there, losses, -jnp.inf))
    spread = jnp.where(most > least, most - least, 1.0)
    h = 2 * (losses - least) / spread - 1
    score = jnp.where(there, jnp.minimum(h + 1, 1) / temperature, -jnp.inf)
    return _normalised(priors, jnp.exp(score - jnp.max(score, initial=jnp.finfo(score.dtype).min)))


def top_k_weights(losses: PerExample, priors: PerExample, k: ArrayLike) -> PerExample:
    """The k hardest examples, as the priors weigh them; of equal losses the first in the batch.

    Source: Fan et al. 2017, "Learning with Average Top-k Loss".
    """
    order = jnp.argsort(jnp.where(priors > 0, -losses, jnp.inf), stable=True)
    rank = jnp.argsort(order, stable=True)
    return _normalised(priors, rank < k)


def skill_weights(
    skills: Float[Array, "examples skills"],
    missing: Float[Array, " skills"],
    priors: PerExample,
) -> PerExample:
    """Weights by missing skills: `w ~ prior sum_s skills_s missing_s`.

    They depend on no loss, so they are for the data: made once for a model, from a profile of it.

    Args:
        skills: 1 where an example needs a skill, else 0.
        missing: the model's profile: how often it failed to apply each skill.
        priors: of the examples.

    Source: the idea of He et al. 2025, "Skill-Targeted Adaptive Training" (STAT-Sel): examples count
    by how often the skills that they need are missing. This form of it is ours.
    """
    chex.assert_rank([skills, missing, priors], [2, 1, 1])
    return _normalised(priors, jnp.sum(skills * missing, axis=1))


def _normalised(priors: PerExample, factor: Array) -> PerExample:
    chex.assert_equal_shape([priors, factor])
    weights = priors * factor.astype(priors.dtype)
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1.0)


# --- weighings for `reweighted` ----------------------------------------------------------------


def hard_self_paced(threshold: Schedule | float) -> Weigh:
    """`hard_weights` with a threshold on an example's loss, in nats, or a schedule that raises it."""
    return Partial(_paced, Partial(hard_weights), _threshold(threshold))


def soft_self_paced(threshold: Schedule | float) -> Weigh:
    """`soft_weights` with a threshold on an example's loss, in nats, or a schedule that raises it."""
    return Partial(_paced, Partial(soft_weights), _threshold(threshold))


def lin_upper(temperature: float = 1.0, burn_in: int = 0) -> Weigh:
    """`lin_upper_weights`, after `burn_in` steps with the priors.

    Raises:
        ValueError: a temperature that is not positive, or a negative `burn_in`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is no divisor of a softmax; use one above 0")
    if burn_in < 0:
        raise ValueError(f"burn_in={burn_in} is not a number of steps; 0 begins at once")
    return Partial(_lin_upper, np.float32(temperature), np.int32(burn_in) if burn_in else None)


def top_k(k: int) -> Weigh:
    """`top_k_weights`. It saves no work, as `hardest` does.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} keeps no example; use at least 1")
    return Partial(_top_k, np.int32(k))


def _threshold(threshold: Schedule | float) -> Any:
    if callable(threshold):
        return as_partial(threshold)
    if threshold <= 0:
        raise ValueError(f"threshold={threshold} lets no example through; use one above 0")
    return np.float32(threshold)


def _paced(weigh: Any, threshold: Any, losses: PerExample, priors: PerExample, step: Any):
    value = at_step(threshold, step) if callable(threshold) else threshold
    return weigh(losses, priors, value)


def _lin_upper(temperature: Any, burn_in: Any, losses: PerExample, priors: PerExample, step: Any):
    weights = lin_upper_weights(losses, priors, temperature)
    if burn_in is None:
        return weights
    has_begun = at_step(lambda count: count >= burn_in, step)
    return jnp.where(has_begun > 0, weights, priors)


def _top_k(k: Any, losses: PerExample, priors: PerExample, step: Any) -> PerExample:
    del step
    return top_k_weights(losses, priors, k)


# --- applied to a policy -----------------------------------------------------------------------


def reweighted(policy: Policy, weigh: Weigh) -> Loss:
    """Cross-entropy whose examples are weighed by their present loss: `sum_i weigh(l)_i l_i`.

    One forward pass serves the weights, which see no gradient, and the loss. What the weighing
    compares are the examples that the loss is called on: with `accumulate` the micro-batch's. For
    weights over the global batch put them into the batch beforehand, by `reweigh`.

    Metrics: `mean_token_accuracy` and `unweighted_loss`, both under the priors; `kept`, the priors'
    share of the examples with a weight.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`.
        weigh: `lin_upper()`, `hard_self_paced(2.0)`, ..., or your own. A `jax.tree_util.Partial`
            keeps its numbers inputs of the program.
    """
    return Loss(_reweighted, (policy, as_partial(weigh)))


def _reweighted(
    inputs: tuple[Policy, Weigh], params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    policy, weigh = inputs
    weights, segments = batch["weights"], batch.get("segments")
    stats = policy(params, batch, key, where=weights != 0)
    logprobs = jax.lax.stop_gradient(stats.logprobs)
    losses, priors = example_losses(logprobs, weights, segments)
    factors = _factors(weigh, losses, priors, batch.get("step"))
    metrics = {
        "mean_token_accuracy": jnp.sum(weights * jax.lax.stop_gradient(stats.correct)),
        "unweighted_loss": nll(logprobs, weights),
        "kept": jnp.sum(jnp.where(factors > 0, priors, 0.0)),
    }
    return nll(stats.logprobs, weights * _at_tokens(factors, segments, weights.shape[0])), metrics


def reweigh(policy: Policy, weigh: Weigh, params: Params, batch: Batch) -> Batch:
    """The batch with the weights of its tokens changed by a weighing of all its examples.

    For `step(state, sft(policy), reweigh(policy, weigh, state.params, batch))`: the weighing compares
    the examples of the global batch, whatever the micro-batches and devices, at the price of a forward
    pass. A weighing with a schedule needs `batch | {"step": state.step}`. Jit it.
    """
    weights, segments = batch["weights"], batch.get("segments")
    logprobs = policy(params, batch, None, where=weights != 0).logprobs
    factors = _factors(weigh, *example_losses(logprobs, weights, segments), batch.get("step"))
    rest = {name: value for name, value in batch.items() if name != "step"}
    return rest | {"weights": weights * _at_tokens(factors, segments, weights.shape[0])}


def hardest(policy: Policy, params: Params, batch: Batch, size: int) -> Batch:
    """The `size` rows with the largest loss, as a smaller batch of the same total weight.

    Loss-threshold skipping at a fixed size: a forward pass over a large batch, a step on a small one.
    A row counts by the mean loss of its targets. Jit it with `static_argnums=3`.

    Raises:
        ValueError: a size that the batch does not have.
    """
    rows = batch["weights"].shape[0]
    if not 1 <= size <= rows:
        raise ValueError(f"size={size} is not a number of rows of this batch, which has {rows}")
    logprobs = policy(params, batch, None, where=batch["weights"] != 0).logprobs
    losses, priors = example_losses(logprobs, batch["weights"])
    kept = jnp.sort(jax.lax.top_k(jnp.where(priors > 0, losses, -jnp.inf), size)[1])
    smaller = {name: jnp.take(array, kept, axis=0) for name, array in batch.items()}
    total = jnp.sum(smaller["weights"])
    scale = jnp.sum(batch["weights"]) / jnp.where(total > 0, total, 1.0)
    return {**smaller, "weights": smaller["weights"] * scale}


def example_losses(
    logprobs: Float[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    segments: Segments = None,
) -> tuple[PerExample, PerExample]:
    """Loss and prior of each example: the weighted mean over its targets, and their weight.

    Examples are rows; with segments they are the places for `seq + 1` segments in every row, of which
    most are empty.
    """
    priors = _by_example(weights, segments)
    losses = -_by_example(weights * logprobs, segments)
    return losses / jnp.where(priors > 0, priors, 1.0), priors


def _by_example(values: Float[Array, "batch seq"], segments: Segments) -> PerExample:
    return segment_sums(values, segments).reshape(-1)


def _factors(weigh: Weigh, losses: PerExample, priors: PerExample, step: Any) -> PerExample:
    """What the weights of an example's tokens are multiplied by, of the same total over the batch."""
    new = weigh(losses, priors, step)
    chex.assert_equal_shape([new, priors])
    return jax.lax.stop_gradient(new * jnp.sum(priors) / jnp.where(priors > 0, priors, 1.0))


def _at_tokens(per_example: PerExample, segments: Segments, rows: int) -> Float[Array, "batch _"]:
    """Each token's value of its example; `[batch, 1]` where a row is one example."""
    return at_tokens(per_example.reshape(rows, -1), segments)
