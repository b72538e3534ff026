"""What recipes that train share: the run's folder, encoding, what makes a resumed run the same, rates."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainjax import data, train, tree
from trainjax.data.encode import TooLong
from trainjax.models import Model
from trainjax.nn import flops_per_token
from trainjax.recipes._common import say
from trainjax.train import metrics
from trainjax.types import Params


def claim_folder(out: Path, *, resume: bool) -> None:
    """Makes the run's folder, or says at once why it cannot be used.

    Raises:
        ValueError: it holds another run and this one does not continue it.
        OSError: it cannot be written.
    """
    if not resume and any(
        (out / name).exists() for name in ("config.yaml", "checkpoints", "adapter", "model")
    ):
        raise ValueError(
            f"{out} holds another run; continue it with --resume, or give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def resumed(
    state: train.TrainState,
    saved: train.Checkpoints,
    loader: data.Loader,
    settings: Mapping[str, Any],
    *,
    wanted: bool,
) -> tuple[train.TrainState, int]:
    """The state to begin with and the tokens seen before it; the loader is moved to its place.

    Raises:
        ValueError: the checkpoint is of a run with other settings; both values are named.
    """
    found = saved.restore(state) if wanted else None
    if found is None:
        if wanted:
            say(f"no checkpoint in {saved.directory}: starting from the beginning")
        return state, 0
    before = found.extra["settings"]
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"the run in {saved.directory.parent} had {name}={before.get(name)!r}, now it is "
                f"{value!r}; resume with the same, or start another run with another --out"
            )
    loader.set_state(found.extra["batches"])
    say(f"resuming after step {found.step}")
    return found.state, found.extra["num_tokens"]


@contextlib.contextmanager
def sinks(
    out: Path, steps: int, done: int, tensorboard: bool, wandb: str | None
) -> Iterator[list[metrics.Sink]]:
    """Where a run's records go: `metrics.jsonl` and the terminal, and what else is asked for."""
    with contextlib.ExitStack() as stack:
        to = [stack.enter_context(metrics.jsonl(out / "metrics.jsonl", after_step=done))]
        to.append(stack.enter_context(metrics.progress(steps, done)))
        if tensorboard:
            to.append(stack.enter_context(metrics.tensorboard(out / "tensorboard")))
        if wandb:
            to.append(
                stack.enter_context(metrics.wandb(project=wandb, name=out.name, dir=str(out)))
            )
        yield to


def encode(
    name: str,
    rows: data.Source,
    *,
    model: Model,
    max_length: int,
    template: bool,
    too_long: TooLong,
) -> data.Examples:
    """Tokens and masks of the rows that a flag named, and a word about them.

    Raises:
        ValueError: rows that cannot be read, with their file's name; a tokenizer of another model.
    """
    try:
        examples = data.encode(
            rows, model.tokenizer, max_length, template=template, too_long=too_long
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if (largest := int(examples.tokens.max())) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {model.source} gives the token {largest}, but the model's "
            f"vocab_size={model.config.vocab_size}; they are not of one model"
        )
    say(examples.summary())
    return examples


def settings(
    config: Any, names: Sequence[str], *, steps: int, model: Model, examples: data.Examples
) -> dict[str, Any]:
    """The named fields of a recipe's settings, groups of flags field by field, and what they act on."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {f"{name}.{key}": part for key, part in dataclasses.asdict(value).items()}
        else:
            found[name] = value
    return found | {"steps": steps, "model": model.fingerprint, "data": examples.fingerprint()}


def rates(
    model: Model,
    examples: data.Examples,
    params: Params,
    schedule: Callable[[int], Any],
    *,
    full: bool,
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`(record) -> record` with the step's learning rate and MFU."""
    flops = flops_per_token(
        model.config,
        context=float((examples.lengths**2).sum() / examples.lengths.sum() / 2),
        adapter_size=0 if full else tree.count(params),
        full=full,
        targets=float(examples.trained.mean()),
    )
    peak = metrics.peak_flops(model.module.dtype)

    def with_rates(record: dict[str, Any]) -> dict[str, Any]:
        rate = float(schedule(record["step"] - 1))
        mfu = None if peak is None else record["tokens_per_second"] * flops / peak
        return record | {"learning_rate": rate, "mfu": mfu}

    return with_rates
