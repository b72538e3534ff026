"""Optimizers and schedules: Optax's own wherever it has them."""

from trainjax.optim.average import AverageState, average_params
from trainjax.optim.hft import HalfState, half_fine_tuning
from trainjax.optim.layerwise import layerwise_decay
from trainjax.optim.schedules import warmup_cosine

__all__ = [
    "AverageState",
    "HalfState",
    "average_params",
    "half_fine_tuning",
    "layerwise_decay",
    "warmup_cosine",
]
