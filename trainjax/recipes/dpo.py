"""Preference optimisation on pairs of a better and a worse completion: DPO and its family."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from trainjax import data, losses
from trainjax.losses import preference
from trainjax.models import Model
from trainjax.policies import policy, reference
from trainjax.recipes import _common as common
from trainjax.recipes import _training as training
from trainjax.types import Loss

WITHOUT_REFERENCE = (preference.simpo, preference.orpo, preference.cpo, preference.rrhf)
WITH_REFERENCE = (
    *(preference.sigmoid, preference.robust, preference.hinge, preference.ipo),
    *(preference.exo_pair, preference.nca_pair, preference.bco_pair, preference.sppo_hard),
    *(preference.apo_zero, preference.apo_down, preference.discopop, preference.sigmoid_norm),
    *(preference.aot, preference.aot_unpaired),
)
LOSSES: Mapping[str, preference.PairLoss] = {
    loss.__name__: loss for loss in (*WITH_REFERENCE, *WITHOUT_REFERENCE)
}
LossName = str if TYPE_CHECKING else Literal[tuple(LOSSES)]  # the choices that --help shows


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss; a coefficient that is not given is the loss's own default."""

    name: LossName = "sigmoid"
    """Which one; sigmoid is DPO."""
    beta: float | None = None
    """Strength of the tie to the reference."""
    label_smoothing: float | None = None
    """Share of labels taken to be wrong."""
    gamma: float | None = None
    """The margin that simpo asks for."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the shorter completion's length."""
    wpo: bool = False
    """Weigh pairs by how likely the policy finds them."""
    sft: float = 0.0
    """Weight of the chosen completions' cross-entropy, added to the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(training.TrainConfig):
    """Fine-tunes a model on pairs; writes adapter, checkpoints, metrics and settings to --out."""

    loss: LossConfig = LossConfig()
    packing: common.PackingName = "none"
    """One pair a row, or several."""
    learning_rate: float = 5e-5
    """Peak of the schedule: linear warm-up, then a cosine to zero."""


def main(config: Config) -> None:
    """Runs the job."""
    numbers = coefficients(config.loss)
    training.run(
        config,
        lambda model: _loss(config, model, numbers),
        encoder=functools.partial(data.encode_groups, read=data.pair),
        same=(*training.SAME, "loss"),
    )


def coefficients(config: LossConfig) -> dict[str, Any]:
    """The coefficients that were given.

    Raises:
        ValueError: the loss has no such coefficient.
    """
    names = ("beta", "label_smoothing", "gamma")
    given = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    known = inspect.signature(LOSSES[config.name]).parameters
    for name in given:
        if name not in known:
            raise ValueError(
                f"--loss.{name.replace('_', '-')} has no meaning for {config.name}, which has "
                f"{', '.join(list(known)[1:])}"
            )
    return given


def _loss(config: Config, model: Model, numbers: Mapping[str, Any]) -> Loss:
    ours = policy(model, config.method())
    chosen = LOSSES[config.loss.name]
    loss = losses.pairwise(
        ours,
        None if chosen in WITHOUT_REFERENCE else reference(model),
        chosen,
        ld_alpha=config.loss.ld_alpha,
        wpo=config.loss.wpo,
        **numbers,
    )
    return loss + config.loss.sft * losses.sft(ours) if config.loss.sft else loss
