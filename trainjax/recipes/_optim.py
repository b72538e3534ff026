"""The flags of optimizers and schedules, and the one place where their names meet functions."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optax

from trainjax import optim, train, tree
from trainjax.types import Gradient


def _refined(
    learning_rate: float,
    steps: int,
    warmup: float,
    *,
    log: str,
    smoothing: float = 0.1,
    power: float = 2.0,
) -> optax.Schedule:
    """Made of the gradient norms in an earlier run's metrics.jsonl."""
    try:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"log={log} cannot be read: {error.strerror}") from error
    records = [json.loads(line) for line in lines]
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    return optim.refined(
        learning_rate, steps, warmup, grad_norms=norms, smoothing=smoothing, power=power
    )


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "adamw_8bit": optim.adamw_8bit,
    "lion": optax.lion,
    "lion_8bit": optim.lion_8bit,
    "sophia_g": optim.sophia_g,
    "sophia_h": optim.sophia_h,
    "muon": optim.muon,
    "schedule_free": optim.schedule_free,
    "prodigy": optim.prodigy,
    "adafactor": optax.adafactor,
    "lamb": optax.lamb,
    "radam": optax.radam,
    "sgd": optax.sgd,
    "swats": optim.swats,
    "fira": optim.fira,
    "galore": optim.galore,
}
NEED_CURVATURE = {"sophia_g"}
"""Optimizers whose step is called with a loss on drawn labels."""
SCHEDULES: Mapping[str, Callable[..., optax.Schedule]] = {
    "cosine": optim.warmup_cosine,
    "linear": optim.linear,
    "constant": optim.constant,
    "wsd": optim.wsd,
    "one_cycle": optim.one_cycle,
    "restarts": optim.cosine_restarts,
    "inverse_sqrt": optim.inverse_sqrt,
    "polynomial": optim.polynomial,
    "step": optim.step_decay,
    "refined": _refined,
}
GRADIENTS: Mapping[str, Callable[..., Gradient]] = {
    "backpropagation": lambda: train.backpropagation,
    "sharpness_aware": optim.sharpness_aware,
    "two_point": optim.two_point,
    "forward": optim.forward_gradient,
    "private": optim.private,
}

if TYPE_CHECKING:
    OptimizerName = ScheduleName = GradientName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    ScheduleName = Literal[tuple(SCHEDULES)]
    GradientName = Literal[tuple(GRADIENTS)]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    name: OptimizerName = "adamw"
    """What turns gradients into steps."""
    settings: tuple[str, ...] = ()
    """Settings of the optimizer, such as b1=0.95 b2=0.98; a wrong one is answered with those that it has."""
    groups: tuple[str, ...] = ()
    """Other rates by name, first match first: 'norm|bias weight_decay=0' 'embed learning_rate=0.1' '.*'."""
    clip_layers: float | None = None
    """Largest norm of each matrix's gradient."""
    plateau: tuple[str, ...] = ()
    """Smaller steps where the loss does not fall any more: factor=0.5 patience=20 accumulation_size=5."""
    average: float | None = None
    """Decay of an average of what trains, which is then evaluated and saved; 0.999, say."""
    gradient: GradientName = "backpropagation"
    """How the gradient is found; two_point and forward need no backward pass, private is DP-SGD."""
    gradient_settings: tuple[str, ...] = ()
    """Settings of the gradient, such as scale=1e-3 directions=4, or rho=0.05."""

    def chain(
        self,
        learning_rate: optax.ScalarOrSchedule,
        weight_decay: float,
        clip: float,
        layers: optim.Layers | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer's whole chain.

        Args:
            learning_rate: a rate or a schedule.
            weight_decay: where no group says otherwise.
            clip: largest global norm.
            layers: of an adapter that holds parts for some layers, as its method's `layers` tells them.

        Raises:
            ValueError: a setting or a group that is not right.
        """
        make = OPTIMIZERS[self.name]
        return optim.chain(
            optim.Chain(
                optimizer=make,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                settings=given(make, self.settings, self.name, "--optim.settings"),
                groups=[group(words) for words in self.groups],
                layers=layers,
                clip=clip,
                clip_layers=self.clip_layers,
                plateau=self._plateau(),
                average=self.average,
            )
        )

    def _plateau(self) -> dict[str, Any] | None:
        make = optax.contrib.reduce_on_plateau
        return given(make, self.plateau, "the plateau", "--optim.plateau") or None

    def gradient_of(self) -> Gradient:
        """How the step comes by its gradient."""
        make = GRADIENTS[self.gradient]
        return make(
            **given(make, self.gradient_settings, self.gradient, "--optim.gradient-settings")
        )

    def refuse_curvature(self) -> None:
        """For a job that has none: its loss is not the likelihood of tokens.

        Raises:
            ValueError: the optimizer needs one.
        """
        if self.name in NEED_CURVATURE:
            raise ValueError(
                f"--optim.name {self.name} estimates the curvature on labels that the model draws, which "
                "this job's loss has not; sophia_h takes any loss"
            )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time, after the warm-up."""

    name: ScheduleName = "cosine"
    """Shape of the schedule."""
    settings: tuple[str, ...] = ()
    """Settings of the schedule, such as end=1e-5, cooldown=0.1 (wsd) or log=RUN/metrics.jsonl (refined)."""
    steps: int | None = None
    """Steps that it is made for; the run's, if not given."""

    def schedule(self, learning_rate: float, steps: int, warmup: float) -> optax.Schedule:
        """The rate at each step.

        Raises:
            ValueError: a setting that is not right; a schedule that ends before the run.
        """
        if self.steps is not None and self.steps < steps:
            raise ValueError(
                f"--schedule.steps {self.steps}: the schedule ends before the run's {steps} steps"
            )
        make = SCHEDULES[self.name]
        own = given(make, self.settings, self.name, "--schedule.settings")
        return make(learning_rate, self.steps or steps, warmup, **own)


def given(make: Callable[..., Any], words: Sequence[str], called: str, flag: str) -> dict[str, Any]:
    """Settings from words such as `b1=0.9`.

    Raises:
        ValueError: a word of another form; a setting that the function does not have, with the nearest
            that it has; a value of another kind.
    """
    known = _parameters(make)
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{flag} {word}: a setting is NAME=VALUE, such as b1=0.9")
        if name in _FLAGS:
            raise ValueError(f"{flag} {word}: {name} has a flag of its own, {_FLAGS[name]}")
        if name not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"{flag} {word}: {called} has no setting {name!r}{tree.nearest(name, known)}; {has}"
            )
        found[name] = _value(text, known[name], f"{flag} {word}")
    missing = [
        n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in found
    ]
    if missing:
        raise ValueError(f"{called} needs {flag} {missing[0]}=...")
    return found


_FLAGS = {
    "learning_rate": "--learning-rate",
    "steps": "--steps",
    "warmup": "--warmup",
    "weight_decay": "--weight-decay",
    "mask": "--optim.groups",
    "weight_decay_mask": "--optim.groups",
}
"""What has a flag of its own."""


def _parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's settings, without what has flags of its own."""
    parameters = inspect.signature(make).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in _FLAGS}


def _value(text: str, parameter: inspect.Parameter, where: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    if "," in text:
        return tuple(_value(part, parameter, where) for part in text.split(",") if part)
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if not math.isfinite(number):
            raise ValueError(f"{where}: {parameter.name} is a finite number")
        return float(number) if isinstance(parameter.default, float) else number
    if isinstance(parameter.default, int | float):
        raise ValueError(f"{where}: {parameter.name} is a number, not {text!r}")
    return text


def group(words: str) -> optim.Group:
    """A parameter group from `REGEX learning_rate=0.1 weight_decay=0 from_step=100`.

    Raises:
        ValueError: no regex, or a word that is none of these.
    """
    match, *rest = words.split() or [""]
    if not match or "=" in match:
        raise ValueError(
            f"--optim.groups {words!r}: a group is a regex and what is other for it, such as "
            "'norm|bias weight_decay=0'"
        )
    own: dict[str, Any] = {}
    for word in rest:
        name, _, text = word.partition("=")
        if name not in (known := ("learning_rate", "weight_decay", "from_step")):
            raise ValueError(
                f"--optim.groups {words!r}: a group has no {name!r}{tree.nearest(name, known)}; it has "
                f"{', '.join(known)}"
            )
        try:
            own[name] = int(text) if name == "from_step" else float(text)
        except ValueError as error:
            raise ValueError(
                f"--optim.groups {words!r}: {name} is a number, not {text!r}"
            ) from error
    return optim.Group(match, **own)
