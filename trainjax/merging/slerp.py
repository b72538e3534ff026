"""SLERP: from one model to another along the arc between them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from trainjax.merging.method import Block, Method, Part, gram, weighted_sum

_COLLINEAR = 0.9995
"""From this cosine on the arc is a line: as in mergekit."""


def slerp(t: float) -> Method:
    """`(sin((1 - t) phi) a + sin(t phi) b) / sin(phi)`, phi the angle between the tensors a and b.

    Each tensor is one vector. Where the two are nearly parallel or opposite (|cos phi| > 0.9995), it
    is `(1 - t) a + t b`.

    Args:
        t: 0 gives the first model, 1 the second, exactly.

    Raises:
        ValueError: t outside [0, 1].

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, in any dimension;
    agrees with mergekit 0.1.5 `slerp`.
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t={t} is not in [0, 1]: 0 is the first model, 1 the second")

    def measure(blocks: Iterable[Block]) -> tuple[float, float]:
        (aa, ab), (_, bb) = gram(block.models for block in blocks)
        cosine = ab / math.sqrt(aa * bb) if aa and bb else 0.0
        if abs(cosine) > _COLLINEAR:
            return 1.0 - t, t
        angle = math.acos(cosine)
        return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def combine(block: Block, coefficients: tuple[float, float]) -> Part:
        return weighted_sum(block.models, coefficients)

    return Method(combine, measure, needs_base=False, least=2, most=2)
