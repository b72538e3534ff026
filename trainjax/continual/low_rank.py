"""Methods with an adapter of its own for each task: O-LoRA and RegLoRA.

A task's adapter begins anew, on a base that carries those of the tasks before it. They are kept apart
from the base, so nothing is rounded and a quantised base will do; and since their sum is a low-rank
update too, all tasks together are one adapter of the sum of their ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from trainjax import losses, platform, tree
from trainjax.continual.method import Memory, Method, checked_strength
from trainjax.policies import Policy
from trainjax.types import Loss, Params, Peft


def o_lora(strength: float = 0.5) -> Method:
    """Orthogonal LoRA: an adapter listens to other inputs than the adapters before it.

    Args:
        strength: of the penalty on the overlap, `losses.o_lora`.

    Raises:
        ValueError: a strength that is not above 0; params that are no low-rank adapter.

    Source: Wang et al. 2023, arXiv:2310.14152.
    """
    checked_strength(strength)

    def penalty(memory: Memory, policy: Policy, number: int) -> Loss | None:
        return losses.o_lora([joined(memory)], strength) if number else None

    return _one_a_task(penalty)


def reg_lora(strength: float = 2500.0, fraction: float = 0.02) -> Method:
    """RegLoRA: an adapter keeps off the entries that were largest in the updates before it.

    Args:
        strength: of the penalty, `losses.reg_lora`.
        fraction: of a matrix's entries that each earlier update has protected.

    Raises:
        ValueError: a strength that is not above 0; a fraction outside (0, 1]; params that are no
            low-rank adapter.

    Source: Chen et al. 2025, arXiv:2505.02486.
    """
    checked_strength(strength)
    losses.key_entries({}, fraction)  # says at once what is wrong with a fraction

    def penalty(memory: Memory, policy: Policy, number: int) -> Loss | None:
        if not number:
            return None
        return losses.reg_lora(_protected(memory, number, fraction), strength)

    return _one_a_task(penalty)


@platform.jit
def joined(memory: Memory) -> Params:
    """The adapters of all tasks as one: factors side by side, so that `A B` is the sum of theirs.

    `[tasks, ..., in, rank] -> [..., in, tasks * rank]` for A, and so for B. Tasks not yet learned are
    zeros.
    """

    def leaf(name: str, stack: Array) -> Array:
        rank_axis = -1 if name.endswith("/a") else -2
        moved = jnp.moveaxis(stack, 0, rank_axis - 1)
        shape = list(stack.shape[1:])
        shape[rank_axis] *= len(stack)
        return moved.reshape(shape)

    return tree.map_named(leaf, memory)


@functools.partial(platform.jit, static_argnums=(1, 2))
def _protected(memory: Memory, tasks: int, fraction: float) -> dict[str, Array]:
    """The key entries of the first so many tasks."""
    first = [jax.tree.map(operator.itemgetter(task), memory) for task in range(tasks)]
    entries = [losses.key_entries(adapter, fraction) for adapter in first]
    return {name: jnp.concatenate([e[name] for e in entries], axis=-1) for name in entries[0]}


def _one_a_task(penalty: Callable[[Memory, Policy, int], Loss | None]) -> Method:
    """The adapters of all tasks are remembered, along a leading axis that is zero where none is yet."""
    return Method(
        init=_empty,
        start=lambda params, fresh: fresh(),
        policy=_on_earlier,
        penalty=penalty,
        learned=lambda memory, task: _with_task(memory, task.number, task.params),
        adapter=lambda memory, params: joined(memory),
    )


def _empty(params: Params, tasks: int) -> Memory:
    if whole := [name for name in tree.flatten(params) if not name.endswith(("/a", "/b"))]:
        raise ValueError(
            f"this method is of low-rank adapters, and {whole[0]!r} trains as a whole; train an "
            "adapter, not every weight"
        )
    return jax.tree.map(lambda leaf: jnp.zeros((tasks, *leaf.shape), leaf.dtype), params)


def _on_earlier(policy: Policy, memory: Memory) -> Policy:
    """The policy whose base carries the earlier adapters."""
    attach = cast(Peft, policy.peft).attach
    return dataclasses.replace(policy, base=attach(policy.base, joined(memory)))


@platform.jit
def _with_task(memory: Memory, number: ArrayLike, params: Params) -> Memory:
    return jax.tree.map(lambda stack, new: stack.at[number].set(new), memory, params)
