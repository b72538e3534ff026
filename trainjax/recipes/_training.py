"""A run that trains: its folder, its rows, what makes a resumed one the same, what it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainjax import data, losses, models, optim, parallel, train, tree
from trainjax.models import Model
from trainjax.nn import flops_per_token
from trainjax.policies import Policy, policy
from trainjax.recipes import _common as common
from trainjax.recipes._common import PeftConfig, say
from trainjax.recipes._configs import StepConfig, TrainConfig
from trainjax.train import metrics
from trainjax.types import Loss, Params

Prepare = Callable[[Model, str, data.Examples], data.Examples]

SAME = (  # what must be equal for a resumed run to be the same run
    *("batch_size", "max_length", "packing", "template", "too_long", "seed", "dtype", "accumulate"),
    *("learning_rate", "warmup", "schedule", "weight_decay", "optim", "clip"),
    *("full", "peft", "base_format", "param_dtype", "fp8"),
)


class Job(NamedTuple):
    """A recipe's own part of a run.

    Attributes:
        loss_of: its loss on a model.
        first_params: `(model) -> params`: what trains, before the first step.
        save: `(model, params)`: writes what a finished run leaves in `--out`.
        read: how a row becomes a group of completions; None where it is one text.
        prepare: adds to the examples of a named dataset what it takes the model to know.
        same: names of the settings that a resumed run has to share.
        curvature: `(model) -> loss` on drawn labels, for Sophia-G; None where the loss is no likelihood.
        tells_tokens: whether the loss goes through the vocabulary, which counts in the MFU.
    """

    loss_of: Callable[[Model], Loss]
    first_params: Callable[[Model], Params]
    save: Callable[[Model, Params], None]
    read: data.Read | None = None
    prepare: Prepare = lambda model, name, examples: examples
    same: Sequence[str] = SAME
    curvature: Callable[[Model], Loss] | None = None
    tells_tokens: bool = True


def run(
    config: TrainConfig,
    loss_of: Callable[[Model], Loss],
    *,
    read: data.Read | None = None,
    prepare: Prepare = lambda model, name, examples: examples,
    same: Sequence[str] = SAME,
) -> None:
    """Trains a language model, whole or by an adapter; see `Job` and `run_job`."""
    first, save = (functools.partial(f, config) for f in (first_params, _save))

    def loss(model: Model) -> Loss:
        return with_penalty(loss_of(model), policy(model, config.adapter()))

    curvature = config.drawn if read is None else None
    run_job(config, Job(loss, first, save, read, prepare, same, curvature))


def run_job(config: TrainConfig, job: Job) -> None:
    """Reads rows and model, trains, and writes what a run leaves.

    Args:
        config: the recipe's settings.
        job: the recipe's own part.

    Raises:
        ValueError: a setting, a file or a row that cannot be; one sentence says which and why.
    """
    claim_folder(config.out, resume=config.resume)
    rows = data.read(config.data)  # before the model: a mistyped name should not cost a minute
    eval_rows = data.read(config.eval_data) if config.eval_data else None
    model = config.load()
    mesh = model.module.mesh
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size}: a batch has at least one row")

    examples = _prepared(config, job, config.data, rows, model)
    held_out = None
    if config.eval_data and eval_rows is not None:
        held_out = _prepared(config, job, config.eval_data, eval_rows, model)
    length = max(data.row_length(e, config.max_length) for e in (examples, held_out) if e)
    plan = config.plan(length)
    loader = data.Loader(examples, plan, mesh)
    steps = len(plan.epoch(examples, 0)) if config.steps is None else config.steps
    if steps < 1:
        raise ValueError(f"steps={steps}: a run has at least one")
    tx, schedule = config.optimizer(steps, model), config.rates(steps)
    step = config.step(tx, None if job.curvature is None else job.curvature(model))
    loss = job.loss_of(model)
    state = train.init(job.first_params(model), tx, config.seed)
    if config.full:
        model = model.with_params(None)  # the state has its own; no second copy stays
    evaluate = None
    if held_out is not None:
        evaluate = train.evaluator(loss, lambda: data.one_epoch(held_out, plan, mesh))

    shared = settings(config, job.same, steps=steps, model=model, examples=examples)
    parallel.check_agreement(shared | common.versions())
    with contextlib.closing(train.Checkpoints(config.out / "checkpoints", config.keep)) as saved:
        state, num_tokens = resumed(state, saved, loader, shared, wanted=config.resume)
        common.save_config(config, config.out / "config.yaml")
        with sinks(config.out, steps, int(state.step), config.tensorboard, config.wandb) as to:
            state = train.fit(
                state,
                step,
                loss,
                loader,
                steps=steps,
                sinks=to,
                checkpoints=saved,
                save_every=config.save_every,
                evaluate=evaluate,
                eval_every=config.eval_every,
                evaluated=evaluated,
                settings=shared,
                derived=rates(
                    model,
                    examples,
                    state.params,
                    schedule,
                    full=config.full,
                    targets=float(examples.trained.mean()) if job.tells_tokens else 0.0,
                ),
                num_tokens=num_tokens,
                stuck_after=config.stuck_after,
            )
    job.save(model, evaluated(state))


def _prepared(
    config: TrainConfig, job: Job, name: str, rows: data.Source, model: Model
) -> data.Examples:
    """The rows that a flag named as the job reads them."""
    return job.prepare(model, name, encode(config, name, rows, model, job.read))


def evaluated(state: train.TrainState) -> Params:
    """The params of a state, or the average of them that its optimizer keeps."""
    trained = optim.eval_params(state.opt_state, tree.trainable(state.params))
    return tree.with_trained(state.params, trained)


def with_penalty(loss: Loss, policy: Policy, part: str | None = None) -> Loss:
    """A recipe's loss and, where the policy's method has one, the method's own term.

    Args:
        loss: of the policy.
        policy: as it trains.
        part: the name under which the policy's params are in those of the loss, if they are a part.
    """
    if policy.peft is None or policy.peft.penalty is None:
        return loss
    own = losses.adapter_penalty(policy)
    return loss + (own if part is None else losses.at(part, own))


def first_params(config: StepConfig, model: Model) -> Params:
    """What trains, before the first step."""
    method = config.adapter()
    if method is None:
        params = tree.cast(model.params, jnp.float32)
    else:
        params = method.init(jax.random.key(config.seed), model.params)
    return tree.cast(params, common.DTYPES[config.param_dtype])


def _save(config: TrainConfig, model: Model, params: Params) -> None:
    method = config.adapter()
    if method is not None:
        models.save_adapter(config.out / "adapter", model, method, params)
    elif not (config.out / "model").exists():  # it does where a finished run is resumed
        models.save_model(config.out / "model", model, params)


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
    parallel.wait_for_all(f"{out} is claimed")  # before one writes what the others would find


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

    def accept(extra: Mapping[str, Any]) -> None:
        before = extra["settings"]
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"the run in {saved.directory.parent} had {name}={before.get(name)!r}, now it is "
                    f"{value!r}; resume with the same, or start another run with another --out"
                )

    found = saved.restore(state, accept) if wanted else None
    if found is None:
        if wanted:
            say(f"no checkpoint in {saved.directory}: starting from the beginning")
        return state, 0
    loader.set_state(found.extra["batches"])
    say(f"resuming after step {found.step}")
    return found.state, found.extra["num_tokens"]


@contextlib.contextmanager
def sinks(
    out: Path, steps: int, done: int, tensorboard: bool, wandb: str | None
) -> Iterator[list[metrics.Sink]]:
    """Where a run's records go: `metrics.jsonl` and the terminal, and what else is asked for.

    Of several processes, which have the same records, the first one's.
    """
    if not parallel.is_first():
        yield []
        return
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
    config: StepConfig,
    name: str,
    rows: data.Source,
    model: Model,
    read: data.Read | None = None,
) -> data.Examples:
    """Tokens and masks of the rows that a flag named, and a word about them.

    Raises:
        ValueError: rows that cannot be read, with their file's name; a tokenizer of another model.
    """
    too_long, encoder = common.TOO_LONG[config.too_long], data.encode
    if read is not None:
        share = model.config.window is None
        encoder = functools.partial(data.encode_groups, read=read, share_prompt=share)
    with common.naming(name):
        examples = encoder(
            rows, model.tokenizer, config.max_length, template=config.template, too_long=too_long
        )
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
        value = value.resolved() if isinstance(value, PeftConfig) else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {f"{name}.{key}": part for key, part in dataclasses.asdict(value).items()}
        else:
            found[name] = value
    found = {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}  # as JSON
    return found | {"steps": steps, "model": model.fingerprint, "data": examples.fingerprint()}


def rates(
    model: Model,
    examples: data.Examples,
    params: Params,
    schedule: Callable[[int], Any],
    *,
    full: bool,
    targets: float,
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`(record) -> record` with the step's learning rate and MFU."""
    flops = flops_per_token(
        model.config,
        context=float((examples.lengths**2).sum() / examples.lengths.sum() / 2),
        adapter_size=0 if full else tree.count(params),
        full=full,
        targets=targets,
    )
    peak = metrics.peak_flops(model.module.dtype)

    def with_rates(record: dict[str, Any]) -> dict[str, Any]:
        rate = float(schedule(record["step"] - 1))
        mfu = None if peak is None else record["tokens_per_second"] * flops / peak
        return record | {"learning_rate": rate, "mfu": mfu}

    return with_rates
