"""Reward models: likelihoods of comparisons, ensembles and objectives made one, and calibration.

Likelihoods are functions of scores, one loss a comparison and not yet weighted: `sum(weights * loss)`
is the weighted sum that a `Loss` returns, as `bradley_terry` does.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from trainjax.losses.combine import as_partial
from trainjax.types import Batch, Loss, Metrics, Params, Scorer

Scores = Float[Array, "*pairs"]


# --- likelihoods of comparisons ---------------------------------------------------------------------


def pair_nll(chosen: Scores, rejected: Scores, margins: ArrayLike = 0.0) -> Scores:
    """Bradley-Terry: `-log sigmoid(r_w - r_l - margin)`, the chosen one's chance to win.

    Args:
        chosen, rejected: scores r_w and r_l of both.
        margins: by how much the chosen one is the better, where the data says.

    Source: Bradley and Terry 1952; with margins Llama 2 (arXiv:2307.09288), equation 2. Agrees with TRL
    1.16 `RewardTrainer`.
    """
    chex.assert_equal_shape([chosen, rejected])
    return -log_sigmoid(chosen - rejected - margins)


def centering(chosen: Scores, rejected: Scores) -> Scores:
    """`(r_w + r_l)^2`, which fixes the constant that comparisons leave open: scores around 0.

    Source: Eisenstein et al. 2023 (arXiv:2312.09244). Agrees with TRL 1.16's
    `center_rewards_coefficient`.
    """
    chex.assert_equal_shape([chosen, rejected])
    return (chosen + rejected) ** 2


def bounding(chosen: Scores, rejected: Scores, bound: ArrayLike) -> Scores:
    """`-ls(bound - r_w) - ls(bound + r_l)`: soft walls, so that no score is worth hunting for.

    With it a score is an advantage: how far above or below what is expected of an answer, on every task
    on the same scale.

    Args:
        chosen, rejected: scores r_w and r_l of both.
        bound: how high a chosen and how low a rejected completion may score, positive; by task where
            it is an array of the scores' shape.

    Source: the idea of the Advantage Model of Peng et al. 2023, arXiv:2309.10202, which bounds the
    scores of Bradley-Terry by a margin. This form of the walls is ours.
    """
    chex.assert_equal_shape([chosen, rejected])
    return -log_sigmoid(bound - chosen) - log_sigmoid(bound + rejected)


def rao_kupper_nll(
    chosen: Scores, rejected: Scores, tied: Bool[Array, "*pairs"], threshold: ArrayLike
) -> Scores:
    """Comparisons with ties, which a difference within a threshold makes.

    `P(w wins) = sigmoid(D - eta)`, `P(tie) = (e^(2 eta) - 1) sigmoid(D - eta) sigmoid(-D - eta)` with
    `D = r_w - r_l`; the three outcomes sum to 1.

    Args:
        chosen, rejected: scores of both; of a tie in either order.
        tied: which pairs are ties.
        threshold: eta, positive. It may be a parameter that trains (its logarithm, to keep it positive).

    Source: Rao and Kupper 1967 (J. Am. Stat. Assoc. 62), with theta = e^eta.
    """
    chex.assert_equal_shape([chosen, rejected, tied])
    difference = chosen - rejected
    win = log_sigmoid(difference - threshold)
    lose = log_sigmoid(-difference - threshold)
    # log(e^(2 eta) - 1), without the overflow
    room = jnp.multiply(2.0, threshold) + jnp.log(-jnp.expm1(jnp.multiply(-2.0, threshold)))
    return -jnp.where(tied, room + win + lose, win)


def davidson_nll(
    chosen: Scores, rejected: Scores, tied: Bool[Array, "*pairs"], log_nu: ArrayLike
) -> Scores:
    """Comparisons with ties, in proportion to the geometric mean of both strengths.

    The chances to win, lose and tie are as `e^(D/2)`, `e^(-D/2)` and `nu`, with `D = r_w - r_l`.

    Args:
        chosen, rejected: scores of both; of a tie in either order.
        tied: which pairs are ties.
        log_nu: log of nu, how common ties are; it may be a parameter that trains.

    Source: Davidson 1970 (J. Am. Stat. Assoc. 65).
    """
    chex.assert_equal_shape([chosen, rejected, tied])
    half = 0.5 * (chosen - rejected)
    tie = jnp.broadcast_to(log_nu, half.shape)
    outcome = jnp.where(tied, tie, half)
    return jnp.logaddexp(jnp.logaddexp(half, -half), tie) - outcome


def plackett_luce_nll(
    scores: Float[Array, "*groups size"], mask: Bool[Array, "*groups size"]
) -> Float[Array, "*groups"]:
    """A ranking as one choice after another: `-sum_i log softmax(s_i, ..., s_n)_i`.

    Of two it is Bradley-Terry.

    Args:
        scores: of a group's members, the best first.
        mask: which members there are, in any places.

    Source: Plackett 1975 and Luce 1959; ListMLE of Xia et al. 2008.
    """
    chex.assert_equal_shape([scores, mask])
    # A finite stand-in for minus infinity, whose differences have gradients.
    filled = jnp.where(mask, scores, -1e30)
    rest = jax.lax.cumlogsumexp(filled, axis=scores.ndim - 1, reverse=True)
    return jnp.sum(jnp.where(mask, rest - filled, 0.0), axis=-1)


# --- many scores made one ---------------------------------------------------------------------------


def weighted_objectives(
    values: Float[Array, "*any objectives"], weights: Float[Array, " objectives"]
) -> Float[Array, "*any"]:
    """`sum_o weights_o values_o`: of a vector of rewards one reward, of losses of objectives one loss.

    With positive weights the best policy for the sum is Pareto optimal; weights that sweep the simplex
    trace the convex part of the front.
    """
    chex.assert_axis_dimension(values, -1, weights.shape[0])
    return values @ weights


def worst_case(scores: Float[Array, " members *any"]) -> Float[Array, "*any"]:
    """The lowest score of an ensemble: none of its members can be fooled alone.

    Args:
        scores: of each member, from `jax.vmap` over adapters or heads.

    Source: WCO of Coste et al. 2023 (arXiv:2310.02743).
    """
    return jnp.min(scores, axis=0)


def uncertainty_penalised(
    scores: Float[Array, " members *any"], coefficient: ArrayLike
) -> Float[Array, "*any"]:
    """`mean_k r_k - coefficient var_k r_k` of an ensemble, the variance unbiased.

    Args:
        scores: of each member, two or more.
        coefficient: lambda; 0 is the mean.

    Raises:
        ValueError: one member, whose variance is undefined.

    Source: UWO of Coste et al. 2023 (arXiv:2310.02743), whose code has the unbiased variance.
    """
    if scores.shape[0] < 2:
        raise ValueError(f"{scores.shape[0]} members have no variance; an ensemble is two or more")
    return jnp.mean(scores, axis=0) - jnp.multiply(coefficient, jnp.var(scores, axis=0, ddof=1))


# --- evaluation -------------------------------------------------------------------------------------


def expected_calibration_error(
    probabilities: Float[Array, " any"],
    outcomes: Bool[Array, " any"],
    weights: Float[Array, " any"],
    bins: int = 10,
) -> Float[Array, ""]:
    """`sum_b |weighted mean of (outcome - probability) in bin b| * weight of b`, 0 if chances are kept.

    Of all data at once: it is no sum over parts of them.

    Args:
        probabilities: of an event, such as `sigmoid(r_w - r_l)` of the chosen one's win. For Guo's form
            give the probability of the likelier outcome, and whether it came.
        outcomes: whether the event came.
        weights: of each, summing to 1.
        bins: intervals `((b - 1) / bins, b / bins]` of [0, 1], the first with its 0.

    Source: Guo et al. 2017 (arXiv:1706.04599), equation 3.
    """
    chex.assert_equal_shape([probabilities, outcomes, weights])
    index = jnp.clip(jnp.ceil(probabilities * bins).astype(jnp.int32) - 1, 0, bins - 1)
    gaps = weights * (outcomes.astype(jnp.float32) - probabilities)
    return jnp.sum(jnp.abs(jax.ops.segment_sum(gaps, index, bins)))


def brier_score(
    probabilities: Float[Array, " any"],
    outcomes: Bool[Array, " any"],
    weights: Float[Array, " any"],
) -> Float[Array, ""]:
    """`sum_i weights_i (probability_i - outcome_i)^2`: 0 at best, 1/4 for a coin.

    Source: Brier 1950, for two classes and without its factor 2.
    """
    chex.assert_equal_shape([probabilities, outcomes, weights])
    return jnp.sum(weights * (probabilities - outcomes.astype(jnp.float32)) ** 2)


# --- the loss of a model that scores -----------------------------------------------------------------


def bradley_terry(
    scores_fn: Scorer, center_rewards_coefficient: float = 0.0, score_bound: float | None = None
) -> Loss:
    """`sum_i w_i (-log sigmoid(r_w - r_l - margin) + coefficient (r_w + r_l)^2)` over a batch's pairs.

    The batch carries `groups`, `[batch, groups]`: the weight of each pair, summing to 1 over the global
    batch, 0 for none; and `margins` of the same shape, if the data has them.

    Metrics, weighted means over pairs: `accuracy`, the share whose chosen completion scores higher,
    `margin`, the mean of `r_w - r_l`, and `mean_reward`.

    Args:
        scores_fn: `(params, batch, key) -> [batch, groups, 2]`, the chosen one's score first. Arrays that it
            needs are inputs if it is a `pytree`, or a `jax.tree_util.Partial` of them.
        center_rewards_coefficient: strength of the centring.
        score_bound: adds `bounding` with this bound; None adds none.

    Raises:
        ValueError: a coefficient below 0, a bound that is not positive, or, when called, groups that
            are not pairs.

    Source: agrees with TRL 1.16 `RewardTrainer`.
    """
    if not 0 <= center_rewards_coefficient < math.inf:
        raise ValueError(
            f"center_rewards_coefficient={center_rewards_coefficient} drives scores apart; use 0 or more"
        )
    if score_bound is not None and not 0 < score_bound < math.inf:
        raise ValueError(
            f"score_bound={score_bound} leaves scores no room; use one above 0, or None"
        )
    bound = None if score_bound is None else np.float32(score_bound)
    inputs = as_partial(scores_fn), np.float32(center_rewards_coefficient), bound
    return Loss(_bradley_terry, inputs)


def _bradley_terry(
    inputs: tuple[Scorer, Array, Array | None],
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
) -> tuple[Array, Metrics]:
    scores_fn, coefficient, bound = inputs
    weights = batch["groups"]
    scores = scores_fn(params, batch, key).astype(jnp.float32)
    if scores.shape != (*weights.shape, 2):
        raise ValueError(
            f"scores of shape {scores.shape} for groups of shape {weights.shape}: Bradley-Terry compares "
            f"pairs, {(*weights.shape, 2)}; `plackett_luce_nll` ranks more"
        )
    # Slots without a pair have weight 0, and might hold anything.
    scores = jnp.where(weights[..., None] != 0, scores, 0.0)
    chosen, rejected = scores[..., 0], scores[..., 1]
    margins = batch.get("margins", np.float32(0.0))
    each = pair_nll(chosen, rejected, margins) + coefficient * centering(chosen, rejected)
    if bound is not None:
        each += bounding(chosen, rejected, bound)
    metrics = {
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "margin": chosen - rejected,
        "mean_reward": 0.5 * (chosen + rejected),
    }
    sums = {name: stop_gradient(jnp.sum(weights * value)) for name, value in metrics.items()}
    return jnp.sum(weights * each), sums
