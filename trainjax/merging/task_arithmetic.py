"""Task arithmetic: what models have learned since their base, added up or taken away."""

from __future__ import annotations

from collections.abc import Sequence

from trainjax.merging.method import Block, Method, Part, checked_weights, weighted_sum


def task_arithmetic(weights: Sequence[float]) -> Method:
    """`theta + sum_i w_i tau_i` with the task vectors `tau_i = theta_i - theta`.

    Args:
        weights: one for each model; a negative one makes the model forget that task.

    Raises:
        ValueError: a weight that is not finite.

    Source: Ilharco et al. 2022, arXiv:2212.04089, sections 2 to 4; agrees with PEFT 0.21
    `merge_utils.task_arithmetic` and mergekit 0.1.5 `task_arithmetic`.
    """
    weights = checked_weights(weights)

    def combine(block: Block, _: None) -> Part:
        return block.plus(weighted_sum(block.deltas(), weights))

    return Method(combine, least=len(weights), most=len(weights))
