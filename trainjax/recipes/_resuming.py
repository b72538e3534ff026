"""What makes a resumed run the same run, and the sentence that says where it is another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trainjax import data, train
from trainjax.recipes._common import PeftConfig, say
from trainjax.recipes._configs import TrainConfig
from trainjax.recipes._start import Start

SAME = (  # what must be equal for a resumed run to be the same run
    *("batch_size", "max_length", "packing", "template", "too_long", "seed", "dtype", "accumulate"),
    *("learning_rate", "warmup", "schedule", "weight_decay", "optim", "clip"),
    *("full", "peft", "base_format", "param_dtype", "fp8"),
)
_IN_WORDS = {"data": "data_is", "model": "model_is", "adapter": "adapter_is"}
"""Fingerprints, and the settings that say in words what they are of."""
_FOR_THE_LENGTH = {"adalora"}
"""Adapters whose every step depends on how many there are in all."""


def settings(
    config: TrainConfig, names: Sequence[str], *, steps: int, start: Start, examples: data.Examples
) -> dict[str, Any]:
    """The named fields of a recipe's settings, groups of flags field by field, and what they act on.

    Those that end in `_is` are words about the others, not to be compared.
    """
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name)
        value = value.resolved() if isinstance(value, PeftConfig) else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {f"{name}.{key}": part for key, part in dataclasses.asdict(value).items()}
        else:
            found[name] = value
    found = {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}  # as JSON
    found |= {"steps": steps, "model": start.model.fingerprint, "data": examples.fingerprint()}
    found |= {"model_is": config.model, "data_is": f"{examples.summary()}, of {config.data}"}
    if start.loaded is not None:
        found |= {"adapter": start.fingerprint(), "adapter_is": str(config.adapter)}
    return found


def resumed(
    state: train.TrainState,
    saved: train.Checkpoints,
    loader: data.Loader,
    settings: Mapping[str, Any],
    config: TrainConfig,
) -> tuple[train.TrainState, int]:
    """The state to begin with and the tokens seen before it; the loader is moved to its place.

    Raises:
        ValueError: the checkpoint is of a run with other settings; both values are named.
    """
    run = saved.directory.parent

    def accept(extra: Mapping[str, Any]) -> None:
        before = extra["settings"]
        for name in dict.fromkeys([*settings, *before]):
            if name in ("steps", *_IN_WORDS.values()) or before.get(name) == settings.get(name):
                continue
            had, has = (_in_words(name, values) for values in (before, settings))
            raise ValueError(
                f"the run in {run} had {name}={had}, now it is {has}; resume with the same, or start another "
                "run with another --out"
            )

    found = saved.restore(state, accept) if config.resume else None
    if found is None:
        if config.resume:
            say(f"no checkpoint in {saved.directory}: starting from the beginning")
        return state, 0
    before, now = found.extra["settings"]["steps"], settings["steps"]
    if reason := _another_past(config, before, now, found.step):
        raise ValueError(f"the run in {run} had steps={before}, now it is {now}, and {reason}")
    loader.set_state(found.extra["batches"])
    say(f"resuming after step {found.step}")
    return found.state, found.extra["num_tokens"]


def _in_words(name: str, values: Mapping[str, Any]) -> str:
    value = values.get(name)
    words = values.get(_IN_WORDS.get(name, ""))
    return repr(value) if words is None else f"{words} (fingerprint {value})"


def _another_past(config: TrainConfig, before: int, now: int, done: int) -> str:
    """Why a run of `before` steps, `done` of them done, cannot go on as one of `now`; nothing if it can."""
    if before == now:
        return ""
    if now < done:
        return f"{done} steps are done already"
    if config.peft.name in _FOR_THE_LENGTH and not config.full:
        return f"{config.peft.name} spreads its ranks over all steps; start another run"
    at = _first_difference(config.rates(before), config.rates(now), done)
    if at is None:
        return ""
    step, old, new = at
    return (
        f"the rate of step {step}, which is done, was {old:.3g} and would have been {new:.3g}: a run goes on "
        "past its end where its schedule does not know it, such as constant, inverse_sqrt, or wsd before its "
        "cool-down, with --warmup in steps, or any with --schedule.steps"
    )


def _first_difference(
    old: Callable[[int], Any], new: Callable[[int], Any], done: int
) -> tuple[int, float, float] | None:
    """The first of the steps that are done whose rates differ, and both rates.

    Of a long run every step at its beginning, where a warm-up is, and some of the others.
    """
    early, later = np.arange(min(done, 256)), np.linspace(0, done - 1, 256).astype(int)
    for count in np.union1d(early, later).tolist():
        rates = float(old(count)), float(new(count))
        if not math.isclose(*rates, rel_tol=1e-6):
            return count + 1, *rates
    return None
