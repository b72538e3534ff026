"""Timber: what instruction tuning changed, reduced to as many directions as its effective rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from trainjax.merging.method import Block, Method, Part


def timber(gamma: float = 0.0) -> Method:
    """`W + U diag(s_1, ..., s_k, gamma s_(k+1), ...) V^T` for the change `U diag(s) V^T` of a matrix.

    `k = ceil(exp(-sum_i p_i log p_i))` with `p_i = s_i / sum_j s_j`: the effective rank of the change
    `theta_instruct - theta`. The rest of its directions goes back to the base. Vectors stay as they are
    in the instruct model, which gives the tokenizer too. The change of a matrix that is wider than tall
    is in memory whole, in float64.

    Args:
        gamma: what is left of the directions after the k-th.

    Raises:
        ValueError: gamma outside [0, 1].

    Source: Wu et al. 2025, arXiv:2509.23595, as its authors' program does it
    (github.com/wutaiqiang/Timber, `timber.py`, where gamma is 0 by default); the effective rank is
    Roy and Vetterli 2007, section 2. The singular vectors come from the smaller Gram matrix here, in
    float64.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(
            f"gamma={gamma} is not in [0, 1]: it is what is left of the directions after the first"
        )

    def measure(blocks: Iterable[Block]) -> Main | None:
        if next(iter(blocks)).models[0].ndim < 2:
            return None
        rows = sum(len(block.models[0]) for block in blocks)
        columns = _change(next(iter(blocks))).shape[1]
        return _of_tall(blocks) if rows >= columns else _of_wide(blocks)

    def combine(block: Block, main: Main | None) -> Part:
        (instruct,) = block.models
        if main is None:
            return instruct
        change = _change(block)
        kept = main.rows(change, block.start // change.shape[1])
        refined = (kept + gamma * (change - kept)).astype(np.float32)
        return block.plus(refined.reshape(instruct.shape))

    return Method(combine, measure, most=1, speaker=0)


class Main(NamedTuple):
    """The first directions of a change.

    Attributes:
        vectors: the right singular vectors of a tall matrix, the left ones of a wide one.
        coefficients: what a wide matrix is in terms of its vectors.
    """

    vectors: Float64[np.ndarray, "side rank"]
    coefficients: Float64[np.ndarray, "rank columns"] | None = None

    def rows(self, change: Float64[np.ndarray, "rows columns"], first: int) -> np.ndarray:
        """Some rows of the change, the first one's number being `first`, in these directions only."""
        if self.coefficients is None:
            return (change @ self.vectors) @ self.vectors.T
        return self.vectors[first : first + len(change)] @ self.coefficients


def _of_tall(blocks: Iterable[Block]) -> Main:
    changes = (_change(block) for block in blocks)
    return Main(_vectors(functools.reduce(np.add, (part.T @ part for part in changes))))


def _of_wide(blocks: Iterable[Block]) -> Main:
    change = np.concatenate([_change(block) for block in blocks])
    vectors = _vectors(change @ change.T)
    return Main(vectors, vectors.T @ change)


def _change(block: Block) -> Float64[np.ndarray, "rows columns"]:
    (delta,) = block.deltas()
    return delta.reshape(len(delta), -1).astype(np.float64)


def _vectors(gram: Float64[np.ndarray, "side side"]) -> Float64[np.ndarray, "side rank"]:
    """As many eigenvectors, those of the largest values first, as the matrix's effective rank."""
    values, vectors = np.linalg.eigh(gram)
    singular = np.sqrt(np.maximum(values[::-1], 0.0))
    # The effective rank of values equal but for rounding is a whole number, but for rounding.
    count = math.ceil(effective_rank(singular) * (1 - 1e-9))
    return np.ascontiguousarray(vectors[:, ::-1][:, :count])


def effective_rank(singular: Float64[np.ndarray, " count"]) -> float:
    """`exp(-sum_i p_i log p_i)` with `p_i = s_i / sum_j s_j`; 0 if all are zero.

    >>> float(effective_rank(np.array([2.0, 2.0, 0.0])).round(6))
    2.0
    """
    if not singular.any():
        return np.float64(0.0)
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return np.exp(-np.sum(shares * np.log(shares)))
