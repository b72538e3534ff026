"""Population-based training: many members in one program, the worst begin anew from the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trainjax import tree

T = TypeVar("T")
Hyperparams = Mapping[str, Float[Array, " members"]]


def parents(
    key: PRNGKeyArray, scores: Float[Array, " members"], share: float = 0.25
) -> Int[Array, " members"]:
    """Exploit: whose copy each member goes on as. The worst take one of the best, the others themselves.

    Args:
        key: of the choice among the best.
        scores: higher is better; what is not finite is worst.
        share: of the population that is replaced, and that may be copied; at most a half.

    Raises:
        ValueError: a share outside of (0, 0.5], or so small that it is nobody.

    Source: Jaderberg et al. 2017, arXiv:1711.09846, section 4.1.1, truncation selection.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share={share} of the population that is replaced is in (0, 0.5]")
    count = len(scores)
    some = round(share * count)
    if some < 1:
        raise ValueError(f"share={share} of {count} members is nobody")
    order = jnp.argsort(jnp.where(jnp.isfinite(scores), scores, -jnp.inf))
    chosen = jax.random.choice(key, order[-some:], (some,))
    return jnp.arange(count).at[order[:some]].set(chosen)


def copied(members: T, chosen: Int[Array, " members"]) -> T:
    """The members as copies of their parents: every leaf has the members first.

    Args:
        members: a pytree, such as a stacked `TrainState`'s params and optimizer state.
        chosen: `parents(...)`.
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), members)


def explored(
    key: PRNGKeyArray,
    hyperparams: Hyperparams,
    chosen: Int[Array, " members"],
    factors: tuple[float, float] = (0.8, 1.25),
) -> dict[str, Array]:
    """Explore: those who were replaced have their parent's hyperparameters times one factor or the other.

    Args:
        key: of the choice.
        hyperparams: of the members before, by name: `opt_state.hyperparams` of `optax.inject_hyperparams`.
        chosen: `parents(...)`.
        factors: down and up.

    Source: Jaderberg et al. 2017, section 4.1.2, perturbation.
    """
    moved = chosen != jnp.arange(len(chosen))
    found = {}
    for name, values in hyperparams.items():
        up = jax.random.bernoulli(tree.key_for(key, name), shape=values.shape)
        factor = jnp.where(up, factors[1], factors[0]).astype(values.dtype)
        found[name] = jnp.where(moved, values[chosen] * factor, values)
    return found


def evolved(
    key: PRNGKeyArray,
    members: Any,
    opt_state: Any,
    scores: Float[Array, " members"],
    *,
    share: float = 0.25,
    factors: tuple[float, float] = (0.8, 1.25),
) -> tuple[Any, Any, Int[Array, " members"]]:
    """One round of exploit and explore, between stretches of training under `jax.vmap`; jit-able.

        tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
        opt_state = jax.vmap(tx.init)(params)          # then opt_state.hyperparams[...] of each member
        params, opt_state, chosen = evolved(key, params, opt_state, scores)

    Args:
        key: of the round.
        members: params of all, members first.
        opt_state: of `optax.inject_hyperparams`, members first.
        scores: higher is better.
        share: of the population that is replaced by copies of as many of the best.
        factors: for the hyperparameters of a copy.

    Returns:
        The params and optimizer states of the next stretch, and whose copy each is.

    Raises:
        ValueError: an optimizer state without injected hyperparameters; a share as in `parents`.
    """
    if not isinstance(
        opt_state, optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState
    ):
        raise ValueError(
            "evolved needs the state of optax.inject_hyperparams(...), whose hyperparams it changes"
        )
    choice, change = jax.random.split(key)
    chosen = parents(choice, scores, share)
    new = explored(change, opt_state.hyperparams, chosen, factors)
    copies = copied(opt_state, chosen)
    return copied(members, chosen), copies._replace(hyperparams=new), chosen
