"""Draw the learning rate that a run would have, step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from trainjax.recipes import _common as common
from trainjax.recipes._optim import SCHEDULES, ScheduleConfig, ScheduleName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Prints the rates at the turns of a schedule, and draws it; takes the schedule's flags of `sft`."""

    steps: int
    """Optimizer steps of the run."""
    learning_rate: float = 2e-4
    """Peak of the schedule."""
    warmup: float = 0.03
    """Linear warm-up in steps, or below 1 a fraction of them."""
    schedule: ScheduleConfig = ScheduleConfig()
    compare: tuple[ScheduleName, ...] = ()
    """Others to draw beside it, with their own defaults."""
    out: Path = Path("schedule.png")
    """The picture."""


def main(config: Config) -> None:
    """Runs the job."""
    if config.steps < 1:
        raise ValueError(f"steps={config.steps}: a run has at least one")
    for name in config.compare:
        if name not in SCHEDULES:
            raise ValueError(f"--compare {name}: the schedules are {', '.join(SCHEDULES)}")
    curves = {config.schedule.name: _rates(config, config.schedule)}
    curves |= {name: _rates(config, ScheduleConfig(name)) for name in config.compare}
    rates = curves[config.schedule.name]
    for step in sorted({0, int(np.argmax(rates)), config.steps // 2, config.steps - 1}):
        print(f"step {step + 1:>8}  rate {rates[step]:.3g}")
    plot(curves, config.out)
    common.say(f"drawn to {config.out}")


def _rates(config: Config, schedule: ScheduleConfig) -> np.ndarray:
    """The rate of every step of the run."""
    found = schedule.schedule(config.learning_rate, config.steps, config.warmup)
    with jax.numpy_dtype_promotion("standard"):  # Optax counts on it
        return np.asarray(jax.vmap(found)(jnp.arange(config.steps)) * jnp.ones(config.steps))


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
    """Rates over steps."""
    from matplotlib.figure import Figure

    figure = Figure((6.4, 3.6), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name, rates in curves.items():
        axes.plot(np.arange(1, len(rates) + 1), rates, label=name)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path)
