"""What recipes on groups of completions share: the reference and where its log-probabilities are kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from trainjax import data, parallel, policies
from trainjax.models import Model
from trainjax.recipes import _common as common
from trainjax.recipes import _training as training
from trainjax.recipes._common import say
from trainjax.recipes._configs import TrainConfig
from trainjax.recipes._start import Start
from trainjax.types import Loss, Policy, Reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TrainConfig):
    """The settings that training on preferences has in common."""

    packing: common.PackingName = "none"
    """One group of completions a row, or several."""
    learning_rate: float = 5e-5
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    reference: str | None = None
    """Another model as the reference; by default --model, with --adapter, as it is before training."""
    cache_reference: bool = False
    """Compute the reference's log-probabilities once and keep them in a file beside the data."""


LossOf = Callable[[Policy, Reference], Loss]
"""`(policy, reference) -> loss`."""


def run(config: PreferenceConfig, loss_of: LossOf, read: data.Read) -> None:
    """Trains on groups of completions.

    Args:
        config: the recipe's settings.
        loss_of: the recipe's loss.
        read: how rows are read: `data.pair` or `data.labelled`.

    Raises:
        ValueError: a setting, a file or a row that cannot be; one sentence says which and why.
    """
    loss_of(common.uncalled, common.uncalled)  # refuses a wrong number before anything is read
    other = functools.cache(functools.partial(_other_model, config))

    def reference(start: Start) -> Start:
        if config.reference is None:
            return start
        return Start(_with_same_tokens(other(), start.model), None)

    def loss(start: Start) -> Loss:
        cached = config.cache_reference
        theirs = policies.CachedReference() if cached else reference(start).reference()
        return loss_of(start.policy(), theirs)

    def prepare(start: Start, name: str, examples: data.Examples) -> data.Examples:
        if not config.cache_reference:
            return examples
        return _cached(config, reference(start), name, examples)

    training.run(
        config,
        loss,
        read=read,
        prepare=prepare,
        same=(*training.SAME, "loss", "reference"),
    )


def _other_model(config: PreferenceConfig) -> Model:
    assert config.reference is not None
    return common.load_model(
        config.reference,
        dtype=config.dtype,
        mesh=config.mesh.mesh(),
        base_format=config.base_format,
    )


def _with_same_tokens(reference: Model, model: Model) -> Model:
    if reference.config.vocab_size == model.config.vocab_size:
        return reference
    raise ValueError(
        f"--reference {reference.source} has vocab_size={reference.config.vocab_size}, and "
        f"{model.source} {model.config.vocab_size}: a reference has the model's own tokens"
    )


def _cached(
    config: PreferenceConfig, reference: Start, name: str, examples: data.Examples
) -> data.Examples:
    """The examples with the reference's log-probabilities: from their file, or computed and saved."""
    weights = f"{reference.model.fingerprint}-{reference.model.module.dtype}"
    if reference.loaded is not None:
        weights += f"-{reference.fingerprint()}"
    if config.base_format is not None:  # the fingerprint is of the weights before
        weights += f"-{config.base_format}"
    path = _beside(name, config.out)
    if parallel.as_first(path.exists()):
        say(f"the reference's log-probabilities are in {path}")
        return data.load_reference(path, examples, weights)
    say(f"computing the reference's log-probabilities, for {path} ...")
    logprobs = policies.reference_logprobs(reference.reference())
    mesh = config.mesh.mesh()
    examples = data.with_reference(examples, logprobs, batch_size=config.batch_size, mesh=mesh)
    if parallel.is_first():
        data.save_reference(path, examples, weights)
    return examples


def _beside(name: str, out: Path) -> Path:
    """`pairs.jsonl.reference.safetensors` for a file that is there, else a file in the run's folder."""
    file = Path(f"{name}.reference.safetensors")
    return file if Path(name).exists() else out / file.name.replace(":", "-")
