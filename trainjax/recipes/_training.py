"""A run that trains: what is common to all jobs on one dataset, from the first row to the last word."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trainjax import data, losses, models, optim, parallel, train, tree
from trainjax.models import Model
from trainjax.nn import flops_per_token
from trainjax.policies import Policy
from trainjax.recipes import _common as common
from trainjax.recipes import _rows as rows
from trainjax.recipes import _run_folder as folder
from trainjax.recipes import _start as starts
from trainjax.recipes._configs import TrainConfig
from trainjax.recipes._resuming import SAME, resumed, settings
from trainjax.recipes._start import Start
from trainjax.train import metrics
from trainjax.types import Loss, Params

Prepare = Callable[[Start, str, data.Examples], data.Examples]


class Job(NamedTuple):
    """A recipe's own part of a run.

    Attributes:
        loss_of: its loss on what the run begins with.
        save: `(start, params)`: writes what a finished run leaves in `--out`.
        start: `(model) -> start`: the adapter, fresh or from `--adapter`.
        first_params: `(start) -> params`: what trains, before the first step.
        read: how a row becomes a group of completions; None where it is one text.
        prepare: adds to the examples of a named dataset what it takes the model to know.
        same: names of the settings that a resumed run has to share.
        curvature: `(policy) -> loss` on drawn labels, for Sophia-G; None where the loss is no likelihood.
        tells_tokens: whether the loss goes through the vocabulary, which counts in the MFU.
        next_command: what a user does next with what is in `--out`.
    """

    loss_of: Callable[[Start], Loss]
    save: Callable[[Start, Params], None]
    start: Callable[[Model], Start]
    first_params: Callable[[Start], Params]
    read: data.Read | None = None
    prepare: Prepare = lambda start, name, examples: examples
    same: Sequence[str] = SAME
    curvature: Callable[[Policy], Loss] | None = None
    tells_tokens: bool = True
    next_command: str = "generate --prompt '...'"


def run(
    config: TrainConfig,
    loss_of: Callable[[Start], Loss],
    *,
    read: data.Read | None = None,
    prepare: Prepare = lambda start, name, examples: examples,
    same: Sequence[str] = SAME,
) -> None:
    """Trains a language model, whole or by an adapter; see `Job` and `run_job`."""

    def loss(start: Start) -> Loss:
        return with_penalty(loss_of(start), start.policy())

    job = Job(
        loss_of=loss,
        save=functools.partial(_save, config),
        start=functools.partial(starts.start, config),
        first_params=functools.partial(starts.first_params, config),
        read=read,
        prepare=prepare,
        same=same,
        curvature=losses.drawn if read is None else None,
    )
    run_job(config, job)


def run_job(config: TrainConfig, job: Job) -> None:
    """Reads rows and model, trains, and writes what a run leaves.

    Args:
        config: the recipe's settings.
        job: the recipe's own part.

    Raises:
        ValueError: a setting, a file or a row that cannot be; one sentence says which and why.
    """
    folder.claim(config.out, resume=config.resume)
    sources = rows.opened(config)  # before the model: a mistyped name should not cost a minute
    starts.check(config)
    start = job.start(config.load())
    mesh = start.model.module.mesh
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size}: a batch has at least one row")

    prepared = [
        job.prepare(start, name, rows.encode(config, name, source, start.model, job.read))
        for name, source in sources
    ]
    examples, held_out = prepared[0], prepared[1] if config.eval_data else None
    pack = common.PACKING[config.packing]
    plan = config.plan(rows.row_length(pack, config.max_length, prepared, mesh))
    loader = data.Loader(examples, plan, mesh)
    steps = len(plan.epoch(examples, 0)) if config.steps is None else config.steps
    if steps < 1:
        raise ValueError(f"steps={steps}: a run has at least one")
    tx, schedule = config.optimizer(steps, start.model, start.method), config.rates(steps)
    step = config.step(tx, None if job.curvature is None else job.curvature(start.policy()))
    loss = job.loss_of(start)
    state = train.init(job.first_params(start), tx, config.seed)
    if config.full:  # the state has its own weights; no second copy stays
        start = start._replace(model=start.model.with_params(None))

    shared = settings(config, job.same, steps=steps, start=start, examples=examples)
    parallel.check_agreement(shared | common.versions())
    with contextlib.closing(train.Checkpoints(config.out / "checkpoints", config.keep)) as saved:
        state, num_tokens = resumed(state, saved, loader, shared, config)
        folder.write(config)
        with folder.sinks(config, steps, int(state.step)) as told:
            evaluate = None
            if held_out is not None:
                passes = functools.partial(data.one_epoch, held_out, plan, mesh)
                evaluate = told.said("evaluating", train.evaluator(loss, passes))
            state = train.fit(
                state,
                step,
                loss,
                loader,
                steps=steps,
                sinks=told.sinks,
                checkpoints=saved,
                save_every=config.save_every,
                evaluate=evaluate,
                eval_every=config.eval_every,
                evaluated=evaluated,
                settings=shared,
                derived=rates(
                    start.model,
                    examples,
                    state.params,
                    schedule,
                    full=config.full,
                    targets=float(examples.trained.mean()) if job.tells_tokens else 0.0,
                ),
                num_tokens=num_tokens,
                stuck_after=config.stuck_after,
            )
    job.save(start, evaluated(state))
    common.say(folder.summary(config, told.last, job.next_command))


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


def _save(config: TrainConfig, start: Start, params: Params) -> None:
    if start.method is not None:
        models.save_adapter(config.out / "adapter", start.model, start.method, params)
    elif not (config.out / "model").exists():  # it does where a finished run is resumed
        models.save_model(config.out / "model", start.model, params)


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
