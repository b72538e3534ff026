"""What `trainjax continual` is made of besides its loop: settings, tasks, stages, scores, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from trainjax import data, evals, losses, models, platform, train, tree
from trainjax.continual import Method
from trainjax.data.files import OnUnreadable, Row, refused
from trainjax.models import Model
from trainjax.policies import Policy
from trainjax.recipes import _common as common
from trainjax.recipes import _run_folder as run_folder
from trainjax.recipes._configs import StepConfig
from trainjax.recipes._forgetting import ACCURACY, EXACT, LOSS, Scores
from trainjax.recipes._rows import checking, kept
from trainjax.recipes._rows import encode as encode_rows
from trainjax.train.metrics import Record, Sink
from trainjax.types import Batch, Loss, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StepConfig):
    """The settings of training on task after task."""

    def untrained(self, model: Model, number: int) -> Params:
        """The params before any training; adapters of other stages start elsewhere."""
        method = self.peft_method()
        if method is None:
            return tree.cast(model.params, jnp.float32)
        return method.init(jax.random.key(self.seed + number), model.params)

    def seed_of(self, number: int) -> int:
        """A seed of a stage's own."""
        return int(np.random.default_rng((self.seed, number)).integers(2**31))

    def encode(self, rows: data.Source, model: Model) -> data.Examples:
        """Tokens and masks of rows that are known to be good."""
        too_long = common.TOO_LONG[self.too_long]
        return data.encode(
            rows, model.tokenizer, self.max_length, template=self.template, too_long=too_long
        )


# --- tasks --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Rows as a flag names them."""

    name: str
    source: str
    rows: data.Source


def read_tasks(
    flags: Sequence[str],
    held_out_flags: Sequence[str],
    unreadable: OnUnreadable = refused,
) -> tuple[list[Task], list[Task]]:
    """The tasks to learn, and the held-out rows of the same; the tasks themselves if there are none.

    Args:
        flags: each a source, named after its file, or NAME=SOURCE.
        held_out_flags: the same for held-out rows, of equal names in the same order; or empty.
        unreadable: what becomes of a line that is no row.

    Raises:
        ValueError: fewer than two tasks, two of one name, names that do not match, a source that
            cannot be read.
    """
    named = [_split(flag) for flag in flags]
    names = [name for name, _ in named]
    if len(names) < 2:
        raise ValueError(f"tasks={names}: forgetting is of a task that another comes after")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tasks are called {twice[0]!r}; tell them apart with NAME=FILE")
    others = [_split(flag) for flag in held_out_flags] or named
    if [name for name, _ in others] != names:
        raise ValueError(
            f"the tasks are {', '.join(names)}, and the held-out rows are of "
            f"{', '.join(name for name, _ in others)}; name them alike, in the same order, with "
            "NAME=FILE where a file is called otherwise"
        )
    tasks = [Task(name, source, data.read(source, unreadable)) for name, source in named]
    if others is named:
        return tasks, tasks
    return tasks, [Task(name, source, data.read(source, unreadable)) for name, source in others]


def sound_tasks(settings: Settings, model: Model, tasks: Sequence[Task]) -> list[Task]:
    """The tasks without the rows that cannot be read, where `--bad-rows drop` asks for it."""
    dropped = settings.out / "dropped.jsonl"

    def sound(task: Task) -> Task:
        check = checking(None, model.tokenizer, settings.template)
        with common.naming(task.source):
            rows, _ = kept(settings.bad_rows, task.source, task.rows, check, dropped)
        return task._replace(rows=rows)

    return [sound(task) for task in tasks]


def _split(flag: str) -> tuple[str, str]:
    """Name and source of `NAME=SOURCE`, or of a source that is called after its file.

    >>> _split("sums=data/a.jsonl"), _split("data/units.test.jsonl")
    (('sums', 'data/a.jsonl'), ('units', 'data/units.test.jsonl'))
    """
    name, equals, source = flag.partition("=")
    return (name, source) if equals else (Path(flag).name.partition(".")[0], flag)


def sample_of(rows: data.Source, count: int, seed: int) -> list[Row]:
    """That many different rows, or all of them if there are fewer, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[int(i)] for i in np.sort(chosen)]


# --- stages -------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What is learned at one time: a task as a rule.

    Attributes:
        name: of the task; all their names where all are learned at once.
        rows: to learn from.
        examples: the same as tokens.
        steps: of the optimizer.
    """

    name: str
    rows: list[Row]
    examples: data.Examples
    steps: int


def stages(settings: Settings, method: Method, model: Model, tasks: Sequence[Task]) -> list[Stage]:
    """What a method learns at which time. All stages together have `settings.steps` steps a task.

    Raises:
        ValueError: no steps.
    """
    every = [task.rows[i] for task in tasks for i in range(len(task.rows))]
    chosen = method.stages([len(task.rows) for task in tasks], settings.seed)
    one_each = len(chosen) == len(tasks)
    names = [task.name for task in tasks] if one_each else [" + ".join(task.name for task in tasks)]
    found = []
    for name, numbers in zip(names, chosen, strict=True):
        rows = [every[int(i)] for i in numbers]
        examples = settings.encode(rows, model)
        steps = len(settings.plan(settings.max_length).epoch(examples, 0))
        if settings.steps is not None:
            steps = settings.steps * len(tasks) // len(chosen)
        found.append(Stage(name, rows, examples, steps))
    if (fewest := min(stage.steps for stage in found)) < 1:
        raise ValueError(f"steps={fewest}: a task has at least one")
    return found


def encoded(settings: Settings, model: Model, tasks: Sequence[Task]) -> list[data.Examples]:
    """The tasks' rows as examples, with a word about each.

    Raises:
        ValueError: rows that cannot be read, with the name of their file.
    """
    return [encode_rows(settings, t.source, t.rows, model) for t in tasks]


def single_examples(
    settings: Settings, model: Model, stages: Sequence[Stage], number: int, count: int
) -> Iterator[Batch]:
    """Batches of a sample of a stage's examples, one a row, of one length in all stages."""
    rows = sample_of(stages[number].rows, count, settings.seed)
    longest = max(int(stage.examples.lengths.max()) for stage in stages)
    plan = data.Plan(settings.batch_size, longest, data.unpacked, seed=None, buckets=1)
    return data.one_epoch(settings.encode(rows, model), plan, model.module.mesh)


# --- scores -------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """How every task is scored, whatever has been learned.

    Attributes:
        model: whose policy is scored.
        plan: of the batches.
        examples: held-out ones of each task.
        questions: conversations of each task that are asked; none of any task if nothing is.
        max_new_tokens: of an answer.
    """

    model: Model
    plan: data.Plan
    examples: Sequence[data.Examples]
    questions: Sequence[Sequence[Row]]
    max_new_tokens: int

    def __call__(self, policy: Policy, params: Params) -> Scores:
        """Loss and token accuracy on held-out rows, and exact match where questions are asked."""
        loss, mesh = losses.sft(policy), self.model.module.mesh
        passes = [data.one_epoch(examples, self.plan, mesh) for examples in self.examples]
        found = [_added_up(loss, params, batches) for batches in passes]
        scores = {name: [task[name] for task in found] for name in (LOSS, ACCURACY)}
        if not any(self.questions):
            return scores
        return scores | {EXACT: self._right(self.model.with_params(policy.attached(params)))}

    def _right(self, tuned: Model) -> list[float]:
        asked = [
            {"messages": row["messages"], "task": f"{number:04}"}
            for number, rows in enumerate(self.questions)
            for row in rows
        ]
        answered = evals.exact_match(tuned, asked, max_new_tokens=self.max_new_tokens)
        return list(answered.by_task.values())


def questions(held_out: Task, count: int, seed: int) -> list[Row]:
    """Conversations to ask: a sample of the rows.

    Raises:
        ValueError: the rows are no conversations.
    """
    chosen = sample_of(held_out.rows, count, seed)
    if any("messages" not in row for row in chosen):
        raise ValueError(
            f"{held_out.source}: exact match is of conversations, in a column 'messages' whose last is "
            "the answer; leave --exact-match out for other rows"
        )
    return chosen


def _added_up(loss: Loss, params: Params, batches: Iterator[Batch]) -> dict[str, float]:
    """The loss and its metrics over one pass, whose weights sum to 1 over all batches."""
    parts = [_forward(loss, params, batch) for batch in batches]
    return {name: float(sum(part[name] for part in parts)) for name in parts[0]}


@platform.jit
def _forward(loss: Loss, params: Params, batch: Batch) -> dict[str, Array]:
    value, metrics = loss(params, batch, None)
    return {LOSS: value, **metrics}


# --- a run --------------------------------------------------------------------------------------


@contextlib.contextmanager
def sinks(settings: Settings, stages: Sequence[Stage], number: int) -> Iterator[list[Sink]]:
    """Where a stage's records go, with its name, and its steps counted through the stages."""
    before = sum(stage.steps for stage in stages[:number])
    steps = before + stages[number].steps

    def numbered(sink: Sink) -> Sink:
        def tell(record: Record) -> None:
            sink({**record, "step": record["step"] + before, "stage": number})

        return tell

    with run_folder.sinks(settings, steps, before) as told:
        yield [numbered(sink) for sink in told.sinks]


class Kept(NamedTuple):
    """What is kept of the stages that are done.

    Attributes:
        params: after the last of them.
        memory: the method's.
        scores: before the first stage and after each.
    """

    params: Params
    memory: Any
    scores: list[Scores]


def save(checkpoints: train.Checkpoints, kept: Kept, same: Mapping[str, Any]) -> None:
    """Writes a checkpoint of the stages that are done."""
    checkpoints.save(_state(kept), {"scores": kept.scores, "settings": dict(same)})
    checkpoints.wait()


def restored(checkpoints: train.Checkpoints, kept: Kept, same: Mapping[str, Any]) -> Kept | None:
    """What the newest sound checkpoint holds, laid out like `kept`; None if there is none.

    Raises:
        ValueError: it is of another run: other settings, or arrays of other shapes.
    """
    found = checkpoints.restore(_state(kept))
    if found is None:
        return None
    before = found.extra["settings"]
    for name, value in same.items():
        if before.get(name) != value:
            raise ValueError(
                f"the run in {checkpoints.directory.parent} had {name}={before.get(name)!r}, now it is "
                f"{value!r}; resume with the same, or start another run with another --out"
            )
    return Kept(found.state.params["params"], found.state.params["memory"], found.extra["scores"])


def _state(kept: Kept) -> train.TrainState:
    """A checkpoint's arrays, all of them on the devices of the params."""
    state = train.init({"params": kept.params, "memory": kept.memory}, optax.identity())
    return state._replace(step=jnp.int32(len(kept.scores) - 1))


def same_run(settings: Settings, model: Model, stages: Sequence[Stage]) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, as JSON has it."""
    apart = {"out", "resume", "mesh", "remat", "tensorboard", "wandb", "model", "bad_rows"}
    found: dict[str, Any] = {}
    resolved = dataclasses.replace(settings, peft=settings.peft.resolved())
    for name, value in dataclasses.asdict(resolved).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": part for key, part in value.items()}
        elif name not in apart:
            found[name] = value
    found = {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}
    rows = [stage.examples.fingerprint() for stage in stages]
    return {n: v for n, v in found.items() if not n.startswith("mesh.")} | {
        "model": model.fingerprint,
        "rows": rows,
    }


def save_adapter(settings: Settings, model: Model, adapter: Params) -> None:
    """The adapter in PEFT's format: of the rank that it has, which may be that of several together."""
    group, rank = (
        settings.peft.resolved(),
        next(iter(tree.select(adapter, "/a$").values())).shape[-1],
    )
    if group.rank is not None and group.alpha is not None:
        grown = rank / group.rank
        alpha = group.alpha * (grown**0.5 if group.rslora else grown)  # the scale stays
        group = dataclasses.replace(group, rank=rank, alpha=alpha)
    method = group.method()
    models.save_adapter(settings.out / "adapter", model, method, adapter)
