"""Model Stock: from the base towards the mean of models, by how much they agree."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from trainjax.merging.method import Block, Method, Part, gram, weighted_sum

_SINGULAR = 1e-6


def model_stock() -> Method:
    """`t mean_i(theta_i) + (1 - t) theta` with `t = n cos / (1 + (n - 1) cos)`, tensor by tensor.

    `cos` is the mean over pairs of the cosine between two of the n task vectors `theta_i - theta`.
    Where the denominator vanishes the base stays.

    Source: Jang et al. 2024, arXiv:2403.19522, eq. 2 for two models, and its form for n; agrees with
    mergekit 0.1.5 `model_stock`.
    """

    def measure(blocks: Iterable[Block]) -> float:
        return ratio(gram(block.deltas() for block in blocks))

    def combine(block: Block, t: float) -> Part:
        deltas = block.deltas()
        return block.plus(weighted_sum(deltas, [t / len(deltas)] * len(deltas)))

    return Method(combine, measure, least=2)


def ratio(products: np.ndarray) -> float:
    """How far to go, from the scalar products of the task vectors with one another."""
    count = len(products)
    norms = np.sqrt(np.diag(products))
    sizes = np.outer(norms, norms)
    cosines = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
    cosine = float(cosines[np.triu_indices(count, 1)].mean())
    denominator = 1.0 + (count - 1) * cosine
    return 0.0 if abs(denominator) < _SINGULAR else count * cosine / denominator
