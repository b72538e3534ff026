"""Find a learning rate by training with one that rises."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from trainjax import data, losses, optim, parallel, train
from trainjax.io import folder
from trainjax.recipes import _common as common
from trainjax.recipes import _rows as rows
from trainjax.recipes import _run_folder as run_folder
from trainjax.recipes import _training as training
from trainjax.recipes._configs import StepConfig
from trainjax.recipes._start import Start, first_params
from trainjax.train import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StepConfig):
    """Trains --steps steps with a rate that rises from --low to --high, and suggests one."""

    data: str
    """Rows: a .jsonl, .json, .csv or .parquet file, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    low: float = 1e-6
    """First rate."""
    high: float = 1.0
    """Last rate, which is not reached where the loss leaves before."""
    smoothing: float = 0.9
    """Share of the earlier steps in the running mean of the loss."""
    leave: float = 1.5
    """The loss has left where its mean is this many times the least before."""

    def rates(self, steps: int) -> optax.Schedule:
        """The rate at each step."""
        return optim.range_test(self.low, self.high, steps)


class Point(NamedTuple):
    """A step of the test."""

    learning_rate: float
    loss: float
    smooth: float


class Suggestion(NamedTuple):
    """What the curve says.

    Attributes:
        learning_rate: a tenth of the rate of the least mean loss: safe, and for runs with a schedule usual.
        steepest: the rate at which the mean loss falls fastest.
        largest: the rate at which it is least; from there on training is on its way out.
    """

    learning_rate: float
    steepest: float
    largest: float


def main(config: Config) -> None:
    """Runs the job."""
    for name in ("learning_rate", "warmup", "schedule"):
        if getattr(config, name) != _DEFAULTS[name]:
            flag = name.replace("_", "-")
            raise ValueError(
                f"lr-find makes the rates itself, from --low to --high; leave out --{flag}"
            )
    if not 0 <= config.smoothing < 1:
        raise ValueError(f"smoothing={config.smoothing} is a share of at least 0 and below 1")
    if not config.leave > 1:
        raise ValueError(f"leave={config.leave} times the least loss is above 1, such as 1.5")
    run_folder.claim(config.out, resume=False)
    points = _test(config)
    found = suggestion(points)
    lines = "".join(json.dumps(point._asdict()) + "\n" for point in points)
    with folder.replaced(config.out / "lr_find.jsonl") as temporary:
        temporary.write_text(lines, encoding="utf-8")
    run_folder.write(config)
    plot(points, found, config.out / "lr_find.png")
    if parallel.is_first():
        print(f"learning rate {found.learning_rate:.2g}")
    common.say(
        f"the loss falls fastest at {found.steepest:.2g} and is least at {found.largest:.2g}; "
        f"the curve is {config.out / 'lr_find.png'}"
    )


def _test(config: Config) -> list[Point]:
    """The steps, up to the one at which the loss has left."""
    source = data.read(config.data, common.BAD_ROWS[config.bad_rows])
    config.check_method()
    start = Start(config.load(), config.peft_method())
    mesh = start.model.module.mesh
    examples = rows.encode(config, config.data, source, start.model)
    pack = common.PACKING[config.packing]
    plan = config.plan(rows.row_length(pack, config.max_length, [examples], mesh))
    steps = 100 if config.steps is None else config.steps
    actor, tx = start.policy(), config.optimizer(steps, start.model, start.method)
    loss = training.with_penalty(losses.sft(actor), actor)
    state = train.init(first_params(config, start), tx, config.seed)
    schedule = config.rates(steps)
    points: list[Point] = []

    def with_rate(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"learning_rate": float(schedule(record["step"] - 1)), "mfu": None}

    def watch(record: metrics.Record) -> None:
        points.append(_after(points, record["learning_rate"], record["loss"], config.smoothing))
        if has_left(points, config.leave):
            raise _LeftError

    with (
        run_folder.sinks(config, steps, 0) as told,
        contextlib.suppress(_LeftError, train.NotFinite),
    ):
        train.fit(
            state,
            config.step(tx, losses.drawn(actor)),
            loss,
            data.Loader(examples, plan, mesh),
            steps=steps,
            sinks=[*told.sinks, watch],
            derived=with_rate,
        )
    return points


class _LeftError(Exception):
    """The loss has left: further steps tell nothing."""


def _after(points: Sequence[Point], rate: float, loss: float, smoothing: float) -> Point:
    """The next point; the mean weighs the steps by powers of `smoothing` that sum to 1."""
    known = 1 - smoothing ** len(points)
    total = smoothing * known * points[-1].smooth if points else 0.0
    return Point(
        rate, loss, (total + (1 - smoothing) * loss) / (1 - smoothing ** (len(points) + 1))
    )


def has_left(points: Sequence[Point], leave: float) -> bool:
    """Whether the mean loss is `leave` times the least before."""
    if len(points) < _FEWEST:
        return False
    return points[-1].smooth > leave * min(point.smooth for point in points)


def suggestion(points: Sequence[Point]) -> Suggestion:
    """What the curve of a range test says.

    Raises:
        ValueError: too few steps to say anything, or a loss that never fell.

    Source: Smith 2015, arXiv:1506.01186, section 3.3; the tenth of the least is fastai's first suggestion.
    """
    if len(points) < _FEWEST:
        raise ValueError(
            f"the loss was gone after {len(points)} steps, too few to say anything; begin with a "
            "smaller --low"
        )
    smooth = np.asarray([point.smooth for point in points])
    least = int(np.argmin(smooth))
    if least < 2:
        raise ValueError(
            f"the loss never fell between the rates {points[0].learning_rate:.2g} and "
            f"{points[-1].learning_rate:.2g}; begin with a smaller --low"
        )
    slope = np.gradient(smooth, np.log([point.learning_rate for point in points]))
    steepest = int(np.argmin(slope[: least + 1]))
    largest = points[least].learning_rate
    return Suggestion(largest / 10, points[steepest].learning_rate, largest)


def plot(points: Sequence[Point], found: Suggestion, path: Path) -> None:
    """The loss over the rate, and the three rates."""
    from matplotlib.figure import Figure

    figure = Figure((6.4, 4.0), layout="constrained", dpi=130)
    axes = figure.subplots()
    rates = [point.learning_rate for point in points]
    axes.plot(rates, [point.loss for point in points], color="0.8", label="loss of a batch")
    axes.plot(rates, [point.smooth for point in points], color="C0", label="running mean")
    for name, rate, color in (
        ("suggested", found.learning_rate, "C2"),
        ("steepest", found.steepest, "C1"),
        ("least", found.largest, "C3"),
    ):
        axes.axvline(rate, color=color, linestyle="--", linewidth=1, label=f"{name}: {rate:.2g}")
    top = 1.2 * max(point.smooth for point in points[: max(_FEWEST, len(points) // 2)])
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)")
    axes.set_ylim(top=top)
    axes.legend(frameon=False)
    with folder.replaced(path) as temporary:
        figure.savefig(temporary, format="png")


_FEWEST = 10
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
