"""The diagonal of the Fisher information, from squared gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from trainjax import platform
from trainjax.estimate.per_example import mean_over_examples
from trainjax.types import Batch, Loss, Params


def fisher(
    loss: Loss,
    params: Params,
    batches: Iterable[Batch],
    *,
    sampler: Any = None,
    key: PRNGKeyArray | None = None,
    chunk: int = 1,
) -> Params:
    """`F_i = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2`, where `y_n` is all targets of example n.

    Not the square of a batch's mean gradient, which is near 0 at the end of training and tells
    nothing. The empirical Fisher takes the labels of the data; the true one takes labels drawn from the
    model itself, at each target given the data's own tokens before it.

    Args:
        loss: minus the log-likelihood of a batch's weighted targets: `losses.sft(policy)`. Weights are
            set to 1 on every target, so the averaging convention of the batches does not matter.
        params: where it is taken: an adapter, or the whole model.
        batches: a finite number, of one example a row (`data.one_epoch` with `data.unpacked`).
        sampler: for the true Fisher, the policy: `draw(params, batch, key) -> [batch, seq]` tokens,
            which the loss finds as the batch's `targets`. Without it the Fisher is the empirical one.
        key: of the draws.
        chunk: rows whose gradients are held at once. 1 takes the least memory; a batch's rows are best
            where devices share them, which all work on each chunk.

    Returns:
        A tree like the params, in float32 and laid out over devices as they are: any checkpointer
        saves it.

    Raises:
        ValueError: packed rows; no targets; a sampler without a key, or a key without a sampler.

    Source: Kunstner et al. 2019, arXiv:1905.12558, on the two. The empirical one agrees with Avalanche's
    `EWCPlugin` at a mini-batch size of 1 on one target an example; at other sizes that squares means.
    """
    if (sampler is None) != (key is None):
        raise ValueError("the true Fisher needs a sampler and a key; the empirical one neither")
    if sampler is not None and key is not None:
        batches = _with_drawn_targets(sampler, params, batches, key)
    return mean_over_examples(jnp.square, loss, params, batches, chunk)


def _with_drawn_targets(
    sampler: Any, params: Params, batches: Iterable[Batch], key: PRNGKeyArray
) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        drawn = _draw(sampler, params, batch, jax.random.fold_in(key, number))
        yield {**batch, "targets": drawn}


@platform.jit
def _draw(sampler: Any, params: Params, batch: Batch, key: PRNGKeyArray) -> Any:
    return sampler.draw(params, batch, key)


def running(fisher: Params, new: Params, decay: float) -> Params:
    """Online EWC: `F <- decay F + F_new`, for the penalty around the newest anchor alone.

    Args:
        fisher: of the tasks so far.
        new: of the task just learned, at its end.
        decay: how much of the old tasks stays, in [0, 1].

    Raises:
        ValueError: a decay outside.

    Source: Schwarz et al. 2018, arXiv:1805.06370. Agrees with Avalanche's `online` mode.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} of the old tasks' Fisher is at least 0 and at most 1")
    return jax.tree.map(lambda old, now: decay * old + now, fisher, new)
