"""Train a reward model on pairs of a better and a worse completion, by Bradley-Terry."""

from __future__ import annotations

import dataclasses
import functools

import jax

from trainjax import data, losses, models
from trainjax.models import Model
from trainjax.models._adapters import load_scoring_adapter
from trainjax.recipes import _common as common
from trainjax.recipes import _start as starts
from trainjax.recipes import _training as training
from trainjax.recipes._configs import TrainConfig
from trainjax.recipes._start import Start
from trainjax.scorers import init_scorer, scorer
from trainjax.types import Loss, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Trains a head that scores completions, and the model below it; writes as `sft` does to --out."""

    center_rewards_coefficient: float = 0.0
    """Strength of the pull of a pair's two scores to a sum of zero."""
    score_bound: float | None = None
    """Soft walls: how high a chosen and how low a rejected completion may score."""
    packing: common.PackingName = "none"
    """One pair a row, or several."""
    learning_rate: float = 1e-4
    """Peak of the schedule: linear warm-up, then a cosine to zero."""


def main(config: Config) -> None:
    """Runs the job."""
    loss_of = functools.partial(
        losses.bradley_terry,
        center_rewards_coefficient=config.center_rewards_coefficient,
        score_bound=config.score_bound,
    )
    loss_of(common.uncalled)  # refuses a wrong number before anything is read

    def with_penalty(start: Start) -> Loss:
        trained = scorer(start.model, start.method)
        return training.with_penalty(loss_of(trained), trained.body, part="body")

    job = training.Job(
        loss_of=with_penalty,
        save=functools.partial(_save, config),
        start=functools.partial(_start, config),
        first_params=functools.partial(_first_params, config),
        read=data.pair,
        same=(*training.SAME, "center_rewards_coefficient", "score_bound"),
        tells_tokens=False,
        next_command="score --data ROWS --out SCORES.jsonl",
    )
    training.run_job(config, job)


def _start(config: Config, model: Model) -> Start:
    """As of other jobs; an adapter to go on with may be a reward model's, or one that makes text."""
    if config.adapter is None or not models.is_scorer(config.adapter):
        return starts.start(config, model)
    base = config.other_base
    method, params = load_scoring_adapter(config.adapter, model, other_base=base)
    return Start(model, method, params | {"body": starts.laid_out(params["body"], model)})


def _first_params(config: Config, start: Start) -> Params:
    if start.loaded is not None and "score" in start.loaded:
        return start.loaded
    fresh = init_scorer(jax.random.key(config.seed), start.model, start.method)
    return fresh if start.loaded is None else fresh | {"body": start.loaded}


def _save(config: Config, start: Start, params: Params) -> None:
    folder = config.out / ("model" if config.full else "adapter")
    if not (config.full and folder.exists()):  # it does where a finished run is resumed
        models.save_scorer(folder, start.model, start.method, params)
