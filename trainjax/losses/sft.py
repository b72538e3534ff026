"""Supervised fine-tuning: cross-entropy on the tokens that carry weight, and its variants.

A variant changes what a token's log-probability counts for: by how probable it is (`dft`), by how
probable its whole completion is (`dco`), or by a score that the data gives it (`unlikelihood`,
`reward_weighted`). The array functions come first, the losses of a policy after them.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trainjax.types import NO_EXTRAS, Batch, Extras, Loss, Metrics, Params, Policy, TokenStats

Tokens = Float[Array, "batch seq"]


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


def smoothed_nll(
    logprobs: Tokens,
    logsumexp: Tokens,
    mean_logit: Tokens,
    weights: Tokens,
    label_smoothing: ArrayLike,
) -> Float[Array, ""]:
    """Cross-entropy with the target `(1 - eps) onehot(y_t) + eps / vocab`.

    `sum_t weights_t (-(1 - eps) log p(y_t) + eps (logsumexp_t - mean_logit_t))`

    Args:
        logprobs: of each target.
        logsumexp, mean_logit: of each token's logits over the vocabulary.
        weights: of each token as a target, summing to 1 over the global batch.
        label_smoothing: eps.

    Source: Szegedy et al. 2016 (arXiv:1512.00567), section 7; agrees with transformers'
    `LabelSmoother`.
    """
    chex.assert_rank([logprobs, logsumexp, mean_logit, weights], 2)
    chex.assert_equal_shape([logprobs, logsumexp, mean_logit, weights])
    uniform = logsumexp - mean_logit
    return jnp.sum(weights * (label_smoothing * uniform - (1.0 - label_smoothing) * logprobs))


def squared_logsumexp(logsumexp: Tokens, weights: Tokens) -> Float[Array, ""]:
    """`sum_t weights_t logsumexp_t^2`, which keeps the logits' normaliser near 1.

    Source: the auxiliary z-loss of PaLM (arXiv:2204.02311), section 5, with strength 1e-4 there.
    """
    chex.assert_rank([logsumexp, weights], 2)
    chex.assert_equal_shape([logsumexp, weights])
    return jnp.sum(weights * logsumexp**2)


def dynamic_nll(logprobs: Tokens, weights: Tokens) -> Float[Array, ""]:
    """`-sum_t weights_t sg(p_t) log p_t`, sg for stop-gradient.

    Read as a policy gradient, cross-entropy weighs a token by `1 / p_t`; this takes that factor out.

    Args:
        logprobs: of each target.
        weights: of each token as a target, summing to 1 over the global batch.

    Source: Wu et al. 2025 (arXiv:2508.05629); agrees with TRL 1.16's `loss_type="dft"`.
    """
    return nll(logprobs, weights * stop_gradient(jnp.exp(logprobs)))


def coverage_factor(logprobs: Float[Array, "*any"], num_samples: ArrayLike) -> Float[Array, "*any"]:
    """The slope of `log(1 - (1 - p)^N)` against that of `log p`: 1 for N = 1, 0 where `p >> 1 / N`.

    `N p (1 - p)^(N - 1) / (1 - (1 - p)^N)`. With `s = -log(1 - p)` and `phi(x) = x / (e^x - 1)` this is
    `phi(N s) / phi(s)`: exact for the smallest p, where numerator and denominator above vanish.

    Args:
        logprobs: `log p`.
        num_samples: N, at least 1.
    """
    p = jnp.minimum(jnp.exp(logprobs), 1.0 - 1e-7)  # at 1 the factor is a limit
    s = -jnp.log1p(-p)
    return _phi(jnp.multiply(num_samples, s)) / _phi(s)


def coverage_nll(
    logprobs: Tokens, weights: Tokens, segments: Int[Array, "batch seq"], num_samples: ArrayLike
) -> Float[Array, ""]:
    """Direct coverage optimisation: the gradient of `-log(1 - (1 - p)^N)`, p of a whole completion.

    `-sum_t weights_t sg(factor(p of t's completion)) log p(y_t)`, sg for stop-gradient: the value is
    cross-entropy's for N = 1 and is no coverage for others. A completion that N samples find almost
    surely is left alone, which keeps the policy from growing certain.

    Args:
        logprobs: of each target; 0 for tokens of no weight.
        weights: of each token as a target, summing to 1 over the global batch.
        segments: the examples packed in a row, numbered from 1.
        num_samples: N, at least 1.

    Source: Chen et al. 2025 (arXiv:2502.07154), whose code has the factor times the completion's summed
    log-probability: here with weights equal for all tokens of a batch.
    """
    chex.assert_rank([logprobs, weights, segments], 2)
    chex.assert_equal_shape([logprobs, weights, segments])
    completions = _totals(stop_gradient(logprobs), segments)
    return nll(logprobs, weights * coverage_factor(completions, num_samples))


def log1m(logprobs: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """`log(1 - p)`, from `log(1e-6)` for p = 1: there the exact slope is infinite, and here 1e6.

    That is steep enough: in the logits the slope is then of order one, as it should be.
    """
    floor = 1e-6
    rounded_up = jnp.maximum(stop_gradient(logprobs), 0.0)  # a value above 0 keeps its slope
    return jnp.log(floor - (1.0 - floor) * jnp.expm1(logprobs - rounded_up))


def likelihood_or_unlikelihood(
    logprobs: Tokens, scores: Tokens, weights: Tokens, threshold: ArrayLike, alpha: ArrayLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`-sum w log p` of the tokens that score `threshold` or more, `-alpha sum w log(1 - p)` of others.

    Args:
        logprobs: of each target.
        scores: of each token, better ones higher.
        weights: of each token as a target, summing to 1 over the global batch.
        threshold: the lowest score whose likelihood is raised.
        alpha: strength of the unlikelihood.

    Returns:
        Both sums.

    Source: Welleck et al. 2019 (arXiv:1908.04319), with the tokens chosen by score as in
    Korbak et al. 2023 (arXiv:2302.08582), where the score is a cost and lower is better.
    """
    chex.assert_rank([logprobs, scores, weights], 2)
    chex.assert_equal_shape([logprobs, scores, weights])
    good = scores >= threshold
    return (
        nll(jnp.where(good, logprobs, 0.0), weights),
        jnp.multiply(alpha, nll(jnp.where(good, 0.0, log1m(logprobs)), weights)),
    )


def exponential_weights(
    scores: Float[Array, "*any"], beta: ArrayLike, baseline: ArrayLike, log_max: ArrayLike
) -> Float[Array, "*any"]:
    """`min(exp((score - baseline) / beta), exp(log_max))`, capped before the exponential overflows."""
    return jnp.exp(jnp.minimum((scores - baseline) / beta, log_max))


def sft(policy: Policy, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Loss:
    """Cross-entropy on the batch's weighted tokens: completions, assistant turns or all text.

    `nll + ...` as `smoothed_nll` has it, `+ z_loss sum_t w_t logsumexp_t^2`.

    Metrics: `mean_token_accuracy`, the weighted share of tokens that the model would pick greedily; with
    an option on, also `nll`, the cross-entropy alone.

    Args:
        policy: `(params, batch, key, where, extras) -> TokenStats`.
        label_smoothing: share of the target that goes to the whole vocabulary. From 0 to another value
            is another program; from one such value to another is not. The same of `z_loss`.
        z_loss: strength of the penalty on the logits' normaliser.

    Raises:
        ValueError: `label_smoothing` outside of [0, 1), or `z_loss` below 0.

    Source: agrees with TRL 1.16 `SFTTrainer` with its default loss on equal masks, and with its
    `label_smoothing_factor`.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is no share; use 0 or more, below 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} would reward large logits; use 0 or more")
    if label_smoothing == z_loss == 0:
        return Loss(_sft, policy)
    return Loss(_regularised, (policy, np.float32(label_smoothing), np.float32(z_loss)))


def _sft(
    policy: Policy, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    weights = batch["weights"]
    stats = policy(params, batch, key, where=weights != 0)
    loss = nll(stats.logprobs, weights)
    return loss, {"mean_token_accuracy": jnp.sum(weights * jax.lax.stop_gradient(stats.correct))}


def _regularised(
    inputs: tuple[Policy, Array, Array], params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    policy, label_smoothing, z_loss = inputs
    stats, weights, metrics = _stats(policy, params, batch, key, Extras(mean_logit=True))
    lse = stats.logsumexp
    assert stats.mean_logit is not None  # asked for above
    loss = smoothed_nll(stats.logprobs, lse, stats.mean_logit, weights, label_smoothing)
    return loss + z_loss * squared_logsumexp(lse, weights), metrics


def dft(policy: Policy) -> Loss:
    """Dynamic fine-tuning: `dynamic_nll`, each token's cross-entropy times its probability.

    Metrics: `mean_token_accuracy` and `nll`, the cross-entropy alone.

    Args:
        policy: `(params, batch, key, where, extras) -> TokenStats`.
    """
    return Loss(_dft, policy)


def _dft(
    policy: Policy, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    stats, weights, metrics = _stats(policy, params, batch, key)
    return dynamic_nll(stats.logprobs, weights), metrics


def dco(policy: Policy, num_samples: int) -> Loss:
    """Direct coverage optimisation, `coverage_nll`: trains for the best of N samples, not for one.

    Metrics: `mean_token_accuracy`, `nll`, and `coverage_factor`, the weighted mean of the factors: near
    0 the batch has nothing more to teach.

    Args:
        policy: `(params, batch, key, where, extras) -> TokenStats`.
        num_samples: N. 1 is cross-entropy.

    Raises:
        ValueError: fewer samples than one.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: coverage is of one sample or more")
    return Loss(_dco, (policy, np.float32(num_samples)))


def _dco(
    inputs: tuple[Policy, Array], params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    policy, num_samples = inputs
    stats, weights, metrics = _stats(policy, params, batch, key)
    segments = batch.get("segments")
    segments = jnp.ones(weights.shape, jnp.int32) if segments is None else segments
    loss = coverage_nll(stats.logprobs, weights, segments, num_samples)
    factors = coverage_factor(_totals(stats.logprobs, segments), num_samples)
    return loss, metrics | {"coverage_factor": stop_gradient(jnp.sum(weights * factors))}


def unlikelihood(policy: Policy, threshold: float, alpha: float = 1.0) -> Loss:
    """Cross-entropy on tokens that score well, `likelihood_or_unlikelihood` on the others.

    Metrics: `mean_token_accuracy` and `nll` of all tokens, and the loss's two parts, `likelihood_loss`
    and `unlikelihood_loss`.

    Args:
        policy: `(params, batch, key, where, extras) -> TokenStats`.
        threshold: the lowest of the batch's `token_scores` whose likelihood is raised.
        alpha: strength of the unlikelihood.

    Raises:
        ValueError: an `alpha` below 0.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha} would raise the likelihood of bad tokens; use 0 or more")
    return Loss(_unlikelihood, (policy, np.float32(threshold), np.float32(alpha)))


def _unlikelihood(
    inputs: tuple[Policy, Array, Array], params: Params, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Array, Metrics]:
    policy, threshold, alpha = inputs
    stats, weights, metrics = _stats(policy, params, batch, key)
    good, bad = likelihood_or_unlikelihood(
        stats.logprobs, _scores(batch), weights, threshold, alpha
    )
    parts = {"likelihood_loss": good, "unlikelihood_loss": bad}
    return good + bad, metrics | stop_gradient(parts)


def reward_weighted(
    policy: Policy, beta: float = 1.0, baseline: float = 0.0, max_weight: float = 20.0
) -> Loss:
    """Cross-entropy with each token's weight times `min(exp((score - baseline) / beta), max_weight)`.

    The weights are not normalised again: a batch of good rows counts for more than one of bad rows.

    Metrics: `mean_token_accuracy` and `nll` under the batch's own weights, and `score_weight`, the mean
    of the weights that the scores give.

    Args:
        policy: `(params, batch, key, where, extras) -> TokenStats`.
        beta: temperature. The smaller, the more the best of the batch's `token_scores` count.
        baseline: the score whose tokens count once, such as the mean of the data's.
        max_weight: the most that a token counts.

    Raises:
        ValueError: a `beta` or a `max_weight` that is not positive.

    Source: Peng et al. 2019 (arXiv:1910.00177), with a constant for the value function.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} is no temperature; use a positive one")
    if not 0 < max_weight < math.inf:
        raise ValueError(
            f"max_weight={max_weight} leaves nothing; use a positive number, such as 20"
        )
    numbers = tuple(map(np.float32, (beta, baseline, math.log(max_weight))))
    return Loss(_reward_weighted, (policy, numbers))


def _reward_weighted(
    inputs: tuple[Policy, tuple[Array, Array, Array]],
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
) -> tuple[Array, Metrics]:
    policy, numbers = inputs
    stats, weights, metrics = _stats(policy, params, batch, key)
    weights = weights * exponential_weights(_scores(batch), *numbers)
    return nll(stats.logprobs, weights), metrics | {"score_weight": jnp.sum(weights)}


def _stats(
    policy: Policy,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
    extras: Extras = NO_EXTRAS,
) -> tuple[TokenStats, Array, Metrics]:
    """The statistics of the tokens that have weight, the weights, and what every variant reports."""
    weights = batch["weights"]
    stats = policy(params, batch, key, where=weights != 0, extras=extras)
    metrics = {"mean_token_accuracy": stats.correct, "nll": -stats.logprobs}
    sums = {name: jnp.sum(weights * stop_gradient(value)) for name, value in metrics.items()}
    return stats, weights, sums


def _scores(batch: Batch) -> Tokens:
    if "token_scores" not in batch:
        raise ValueError(
            "the batch has no `token_scores`, [batch, seq]; `data.score_tokens` makes them of a score "
            "for each row of the source"
        )
    return batch["token_scores"]


def _totals(values: Tokens, segments: Int[Array, "batch seq"]) -> Tokens:
    """Sum of the values over each token's segment."""

    def of_row(values: Array, segments: Array) -> Array:
        return jnp.zeros(values.size + 1, values.dtype).at[segments].add(values)[segments]

    return jax.vmap(of_row)(values, segments)


def _phi(x: Array) -> Array:
    """`x / (e^x - 1)`, 1 at 0."""
    safe = jnp.where(x > 0, x, 1.0)
    return jnp.where(x > 0, safe / jnp.expm1(safe), 1.0)
