"""TIES: task vectors trimmed to their largest entries, and added where their signs agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

from trainjax.merging.method import (
    Block,
    Method,
    Part,
    check_density,
    checked_weights,
    total,
    weighted_sum,
)

Consensus = Callable[[Sequence[Part], Sequence[float]], Part]
"""`(deltas, weights) -> delta`: one of what several say."""


def weighted_mean(deltas: Sequence[Part], weights: Sequence[float]) -> Part:
    """Mean by weight, of each entry, of the models with the elected sign.

    The elected sign is that of `sum_i w_i tau_i`, positive at zero. Entries that are zero have no
    say. Agrees with mergekit 0.1.5 `ties` for weights that are not negative; a negative one here
    turns its task vector round and counts by its size.
    """
    weighted = [np.float32(weight) * delta for delta, weight in zip(deltas, weights, strict=True)]
    agree = _with_sign_of(total(weighted), weighted)
    sizes = weighted_sum([mask.astype(np.float32) for mask in agree], list(map(abs, weights)))
    return _sum_of(weighted, agree) / np.where(sizes == 0, np.float32(1), sizes)


def counted_mean(deltas: Sequence[Part], weights: Sequence[float]) -> Part:
    """Mean by count, `sum w_i tau_i / count` of each entry, of the models with the elected sign.

    The elected sign is that of `sum_i tau_i`, positive at zero: weights have no say in it, and they
    scale the result. Agrees with PEFT 0.21 `merge_utils.ties`.
    """
    agree = _with_sign_of(total(deltas), deltas)
    weighted = [np.float32(weight) * delta for delta, weight in zip(deltas, weights, strict=True)]
    counts = np.sum(agree, axis=0, dtype=np.float32)
    return _sum_of(weighted, agree) / np.maximum(counts, 1)


def ties(
    weights: Sequence[float],
    density: float,
    *,
    scale: float = 1.0,
    consensus: Consensus = weighted_mean,
) -> Method:
    """`theta + scale * consensus(trim(tau_1), ..., trim(tau_n))`.

    Of each tensor of a task vector `tau_i = theta_i - theta`, the `int(density * size)` entries of
    the largest magnitude stay, at least one; of equals at the threshold those that come first.

    Args:
        weights: one for each model.
        density: the share of entries that stays.
        scale: the paper's lambda.
        consensus: how those that stay are made one, `weighted_mean` or `counted_mean`.

    Raises:
        ValueError: density outside (0, 1]; a weight or a scale that is not finite.

    Source: Yadav et al. 2023, arXiv:2306.01708, algorithm 1. The paper has no weights: with equal
    ones `weighted_mean` is its disjoint merge.
    """
    weights, (scale,) = checked_weights(weights), checked_weights([scale])
    check_density(density)

    def measure(blocks: Iterable[Block]) -> list[Kept] | None:
        return None if density == 1.0 else largest(blocks, density)

    def combine(block: Block, kept: list[Kept] | None) -> Part:
        deltas = block.deltas()
        if kept is not None:
            deltas = [_trim(*each, block.start) for each in zip(deltas, kept, strict=True)]
        return block.plus(np.float32(scale) * consensus(deltas, weights))

    return Method(combine, measure, least=len(weights), most=len(weights))


def _with_sign_of(elected: Part, deltas: Sequence[Part]) -> list[np.ndarray]:
    positive = elected >= 0
    return [np.where(positive, delta > 0, delta < 0) for delta in deltas]


def _sum_of(deltas: Sequence[Part], masks: Sequence[np.ndarray]) -> Part:
    return total(np.where(mask, d, np.float32(0)) for d, mask in zip(deltas, masks, strict=True))


# The largest entries of a tensor that is not in memory at once. The bits of floats that are not
# negative are ordered as the floats are, so the k-th largest is found digit by digit, of 16 bits each.


class Kept(NamedTuple):
    """Which entries stay: of a larger magnitude, or of an equal one and not after `last`."""

    magnitude: int
    last: int


def largest(blocks: Iterable[Block], density: float) -> list[Kept]:
    """The `int(density * size)` largest differences of each model, at least one."""
    upper = _histograms(blocks)
    count = max(1, int(density * int(upper[0].sum())))
    digits, counts = zip(*(_digit(histogram, count) for histogram in upper), strict=True)
    lower = _histograms(blocks, digits)
    found = [_digit(histogram, left) for histogram, left in zip(lower, counts, strict=True)]
    magnitudes = [high << 16 | low for high, (low, _) in zip(digits, found, strict=True)]
    return [
        Kept(magnitude, _place(blocks, model, magnitude, left))
        for model, (magnitude, (_, left)) in enumerate(zip(magnitudes, found, strict=True))
    ]


def _histograms(
    blocks: Iterable[Block], digits: Sequence[int] | None = None
) -> list[Int64[np.ndarray, "65536"]]:
    """How often each upper digit occurs, or each lower one after the given upper one; by model."""
    counts: list[np.ndarray] = []
    for block in blocks:
        every = [_bits(delta) for delta in block.deltas()]
        if digits is None:
            found = [bits >> 16 for bits in every]
        else:
            pairs = zip(every, digits, strict=True)
            found = [bits[bits >> 16 == digit] & 0xFFFF for bits, digit in pairs]
        new = [np.bincount(each, minlength=1 << 16) for each in found]
        counts = [old + more for old, more in zip(counts, new, strict=True)] if counts else new
    return counts


def _digit(histogram: Int64[np.ndarray, "65536"], count: int) -> tuple[int, int]:
    """The digit of the `count`-th largest, and how many of those that have it are among them."""
    reached = histogram[::-1].cumsum()[::-1]
    digit = int(np.flatnonzero(reached >= count)[-1])
    return digit, count - int(reached[digit] - histogram[digit])


def _place(blocks: Iterable[Block], model: int, magnitude: int, count: int) -> int:
    """Where in the tensor the `count`-th entry of this magnitude is."""
    for block in blocks:
        equal = np.flatnonzero(_bits(block.deltas()[model]) == magnitude)
        if len(equal) >= count:
            return block.start + int(equal[count - 1])
        count -= len(equal)
    raise AssertionError("the blocks were others than before")


def _bits(delta: Part) -> UInt32[np.ndarray, " size"]:
    return np.abs(delta).reshape(-1).view(np.uint32)


def _trim(delta: Part, kept: Kept, start: int) -> Part:
    bits = _bits(delta)
    stays = bits > kept.magnitude
    before = bits[: max(0, kept.last + 1 - start)]
    stays[: len(before)] |= before == kept.magnitude
    return np.where(stays.reshape(delta.shape), delta, np.float32(0))
