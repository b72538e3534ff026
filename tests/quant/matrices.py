"""The matrices that other libraries quantised for the goldens, `[out, in]` as they hold them."""

from __future__ import annotations

import numpy as np

NF4_CASES = {
    "rows": (24, 128),  # blocks are parts of rows
    "across": (20, 48),  # blocks run across rows
    "partial": (7, 33),  # and the last one is no whole block; an odd number of codes
}


def matrix(fan_out: int, fan_in: int) -> np.ndarray:
    """Normal numbers with a spread of their own in each row, and a block of zeros at the start."""
    rng = np.random.default_rng([fan_out, fan_in])
    w = rng.standard_normal((fan_out, fan_in)) * rng.uniform(0.01, 1.0, (fan_out, 1))
    w.reshape(-1)[:64] = 0.0
    return w.astype(np.float32)


def large() -> np.ndarray:
    """N(0, 1): 4096 blocks of 64, which are 16 of 256 scales."""
    return np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
