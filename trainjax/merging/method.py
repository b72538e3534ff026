"""What a method of merging is: pure functions over the blocks of one tensor.

A tensor of a large model does not fit in memory several times over, so it is merged in blocks of rows.
What has to be known of the whole tensor (a threshold, an angle) is measured first, block by block too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

Part = Float32[np.ndarray, "..."]
"""Some rows of a tensor, or all of it."""


class Block(NamedTuple):
    """The same rows of one tensor in every model, in float32.

    Attributes:
        name: of the tensor.
        start: how many numbers of the tensor come before.
        base: of the base, for a method that has one.
        models: of the models to merge; all of one shape.
    """

    name: str
    start: int
    base: Part | None
    models: Sequence[Part]

    def deltas(self) -> list[Part]:
        """What each model is more than the base: task vectors."""
        assert self.base is not None
        return [model - self.base for model in self.models]

    def plus(self, delta: Part) -> Part:
        """The base with a difference added."""
        assert self.base is not None
        return self.base + delta


def _nothing(blocks: Iterable[Block]) -> None:
    return None


class Method(NamedTuple):
    """A way to make one model of several, as pure functions.

    Attributes:
        combine: `(block, measured) -> rows`: the block's rows of the merged tensor, in float32.
        measure: `(blocks) -> measured`: what `combine` has to know of the whole tensor. It may go
            through the blocks several times.
        needs_base: whether blocks have a base.
        least, most: how many models it merges, besides the base; any number if `most` is None.
        speaker: which of the models gives tokenizer and configuration to the merged one; None leaves
            it to `merge_models`.
    """

    combine: Callable[[Block, Any], Part]
    measure: Callable[[Iterable[Block]], Any] = _nothing
    needs_base: bool = True
    least: int = 1
    most: int | None = None
    speaker: int | None = None


def merge_tensor(
    method: Method, base: np.ndarray | None, models: Sequence[np.ndarray], name: str = ""
) -> Part:
    """One tensor that is in memory, merged.

    Args:
        method: `ties(...)` and the like.
        base: the base's, or None for a method that has none.
        models: those of the models, of the same shape.
        name: the tensor's, which methods that draw at random fold into their seed.

    Returns:
        The merged tensor in float32.

    >>> from trainjax.merging import linear
    >>> merge_tensor(linear([1.0, 3.0]), None, [np.zeros(2), np.ones(2)])
    array([0.75, 0.75], dtype=float32)
    """
    wide = None if base is None else np.asarray(base, np.float32)
    block = Block(name, 0, wide, [np.asarray(model, np.float32) for model in models])
    return method.combine(block, method.measure((block,)))


def checked_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights as they are, or a ValueError for one that is not a finite number."""
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"a weight of {weight} is not a finite number")
    return tuple(map(float, weights))


def check_density(density: float) -> None:
    """Raises ValueError for a share that is not above 0 and at most 1."""
    if not 0.0 < density <= 1.0:
        raise ValueError(
            f"density={density} is not in (0, 1]: it is the share of each difference that is kept"
        )


def weighted_sum(parts: Sequence[Part], weights: Sequence[float]) -> Part:
    """`sum_i weights_i * parts_i`."""
    found = np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        found += np.float32(weight) * part
    return found


def total(parts: Iterable[Part]) -> Part:
    """The sum of one part or more."""
    return functools.reduce(np.add, parts)


def gram(groups: Iterable[Sequence[Part]]) -> Float64[np.ndarray, "n n"]:
    """The scalar products of a few tensors with one another, from their blocks, in float64."""
    products: Any = 0.0
    for parts in groups:
        rows = np.stack([part.reshape(-1).astype(np.float64) for part in parts])
        products = products + rows @ rows.T
    return products
