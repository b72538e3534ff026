"""Which examples an epoch visits, in which order: shuffled, from easy to hard, a fresh part each time.

An order is a function `(count, epoch, rng) -> indices` that a `Plan` calls once an epoch:

    difficulty = curriculum.reference_loss(data.with_reference(examples, logprobs))
    Plan(batch_size, length, seed=None, order=curriculum.easy_first(difficulty), window=64)

A plan packs what stands in one `window` of the order, and shuffles it there if it has a seed; so an order
from easy to hard wants no seed and a small window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import chex
import numpy as np
from jaxtyping import Float, Int, Num

from trainjax.data.encode import Examples

Indices = Int[np.ndarray, " visited"]
Order = Callable[[int, int, np.random.Generator | None], Indices]
"""`(number of examples, epoch, generator of the epoch or None without a seed) -> examples to visit`."""


def shuffled(count: int, epoch: int, rng: np.random.Generator | None) -> Indices:
    """All examples in a new order each epoch; without a seed in that of the source."""
    del epoch
    return np.arange(count) if rng is None else rng.permutation(count)


@dataclasses.dataclass(frozen=True, eq=False)
class _EasyFirst:
    difficulty: Float[np.ndarray, " examples"]

    def __call__(self, count: int, epoch: int, rng: np.random.Generator | None) -> Indices:
        del epoch, rng
        if count != len(self.difficulty):
            raise ValueError(
                f"difficulties of {len(self.difficulty)} examples do not order {count} of them"
            )
        return np.argsort(self.difficulty, kind="stable")


def easy_first(difficulty: Num[np.ndarray, " examples"]) -> Order:
    """From the least difficult example to the most; of equal ones the first in the source.

    Args:
        difficulty: of each example: `examples.lengths`, `reference_loss(examples)`, the steps that an
            earlier run took until it had learned it, or a person's judgement.

    Raises:
        ValueError: a difficulty that is not a number; when called, another number of examples.

    Source: Bengio et al. 2009, "Curriculum Learning".
    """
    difficulty = difficulty.astype(np.float64)
    if (odd := np.flatnonzero(np.isnan(difficulty))).size:
        raise ValueError(f"the difficulty of example {odd[0]} is not a number")
    return _EasyFirst(difficulty)


@dataclasses.dataclass(frozen=True)
class _FreshSubset:
    fraction: float

    def __call__(self, count: int, epoch: int, rng: np.random.Generator | None) -> Indices:
        if rng is None:
            raise ValueError("a fresh subset is drawn: give the plan a seed")
        return shuffled(count, epoch, rng)[: max(1, round(self.fraction * count))]


def fresh_subset(fraction: float) -> Order:
    """RS2: each epoch visits another random part of the examples, in random order.

    Args:
        fraction: of the examples, above 0 and at most 1.

    Raises:
        ValueError: another fraction; when called, a plan without a seed.

    Source: Okanovic et al. 2023, arXiv:2305.18424, RS2 with replacement between epochs.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} of the examples is above 0 and at most 1")
    return _FreshSubset(fraction)


def resorted(
    order: Indices, start: int, stop: int, difficulty: Float[np.ndarray, " block"]
) -> Indices:
    """The order with its places `start` to `stop` sorted by what the present model finds easy.

    ADCL: examples stand in blocks from easy to hard by an earlier model; before a block is learned,
    the model as it is scores that block alone, and it is sorted anew.

    Args:
        order: of the examples.
        start, stop: the block that comes next.
        difficulty: of the block's examples, in their present order.

    Source: Zhang et al. 2025, arXiv:2505.08364, adaptive difficulty curriculum learning.
    """
    chex.assert_shape(difficulty, (stop - start,))
    block = order[start:stop][np.argsort(difficulty, kind="stable")]
    return np.concatenate([order[:start], block, order[stop:]])


def reference_loss(examples: Examples) -> Float[np.ndarray, " examples"]:
    """The mean loss in nats of each example's targets under the reference; 0 without targets.

    Args:
        examples: with a reference's log-probabilities, from `with_reference`.

    Raises:
        ValueError: examples without them.
    """
    if examples.reference is None:
        raise ValueError("the examples carry no reference; give them one by `with_reference`")
    trained = [examples.slice_of(i) for i in range(len(examples))]
    sums = [-(examples.reference[s] * examples.trained[s]).sum() for s in trained]
    return np.asarray(sums, np.float64) / np.maximum(examples.targets, 1)
