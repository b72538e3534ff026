"""What a method against forgetting is: pure functions around what it remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Int, PyTree

from trainjax.policies import Policy
from trainjax.types import Batch, Loss, Params

Memory = PyTree
"""Arrays, of the same names and shapes from the first task to the last: a checkpoint of any stage then
restores into what `init` gives. `()` where nothing is remembered."""

Rows = Int[np.ndarray, " rows"]
"""Numbers of rows, counted through all tasks."""


class Learned(NamedTuple):
    """A task that has just been learned, for who must remember it.

    Attributes:
        number: tasks learned before it.
        params: at its end.
        opt_state: of the optimizer, at its end.
        policy: as it trained.
        batches: `(count) -> batches` of that many of its examples, fewer if it has fewer, one a row.
    """

    number: int
    params: Params
    opt_state: Any
    policy: Policy
    batches: Callable[[int], Iterator[Batch]]


def nothing(params: Params, tasks: int) -> Memory:
    """No memory."""
    del params, tasks
    return ()


def in_turn(sizes: Sequence[int], seed: int) -> list[Rows]:
    """A stage a task, each with the task's own rows.

    >>> [rows.tolist() for rows in in_turn([2, 3], seed=0)]
    [[0, 1], [2, 3, 4]]
    """
    del seed
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


class Method(NamedTuple):
    """A method against forgetting; as it stands, plain fine-tuning on one task after another.

    Training goes through stages, one a task as a rule. Each field changes one thing about it and
    leaves the others alone, so a method is the few fields that it needs.

    Attributes:
        init: `(params, tasks) -> memory` before the first of so many tasks.
        stages: `(sizes, seed) -> rows of each stage`, from the number of rows of each task.
        start: `(params, fresh) -> params` that a stage after the first begins with: those that the
            stage before has left, or `fresh()`, which never trained.
        policy: `(policy, memory) -> policy` that trains in a stage.
        penalty: `(memory, policy, number) -> loss` to be added in a stage, None for none; `number`
            counts the stages before it.
        optimizer: `(tx, memory, seed) -> tx` of a stage, whose choices the seed is of.
        learned: `(memory, Learned) -> memory` after a stage.
        adapter: `(memory, params) -> params` of all tasks together, after the last stage.
    """

    init: Callable[[Params, int], Memory] = nothing
    stages: Callable[[Sequence[int], int], list[Rows]] = in_turn
    start: Callable[[Params, Callable[[], Params]], Params] = lambda params, fresh: params
    policy: Callable[[Policy, Memory], Policy] = lambda policy, memory: policy
    penalty: Callable[[Memory, Policy, int], Loss | None] = lambda memory, policy, number: None
    optimizer: Callable[
        [optax.GradientTransformation, Memory, int], optax.GradientTransformation
    ] = lambda tx, memory, seed: tx
    learned: Callable[[Memory, Learned], Memory] = lambda memory, task: memory
    adapter: Callable[[Memory, Params], Params] = lambda memory, params: params


def checked_strength(strength: float) -> float:
    """The strength of a penalty, or of what takes its place.

    Raises:
        ValueError: it is not above 0.
    """
    if not strength > 0:
        raise ValueError(f"strength={strength} protects nothing; give a number above 0")
    return strength
