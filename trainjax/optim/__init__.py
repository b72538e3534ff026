"""Optimizers and schedules: Optax's own wherever it has them."""

from trainjax.optim.schedules import warmup_cosine

__all__ = ["warmup_cosine"]
