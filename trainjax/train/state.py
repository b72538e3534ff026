"""What one step turns into the next: params, optimizer state, step, random key."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from trainjax.types import Params


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint of it holds.

    Attributes:
        step: optimizer steps done.
        params: what trains: an adapter or the whole model, in float32.
        opt_state: the optimizer's.
        key: root of the run's randomness; step n uses `fold_in(key, n)`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray


def init(
    params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray | int = 0
) -> TrainState:
    """The state before the first step.

    The params are copied: the step donates its state, and must not take away arrays that a caller
    still holds (an EWC anchor, the initial adapter).
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    params = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)
    return _on_one_mesh(state)


def _on_one_mesh(state: TrainState) -> TrainState:
    """Scalars and keys on the devices of the params; one jitted step takes one set of devices."""
    layouts = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    mesh = next((layout.mesh for layout in layouts if isinstance(layout, NamedSharding)), None)
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Array) -> Array:
        return (
            leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere)
        )

    return jax.tree.map(place, state)
