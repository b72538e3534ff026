"""Instruction residual: instruction tuning carried over to a base that was trained further."""

from __future__ import annotations

import numpy as np

from trainjax.merging.method import Block, Method, Part, checked_weights


def instruction_residual(scale: float = 1.0) -> Method:
    """`theta_new + scale * (theta_instruct - theta)`.

    The two models are, in this order, the base after its further pretraining (theta_new) and the model
    that was tuned on instructions from the base (theta_instruct), which gives the tokenizer.

    Args:
        scale: of the residual; 1 in the paper.

    Raises:
        ValueError: a scale that is not finite.

    Source: Jindal et al. 2024, arXiv:2410.10739, the section on instruction residuals.
    """
    (scale,) = checked_weights([scale])

    def combine(block: Block, _: None) -> Part:
        further, instruct = block.models
        assert block.base is not None
        return further + np.float32(scale) * (instruct - block.base)

    return Method(combine, least=2, most=2, speaker=1)
