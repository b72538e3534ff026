"""Learning rates over time, as Optax schedules: of optimizer steps, not of micro-batches.

All but `refined` and `range_test` are `f(learning_rate, steps, warmup, ...)`: T `steps` in all, of which
the first w rise in a line from 0 to `learning_rate`, the peak. `warmup` is in steps, or below 1 a fraction
of them. With `x = (t - w) / (T - w)`, the share of what follows that is done, the formulas below are of
`t >= w`. After T the rate stays where it ended.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


def constant(learning_rate: float, steps: int, warmup: float = 0.0) -> optax.Schedule:
    """`learning_rate`.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w.

    Raises:
        ValueError: a negative rate, or a warm-up longer than the run.
    """
    return _warmed(
        learning_rate, steps, warmup, lambda left: optax.constant_schedule(learning_rate)
    )


def linear(
    learning_rate: float, steps: int, warmup: float = 0.0, *, end: float = 0.0
) -> optax.Schedule:
    """`learning_rate + (end - learning_rate) x`.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w.
        end: the rate at T.

    Raises:
        ValueError: a negative rate, or a warm-up longer than the run.
    """
    return polynomial(learning_rate, steps, warmup, power=1.0, end=end)


def polynomial(
    learning_rate: float,
    steps: int,
    warmup: float = 0.0,
    *,
    power: float = 2.0,
    end: float = 0.0,
) -> optax.Schedule:
    """`end + (learning_rate - end) (1 - x)^power`.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w.
        power: above 0; 1 is a line.
        end: the rate at T.

    Raises:
        ValueError: a negative rate, a power that is not positive, a warm-up longer than the run.
    """
    _not_negative(end=end)
    if not power > 0:
        raise ValueError(f"power={power} of a polynomial schedule is above 0; 1 is a line")
    return _warmed(
        learning_rate,
        steps,
        warmup,
        lambda left: optax.polynomial_schedule(learning_rate, end, power, left),
    )


def step_decay(
    learning_rate: float,
    steps: int,
    warmup: float = 0.0,
    *,
    factor: float = 0.1,
    boundaries: Sequence[float] = (0.5, 0.75),
) -> optax.Schedule:
    """`learning_rate factor^k`, where k of the boundaries are behind.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w.
        factor: from one stair to the next, above 0.
        boundaries: in steps of the run, or below 1 as fractions of them; rising, none within the warm-up.

    Raises:
        ValueError: a negative rate, a factor that is not positive, boundaries that do not rise or are not
            between the warm-up and the end, a warm-up longer than the run.
    """
    if not factor > 0:
        raise ValueError(f"factor={factor} from one stair to the next is above 0")
    first = num_steps("warmup", warmup, steps)
    at = [num_steps("boundaries", boundary, steps) for boundary in boundaries]
    if at != sorted(set(at)) or any(not first < boundary < steps for boundary in at):
        raise ValueError(
            f"boundaries={tuple(boundaries)} are to rise, after the warm-up of {first} and within the run's "
            f"{steps} steps"
        )

    def stairs(left: int) -> optax.Schedule:
        del left
        scales = {boundary - first: factor for boundary in at}
        return optax.piecewise_constant_schedule(learning_rate, scales)

    return _warmed(learning_rate, steps, warmup, stairs)


def warmup_cosine(
    learning_rate: float, steps: int, warmup: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """`end + (learning_rate - end) (1 + cos(pi x)) / 2`.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w.
        end: the rate at T.

    Raises:
        ValueError: a negative rate, or a warm-up longer than the run.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, with a linear warm-up.
    """
    return cosine_restarts(learning_rate, steps, warmup, cycles=1, end=end)


def cosine_restarts(
    learning_rate: float,
    steps: int,
    warmup: float = 0.0,
    *,
    cycles: int = 3,
    decay: float = 1.0,
    end: float = 0.0,
) -> optax.Schedule:
    """`end + (learning_rate decay^c - end) (1 + cos(pi y)) / 2` in cycle c, of which the share y is done.

    Args:
        learning_rate: the first peak.
        steps: T.
        warmup: w, before the first cycle alone.
        cycles: of equal lengths, as far as whole steps allow.
        decay: from one peak to the next, in (0, 1].
        end: the rate at the end of each.

    Raises:
        ValueError: a negative rate, fewer than one step a cycle, a decay outside (0, 1], a warm-up longer
            than the run.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, with cycles of one length.
    """
    _not_negative(end=end)
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} from one peak to the next is in (0, 1]")

    def cosines(left: int) -> optax.Schedule:
        if not 1 <= cycles <= left:
            raise ValueError(f"cycles={cycles}: at least one, and a step for each of the {left}")
        at = [round(left * number / cycles) for number in range(cycles + 1)]
        parts = [
            _half_cosine(learning_rate * decay**number, end, at[number + 1] - at[number])
            for number in range(cycles)
        ]
        return optax.join_schedules(parts, at[1:-1])

    return _warmed(learning_rate, steps, warmup, cosines)


def _half_cosine(start: float, end: float, steps: int) -> optax.Schedule:
    if start:
        return optax.cosine_decay_schedule(start, steps, alpha=end / start)
    share = optax.cosine_decay_schedule(1.0, steps)
    return lambda count: end * (1.0 - share(count))


def one_cycle(
    learning_rate: float,
    steps: int,
    warmup: float = 0.3,
    *,
    start_factor: float = 25.0,
    end_factor: float = 1e4,
) -> optax.Schedule:
    """Half a cosine up from `learning_rate / start_factor`, half a cosine down far below the start.

    The last rate is `learning_rate / (start_factor end_factor)`.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w, the way up.
        start_factor: peak over first rate; at least 1.
        end_factor: first rate over last; at least 1.

    Raises:
        ValueError: a negative rate, a factor below 1, a warm-up longer than the run.

    Source: Smith and Topin 2017, arXiv:1708.07120; the momentum stays. Agrees with
    `optax.cosine_onecycle_schedule` and torch's `OneCycleLR`.
    """
    for name, factor in {"start_factor": start_factor, "end_factor": end_factor}.items():
        if not factor >= 1:
            raise ValueError(f"{name}={factor} is at least 1")
    start = learning_rate / start_factor
    down = functools.partial(_half_cosine, learning_rate, start / end_factor)
    first = _check(learning_rate, steps, warmup)
    if not first:
        return down(steps)
    up = _half_cosine(start, learning_rate, first)
    return up if first == steps else optax.join_schedules([up, down(steps - first)], [first])


def wsd(
    learning_rate: float,
    steps: int,
    warmup: float = 0.0,
    *,
    cooldown: float = 0.2,
    root: bool = False,
    end: float = 0.0,
) -> optax.Schedule:
    """Warm-up, stable, decay: the peak up to the cool-down, of which the share y is done, then down.

    `learning_rate + (end - learning_rate) y`, or with `root` `learning_rate + (end - learning_rate) sqrt(y)`.
    A run can go on from any step before the cool-down, whatever its length was to be.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w.
        cooldown: the last steps, or below 1 the last fraction of all.
        root: down by the square root, steep at first.
        end: the rate at T.

    Raises:
        ValueError: a negative rate; warm-up and cool-down longer than the run together.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4; Hagele et al. 2024, arXiv:2405.18392, for the root.
    """
    _not_negative(end=end)
    last, first = num_steps("cooldown", cooldown, steps), num_steps("warmup", warmup, steps)
    if first + last > steps:
        raise ValueError(
            f"warmup={warmup} and cooldown={cooldown} are {first} and {last} steps; together they are more "
            f"than the run's {steps}"
        )

    def after(left: int) -> optax.Schedule:
        def down(count: ArrayLike) -> ArrayLike:
            share = jnp.clip(jnp.asarray(count, jnp.float32) / max(last, 1), 0.0, 1.0)
            return learning_rate + (end - learning_rate) * (jnp.sqrt(share) if root else share)

        if not last:
            return optax.constant_schedule(learning_rate)
        return optax.join_schedules([optax.constant_schedule(learning_rate), down], [left - last])

    return _warmed(learning_rate, steps, warmup, after)


def inverse_sqrt(
    learning_rate: float, steps: int, warmup: float = 0.0, *, timescale: float | None = None
) -> optax.Schedule:
    """`learning_rate sqrt(s / (t - w + s))`, at the peak at w, which knows no end.

    Args:
        learning_rate: the peak.
        steps: T; only a fraction as `warmup` needs it.
        warmup: w.
        timescale: s; by default w, so that it is `learning_rate sqrt(w / t)`, or 10 000 without warm-up.

    Raises:
        ValueError: a negative rate, a timescale that is not positive, a warm-up longer than the run.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 5.3, scaled to the peak. Agrees with transformers'
    `get_inverse_sqrt_schedule`.
    """
    scale = timescale if timescale is not None else num_steps("warmup", warmup, steps) or 10_000
    if not scale > 0:
        raise ValueError(f"timescale={timescale} is a number of steps above 0")

    def after(left: int) -> optax.Schedule:
        del left
        return lambda count: (
            learning_rate * jnp.sqrt(scale / (jnp.asarray(count, jnp.float32) + scale))
        )

    return _warmed(learning_rate, steps, warmup, after)


def refined(
    learning_rate: float,
    steps: int,
    warmup: float = 0.0,
    *,
    grad_norms: Sequence[float] | np.ndarray,
    smoothing: float = 0.1,
    power: float = 2.0,
) -> optax.Schedule:
    """What the gradients of an earlier run ask for: small rates where they were large, and down at the end.

    With G the norms' running median, `w_t = G_t^-power` and `rate_t = w_t sum_(s > t) w_s`, scaled to
    `learning_rate` at its highest; the bound on the last iterate's error that it minimises is that of steps
    along gradients of such norms. What is a warm-up here comes out of the norms.

    Args:
        learning_rate: the peak.
        steps: T.
        warmup: w, on top of what the norms ask for: the rate of a step is at most `learning_rate t / w`.
        grad_norms: of each step of the run, before clipping; at least T of them.
        smoothing: width of the median, as a share of T.
        power: 2 for SGD and its norm; 1 for Adam, whose steps are divided by the norm once, and its l1 norm.

    Raises:
        ValueError: fewer norms than steps, norms that are not positive and finite, a negative rate.

    Source: Defazio et al. 2023, arXiv:2310.07831, algorithm 1 and theorem 3.
    """
    first = _check(learning_rate, steps, warmup)
    norms = np.asarray(grad_norms, np.float64)
    if norms.ndim != 1 or len(norms) < steps:
        raise ValueError(
            f"the log has gradient norms of {norms.size} steps, and a schedule made of it ends before the "
            f"run's {steps}"
        )
    norms = norms[:steps]
    if not (np.isfinite(norms) & (norms > 0)).all():
        at = int(np.argmin(np.isfinite(norms) & (norms > 0)))
        raise ValueError(f"grad_norms[{at}]={norms[at]} is not a finite number above 0")
    weights = _running_median(norms, max(1, round(smoothing * steps))) ** -power
    after = np.append(np.cumsum(weights[::-1])[::-1][1:], 0.0)
    rates = weights * after
    rates *= learning_rate / max(rates.max(), np.finfo(np.float64).tiny)
    if first:
        rates = np.minimum(rates, learning_rate * np.arange(steps) / first)
    table = jnp.asarray(np.append(rates, 0.0), jnp.float32)
    return lambda count: table[jnp.clip(jnp.asarray(count), 0, steps)]


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Medians of `width` neighbours, with the ends mirrored."""
    before, after = (width - 1) // 2, width // 2
    padded = np.pad(values, (before, after), mode="symmetric")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=-1)


def range_test(low: float, high: float, steps: int) -> optax.Schedule:
    """`low (high / low)^(t / (T - 1))`: from a rate that does nothing to one at which training falls apart.

    Args:
        low: the first rate, above 0.
        high: the last, above the first.
        steps: T, at least 2.

    Raises:
        ValueError: rates that are not positive or do not rise; fewer than two steps.

    Source: Smith 2015, arXiv:1506.01186, section 3.3, with a geometric instead of a linear rise.
    """
    if not 0 < low < high:
        raise ValueError(f"low={low} and high={high}: rates above 0, the second the larger")
    if steps < 2:
        raise ValueError(f"steps={steps}: a rise takes at least 2")
    return optax.exponential_decay(low, steps - 1, high / low, end_value=high)


def num_steps(name: str, given: float, steps: int) -> int:
    """A number of steps that is given as such, or below 1 as a fraction of the run's.

    Raises:
        ValueError: it is negative, or more than the run has.
    """
    found = round(given * steps) if given < 1 else int(given)
    if not 0 <= found <= steps or given < 0:
        raise ValueError(f"{name}={given} is not within the run's {steps} steps")
    return found


def _check(learning_rate: float, steps: int, warmup: float) -> int:
    """The steps of the warm-up."""
    _not_negative(learning_rate=learning_rate)
    return num_steps("warmup", warmup, steps)


def _not_negative(**rates: float) -> None:
    for name, rate in rates.items():
        if rate < 0 or not math.isfinite(rate):
            fault = "negative" if rate < 0 else "not finite"
            raise ValueError(f"{name}={rate} is {fault}")


def _warmed(
    learning_rate: float, steps: int, warmup: float, after: Callable[[int], optax.Schedule]
) -> optax.Schedule:
    """A line up to the peak, and then the schedule of the steps that are left."""
    first = _check(learning_rate, steps, warmup)
    if not first:
        return after(steps)
    up = optax.linear_schedule(0.0, learning_rate, first)
    return up if first == steps else optax.join_schedules([up, after(steps - first)], [first])
