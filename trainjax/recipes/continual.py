"""Tasks learned one after another by a method against forgetting, all measured after each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import optax

from trainjax import continual, data, losses, models, train
from trainjax.continual import Learned, Method
from trainjax.models import Model
from trainjax.policies import Policy, policy
from trainjax.recipes import _common as common
from trainjax.recipes import _continual as parts
from trainjax.recipes import _forgetting as forgetting
from trainjax.recipes import _run_folder as run_folder
from trainjax.recipes import _training as training
from trainjax.recipes._common import say
from trainjax.recipes._forgetting import Report
from trainjax.train.step import Step

METHODS: Mapping[str, Callable[..., Method]] = {
    name: function
    for name, function in inspect.getmembers(continual, inspect.isfunction)
    if inspect.signature(function).return_annotation in (Method, Method.__name__)
}
MethodName = str if TYPE_CHECKING else Literal[tuple(METHODS)]  # the choices that --help shows


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The method; a coefficient that is not given is the method's own default."""

    name: MethodName = "ewc"
    """Which one; sequential does nothing against forgetting, joint learns all tasks at once."""
    strength: float | None = None
    """Strength of the penalty; with replay, old rows that come again for each new one."""
    samples: int | None = None
    """Examples of a task that ewc, online_ewc and mas estimate importances from."""
    decay: float | None = None
    """How much of earlier Fishers online_ewc keeps."""
    damping: float | None = None
    """Damping of the division in si."""
    capacity: int | None = None
    """Rows that replay keeps."""
    fraction: float | None = None
    """Share of a matrix's entries that reg_lora protects for a task."""

    def method(self) -> Method:
        """The method's functions.

        Raises:
            ValueError: a coefficient that the method does not have, or a value that it refuses.
        """
        given = {n: v for n, v in dataclasses.asdict(self).items() if n != "name" and v is not None}
        known = list(inspect.signature(METHODS[self.name]).parameters)
        for name in given:
            if name not in known:
                raise ValueError(
                    f"--method.{name} has no meaning for {self.name}, which has "
                    f"{', '.join(known) or 'no coefficients'}"
                )
        return METHODS[self.name](**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(parts.Settings):
    """Learns tasks in turn; writes the matrix of scores, its picture and the adapter to --out."""

    tasks: tuple[str, ...]
    """Rows of each task in the order of learning: a source named after its file, or NAME=SOURCE."""
    eval_tasks: tuple[str, ...] = ()
    """Held-out rows of the same tasks; without them the tasks' own rows are measured on."""
    method: MethodConfig = MethodConfig()
    exact_match: int = 0
    """Held-out conversations of each task that are asked; their right answers are then the score."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""


def main(config: Config) -> None:
    """Runs the job."""
    method = config.method.method()
    unreadable = common.BAD_ROWS[config.bad_rows]
    tasks, held_out = parts.read_tasks(config.tasks, config.eval_tasks, unreadable)
    run_folder.claim(config.out, resume=config.resume)
    config.check_method()
    model, adapter = config.load(), config.peft_method()
    params = config.untrained(model, 0)
    model = model.with_params(None) if config.full else model  # no second copy of the weights stays
    kept = parts.Kept(params, method.init(params, len(tasks)), [])
    run = _prepared(config, method, model, tasks, held_out)
    report = functools.partial(
        Report,
        dataclasses.asdict(config.method),
        [t.name for t in tasks],
        [s.name for s in run.stages],
    )
    same = parts.same_run(config, model, run.stages)
    with contextlib.closing(train.Checkpoints(config.out / "checkpoints", keep=1)) as saved:
        kept = (parts.restored(saved, kept, same) if config.resume else None) or kept
        run_folder.write(config)
        if not kept.scores:
            ours = method.policy(run.plain, kept.memory)
            kept = kept._replace(scores=[run.evaluate(ours, kept.params)])
        for number in range(len(kept.scores) - 1, len(run.stages)):
            say(f"learning {run.stages[number].name} ({number + 1} of {len(run.stages)})")
            kept = _learned(run, kept, number)
            parts.save(saved, kept, same)
            forgetting.write(report(kept.scores), config.out / "forgetting.json")
    forgetting.plot(report(kept.scores), config.out / "forgetting.png")
    forgetting.show(report(kept.scores))
    if adapter is not None:
        parts.save_adapter(config, model, method.adapter(kept.memory, kept.params))
    elif not (config.out / "model").exists():  # it does where a finished run is resumed
        models.save_model(config.out / "model", model, kept.params)


class _Run(NamedTuple):
    """What all stages share."""

    config: Config
    method: Method
    model: Model
    stages: list[parts.Stage]
    plain: Policy
    evaluate: parts.Evaluation
    optimizer: Callable[[int], optax.GradientTransformation]
    make_step: Callable[[optax.GradientTransformation], Step]


def _prepared(
    config: Config,
    method: Method,
    model: Model,
    tasks: list[parts.Task],
    held_out: list[parts.Task],
) -> _Run:
    others = None if held_out is tasks else parts.sound_tasks(config, model, held_out)
    tasks = parts.sound_tasks(config, model, tasks)
    held_out = tasks if others is None else others
    examples = parts.encoded(config, model, tasks)
    measured = examples if others is None else parts.encoded(config, model, held_out)
    adapter = config.peft_method()
    plain = policy(model, adapter)
    asked = [parts.questions(t, config.exact_match, config.seed) for t in held_out]
    return _Run(
        config,
        method,
        model,
        parts.stages(config, method, model, tasks),
        plain,
        parts.Evaluation(
            model, config.plan(config.max_length), measured, asked, config.max_new_tokens
        ),
        # Equal stages are one program.
        functools.cache(functools.partial(config.optimizer, model=model, method=adapter)),
        functools.cache(functools.partial(config.step, curvature=losses.drawn(plain))),
    )


def _learned(run: _Run, kept: parts.Kept, number: int) -> parts.Kept:
    """What there is after one more stage."""
    config, method, stage = run.config, run.method, run.stages[number]
    ours, seed = method.policy(run.plain, kept.memory), config.seed_of(number)
    penalty = method.penalty(kept.memory, ours, number)
    loss = training.with_penalty(losses.sft(ours), ours)
    loss = loss if penalty is None else loss + penalty
    tx = method.optimizer(run.optimizer(stage.steps), kept.memory, seed)
    start = method.start(kept.params, lambda: config.untrained(run.model, number))
    state, step = train.init(start, tx, seed), run.make_step(tx)
    loader = data.Loader(stage.examples, config.plan(config.max_length), run.model.module.mesh)
    with parts.sinks(config, run.stages, number) as to:
        state = train.fit(state, step, loss, loader, steps=stage.steps, sinks=to)
    batches = functools.partial(parts.single_examples, config, run.model, run.stages, number)
    params = training.evaluated(state)
    task = Learned(number, params, state.opt_state, ours, batches)
    scores = [*kept.scores, run.evaluate(ours, params)]
    return parts.Kept(params, method.learned(kept.memory, task), scores)
