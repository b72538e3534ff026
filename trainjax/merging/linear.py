"""Linear merging: the weighted mean of models ("model soup")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainjax.merging.method import Block, Method, Part, checked_weights, weighted_sum


def linear(weights: Sequence[float], *, normalize: bool = True) -> Method:
    """`sum_i w_i theta_i / sum_i w_i`, without the division if not `normalize`.

    Args:
        weights: one for each model.
        normalize: divide by the weights' sum.

    Raises:
        ValueError: weights that sum to zero, to be normalised; one that is not finite.

    Source: Wortsman et al. 2022, arXiv:2203.05482; agrees with mergekit 0.1.5 `linear`.
    """
    weights = checked_weights(weights)
    total = sum(weights) if normalize else 1.0
    if total == 0.0:
        raise ValueError(f"weights {weights} sum to zero, so they cannot be normalised")

    def combine(block: Block, _: None) -> Part:
        return weighted_sum(block.models, weights) / np.float32(total)

    return Method(combine, needs_base=False, least=len(weights), most=len(weights))
