"""Supervised fine-tuning of a model on conversations, prompts with completions, or plain text."""

from __future__ import annotations

import dataclasses

from trainjax import losses
from trainjax.recipes import _training as training
from trainjax.recipes._configs import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Fine-tunes a model; writes adapter, checkpoints, metrics and settings to --out."""


def main(config: Config) -> None:
    """Runs the job."""
    training.run(config, lambda start: losses.sft(start.policy()))
