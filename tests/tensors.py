"""Tensors to merge: random ones for the tests of merging and for `golden/make_merging.py`."""

from __future__ import annotations

import numpy as np


def base_and_models(
    seed: int, count: int = 3, shape: tuple[int, ...] = (6, 8), std: float = 0.3
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and models that have moved away from it, partly in the same direction; float32."""
    rng = np.random.default_rng(seed)
    base, common = rng.standard_normal((2, *shape))
    own = rng.standard_normal((count, *shape))
    models = [base + std * (common + each) for each in own]
    return base.astype(np.float32), [model.astype(np.float32) for model in models]


GOLDEN_CASES = {
    "linear": [{"weights": [1.0, 0.5, 2.0]}, {"weights": [0.7, -0.2, 0.1], "normalize": False}],
    "task_arithmetic": [{"weights": [1.0, 0.5, -0.8]}],
    "ties": [
        {"weights": [1.0, 1.0, 1.0], "density": 0.5},
        {"weights": [1.0, 0.5, 2.0], "density": 0.3},
        {"weights": [1.0, 0.25, 0.5], "density": 1.0, "scale": 0.7},
    ],
    "slerp": [{"t": 0.0}, {"t": 0.3}, {"t": 0.75}, {"t": 1.0}],
    "model_stock": [{}],
}
"""Settings by method, in the names of the functions of `trainjax.merging`."""
