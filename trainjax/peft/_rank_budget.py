"""The budget of singular values over all matrices, kept by the optimizer: AdaLoRA's allocation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from trainjax import tree
from trainjax.types import Params

_PARTS = "abe"


@dataclasses.dataclass(frozen=True)
class RankBudget:
    """When how many singular values are left; see `peft.adalora`."""

    rank: int
    initial_rank: int
    warmup: int
    final: int
    every: int
    beta1: float
    beta2: float

    def __post_init__(self):
        if self.warmup < 0 or self.final < 0:
            raise ValueError(f"warmup={self.warmup} and final={self.final}: steps are at least 0")
        if self.every < 1:
            raise ValueError(
                f"every={self.every}: values are chosen every so many steps, 1 or more"
            )
        for name in ("beta1", "beta2"):
            if not 0 < (beta := getattr(self, name)) < 1:
                raise ValueError(f"{name}={beta} smooths over steps: it is between 0 and 1")

    def dropped(self, matrices: int, steps: int) -> Int[np.ndarray, " steps_and_one"]:
        """How many values of all matrices are left out after each step, from 1; -1 where none are chosen.

        Raises:
            ValueError: no step is left between warm-up and the final ones.
        """
        end = steps - self.final
        if self.warmup >= end:
            raise ValueError(
                f"warmup={self.warmup} and final={self.final} leave none of {steps} steps in which the "
                "rank falls; make them less or the run longer"
            )
        first, last = self.initial_rank * matrices, self.rank * matrices
        found = np.full(steps + 1, -1, np.int32)
        for step in range(self.warmup + 1, end + 1):
            if step % self.every == 0 or step == end:
                share = 1 - (step - self.warmup) / (end - self.warmup)
                found[step] = first - int((first - last) * share**3 + last)
        return found


class BudgetState(NamedTuple):
    """What the allocation remembers.

    Attributes:
        inner: the state of the optimizer inside.
        step: steps done.
        importance, deviation: smoothed, of each number of each factor, by name.
        kept: by matrix, which singular values the last choice kept.
    """

    inner: Any
    step: Int[Array, ""]
    importance: dict[str, Array]
    deviation: dict[str, Array]
    kept: dict[str, Bool[Array, "*stack rank"]]


def with_budget(
    budget: RankBudget, steps: int, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer with the allocation of singular values around it.

    Where the params hold the parts `a`, `e` and `b` of a matrix, importance follows `|w g|` of the
    gradients that come in and the params as the updates leave them. A value outside the budget gets the
    update that makes it exactly zero.

    Args:
        budget: when how many are left.
        steps: of the run.
        tx: the whole chain that makes the updates.

    Raises:
        ValueError: fewer steps than warm-up and the final ones take.
    """
    tx = optax.with_extra_args_support(tx)
    budget.dropped(1, steps)  # says at once that a run is too short

    def init(params: Params) -> BudgetState:
        named = _factors(params)
        zeros = {name: jnp.zeros_like(x) for name, x in named.items()}
        kept = {_matrix(n): jnp.ones(x.shape, bool) for n, x in named.items() if n.endswith("/e")}
        deviation = {name: jnp.zeros_like(x) for name, x in named.items()}
        return BudgetState(tx.init(params), jnp.zeros((), jnp.int32), zeros, deviation, kept)

    def update(
        grads: Params, state: BudgetState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, BudgetState]:
        updates, inner = tx.update(grads, state.inner, params, **extra)
        new = _factors(optax.apply_updates(params, updates))
        step, end = state.step + 1, steps - budget.final
        importance, deviation = _smoothed(budget, state, new, _factors(grads), step < end)
        scores = _scores({name: importance[name] * deviation[name] for name in importance})
        table = budget.dropped(sum(s[..., 0].size for s in scores.values()), steps)
        count = jnp.asarray(table)[jnp.minimum(step, steps)]
        chosen = _chosen(scores, count)
        kept = {n: jnp.where(count >= 0, chosen[n], old) for n, old in state.kept.items()}
        holds = (count >= 0) | (step > end)

        def leaf(name: str, change: Array, value: Array) -> Array:
            matrix = _matrix(name)
            if matrix not in kept or not name.endswith("/e"):
                return change
            return jnp.where(kept[matrix] | ~holds, change, -value)

        updates = tree.map_named(leaf, updates, params)
        return updates, BudgetState(inner, step, importance, deviation, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _matrix(name: str) -> str:
    return name.rpartition("/")[0]


def _factors(params: Params) -> dict[str, Array]:
    """The parts of those matrices that have singular values."""
    named = tree.flatten(params)
    return {
        name: value
        for name, value in named.items()
        if f"{_matrix(name)}/e" in named and name.rpartition("/")[2] in _PARTS
    }


def _smoothed(
    budget: RankBudget,
    state: BudgetState,
    params: dict[str, Array],
    grads: dict[str, Array],
    goes_on: Bool[Array, ""],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Importance and its deviation after a step, as they were once the values are chosen for good."""
    importance, deviation = {}, {}
    for name, old in state.importance.items():
        now = jnp.abs(params[name] * grads[name])
        new = budget.beta1 * old + (1 - budget.beta1) * now
        spread = state.deviation[name]
        wider = budget.beta2 * spread + (1 - budget.beta2) * jnp.abs(now - new)
        importance[name] = jnp.where(goes_on, new, old)
        deviation[name] = jnp.where(goes_on, wider, spread)
    return importance, deviation


def _scores(elements: dict[str, Array]) -> dict[str, Float[Array, "*stack rank"]]:
    """Score of each singular value: its own and the mean scores of its two vectors."""
    return {
        name: elements[f"{name}/e"]
        + jnp.mean(elements[f"{name}/a"], axis=-2)
        + jnp.mean(elements[f"{name}/b"], axis=-1)
        for name in [_matrix(full) for full in elements if full.endswith("/e")]
    }


def _chosen(
    scores: dict[str, Float[Array, "*stack rank"]], count: Int[Array, ""]
) -> dict[str, Bool[Array, "*stack rank"]]:
    """Which values stay where `count` of all are left out: those above the count-th smallest score."""
    ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    threshold = ordered[jnp.maximum(count, 1) - 1]
    return {name: (score > threshold) | (count < 1) for name, score in scores.items()}
