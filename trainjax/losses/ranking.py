"""Losses on lists of scored completions of a prompt: their order, learned by the policy.

Each loss is a function of `Lists`, and `listwise` wires a policy and a reference into any of them, as
`preference.pairwise` does for pairs:

    losses.listwise(policy, reference, plackett_luce, beta=0.1)
    losses.listwise(policy, None, rrhf)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from trainjax.losses.coefficients import as_input, check_names, positive
from trainjax.losses.reward import plackett_luce_nll
from trainjax.losses.sequences import sequences
from trainjax.types import Batch, Loss, Metrics, Params, Policy, Reference

PerGroup = Float[Array, "*groups"]
PerMember = Float[Array, "*groups size"]


class Lists(NamedTuple):
    """What the losses read of groups of completions.

    Attributes:
        logprobs, ref_logprobs: of each completion under policy and reference, summed over its tokens.
        lengths: tokens of the completions.
        scores: how good each is.
        mask: which completions there are.
    """

    logprobs: PerMember
    ref_logprobs: PerMember
    lengths: PerMember
    scores: PerMember
    mask: Bool[Array, "*groups size"]

    @property
    def means(self) -> PerMember:
        """The policy's log-probability a token."""
        return self.logprobs / jnp.maximum(self.lengths, 1.0)


ListLoss = Callable[..., PerGroup]
"""`(lists, coefficients by name) -> loss of each group`."""


def plackett_luce(lists: Lists, beta: float | Array = 0.1) -> PerGroup:
    """DPO on a ranking: `-sum_k log softmax(r_k, ..., r_n)_k`, r the implied rewards from best to worst.

    `r = beta (log pi(y|x) - log ref(y|x))`. Of two completions it is DPO. Equal scores are ranked in the
    order of the list.

    Args:
        lists: log-probabilities and scores.
        beta: strength of the tie to the reference, above 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 20.
    """
    rewards = beta * (lists.logprobs - lists.ref_logprobs)
    order = jnp.argsort(-jnp.where(lists.mask, lists.scores, -jnp.inf), axis=-1, stable=True)
    ranked, there = (jnp.take_along_axis(x, order, axis=-1) for x in (rewards, lists.mask))
    return plackett_luce_nll(ranked, there)


def rrhf(lists: Lists, alpha: float | Array = 1.0) -> PerGroup:
    """`sum over score_i < score_j of max(0, p_i - p_j), - alpha p_best`, with p the mean log-probability.

    Args:
        lists: log-probabilities and scores; the reference's are not read.
        alpha: weight of the best completion's likelihood; of equally good ones the first.

    Source: Yuan et al. 2023, arXiv:2304.05302, eq. 2-4.
    """
    p = lists.means
    worse = lists.scores[..., :, None] < lists.scores[..., None, :]
    both = lists.mask[..., :, None] & lists.mask[..., None, :]
    hinge = jax.nn.relu(p[..., :, None] - p[..., None, :])
    ranking = jnp.sum(jnp.where(worse & both, hinge, 0.0), axis=(-2, -1))
    return ranking - alpha * jnp.take_along_axis(p, _best(lists)[..., None], axis=-1)[..., 0]


def listwise(
    policy: Policy, reference: Reference | None, loss: ListLoss = plackett_luce, **coefficients: Any
) -> Loss:
    """Any loss of lists on a batch of them: the weighted mean over its groups.

    The batch is of rows `prompt`, `completions`, `scores` (`data.scored`). Metric: `best_accuracy`, the
    share of groups whose best completion is the one that the policy finds likeliest a token.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`.
        reference: `(batch, where) -> TokenStats`; None for a loss without one.
        loss: `(lists, coefficients) -> losses`, from this module or of your own.
        **coefficients: the loss's own; arrays or numbers, which are inputs of the program.

    Raises:
        ValueError: a coefficient that the loss does not have; a beta that is not above 0; when called, a
            batch without scores.
    """
    check_names(loss, coefficients)
    if "beta" in coefficients:
        positive("beta", coefficients["beta"])
    numbers = {name: as_input(value) for name, value in coefficients.items()}
    return Loss(_Listwise(loss), {"policy": policy, "reference": reference, "numbers": numbers})


@dataclasses.dataclass(frozen=True)
class _Listwise:
    """The pure function of a loss of lists, equal to another of the same."""

    loss: ListLoss

    def __call__(
        self, inputs: dict[str, Any], params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Array, Metrics]:
        if "scores" not in batch:
            raise ValueError(
                "the batch has no scores, [batch, groups, size] floats: a list of completions is learned "
                "from rows with the columns prompt, completions, scores"
            )
        reference, where = inputs["reference"], batch["completions"] > 0
        scores, weights = batch["scores"], batch["groups"]
        ours = sequences(
            inputs["policy"](params, batch, key, where=where).logprobs, batch, scores.shape[-1]
        )
        theirs = jnp.zeros_like(ours.sums)
        if reference is not None:
            theirs = sequences(reference(batch, where=where).logprobs, batch, scores.shape[-1]).sums
        lists = Lists(ours.sums, theirs, ours.lengths, scores, ours.lengths > 0)
        each = self.loss(lists, **inputs["numbers"])
        likeliest = jnp.argmax(jnp.where(lists.mask, lists.means, -jnp.inf), axis=-1)
        right = (likeliest == _best(lists)).astype(jnp.float32)
        # Slots without a group have weight 0, and might hold anything.
        value = jnp.sum(jnp.where(weights > 0, weights * each, 0.0))
        return value, {"best_accuracy": jnp.sum(weights * right)}


def _best(lists: Lists) -> Array:
    return jnp.argmax(jnp.where(lists.mask, lists.scores, -jnp.inf), axis=-1)
