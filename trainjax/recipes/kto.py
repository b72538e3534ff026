"""Preference optimisation on completions that are each called good or bad: KTO."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from trainjax import data, losses
from trainjax.recipes import _preferences as preferences
from trainjax.types import Loss


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss."""

    beta: float = 0.1
    """Strength of the tie to the reference."""
    desirable_weight: float = 1.0
    """Weight of completions whose label is true."""
    undesirable_weight: float = 1.0
    """Weight of completions whose label is false; with the first it makes up for a kind that is rare."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(preferences.PreferenceConfig):
    """Fine-tunes a model on labelled completions; writes adapter, checkpoints, metrics and settings."""

    loss: LossConfig = LossConfig()


def main(config: Config) -> None:
    """Runs the job."""
    preferences.run(config, functools.partial(_loss, config.loss), data.labelled)


def _loss(config: LossConfig, ours: Any, theirs: Any) -> Loss:
    return losses.kto(ours, theirs, **dataclasses.asdict(config))
