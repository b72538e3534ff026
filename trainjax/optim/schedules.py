"""Learning rates over time, as Optax schedules of optimizer steps."""

from __future__ import annotations

import optax


def warmup_cosine(
    learning_rate: float, steps: int, warmup: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Linear from 0 to `learning_rate`, then half a cosine down to `end`.

    `t < w: learning_rate t / w`, else `end + (learning_rate - end) (1 + cos(pi (t - w) / (T - w))) / 2`.

    Args:
        learning_rate: the peak.
        steps: T, the optimizer steps of the run (not micro-batches).
        warmup: w, in steps, or below 1 a fraction of `steps`.
        end: learning rate at the last step and after it.

    Raises:
        ValueError: a negative rate, or a warm-up longer than the run.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, with a linear warm-up.
    """
    if learning_rate < 0:
        raise ValueError(f"learning_rate={learning_rate} is negative")
    warmup_steps = round(warmup * steps) if warmup < 1 else int(warmup)
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup={warmup} is not within the run's {steps} steps")
    if steps == warmup_steps:
        return optax.linear_schedule(0.0, learning_rate, steps)
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps, end)
