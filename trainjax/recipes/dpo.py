"""Preference optimisation on pairs of a better and a worse completion: DPO and its family."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainjax import data, losses
from trainjax.losses import preference
from trainjax.recipes import _preferences as preferences
from trainjax.types import Loss

LossName = (
    str if TYPE_CHECKING else Literal[tuple(preference.LOSSES)]
)  # the choices that --help shows


COEFFICIENTS = ("beta", "label_smoothing", "gamma", "tau", "alpha", "shift")
"""What the losses are told, each those that it has."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss; a coefficient that is not given is the loss's own default."""

    name: tuple[LossName, ...] = ("sigmoid",)
    """Which one; sigmoid is DPO. Several are added up, and share their coefficients."""
    weight: tuple[float, ...] = ()
    """Weight of each of several losses; 1 if not given."""
    beta: float | None = None
    """Strength of the tie to the reference."""
    label_smoothing: float | None = None
    """Share of labels taken to be wrong."""
    gamma: float | None = None
    """The margin that simpo asks for."""
    tau: float | None = None
    """Temperature of discopop's mixture."""
    alpha: float | None = None
    """Weight of the chosen completion's likelihood in cpo and rrhf."""
    shift: float | None = None
    """The mean reward that bco_pair compares with."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the shorter completion's length."""
    wpo: bool = False
    """Weigh pairs by how likely the policy finds them."""
    sft: float = 0.0
    """Weight of the chosen completions' cross-entropy, added to the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(preferences.PreferenceConfig):
    """Fine-tunes a model on pairs; writes adapter, checkpoints, metrics and settings to --out."""

    loss: LossConfig = LossConfig()


def main(config: Config) -> None:
    """Runs the job."""
    preferences.run(config, functools.partial(_loss, config.loss, _terms(config.loss)), data.pair)


class _Term(NamedTuple):
    """One of the losses that are added up."""

    name: str
    weight: float
    coefficients: Mapping[str, Any]


def _terms(config: LossConfig) -> list[_Term]:
    """The losses that were named, each with the coefficients that it has.

    Raises:
        ValueError: weights for more or fewer than there are; a loss named twice; a coefficient that
            none of them has.
    """
    weights = config.weight or (1.0,) * len(config.name)
    if len(weights) != len(config.name):
        raise ValueError(
            f"--loss.weight gives {len(weights)} numbers for {len(config.name)} losses "
            f"({', '.join(config.name)}): one each"
        )
    if len(set(config.name)) < len(config.name):
        raise ValueError(f"--loss.name {' '.join(config.name)}: each loss once, with its weight")
    known = {name: _coefficients(preference.LOSSES[name]) for name in config.name}
    given = {n: getattr(config, n) for n in COEFFICIENTS if getattr(config, n) is not None}
    for coefficient in given:
        if not any(coefficient in names for names in known.values()):
            have = "; ".join(f"{name}, which has {', '.join(c)}" for name, c in known.items())
            raise ValueError(f"--loss.{coefficient.replace('_', '-')} has no meaning for {have}")
    return [
        _Term(name, weight, {n: value for n, value in given.items() if n in known[name]})
        for name, weight in zip(config.name, weights, strict=True)
    ]


def _coefficients(loss: preference.PairLoss) -> list[str]:
    return list(inspect.signature(loss).parameters)[1:]


def _loss(config: LossConfig, terms: Sequence[_Term], ours: Any, theirs: Any) -> Loss:
    def of(term: _Term) -> Loss:
        chosen = preference.LOSSES[term.name]
        loss = losses.pairwise(
            ours,
            None if chosen in preference.WITHOUT_REFERENCE else theirs,
            chosen,
            ld_alpha=config.ld_alpha,
            wpo=config.wpo,
            **term.coefficients,
        )
        return term.weight * (loss if len(terms) == 1 else loss.named(term.name))

    total = functools.reduce(operator.add, map(of, terms))
    return total + config.sft * losses.sft(ours) if config.sft else total
