"""DARE: entries of task vectors dropped at random and the rest rescaled, before they are added."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from trainjax.merging.method import (
    Block,
    Method,
    Part,
    check_density,
    checked_weights,
    weighted_sum,
)
from trainjax.merging.ties import Consensus, weighted_mean


def dare_linear(weights: Sequence[float], density: float, *, seed: int = 0) -> Method:
    """`theta + sum_i w_i dare(tau_i)`, where `dare` keeps an entry with probability `density`.

    Those that stay are divided by `density`, so that the expectation is the task vector. What is
    drawn depends on the seed, the tensor's name and the model's place, and on nothing else.

    Args:
        weights: one for each model.
        density: the probability that an entry stays, the paper's `1 - p`.
        seed: of the draws.

    Raises:
        ValueError: density outside (0, 1]; a negative seed; a weight that is not finite.

    Source: Yu et al. 2023, arXiv:2311.03099, section 3.2; with equal draws it agrees with PEFT 0.21
    `merge_utils.dare_linear`. (mergekit 0.1.5 rescales to the task vector's sum of magnitudes.)
    """

    def summed(deltas: Sequence[Part], weights: Sequence[float]) -> Part:
        return weighted_sum(deltas, weights)

    return _dare(weights, density, seed, summed)


def dare_ties(
    weights: Sequence[float],
    density: float,
    *,
    seed: int = 0,
    consensus: Consensus = weighted_mean,
) -> Method:
    """`theta + consensus(dare(tau_1), ..., dare(tau_n))`: DARE in the place of TIES's trimming.

    Args:
        weights: one for each model.
        density: the probability that an entry stays.
        seed: of the draws.
        consensus: as in `ties`; with `counted_mean` and equal draws it agrees with PEFT 0.21
            `merge_utils.dare_ties`. (mergekit 0.1.5 sums, unless told to normalise.)

    Raises:
        ValueError: as in `dare_linear`.

    Source: Yu et al. 2023, arXiv:2311.03099, section 3.3, with TIES-Merging (`ties`).
    """
    return _dare(weights, density, seed, consensus)


def _dare(weights: Sequence[float], density: float, seed: int, consensus: Consensus) -> Method:
    weights = checked_weights(weights)
    check_density(density)
    if seed < 0:
        raise ValueError(f"seed={seed} is negative")

    def combine(block: Block, _: None) -> Part:
        deltas = block.deltas()
        for model, delta in enumerate(deltas):
            stays = kept(seed, block.name, model, block.start, delta.size, density)
            delta *= stays.reshape(delta.shape)
            delta /= np.float32(density)
        return block.plus(consensus(deltas, weights))

    return Method(combine, least=len(weights), most=len(weights))


_WORDS = 4
"""Numbers that Philox draws at a time."""


def kept(seed: int, name: str, model: int, start: int, size: int, density: float) -> np.ndarray:
    """Which of the entries `start` to `start + size` of a tensor stay, as booleans.

    The generator counts, so that it begins anywhere: a tensor in blocks gets the draws of the whole.
    """
    if density == 1.0:
        return np.ones(size, bool)
    key = [seed, zlib.crc32(name.encode()) << 32 | model]
    before = start % _WORDS
    draws = np.random.Philox(key=key, counter=start // _WORDS).random_raw(before + size)
    return draws[before:] < np.uint64(density * 2.0**64)
