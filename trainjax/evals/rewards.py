"""Rewards: the scores of rows of data, and how good and how honest a reward model's comparisons are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from trainjax import data, platform
from trainjax.data import pipeline
from trainjax.losses import reward
from trainjax.losses.combine import as_partial
from trainjax.types import Batch, Params, Scorer


class Comparisons(NamedTuple):
    """How a reward model judges pairs.

    Attributes:
        accuracy: share of pairs whose chosen completion scores higher.
        margin: mean of how much higher.
        calibration_error: between the chance that the scores give to the likelier completion and how
            often that one was the chosen (ECE, ten bins).
        brier: mean squared error of the chance that they give to the chosen one.
    """

    accuracy: float
    margin: float
    calibration_error: float
    brier: float


def comparisons(
    chosen: Float[np.ndarray, " pairs"], rejected: Float[np.ndarray, " pairs"]
) -> Comparisons:
    """What scores of pairs are worth, `sigmoid(chosen - rejected)` being the chosen one's chance.

    An even score is half right, as a coin would be.

    Source: Guo et al. 2017 (arXiv:1706.04599) for calibration, of the likelier of two outcomes.
    """
    difference = jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)
    right, weights = difference > 0, jnp.full(len(difference), 1 / len(difference), jnp.float32)
    confidence = jax.nn.sigmoid(jnp.abs(difference))
    ece = reward.expected_calibration_error(confidence, right, weights)
    brier = reward.brier_score(jax.nn.sigmoid(difference), jnp.ones_like(right), weights)
    accuracy = np.mean(np.asarray(right) + 0.5 * np.asarray(difference == 0))
    return Comparisons(float(accuracy), float(jnp.mean(difference)), float(ece), float(brier))


def scores(
    scorer: Scorer,
    params: Params,
    examples: data.Examples,
    plan: data.Plan,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "examples size *objectives"]:
    """The score of every completion of the examples, in their order.

    Args:
        scorer: `(params, batch, key) -> [batch, groups, size]`, a last axis for objectives if it has any.
        params: of the scorer.
        examples: groups of completions, from `data.encode_groups`.
        plan: how they are batched, which changes no score.
        mesh: splits rows over its axes.

    Raises:
        ValueError: groups of another size than the scorer's.
    """
    pytree = as_partial(scorer)
    found: dict[int, np.ndarray] = {}
    rows = pipeline.own_rows(plan.batch_size, mesh)
    for batch in plan.epoch(examples, 0):
        filled = data.fill(examples, plan, batch, rows=rows)
        arrays = pipeline.to_devices(filled, mesh, plan.batch_size)
        given = platform.get(_scored(pytree, params, arrays))
        if examples.groups is None or given.shape[2] != examples.groups.size:
            raise ValueError(
                f"the scorer gives {given.shape[2]} scores a group; of groups of another size or none it "
                "would tell one completion's score as another's"
            )
        for row, members in enumerate(batch.rows):
            found |= {example: given[row, slot] for slot, example in enumerate(members)}
    return np.stack([found[example] for example in range(len(examples))])


def _score(scorer: Scorer, params: Params, batch: Batch) -> Array:
    return scorer(params, batch, None)


_scored = platform.jit(_score)
