"""Pairs of completions: what a loss reads of them, and how a batch's tokens become that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trainjax.losses.sequences import Sequences, sequences
from trainjax.types import Batch, Metrics, pytree

_LARGEST = 40.0  # of exponents: e^40 squared, and its gradient, are still float32 numbers

Scores = Float[Array, "*pairs"]


class Pairs(NamedTuple):
    """What the losses read of pairs; all of one shape.

    Attributes:
        chosen, rejected: log-probability of the completion under the policy, summed over its tokens.
        ref_chosen, ref_rejected: the same under the reference; zeros where there is none.
        chosen_length, rejected_length: tokens of the completions.
        weights: of each pair; sums to 1 over the batch. Only losses that compare pairs with one
            another read it.
        margins: by how much the chosen one scores higher, where the data say. Only `dno` reads it.
    """

    chosen: Scores
    rejected: Scores
    ref_chosen: Scores
    ref_rejected: Scores
    chosen_length: Scores
    rejected_length: Scores
    weights: Scores
    margins: Scores | None = None

    @property
    def c(self) -> Scores:
        """Log-ratio of the chosen completions."""
        return self.chosen - self.ref_chosen

    @property
    def r(self) -> Scores:
        """Log-ratio of the rejected completions."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Scores:
        """`c - r`, which a loss wants large."""
        return self.c - self.r

    @property
    def chosen_mean(self) -> Scores:
        """The policy's log-probability a token of the chosen completions."""
        return self.chosen / jnp.maximum(self.chosen_length, 1.0)

    @property
    def rejected_mean(self) -> Scores:
        """The policy's log-probability a token of the rejected completions."""
        return self.rejected / jnp.maximum(self.rejected_length, 1.0)


# --- divergences: what takes the place of the log-ratio -------------------------------------------


def reverse_kl(x: Scores) -> Scores:
    """The log-ratio itself: DPO's own."""
    return x


def forward_kl(x: Scores) -> Scores:
    """`1 - exp(-x)`, that is `f'(t) = 1 - 1/t` at `t = exp(x)`."""
    return 1 - jnp.exp(jnp.minimum(-x, _LARGEST))


def js_divergence(x: Scores) -> Scores:
    """`log 2 + ls(x)`, that is `f'(t) = log(2 t / (t + 1))`."""
    return math.log(2.0) + jax.nn.log_sigmoid(x)


@pytree
class AlphaDivergence:
    """`(t^(alpha - 1) - 1) / (alpha - 1)` at `t = exp(x)`; the log-ratio in the limit of alpha = 1."""

    alpha: Any = 0.5

    def __call__(self, x: Scores) -> Scores:
        k = jnp.asarray(self.alpha, x.dtype) - 1
        near = jnp.abs(k) < 1e-6
        power = jnp.expm1(jnp.minimum(k * x, _LARGEST)) / jnp.where(near, 1, k)
        return jnp.where(near, x, power)


def diverged(pairs: Pairs, divergence: Callable[[Scores], Scores] | None) -> Pairs:
    """Pairs whose log-ratios, to a reference of zeros, are what the divergence makes of them."""
    if divergence is None:
        return pairs
    zeros = jnp.zeros_like(pairs.c)
    return pairs._replace(
        chosen=divergence(pairs.c),
        rejected=divergence(pairs.r),
        ref_chosen=zeros,
        ref_rejected=zeros,
    )


# --- from tokens to pairs ----------------------------------------------------------------------


def pairs_of(
    logprobs: Float[Array, "batch seq"],
    reference_logprobs: Float[Array, "batch seq"] | None,
    batch: Batch,
    ld_alpha: float | Array | None = None,
) -> Pairs:
    """The pairs of a batch from the log-probabilities of its tokens; each field is `[batch, groups]`."""

    def split(summed: Sequences) -> list[Array]:
        chosen, rejected = summed.sums[..., 0], summed.sums[..., 1]
        if ld_alpha is None:
            return [chosen, rejected]
        shared = jnp.min(summed.lengths, axis=-1, keepdims=True)
        weights = jnp.where(summed.places <= _at(shared, batch, summed), 1.0, ld_alpha)
        again = sequences(summed.values * weights, batch, size=2)
        return [again.sums[..., 0], again.sums[..., 1]]

    ours = sequences(logprobs, batch, size=2)
    chosen, rejected = split(ours)
    ref_chosen = ref_rejected = jnp.zeros_like(chosen)
    if reference_logprobs is not None:
        ref_chosen, ref_rejected = split(sequences(reference_logprobs, batch, size=2))
    lengths = ours.lengths[..., 0], ours.lengths[..., 1]
    rest = *lengths, batch["groups"], batch.get("margins")
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *rest)


def _at(per_group: Float[Array, "batch groups 1"], batch: Batch, summed: Sequences) -> Array:
    """The group's number at each of its tokens."""
    group = jnp.maximum(batch["completions"] - 1, 0) // summed.sums.shape[-1]
    return jnp.take_along_axis(per_group[..., 0], group, axis=1)


def wpo_weights(aligned: Float[Array, "batch seq"], batch: Batch) -> Scores:
    """`exp` of the means over both completions' tokens of `log p - log sum_v p_v^2`; no gradient."""
    summed = sequences(jax.lax.stop_gradient(aligned), batch, size=2)
    return jnp.exp(jnp.sum(summed.sums / jnp.maximum(summed.lengths, 1.0), axis=-1))


def metrics_of(pairs: Pairs, beta: Any) -> Metrics:
    """What TRL reports of pairs, by its names."""
    p = jax.lax.stop_gradient(pairs)
    chosen, rejected = beta * p.c, beta * p.r
    each = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": p.chosen,
        "logps/rejected": p.rejected,
    }
    return {name: jnp.sum(p.weights * values) for name, values in each.items()}
