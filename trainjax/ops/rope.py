"""Rotary position embedding, with the frequency scalings of the Llama family."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
        theta: base of the frequencies `theta^(-2i/d)`, i = 0 .. d/2 - 1.
        factor: context extension, 1 for none. Alone it is linear interpolation: every frequency is
            divided by it.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: given together they
            select Llama 3's rule: frequencies that turn fewer than `low_freq_factor` times over the
            original context are divided by `factor`, those that turn more than `high_freq_factor`
            times stay, those between are interpolated.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each of the `head_dim / 2` pairs (host, float64)."""
        frequency = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is None or high is None or self.original_max_position_embeddings is None:
            return frequency / self.factor
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequency + (1.0 - kept) * frequency / self.factor


class Rotation(NamedTuple):
    """Cosines and sines of a batch's positions, made once and used by every layer."""

    cos: Float[Array, "batch seq half"]
    sin: Float[Array, "batch seq half"]


def rotation(rope: Rope, positions: Int[Array, "batch seq"], head_dim: int) -> Rotation:
    """The tables for `positions`, in float32: bf16 angles are wrong by radians at long context."""
    frequency = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(
    x: Float[Array, "batch seq heads dim"], tables: Rotation
) -> Float[Array, "batch seq heads dim"]:
    """Turns each pair `(x[i], x[i + dim/2])` by its angle: the half-split layout of Hugging Face.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, with the pairs laid out as in GPT-NeoX.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
